"""Each process by itself: any order, killed and started again, and what it says when it cannot start."""

import shutil
import signal
import subprocess
import time

import pytest

from tests.integration.fleet import Fleet

PARTS = ("broker", "learner", "replica-0", "actor-0")


def test_any_order_will_do_and_two_ranks_train_as_told(tmp_path, model):
    with Fleet(tmp_path, model, "learner.ranks=2", "run.steps=6", "evaluation.every=3") as fleet:
        fleet.start("learner", ranks=2)
        fleet.start("actor-0")
        fleet.start("replica-0")
        with pytest.raises(subprocess.TimeoutExpired):
            fleet.wait("actor-0", 4)  # all wait for a broker
        fleet.start("broker")
        assert [fleet.wait(name) for name in PARTS] == [0, 0, 0, 0], fleet.words()
        assert [s["step"] for s in fleet.steps()] == list(range(6))
        assert fleet.status()["versions_published"] == [1, 2, 3, 4, 5, 6]


# What is wrong, which process meets it, and the words that name the thing and the remedy.
REFUSALS = {
    "address": ("broker", (), ("{address}", "already in use", "broker.address")),
    "no_model": ("actor-1", ("model.path=nowhere/at/all",), ("nowhere/at/all", "tools.warmstart")),
    "half_model": ("learner", ("model.path={half}",), ("{half}", "none of model.safetensors", "copy the whole")),
    "no_task": ("actor-2", ("task.name=sort7",), ("sort7", "did you mean")),
    "no_channel": ("actor-3", ("task.reward_weights={{corect: 1.0}}",), ("corect", "did you mean")),
    "wrong_type": ("learner", ("run.steps=many",), ("run.steps", "many")),
    "no_broker": (
        "actor-4",
        ("broker.address=tcp://127.0.0.1:9", "actor.wait_s=1"),
        ("tcp://127.0.0.1:9", "python -m broker"),
    ),
    "rank_count": ("learner", ("learner.ranks=2",), ("learner.ranks=2", "--nproc-per-node 2")),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_start_says_why_and_what_to_do(tmp_path, model, case):
    name, overrides, words = REFUSALS[case]
    half = tmp_path / "half"
    shutil.copytree(model, half, ignore=shutil.ignore_patterns("*.safetensors"))
    with Fleet(tmp_path, model) as fleet:
        if case == "address":
            fleet.start("broker")
            wait_for_log(fleet, "broker", "run ")
            first = fleet.running.pop("broker")
        places = {"address": fleet.config.broker.address, "half": half}
        process = fleet.start(name, *(o.format(**places) for o in overrides))
        assert process.wait(30) == 1
        if case == "address":
            first.send_signal(signal.SIGTERM)
            assert first.wait(10) == 0
        said = fleet.log(name).read_text()
        assert "Traceback" not in said
        for word in words:
            assert word.format(**places) in said, said


def wait_for_log(fleet, name, words, timeout=20):
    deadline = time.monotonic() + timeout
    while words not in (fleet.log(name).read_text() if fleet.log(name).exists() else ""):
        assert time.monotonic() < deadline, fleet.words()
        time.sleep(0.05)


def test_a_second_learner_is_turned_away_and_the_first_goes_on(tmp_path, model):
    with Fleet(tmp_path, model, "run.steps=1000000") as fleet:
        for name in PARTS:
            fleet.start(name)
        fleet.wait_for_step(1)
        first = fleet.running.pop("learner")
        second = fleet.start("learner")
        assert second.wait(30) == 1, fleet.words()
        assert "another learner is connected" in fleet.log("learner").read_text()
        fleet.wait_for_step(fleet.steps()[-1]["step"] + 3)
        assert first.poll() is None
        fleet.running["first"] = first
        assert fleet.kill("broker", signal.SIGTERM) == 0
        assert [p.wait(20) for n, p in fleet.running.items() if n not in ("learner", "broker")] == [0, 0, 0]
