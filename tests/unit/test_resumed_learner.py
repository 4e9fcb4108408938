"""A learner that joins: versions that the run can go on from, and lines of metrics.jsonl that it writes again."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from broker.chunks import Event
from broker.journal import Journal
from broker.pipeline import Pipeline
from broker.recorder import Recorder, difference
from broker.runfiles import RunFiles
from broker.training import Training
from common import wire
from tests.unit.test_recovery import CONFIGS, STEPS, VOCAB, B, G, rollouts


def joining(journal: Journal | None = None, files: RunFiles | None = None) -> Training:
    recorder = Recorder(Pipeline(CONFIGS["off"], VOCAB), journal, dict)
    return Training(CONFIGS["off"], recorder, SimpleNamespace(), files, SimpleNamespace(), str)  # type: ignore[arg-type]


def objection(training: Training, version: int, rank: int = 0) -> str:
    return training.objection(wire.Hello("learner", "learner", "", "s", rank, 1, version, 0, "h", 1))


def train(training: Training, steps: int) -> None:
    recorder = training.recorder
    for step in range(recorder.pipeline.ledger.next_step, steps):
        for group in recorder.grant("a", B, step).groups.tolist():
            recorder.admit(rollouts(group, list(range(G)), step, 1), "a", step)
        recorder.assemble(step)
        recorder.commit(step, {})


def test_a_learner_that_needs_a_step_that_is_forgotten_is_told_that_checkpoints_are_missing() -> None:
    training = joining()
    assert all(objection(training, version) == "" for version in range(STEPS + 1))  # nothing is known yet
    training.learner_seen = True
    train(training, 4)
    assert all(objection(training, version) == "" for version in range(6))  # all are held
    training.recorder.checkpointed(1)
    words = "it holds version {}, and this run has forgotten all steps before 2: its checkpoints are missing from "
    for version in (0, 1):
        assert objection(training, version).startswith(words.format(version))
        assert objection(training, version).endswith("/checkpoints; bring them back, or begin a new run")
    assert objection(training, 0, rank=1) == ""  # follows the one that leads
    assert all(objection(training, version) == "" for version in (2, 3, 4))
    train(training, STEPS)
    training.recorder.checkpointed(STEPS - 1)  # the run is finished
    assert f"before {STEPS}: its checkpoints are missing" in objection(training, 0)
    assert objection(training, STEPS - 1) == ""  # has said of its last commit, and not yet of its last version
    assert objection(training, STEPS) == ""


def test_a_learner_that_was_killed_before_its_first_checkpoint_is_told_what_would_have_helped() -> None:
    training = joining()
    training.learner_seen = True
    train(training, 4)
    training.pipeline.steps.checkpointed(1)  # as broker.retain_mb would
    assert objection(training, 1).endswith(
        "before 2: no later checkpoint was completed; begin a new run, with more checkpoints "
        "(learner.checkpoint_every) or more steps that are kept (broker.retain_mb, broker.journal_mb)"
    )


def test_what_was_served_and_is_no_longer_kept_is_a_difference_and_no_crash() -> None:
    training = joining()
    train(training, 4)
    training.recorder.checkpointed(1)
    told = difference(training.pipeline, Event(9, "served", {"step": 0, "world": 1, "shards": []}, []))
    assert told.startswith("step 0: its shards cannot be made again (")


def test_without_a_journal_the_run_goes_on_where_the_learner_is() -> None:
    training = joining()
    training.recorder.start_at(3)
    training.learner_seen = True
    assert objection(training, 3) == "" and objection(training, 4) == ""
    assert "before 3: no later checkpoint was completed; begin a new run, with more" in objection(training, 0)
    training.recorder.checkpointed(2)  # so it says
    assert "before 3: its checkpoints are missing" in objection(training, 0)


@pytest.mark.parametrize("journaled", [False, True])
def test_lines_behind_the_learners_version_are_cut_where_no_journal_knows_of_them(
    tmp_path: Path, journaled: bool
) -> None:
    files = RunFiles(tmp_path)
    for step in range(4):
        files.metric("step", {"step": step})
    journal = Journal(tmp_path / "journal", "r", 64) if journaled else None
    training = joining(journal, files)
    training.learner_joined(2)
    files.metric("step", {"step": 9})
    training.learner_joined(2)  # comes again, and has trained none of it anew
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == ([0, 1, 2, 3, 9] if journaled else [0, 1, 9])
    files.close()
    if journal is not None:
        journal.close()
