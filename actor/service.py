"""The actor process: credits in, trajectories out, weights taken in flight.

::

    messages -> load weights that arrived -> start granted groups -> step the engine -> play on or score -> send
        ^                                                                                              |
        +----------------------------------------------------------------------------------------------+

The engine samples everything in flight together; nothing waits for a group, a grant or a publish.
What becomes of a group is in :mod:`actor.play`.
"""

import dataclasses
import logging
import os
import secrets
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from actor.engine.base import Engine
from actor.exports import counter_families
from actor.outbox import Finished, Outbox, by_channels, in_messages, pack
from actor.play import Play, open_task
from actor.tasks.base import count_questions
from actor.tasks.mixed import parts_of
from actor.weights import GroupCollective
from common import wire
from common.config import MEGABYTE, RunConfig
from common.errors import ConfigError, ModelError, TaskError, lasting
from common.exporter import Families, families_of_peer, gauge, open_exporter
from common.identity import model_identity
from common.link import BrokerLink, connect, parting
from common.process import StopFlag
from common.slowness import Slowness
from common.trace import Tracer, open_tracer, power_of_two, silent
from common.weights import Receiver, StagedWeights, WeightReceiver

IDLE_WAIT_S = 0.01  # how long an idle actor blocks for a message before it looks for new weights
AGENTS_WAIT_S = 0.002  # the same while agents are at work, whose requests come from another thread
PAUSE_S = 0.1  # actor.slowdown and .pace_s: how long at a time
MESSAGE_SHARE = 4  # one in so many bytes of broker.max_message_mb: a link is shared with heartbeats
ENGINE_WAIT_S = 0.005  # how long a step may wait for an engine that samples elsewhere

log = logging.getLogger("actor")


def make_engine(config: RunConfig, name: str, tracer: Tracer | None = None) -> Engine:
    """The engine that the configuration names, for the actor ``name``."""
    if config.actor.engine == "sglang":
        from actor.engine.sglang import SglangEngine

        return SglangEngine(config, name, tracer)
    from actor.engine.local import LocalEngine

    longest = config.rollout.max_length
    return LocalEngine(
        config.rollout_path,
        max_sequences=config.actor.max_sequences,
        max_length=longest,
        dtype=getattr(torch, config.model.dtype),
        threads=config.actor.threads,
        record_experts=config.rollout.routing_replay,
        frozen=config.rollout_frozen,
        expert_bias=config.rollout_bias,
        tracer=tracer,
    )


def make_receiver(config: RunConfig, engine: Engine, send: Callable[[Any], None], tracer: Tracer) -> Receiver:
    """Who takes part in the learner's broadcasts: this process, or with ``weights.route=direct`` its servers."""
    if config.route == "direct":
        from actor.engine.direct import DirectReceiver
        from actor.engine.sglang import SglangEngine

        assert isinstance(engine, SglangEngine)
        return DirectReceiver(send, engine, config.engine.update, tracer)
    deadline, device = config.weights.deadline_s, engine.device
    return WeightReceiver(send, lambda prepare: GroupCollective(prepare, deadline, device), deadline, tracer)


def reporting(link: BrokerLink, engine: Engine) -> Callable[[Any], None]:
    """What a receiver sends by: the link knows first what is held, so that no heartbeat denies what was applied."""

    def send(message: Any) -> None:
        link.set_version(engine.holds)
        link.send(message)

    return send


class ActorService:
    """One actor; :meth:`run` returns when the broker says Stop or the process is asked to end."""

    def __init__(self, config: RunConfig, name: str, stop: StopFlag, tracer: Tracer | None = None) -> None:
        self.config = config
        self.name = name
        self.stop = stop
        self.tracer = tracer or silent(name, "actor")
        self.task = open_task(config)
        self.engine = make_engine(config, name, self.tracer)
        self.outbox = Outbox()
        self.counters: Counter[str] = Counter()
        self._slowness = Slowness(config.actor.slowdown, config.actor.pace_s)
        self.play = Play(config, self.task, self.engine, self.counters, self._send, self.tracer)
        self._grants: deque[wire.Grant] = deque()
        self._loading: StagedWeights | None = None  # the version that the engine is taking into use
        self._loading_since = 0
        hello = wire.Hello(
            role="actor",
            name=name,
            run_id="",
            session=secrets.token_hex(4),
            rank=0,
            world=1,
            version=0,
            capacity=config.actor.max_sequences // config.rollout.started,
            host=socket.gethostname(),
            pid=os.getpid(),
            model=model_identity(config.rollout_path),
            questions=[count_questions(part) for part in parts_of(self.task)],
        )
        self.link = connect(config.broker, hello, self.tracer)
        self.receiver = make_receiver(config, self.engine, reporting(self.link, self.engine), self.tracer)

    def run(self) -> None:
        """Sample until told to stop."""
        try:
            self.tracer.state("idle.start")
            if self.link.wait_welcome(self.config.actor.wait_s, lambda: self.stop.is_set) is None:
                return
            log.info("%s serves run %s", self.name, self.link.run_id)
            while not self.stop.is_set:
                self._turn()
        finally:
            self.tracer.state("end")
            self.receiver.close()
            self.link.close(parting("stopped"))
            self.play.close()
            ended = self.play.figures | dict(self.counters)
            log.info("ends: %s", ", ".join(f"{name} {value:g}" for name, value in sorted(ended.items())))
            self.engine.close()

    def _turn(self) -> None:
        block = not self.engine.busy and not self._startable()
        wait_s = AGENTS_WAIT_S if self.play.waits_for_agents else IDLE_WAIT_S
        self.tracer.state(self._waits_for() if block else "play")
        while (message := self.link.receive(wait_s if block else 0.0)) is not None:
            self.tracer.state("play")
            self._handle(message)
            block = False
            if self.stop.is_set:
                return
        self.tracer.state("play")
        self._take_weights()
        self._start()
        self.play.follow_agents()
        if self.engine.busy:
            self.tracer.state("sample" if self.engine.in_flight else self._waits_for())
            rows, began = self.engine.in_flight, time.perf_counter()
            ended = self.engine.step(ENGINE_WAIT_S)
            self._slow_down(self._slowness.pause_s(rows, time.perf_counter() - began))
            took = time.perf_counter() - began
            self.counters["seconds_decode"] += took  # type: ignore[assignment]
            self.counters["seconds_unfilled"] += took * self._unfilled(rows)  # type: ignore[assignment]
            self.tracer.state("play")
            finished = self.play.collect(ended)
        else:
            finished = self.play.scored()
        if finished:
            self._send_off(finished)
        self.link.counters = self.engine.counters | self.play.figures | {k: float(v) for k, v in self.counters.items()}
        if self.tracer.wants_levels:
            grants = sum(len(grant.groups) for grant in self._grants)
            self.tracer.levels(rows=self.engine.in_flight, grants=grants, unacked=len(self.outbox))

    def _send_off(self, finished: Sequence[Finished]) -> None:
        with self.tracer.within("send"):
            for channels, alike in by_channels(finished).items():
                for part in in_messages(alike, self.config.broker.max_message_bytes // MESSAGE_SHARE):
                    trajectories = pack(self.link.run_id, channels, part)
                    self.outbox.add(trajectories)
                    self.link.send(trajectories)

    def _waits_for(self) -> str:
        """The state of a main thread that has nothing to do; see :data:`common.trace.STATES`."""
        if self._loading is not None:
            return "swap"
        if self.engine.version < 0:
            return "idle.server"
        if self.play.waits_for_agents:
            return "idle.agents"
        if len(self.play.rollouts):
            return "idle.scoring"
        if self._grants:
            return "idle.weights" if self._grants[0].min_version > self.engine.version else "idle.broker"
        return "idle.credits"

    def _slow_down(self, seconds: float) -> None:
        """Let ``seconds`` pass and take what comes meanwhile (actor.slowdown, actor.pace_s)."""
        deadline = time.perf_counter() + seconds
        while not self.stop.is_set and (left := deadline - time.perf_counter()) > 0:
            if (message := self.link.receive(min(left, PAUSE_S))) is not None:
                self._handle(message)

    def _handle(self, message: object) -> None:
        match message:
            case wire.Grant():
                self._grants.append(self._unknown(message))
            case wire.Ack():
                for group, sibling, reason in self.outbox.acknowledge(message):
                    self.counters["refused"] += 1
                    log.warning("the broker refused trajectory %d.%d: %s", group, sibling, reason)
            case wire.Prepare():
                self.receiver.on_prepare(message)
            case wire.Go():
                self.receiver.on_go(message)
            case wire.Welcome():
                for unacknowledged in self.outbox.unacknowledged():
                    self.link.send(unacknowledged)
            case wire.Stop():
                self.stop.set(f"the broker said stop: {message.reason}")

    def families(self) -> Families:
        """For Prometheus, whenever it asks."""
        yield from families_of_peer(self.link)
        yield from counter_families(self.link.counters)
        yield gauge("croupier_actor_in_flight", "Trajectories being sampled.", self.engine.in_flight)
        yield gauge("croupier_actor_unacknowledged", "Trajectories that the broker has not taken.", len(self.outbox))
        yield gauge("croupier_actor_unacknowledged_bytes", "Their bytes.", self.outbox.nbytes)
        yield gauge(
            "croupier_actor_grants", "Groups granted and not started.", sum(len(g.groups) for g in self._grants)
        )

    # ---- weights --------------------------------------------------------------------------------

    def _take_weights(self) -> None:
        """Use every version that has arrived, oldest first."""
        self.link.set_version(self.engine.holds)
        while self._loading is None and (staged := self.receiver.staged()) is not None:
            if staged.version == self.engine.holds:  # a resync brings the same version again
                self.receiver.applied(staged)
            else:
                self._loading = staged
                self._load(staged)
        while self._loading is not None and (loaded := self.engine.loaded()) is not None:
            staged, self._loading = self._loading, None
            self.tracer.span("weights", "load", self._loading_since, self.tracer.now(), version=staged.version)
            if loaded.error:
                log.error("version %d cannot be used: %s", staged.version, loaded.error)
                self.receiver.failed(staged, loaded.error)
                continue
            self.counters["swaps"] += 1
            self.receiver.applied(staged, adopted=loaded.keeps, copied=not loaded.keeps)

    def _load(self, staged: StagedWeights) -> None:
        began, cpu = self.tracer.now(), self.tracer.cpu()
        self._loading_since = began
        with self.tracer.within("swap"):
            self.engine.load(staged.version, staged.buckets)
        nbytes = sum(bucket.nbytes for bucket, _ in staged.buckets)
        took = self.tracer.now() - began, self.tracer.cpu() - cpu
        self.tracer.tally("swap", power_of_two(nbytes), *took, nbytes)

    # ---- grants ---------------------------------------------------------------------------------

    def _unknown(self, grant: wire.Grant) -> wire.Grant:
        """``grant`` without the groups that we have: a broker that came back grants what we owe again."""
        queued = {group for waiting in self._grants for group in waiting.groups.tolist()}
        have = queued | self.play.rollouts.request_ids() | self.outbox.groups()
        if not have.isdisjoint(grant.groups.tolist()):
            new = np.array([group not in have for group in grant.groups.tolist()], np.bool_)
            grant = dataclasses.replace(grant, groups=grant.groups[new], prompts=grant.prompts[new])
        return grant

    def _startable(self) -> bool:
        if not self._grants or self._is_outbox_full():
            return False
        return (0 if self.config.joint.stays else self._grants[0].min_version) <= self.engine.version

    def _is_outbox_full(self) -> bool:
        return self.outbox.nbytes >= self.config.actor.unacked_mb * MEGABYTE

    def _unfilled(self, rows: int) -> float:
        """The share of the engine's slots that had nothing to decode for want of credits."""
        return 0.0 if self._is_outbox_full() else max(0.0, 1 - rows / max(1, self.engine.slots))

    def _start(self) -> None:
        while self._startable():
            grant = self._grants.popleft()
            if self.config.joint.stays:
                self.play.date = grant.min_version
            if grant.evaluation >= 0:
                self.play.start_evaluation(grant.evaluation, grant.evaluation_prompts, grant.evaluation_samples)
            for group, prompt in zip(grant.groups.tolist(), grant.prompts.tolist(), strict=True):
                self.play.start_group(group, prompt)

    def _send(self, message: wire.GroupFailed | wire.EvaluationResult) -> None:
        if isinstance(message, wire.EvaluationResult) and message.version_max < 0:  # nothing was sampled
            message = dataclasses.replace(message, version_min=self.engine.holds, version_max=self.engine.holds)
        if isinstance(message, wire.GroupFailed):
            self.outbox.failed(message)
        self.link.send(message)


def run_actor(config: RunConfig, name: str, stop: StopFlag) -> None:
    """Serve one run to its end."""
    with open_tracer(config, name, "actor") as tracer, open_exporter(config, tracer) as exporter:
        with lasting(ConfigError, ModelError, TaskError):
            service = ActorService(config, name, stop, tracer)
        exporter.families = service.families
        service.run()
