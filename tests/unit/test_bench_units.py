"""The harness, and one tiny repeat of the benches that need no processes."""

import json
from pathlib import Path

import pytest

from tools.bench.__main__ import main
from tools.bench.harness import REGISTRY, Row, forget, interleave
from tools.bench.launching import loop_figures
from tools.bench.loop import harmonic, loop_config


def test_rows_are_json_with_the_promised_keys() -> None:
    row = Row("b", "n", 3.0, "tok/s", "limit", 6.0, 5)
    keys = ["bench", "name", "value", "unit", "reference", "reference_value", "ratio", "reps", "spread"]
    assert list(json.loads(row.to_json())) == keys
    assert row.ratio == 0.5


def test_contestants_take_turns_and_medians_are_compared() -> None:
    order: list[str] = []
    values = iter([1.0, 10.0, 5.0, 30.0, 2.0, 20.0])

    def contestant(name: str) -> float:
        order.append(name)
        return next(values)

    assert interleave({"a": lambda: contestant("a"), "b": lambda: contestant("b")}, 3) == {"a": 2.0, "b": 20.0}
    assert order == ["a", "b"] * 3
    with pytest.raises(ValueError, match="at least one repeat"):
        interleave({}, 0)


def test_help_lists_each_name_that_can_be_given_apart_from_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    listed = capsys.readouterr().out.split("benchmarks:\n")[1].split("\n\n")[0].splitlines()
    words = {name: what for name, (_, what, _) in REGISTRY.items() if name != "learner_gpu"}
    assert dict(line.strip().split(maxsplit=1) for line in listed) == words
    assert len({line.index(what) for line, what in zip(listed, words.values(), strict=True)}) == 1


@pytest.mark.parametrize("name", ["obrs", "codec", pytest.param("verifiers", marks=pytest.mark.slow)])
def test_a_bench_prints_json_rows(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--json", "--reps", "1"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows
    assert all(row["bench"] == name and row["value"] > 0 and row["reps"] == 1 for row in rows)


def test_unknown_names_and_repeats_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["nosuch"], ["obrs", "--reps", "0"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    assert set(REGISTRY) == {
        "loop",
        "algorithms",
        "staleness",
        "end2end",
        "verifiers",
        "learner",
        "learner_gpu",
        "obrs",
        "codec",
        "broker",
        "store",
        "fleet",
        "trace",
        "simulate",
        "closed_loop",
    }


def test_a_study_forgets_its_own_and_nothing_else(tmp_path: Path) -> None:
    for name in ("obrs-0", "obrs-12", "start-3", "tried", "obrs-notes", "obrs", "mine-0", "docs"):
        (tmp_path / name / "in").mkdir(parents=True)
    (tmp_path / "chosen.json").write_text("{}")
    (tmp_path / "mine.json").write_text("{}")
    forget(tmp_path, ["obrs", "start"], ["chosen.json", "tried"])
    assert {path.name for path in tmp_path.iterdir()} == {"obrs-notes", "obrs", "mine-0", "docs", "mine.json"}
    forget(tmp_path / "nowhere", ["obrs"])


def test_the_loop_bench_asks_for_the_bar_s_shape(tmp_path: Path) -> None:
    config = loop_config(tmp_path, tmp_path / "model", "tcp://127.0.0.1:5999")
    assert config.rollout.groups_per_step * config.rollout.group_size == 16
    assert (config.rollout.max_prompt_tokens, config.rollout.max_tokens, config.rollout.ignore_eos) == (32, 128, True)
    assert config.evaluation.prompts == 0


def test_loop_speed_and_shares_come_from_the_step_lines() -> None:
    steps = [
        {"kind": "step", "step": s, "time_s": 2.0 * s, "seconds_train": 0.5, "seconds_pack": 0.1} for s in range(1, 8)
    ]
    speed, shares = loop_figures(steps, tokens_per_step=2048)
    assert speed == pytest.approx(1024.0)
    assert shares == {"pack": pytest.approx(0.05), "train": pytest.approx(0.25)}
    assert harmonic(3.0, 6.0) == pytest.approx(2.0)
