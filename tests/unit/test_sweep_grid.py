"""A sweep's command line: lists multiply, aliases stand for what they say, mistakes are told."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from tools.sweep.__main__ import main
from tools.sweep.grid import LONGEST_NAME, Axis, cells, directory_name, expand, parse


def test_lists_multiply_and_single_values_are_for_all():
    found = cells(parse(["staleness.budget=0,4", "run.steps=150", "optim.lr=1e-3,3e-4,1e-4"]))
    assert [cell.label for cell in found[:2]] == [
        "staleness.budget=0 optim.lr=1e-3",
        "staleness.budget=0 optim.lr=3e-4",
    ]
    assert len(found) == 6
    assert found[5].overrides == ("run.steps=150", "staleness.budget=4", "optim.lr=1e-4")
    assert found[5].name == "staleness.budget=4,optim.lr=1e-4"
    assert cells(parse([]))[0].name == "all"


def test_rejection_is_one_axis():
    words = parse(["staleness.budget=auto,8", "obrs.budget=off,0.95"])
    assert [cell.overrides for cell in cells(words)] == [
        ("staleness.budget=auto", "obrs.mode=off"),
        ("staleness.budget=auto", "obrs.mode=budget", "obrs.budget=0.95"),
        ("staleness.budget=8", "obrs.mode=off"),
        ("staleness.budget=8", "obrs.mode=budget", "obrs.budget=0.95"),
    ]
    assert expand("obrs.threshold", "2") == ["obrs.mode=threshold", "obrs.threshold=2"]
    assert expand("obrs.target_ess", "0.9") == ["obrs.mode=ess", "obrs.target_ess=0.9"]
    assert expand("obrs.threshold", "OFF") == ["obrs.mode=off"]
    assert expand("optim.lr", "off") == ["optim.lr=off"]


def test_the_mode_may_be_said_beside_a_number_that_means_it():
    assert cells(parse(["obrs.mode=budget", "obrs.budget=0.9"]))[0].overrides == ("obrs.mode=budget", "obrs.budget=0.9")


@pytest.mark.parametrize(
    ("rest", "values"),
    [
        ("[1,2],[3,4]", ("[1,2]", "[3,4]")),
        ("{a: 1, b: 2}", ("{a: 1, b: 2}",)),
        ("{a: [1,2]}, {}", ("{a: [1,2]}", "{}")),
        ("'a,b',c", ("'a,b'", "c")),
        ("a=b,c", ("a=b", "c")),
        ("", ("",)),
    ],
)
def test_what_is_bracketed_is_one_value(rest, values):
    assert parse([f"task.params={rest}"]) == [Axis("task.params", values)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["staleness.budget"], "must read section.key=value"),
        (["=3"], "must read section.key=value"),
        (["a.b=1,,2"], "empty; remove the comma"),
        (["a.b=[1,2"], "not closed"),
        (["a.b=1]"], "not closed"),
        (["a.b='x"], "not closed"),
        (["a.b=1,2,1"], "1 is there twice"),
        (["a.b=1", "a.b=2"], "given twice; write its values as one list: a.b=a,b"),
        (["run.name=x"], "--name"),
        (["run.seed=1,2"], "--seeds"),
        (["broker.address=tcp://127.0.0.1:1"], "free port"),
        (["learner.resume=true"], "set aside"),
    ],
)
def test_mistakes_are_told_with_the_remedy(words, said):
    with pytest.raises(ConfigError, match=said):
        parse(words)


def test_words_that_contradict_each_other_are_told():
    with pytest.raises(ConfigError, match=r"obrs\.mode=off sets obrs\.mode=off.*remove one|obrs\.mode=budget.*remove"):
        cells(parse(["obrs.mode=off,budget", "obrs.budget=0.9"]))
    with pytest.raises(ConfigError, match="at most 500"):
        cells(parse([f"a.{k}={','.join(map(str, range(10)))}" for k in "xyz"]))


VALUES = st.lists(st.text("abz019./=[]{} ,-_é", max_size=90), min_size=1, max_size=3)


@settings(max_examples=40)
@given(VALUES, VALUES)
def test_directories_are_plain_and_tell_cells_apart(first, second):
    names = [directory_name([(f"k{i}", v) for i, v in enumerate(values)]) for values in (first, second)]
    for name in names:
        assert name not in ("", ".", "..") and not set(name) - set("abzk019._=,+-cdefghijlmnopqrstuvwxy2345678")
        assert len(name) <= LONGEST_NAME + 9 and not name.startswith(".")
    assert (names[0] == names[1]) == (first == second)


def test_an_option_cut_short_is_no_option(capsys):
    with pytest.raises(SystemExit):
        main(["configs/smoke.yaml", "--seed", "2"])
    assert "--seed" in capsys.readouterr().err
