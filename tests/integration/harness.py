"""A broker in a thread, and hand-written peers without a model."""

import json
import threading
import time

import numpy as np

from broker.service import BrokerService
from common import wire
from common.config import (
    BrokerSection,
    EvaluationSection,
    ModelSection,
    ObrsSection,
    RolloutSection,
    RunConfig,
    RunSection,
    StalenessSection,
    WeightsSection,
)
from common.errors import CroupierError
from common.link import connect
from common.process import StopFlag
from tests.integration.fleet import free_address

G, B, STEPS = 2, 2, 4


def until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Broker:
    """A broker in a thread."""

    def __init__(self, config):
        self.config, self.stop = config, StopFlag()
        self.service = BrokerService(config, self.stop)
        self.failure, self.may_fail = None, False  # what ended it, and whether that fails no test
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self):
        try:
            self.service.run()
        except CroupierError as error:
            self.failure = error
            if not self.may_fail:
                raise

    def end(self):
        self.stop.set("test")
        self.thread.join(10)
        assert not self.thread.is_alive()

    def status(self):
        return json.loads((self.config.run.path / "status.json").read_text())


class Peer:
    """A link that collects what it is told."""

    def __init__(
        self,
        broker,
        role,
        name,
        session="s",
        rank=0,
        world=1,
        run_id="",
        version=0,
        capacity=8,
        section=None,
        questions=(),
        serves="",
    ):
        self.hello = wire.Hello(
            role, name, run_id, session, rank, world, version, capacity, "host", 1, serves=serves,
            questions=list(questions),
        )  # fmt: skip
        self.link = connect(section or broker.config.broker, self.hello)
        try:
            self.link.wait_welcome(5)
        except CroupierError:
            self.link.close(None)  # or it says Hello for ever, to whoever listens at that port next
            raise
        self.stash = []  # what came while another kind was expected

    def expect(self, kind, seconds=5.0):
        found = next((m for m in self.stash if isinstance(m, kind)), None)
        if found is not None:
            self.stash = [m for m in self.stash if m is not found]
            return found
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            message = self.link.receive(0.05)
            if isinstance(message, kind):
                return message
            if message is not None:
                self.stash.append(message)
        raise AssertionError(f"no {kind.__name__} within {seconds} s")

    def nothing(self, kind, seconds=0.4):
        deadline = time.monotonic() + seconds
        assert not any(isinstance(m, kind) for m in self.stash)
        while time.monotonic() < deadline:
            assert not isinstance(self.link.receive(0.05), kind)

    def publish(self, version, receivers):
        self.link.send(wire.Publish(version, "127.0.0.1", 1, "gloo", 1 << 20, [["w", "float32", [1]]]))
        for receiver in receivers:
            prepare = receiver.expect(wire.Prepare)
            receiver.link.send(wire.Ready(prepare.epoch, version))
        go = self.expect(wire.Go)
        self.link.send(wire.Published(go.epoch, version, "d", 0.01))
        for receiver in receivers:
            receiver.expect(wire.Go)
            receiver.link.set_version(version)
            receiver.link.send(wire.Applied(go.epoch, version, "d"))
        self.expect(wire.PublishDone)


def make_broker(directory, broker=None, run_steps=STEPS, **sections):
    """A broker of a tiny run in ``directory``; ``broker`` are fields of its section, the others whole sections."""
    model = directory / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text('{"vocab_size": 16}')
    bounds = {"address": free_address(), "heartbeat_s": 0.1, "peer_timeout_s": 5.0, **(broker or {})}
    base = {
        "run": RunSection(name="r", dir=str(directory), steps=run_steps),
        "model": ModelSection(path=str(model)),
        "rollout": RolloutSection(groups_per_step=B, group_size=G, max_prompt_tokens=2, max_tokens=2),
        "staleness": StalenessSection(0),
        "obrs": ObrsSection(mode="off"),
        "broker": BrokerSection(**bounds),
        "evaluation": EvaluationSection(prompts=0),
        "weights": WeightsSection(deadline_s=5.0),
    }
    return Broker(RunConfig(**{**base, **sections}))


def group(run_id, number, version=0, log_q=-0.5):
    n = 4 * G
    on = np.tile([0, 0, 1, 1], G).astype(np.uint8)
    return wire.Trajectories(
        run_id=run_id, channel_names=["correct"], groups=np.full(G, number, np.int64),
        siblings=np.arange(G, dtype=np.int32), rewards=np.arange(G, dtype=np.float32),
        channels=np.zeros((G, 1), np.float32), finish=np.zeros(G, np.uint8),
        cu_seqlens=np.arange(0, n + 1, 4, dtype=np.int32), token_ids=np.zeros(n, np.int32), trainable=on,
        log_q=np.where(on, log_q, 0).astype(np.float32), versions=np.where(on, version, -1).astype(np.int32),
        topk_ids=np.zeros((n, 0), np.int32), topk_log_q=np.zeros((n, 0), np.float32),
    )  # fmt: skip
