"""Real servers killed and stopped, and learners that die or hang in the middle of a broadcast."""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from actor.engine.base import Failure
from actor.engine.server import State
from actor.service import make_receiver
from common import wire
from common.config import WeightsSection
from common.trace import silent
from tests.sglang.servers import (
    TOLERANCE,
    ask,
    at,
    attached,
    drain,
    logprobs_of,
    prompt_of,
    reference,
    run_config,
    sglang_engine,
    take_version,
    wait_for,
)
from tools.processes import descendants

pytestmark = pytest.mark.sglang
BUCKET = 20_000


# ---- servers -------------------------------------------------------------------------------------


def processes_of(server) -> list[int]:
    """The server and its scheduler, detokenizer and so on."""
    return [server._process.pid, *descendants(server._process.pid)]


@pytest.mark.timeout(400)
def test_killed_and_stopped_servers_are_found_replaced_and_given_the_version(sglang_python, models, tmp_path):
    config = run_config(models["first"], tmp_path, sglang_python, launch=2, server_timeout_s=10.0)
    engine = sglang_engine(config)
    try:
        first, second = engine.servers
        wait_for(engine, lambda: first.state == second.state == State.SERVING, 120)
        take_version(engine, 1, models["second"])
        for number in range(8):
            engine.add(ask(number, prompt_of(5, number), 2, 250, ignore_eos=True))
        wait_for(engine, lambda: engine.counters["requests"] >= 16)
        for pid in processes_of(first):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        done = drain(engine, 120)
        assert len(done) == 16 and not any(isinstance(c, Failure) for c in done)
        assert engine.counters["retries"] > 0 and first.restarts == 1 and "SIGKILL" in first.why
        model = reference(models["second"])
        for c in done[::4]:
            rows = logprobs_of(model, prompt_of(5, c.request_id), c)
            np.testing.assert_allclose(c.logprobs, at(rows, c.token_ids), atol=TOLERANCE)
        wait_for(engine, lambda: first.state == State.SERVING, 120)
        assert first.version == 1  # pushed from the actor's memory: no learner is near

        scheduler = [p for p in processes_of(second) if b"scheduler" in Path(f"/proc/{p}/cmdline").read_bytes()]
        for number in range(8):
            engine.add(ask(100 + number, prompt_of(5, number), 2, 100, ignore_eos=True))
        wait_for(engine, lambda: engine.counters["requests"] >= 30)
        began = time.monotonic()
        for pid in scheduler:
            os.kill(pid, signal.SIGSTOP)
        assert scheduler
        done = drain(engine, 120)
        assert len(done) == 16 and not any(isinstance(c, Failure) for c in done)
        wait_for(engine, lambda: second.restarts >= 1)
        assert time.monotonic() - began < 60 and "no answer within 10 s" in second.why
        wait_for(engine, lambda: second.state == State.SERVING, 120)
        assert engine.version == 1
    finally:
        engine.close()


# ---- learners ------------------------------------------------------------------------------------


class Learner:
    """tests.sglang.learner in a process."""

    def __init__(self, model, epoch, after=0, fate="none", bucket_bytes=BUCKET):
        command = [sys.executable, "-m", "tests.sglang.learner", str(model), str(bucket_bytes), str(epoch), "2"]
        self.process = subprocess.Popen(
            [*command, str(after), fate], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        state = load_file(model / "model.safetensors")
        tensors = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in state.items()]
        port = int(self.process.stdout.readline())
        offer = wire.Publish(epoch, "127.0.0.1", port, "gloo", bucket_bytes, tensors)
        self.prepare = wire.Prepare(epoch, 1, 1, 2, offer.__dict__)
        self.go = wire.Go(epoch, epoch, ["a"], 2)

    def begin(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self):
        self.process.kill()
        self.process.communicate(timeout=10)


@pytest.fixture
def fleet(server, models, tmp_path):
    """(engine, receiver, sent, learner maker) by route; the broker's part is played by the test."""
    open_ = []

    def make(route, **engine):
        config = attached(run_config(models["first"], tmp_path, restarts=50, **engine), server)
        config = replace(config, weights=WeightsSection(route=route, deadline_s=6.0))
        engine = sglang_engine(config)
        sent = queue.Queue()
        receiver = make_receiver(config, engine, sent.put, silent())
        open_.append((engine, receiver))
        return engine, receiver, sent

    learners = []

    def learner(*args, **kwargs):
        learners.append(Learner(*args, **kwargs))
        return learners[-1]

    yield make, learner
    for one in learners:
        one.end()
    for engine, receiver in open_:
        receiver.close()
        engine.close()


def send(engine, receiver, sent, learner, kind, seconds=40.0):
    """Play broker until a message of ``kind`` comes; what ended meanwhile."""
    receiver.on_prepare(learner.prepare)
    assert sent.get(timeout=5) == wire.Ready(learner.prepare.epoch, learner.prepare.epoch, 1)
    learner.begin()
    receiver.on_go(learner.go)
    got = []

    def answered() -> bool:
        staged = receiver.staged()
        if staged is not None:
            engine.load(staged.version, staged.buckets)
            got.append(staged)
        if got and (loaded := engine.loaded()) is not None:
            receiver.applied(got.pop(), adopted=loaded.keeps, copied=not loaded.keeps)
        with contextlib.suppress(queue.Empty):
            answers.append(sent.get_nowait())
        return bool(answers)

    answers = []
    ended = wait_for(engine, answered, seconds)
    assert isinstance(answers[0], kind), answers
    return ended


def check_model(completions, models, names):
    for c in completions:
        prompt = prompt_of(5)
        for version, name in names.items():
            at_version = c.versions == version
            rows = at(logprobs_of(reference(models[name]), prompt, c), c.token_ids)
            np.testing.assert_allclose(c.logprobs[at_version], rows[at_version], atol=TOLERANCE)
        assert set(c.versions.tolist()) <= set(names)


@pytest.mark.parametrize("route", ["relay", "direct"])
def test_versions_from_a_learner_reach_the_server(fleet, models, route):
    make, learner = fleet
    engine, receiver, sent = make(route)
    for epoch, name in ((1, "second"), (2, "first"), (3, "second")):
        send(engine, receiver, sent, learner(models[name], epoch), wire.Applied)
        assert engine.version == engine.holds == epoch
        engine.add(ask(epoch, prompt_of(5), 2, 20))
        check_model(drain(engine), models, {epoch: name})


@pytest.mark.parametrize("route", ["relay", "direct"])
@pytest.mark.parametrize("fate", ["SIGKILL", "SIGSTOP"])
def test_a_learner_that_dies_or_hangs_before_the_first_bucket_changes_nothing(fleet, models, route, fate):
    make, learner = fleet
    engine, receiver, sent = make(route)
    engine.add(ask(0, prompt_of(5), 2, 280, ignore_eos=True))
    bad = learner(models["second"], 1, 0, fate)
    ended = send(engine, receiver, sent, bad, wire.ReceiveFailed)
    if (route, fate) == ("direct", "SIGSTOP"):  # SGLang waits for as long as that process has its sockets open
        bad.end()
        wait_for(engine, lambda: engine.servers[0].state == State.SERVING, 40)
    ended += drain(engine)
    assert len(ended) == 2 and not any(isinstance(c, Failure) for c in ended)
    check_model(ended, models, {0: "first"})
    send(engine, receiver, sent, learner(models["second"], 2), wire.Applied)
    engine.add(ask(1, prompt_of(5), 2, 20))
    check_model(drain(engine), models, {2: "second"})


@pytest.mark.parametrize("route", ["relay", "direct"])
def test_a_learner_killed_between_two_buckets_never_makes_a_server_sample_from_both(fleet, models, route):
    make, learner = fleet
    engine, receiver, sent = make(route)
    engine.add(ask(0, prompt_of(5), 2, 280, ignore_eos=True))
    early = send(engine, receiver, sent, learner(models["second"], 1, 2, "SIGKILL"), wire.ReceiveFailed)
    if route == "direct":
        assert engine.servers[0].state == State.STALE and engine.holds == -1 and engine.version == -1
    else:
        assert engine.version == 0
    early += send(engine, receiver, sent, learner(models["second"], 2), wire.Applied)
    done = early + drain(engine)
    assert len(done) == 2
    check_model(done, models, {0: "first", 2: "second"})
