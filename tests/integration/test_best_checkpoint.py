"""A whole run over two tasks that keeps its best version: what is exported is what was evaluated."""

import json
import subprocess
import sys

import pytest

from tests.integration.fleet import BRIEF, ROOT, environment, free_address
from tests.integration.test_end_to_end import explain, lines_of
from tools.export import main as export

SMALL = (
    "staleness.budget=0", "obrs.mode=off", "actor.count=1", "rollout.groups_per_step=4", "rollout.group_size=4",
    "evaluation.prompts=24", "evaluation.samples=1", "evaluation.pass_at=[]", "evaluation.temperature=0",
    "task.mix.sort6.reward_weights.prefix=0.5",
)  # fmt: skip


def launch(tmp_path, model, name, *overrides):
    base = [f"run.dir={tmp_path}", f"run.name={name}", f"model.path={model}", f"broker.address={free_address()}"]
    words = [sys.executable, "-m", "tools.launch", "configs/mixed.yaml", *base, *BRIEF, *SMALL, *overrides]
    done = subprocess.run(words, cwd=ROOT, env=environment(), timeout=100, capture_output=True, text=True)
    run = tmp_path / name
    assert done.returncode == 0, explain(done, run)
    return run


@pytest.mark.slow
def test_the_best_version_is_exported_as_it_was_evaluated(tmp_path, model):
    keep = ("evaluation.every=1", "learner.checkpoint_keep=1", "optim.lr=0.01")
    run = launch(tmp_path, model, "first", *keep, "run.steps=6")
    evaluations = lines_of(run, "eval")
    assert {e["version_asked"] for e in evaluations} <= set(range(7)) and len(evaluations) >= 3
    best = max(evaluations, key=lambda e: (e["reward"], -e["version_asked"]))
    assert best["version_asked"] > 0, "the starting model was best: nothing is proved"
    kept = json.loads((run / "checkpoints" / "best.json").read_text())
    assert kept == {"version": best["version_asked"], "reward": best["reward"]}
    here = sorted(p.name for p in (run / "checkpoints").glob("step-*"))
    assert here == sorted({f"step-{kept['version']:08d}", "step-00000006"})
    assert json.loads((run / "status.json").read_text())["best"] == kept
    assert {label: task["prompts"] for label, task in best["tasks"].items()} == {"sort6": 18, "guess": 6}

    assert export([str(run), "--best", "--out", str(tmp_path / "best")]) == 0
    again = launch(tmp_path, tmp_path / "best", "again", "evaluation.keep_best=false", "run.steps=1")
    first = lines_of(again, "eval")[0]
    if best["version"] == best["version_max"] == kept["version"]:  # no newer weights came while it was sampled
        assert first["reward"] == best["reward"] and first["tasks"] == best["tasks"]
