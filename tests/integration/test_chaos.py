"""Processes killed and stopped at random moments, a full disk, peers that say nothing: nothing acknowledged is lost.

``make chaos`` runs all but the shortest, which is among the slow tests of CI.
"""

import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import zmq

from broker.journal import Journal
from common.config import load
from tests.integration.fleet import ROOT, Fleet, environment
from tools.processes import descendants
from tools.replay import verify

PARTS = ("broker", "learner", "replica-0", "actor-0", "actor-1")
QUICK = (
    "broker.heartbeat_s=0.3", "broker.peer_timeout_s=2.5", "weights.deadline_s=3", "learner.checkpoint_every=3",
    "broker.score_timeout_s=3", "obrs.rethin_below=1.0", "evaluation.prompts=8", "learner.wait_s=60", "actor.wait_s=60",
)  # fmt: skip


def assert_nothing_lost_nothing_twice(fleet):
    """The invariants of every run, read from what it left behind."""
    status, steps = fleet.status(), fleet.steps()
    assert [s["step"] for s in steps] == list(range(fleet.config.run.steps)), fleet.words()
    assert max(s["lag_max"] for s in steps) <= fleet.config.staleness.limit
    assert sum(s["trajectories"] for s in steps) == status["trajectories_trained"]
    dropped = sum(status["trajectories_dropped"].values())
    assert status["trajectories_acked"] == status["trajectories_trained"] + dropped + status["trajectories_queued"]
    versions = status["versions_published"]
    assert versions == list(range(1, fleet.config.run.steps + 1))
    journal = Journal(fleet.run / "journal", "", 64, read_only=True)
    verdict = verify(load(fleet.file), journal)
    journal.close()
    assert verdict.difference == ""
    assert verdict.decisions >= fleet.config.run.steps


def start(fleet, name):
    fleet.start(name, *(["learner.resume=true"] if name == "learner" else []))


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("seed", range(4))
def test_random_kills_and_stops(tmp_path, model, seed):
    rng = np.random.default_rng(seed)
    with Fleet(tmp_path, model, "run.steps=120", *QUICK) as fleet:
        for name in PARTS:
            start(fleet, name)
        fleet.wait_for_step(2)
        for _ in range(6):
            victim = PARTS[rng.integers(0, len(PARTS))]
            time.sleep(float(rng.uniform(0.0, 0.7)))
            if fleet.running[victim].poll() is not None:
                continue  # the run is over
            if rng.random() < 0.5:
                fleet.kill(victim)
                time.sleep(float(rng.uniform(0.0, 1.0)))
                start(fleet, victim)
            else:
                os.killpg(fleet.running[victim].pid, signal.SIGSTOP)
                time.sleep(float(rng.uniform(0.5, 4.0)))
                os.killpg(fleet.running[victim].pid, signal.SIGCONT)
        assert [fleet.wait(name, 120) for name in PARTS[:2]] == [0, 0], fleet.words()
        assert_nothing_lost_nothing_twice(fleet)


@pytest.mark.slow  # and of CI: the shortest
def test_a_killed_learner_and_a_killed_broker_are_started_again_and_nothing_is_lost(tmp_path, model):
    with Fleet(tmp_path, model, "run.steps=24", *QUICK) as fleet:
        for name in PARTS[:-1]:
            start(fleet, name)
        for step, victim in ((5, "learner"), (12, "broker")):
            fleet.wait_for_step(step)
            fleet.kill(victim)
            start(fleet, victim)
        assert [fleet.wait(name) for name in PARTS[:-1]] == [0] * 4, fleet.words()
        assert_nothing_lost_nothing_twice(fleet)
        assert "resumed from" in fleet.log("learner").read_text()
        assert sum("rethinned_by_version" in s for s in fleet.steps()) > 5


@pytest.mark.chaos
@pytest.mark.slow
def test_a_full_disk_and_peers_that_say_nothing_or_nonsense_lose_nothing(tmp_path, model):
    """A file-size limit stands in for the disk: write returns an error at the same place."""
    with Fleet(tmp_path, model, "run.steps=24", *QUICK) as fleet:
        for name in PARTS[1:-1]:
            start(fleet, name)
        log = fleet.log("broker").open("ab")
        limited = subprocess.Popen(
            [sys.executable, "-m", "broker", str(fleet.file)], cwd=ROOT, env=environment(), stderr=log,
            stdout=subprocess.DEVNULL, start_new_session=True,
            preexec_fn=lambda: (
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
                resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000)),
            ),
        )  # fmt: skip
        log.close()
        fleet.running["limited"] = limited
        assert limited.wait(60) == 1, fleet.words()
        said = fleet.log("broker").read_text()
        assert "could not be written" in said
        assert "make room on the disk" in said
        fleet.start("broker")
        with zmq.Context() as context, context.socket(zmq.DEALER) as silent, context.socket(zmq.DEALER) as noisy:
            for socket in (silent, noisy):
                socket.setsockopt(zmq.LINGER, 0)
                socket.connect(fleet.config.broker.address)
            while fleet.running["broker"].poll() is None:
                noisy.send_multipart([os.urandom(50), os.urandom(500)])
                time.sleep(0.01)
        assert [fleet.wait(name) for name in PARTS[:-1]] == [0] * 4, fleet.words()
        assert fleet.status()["bad_messages"]["WireError"] > 10
        assert_nothing_lost_nothing_twice(fleet)


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_learner_on_a_mesh_is_killed_and_goes_on_on_another(tmp_path, model):
    """tp=2, killed; then pp=2 from its checkpoint, with the shards that the broker serves again."""
    with Fleet(tmp_path, model, "run.steps=24", "learner.tp=2", *QUICK) as fleet:
        for name in ("broker", "replica-0", "actor-0"):
            start(fleet, name)
        fleet.start("learner", ranks=2)
        fleet.wait_for_step(5)
        ranks = descendants(fleet.running["learner"].pid)  # torchrun gives them sessions of their own
        fleet.kill("learner")
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
        fleet.start("learner", "learner.tp=1", "learner.pp=2", "learner.resume=true", ranks=2)
        assert [fleet.wait(name, 100) for name in ("learner", "broker")] == [0, 0], fleet.words()
        assert_nothing_lost_nothing_twice(fleet)
        assert (fleet.run / "model" / "model.safetensors").exists()


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("while_they", ["train", "wait"])
def test_when_one_rank_is_told_to_stop_all_of_them_do(tmp_path, model, while_they):
    """Also where the others wait for what does not come."""
    with Fleet(tmp_path, model, "run.steps=5000", "learner.dp_shard=2", *QUICK) as fleet:
        for name in ("broker", "replica-0", "actor-0"):
            start(fleet, name)
        launcher = fleet.start("learner", ranks=2)
        fleet.wait_for_step(3)
        ranks = sorted(descendants(launcher.pid))
        assert len(ranks) == 2
        if while_they == "wait":
            fleet.kill("actor-0")
            fleet.wait_for_log("learner", "waiting since")
        os.kill(ranks[-1], signal.SIGTERM)
        assert fleet.wait("learner", 40) == 0, fleet.words()


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_ranks_whose_broker_is_gone_keep_what_they_trained(tmp_path, model):
    settings = (*QUICK, "learner.dp_shard=2", "learner.checkpoint_every=1000", "learner.wait_s=4")
    with Fleet(tmp_path, model, "run.steps=5000", *settings) as fleet:
        for name in ("broker", "replica-0", "actor-0"):
            start(fleet, name)
        fleet.start("learner", ranks=2)
        fleet.wait_for_step(3)
        fleet.kill("broker")
        assert fleet.wait("learner", 40) == 1, fleet.words()
        assert "DeadlineError: the broker at" in fleet.log("learner").read_text()
        (kept,) = (fleet.run / "checkpoints").iterdir()
        assert int(kept.name.removeprefix("step-")) > fleet.steps()[-1]["step"]
