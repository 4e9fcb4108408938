"""Each process by itself: any order, killed and started again, and what it says when it cannot start."""

import contextlib
import json
import shutil
import signal
import socket
import subprocess

import pytest

from common.cli import EXIT_FAILED, EXIT_LASTING
from tests.integration.fleet import Fleet
from tools import export

pytestmark = pytest.mark.slow
PARTS = ("broker", "learner", "replica-0", "actor-0")
MESH = (
    "learner.tp=2",
    "replica.ep=2",
    "rollout.routing_replay=true",
    "loss.expert_bias_rate=0.001",
    "run.steps=6",
    "evaluation.every=3",
)


def test_any_order_will_do_and_a_learner_and_a_replica_of_two_ranks_each_do_their_part(tmp_path, model):
    with Fleet(tmp_path, model, *MESH) as fleet:
        fleet.start("learner", ranks=2)
        fleet.start("actor-0")
        fleet.start("replica-0", ranks=2)
        with pytest.raises(subprocess.TimeoutExpired):
            fleet.wait("actor-0", 2)  # all wait for a broker
        fleet.start("broker")
        assert [fleet.wait(name) for name in PARTS] == [0, 0, 0, 0], fleet.words()
        assert [s["step"] for s in fleet.steps()] == list(range(6))
        assert fleet.status()["versions_published"] == [1, 2, 3, 4, 5, 6]
        learner = [s["learner"] for s in fleet.steps() if "learner" in s] or fleet.steps()
        assert all(0 <= s["routing_disagreement"] < 0.5 for s in learner)
        fleet.run.joinpath("config.yaml").write_text(fleet.file.read_text())
        assert export.main([str(fleet.run), "--out", str(tmp_path / "out")]) == 0
        assert json.loads((tmp_path / "out" / "config.json").read_text())["expert_bias"] is True
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            assert (tmp_path / "out" / name).read_bytes() == (fleet.run / "model" / name).read_bytes()
        assert export.main([str(fleet.run), "--step", "4"]) == 2


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
    "rank_count": ("learner", ("learner.dp_shard=2",), ("dp_shard=2", "--nproc-per-node 2")),
}
LASTING = ("no_model", "no_task", "no_channel")  # an actor's, which its launcher need not start again


def test_what_cannot_start_says_why_and_what_to_do(tmp_path, model):
    half = tmp_path / "half"
    shutil.copytree(model, half, ignore=shutil.ignore_patterns("*.safetensors"))
    places = {"half": half}
    with contextlib.ExitStack() as stack:
        fleets = {}
        for case, (name, overrides, _) in REFUSALS.items():
            (tmp_path / case).mkdir()
            fleet = fleets[case] = stack.enter_context(Fleet(tmp_path / case, model))
            if case == "address":
                places["address"] = fleet.config.broker.address
                taken = stack.enter_context(socket.socket())
                host, _, port = fleet.config.broker.address.removeprefix("tcp://").partition(":")
                taken.bind((host, int(port)))
                taken.listen()
            fleet.start(name, *(o.format(**places) for o in overrides))
        for case, (name, _, words) in REFUSALS.items():
            assert fleets[case].wait(name, 60) == (EXIT_LASTING if case in LASTING else EXIT_FAILED), case
            said = fleets[case].log(name).read_text()
            assert "Traceback" not in said, case
            for word in words:
                assert word.format(**places) in said, (case, said)


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
