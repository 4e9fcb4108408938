"""tools.evaluate's command line: what is there is known before anything is evaluated, and what was done is shown."""

import re

import pytest

from common.errors import DeadlineError
from common.locks import try_lock
from tests.unit.named import write_hf
from tests.unit.test_checkpoint import saved
from tests.unit.test_step import model_of
from tools import evaluate, export

FOUND = {"reward": 0.5, "reward_low": 0.4, "reward_high": 0.6, "prompts": 8, "samples": 1, "length_mean": 3.0}


@pytest.fixture
def run(tmp_path):
    """A run of two checkpoints, by a croupier that knew more keys."""
    directory = tmp_path / "run"
    for step in (10, 20):
        saved(directory / "checkpoints", step)
    write_hf(tmp_path / "model", model_of())
    (directory / "config.yaml").write_text(f"model: {{path: {tmp_path / 'model'}}}\nobrs: {{wings: 2}}\n")
    return directory


@pytest.fixture
def judged(monkeypatch):
    """The directories that were evaluated; one called "late" cannot be."""
    found = []

    def held_out(config, path, limit_s):
        if path.name == "late":
            raise DeadlineError(f"{path}: not evaluated within {limit_s:g} s")
        found.append((path.name, config.evaluation.prompts))
        return FOUND

    monkeypatch.setattr(evaluate, "held_out", held_out)
    return found


def test_what_is_named_twice_is_evaluated_once(run, judged, tmp_path, capsys):
    twice = ["--step", "20", "--step", "20", "--model", str(tmp_path / "model"), "--model", f"{tmp_path}/model/"]
    assert evaluate.main([str(run), *twice, "evaluation.prompts=8"]) == 0
    assert judged == [("20-policy", 8), ("model", 8)]
    said = capsys.readouterr().out
    assert "note: config.yaml: of another croupier; left out what this one does not know: obrs.wings" in said
    assert len(re.findall(r"0\.5", said)) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--step", "10", "--step", "30"], "no checkpoint of step 30; has: 10, 20"),
        (["--step", "10", "--model", "nowhere"], "nowhere: no model directory"),
        ([], "no model there yet; name a checkpoint with --step N; has: 10, 20 ("),
        (["--step", "10", "--limit-s", "nan"], "--limit-s nan: must be a finite number of seconds above 0"),
        (["--step", "10", "--limit-s", "inf"], "--limit-s inf: must be"),
        (["--step", "10", "evaluation.bugdet=3"], "evaluation.bugdet"),
    ],
)
def test_nothing_is_evaluated_before_all_is_known_to_be_there(run, judged, capsys, words, said):
    assert evaluate.main([str(run), *words]) == 2
    assert said in " ".join(capsys.readouterr().out.split())
    assert judged == []


def test_servers_of_a_run_under_way_are_left_to_it(run, judged, capsys):
    words = [str(run), "--step", "10", "actor.engine=sglang", "actor.count=1"]
    shared = [*words, "engine.launch=0", "engine.addresses=[http://h:1]"]
    with (run / "metrics.jsonl").open("a") as broker:
        assert try_lock(broker)
        assert evaluate.main(shared) == 2
        assert "add engine.launch=1 engine.addresses=[]" in " ".join(capsys.readouterr().out.split())
        assert judged == []
        assert evaluate.main([*words, "engine.launch=1"]) == 0
    assert evaluate.main(shared) == 0


def test_a_checkpoint_s_export_goes_before_the_next_is_made(run, judged, monkeypatch):
    found = []
    monkeypatch.setattr(
        evaluate, "held_out", lambda config, path, limit_s: found.append(len(list(path.parent.iterdir()))) or FOUND
    )
    assert evaluate.main([str(run), "--step", "10", "--step", "20"]) == 0
    assert found == [1, 1]


def test_what_was_done_is_shown_before_the_failure_of_the_next(run, judged, tmp_path, capsys):
    (tmp_path / "model").rename(tmp_path / "late")
    (tmp_path / "model").symlink_to("late")
    assert evaluate.main([str(run), "--step", "10", "--model", str(tmp_path / "late")]) == 2
    said = capsys.readouterr().out
    assert said.index("policy, step 10") < said.index("not evaluated within") and judged == [("10-policy", 512)]


def test_a_run_of_another_croupier_is_exported_beside_foreign_files(run, tmp_path, capsys):
    (run / "checkpoints" / "step-foo").mkdir()
    assert export.main([str(run), "--step", "77"]) == 2
    assert "no checkpoint of step 77; has: 10, 20" in " ".join(capsys.readouterr().out.split())
    assert export.main([str(run), "--step", "20", "--out", str(tmp_path / "out")]) == 0
    assert "obrs.wings" in capsys.readouterr().out and (tmp_path / "out" / "config.json").is_file()
