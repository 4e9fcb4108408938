"""The broker process: the only file here that holds sockets.

One thread, one loop::

    receive -> handle (pipeline, coordinator, schedule) -> assemble -> grant -> serve -> status

A turn never blocks for longer than TURN_S; what is heavy (collating, coins, packing) is numpy over
whole batches.
"""

import json
import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from broker.evaluation import EvaluationSchedule
from broker.peers import Peer, Roster
from broker.pipeline import Pipeline
from broker.publishing import LEARNER, Outgoing, PublishCoordinator
from broker.runfiles import RunFiles
from common import wire
from common.config import RunConfig
from common.errors import DataError, ModelError, ProtocolError
from common.process import StopFlag
from common.sockets import RouterSocket

TURN_S = 0.05
WAITING_EVERY_S = 1.0  # how often a parked learner is told what it waits for
RATE_WINDOW_S = 10.0
FAREWELL_S = 3.0  # how long to wait for Byes at the end
WORD_EVERY_S = 10.0  # a log line while nothing can be done

log = logging.getLogger("broker")


def read_vocab_size(model_dir: str) -> int:
    """From the model directory's config.json."""
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise ModelError(
            f"model.path={model_dir}: no config.json there; make the quick-start model with "
            "`python -m tools.warmstart RUN.yaml` or name a Hugging Face directory"
        )
    try:
        return int(json.loads(path.read_text())["vocab_size"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: no usable vocab_size ({error}); the directory may be half written") from error


class BrokerService:
    """Everything the broker does over its socket; :meth:`run` returns when the run is over."""

    def __init__(self, config: RunConfig, stop: StopFlag) -> None:
        self.config = config
        self.stop = stop
        vocab_size = read_vocab_size(config.model.path)
        self.router = RouterSocket(config.broker.address)
        self.files = RunFiles(config.run.path)
        self.pipeline = Pipeline(config, vocab_size, self.files.generation)
        self.weights = PublishCoordinator(config.weights.deadline_s, self.files.generation)
        self.schedule = EvaluationSchedule(config.evaluation, config.run.steps)
        self.roster = Roster()
        self.errors: Counter[str] = Counter()
        self.phase = "waiting"
        self.learner_seen = False
        self._fetches: dict[bytes, tuple[wire.Fetch, float]] = {}
        self._score_sent: tuple[bytes, float] | None = None
        self._next_replica = 0
        self._next_pong = 0.0
        self._next_word = time.monotonic() + WORD_EVERY_S
        self._resync_asked: dict[str, tuple[int, float]] = {}
        self._rate: deque[tuple[float, int]] = deque()
        self._last_step: dict[str, Any] = {}
        self._lag_sum, self._lag_tokens, self._lag_max = 0.0, 0, 0
        self._score_seconds = 0.0
        self._actor_seconds = 0.0
        self._handlers: dict[type[Any], Callable[[Peer, Any], None]] = {
            wire.Heartbeat: self._on_heartbeat,
            wire.Bye: lambda peer, m: self._lose(peer, m.reason or "bye", orderly=True),
            wire.Trajectories: self._on_trajectories,
            wire.GroupFailed: self._on_group_failed,
            wire.EvaluationResult: self._on_evaluation,
            wire.ScoreResult: self._on_scores,
            wire.Fetch: self._on_fetch,
            wire.Commit: self._on_commit,
            wire.Checkpointed: lambda peer, m: self.pipeline.checkpointed(m.step),
            wire.Publish: self._on_publish,
            wire.Published: self._on_published,
            wire.PublishFailed: self._on_publish_failed,
            wire.Ready: lambda peer, m: self._dispatch(self.weights.on_ready(m, peer.name, time.monotonic())),
            wire.Applied: self._on_applied,
            wire.ReceiveFailed: lambda peer, m: self._dispatch(self.weights.on_receive_failed(m, peer.name)),
        }

    # ---- the loop -------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until the last version is published and evaluated, or until asked to stop."""
        log.info("run %s on %s", self.files.run_id, self.config.broker.address)
        try:
            while not self.stop.is_set and not self._finished():
                self.turn()
            self.phase = "stopped" if self.stop.is_set else "finished"
            self._farewell()
        finally:
            self.files.status(self.status())
            self.files.close()
            self.router.close()

    def turn(self) -> None:
        """One turn of the loop."""
        for identity, message in self.router.receive(TURN_S):
            self._receive(identity, message)
        now = time.monotonic()
        self._look_after_peers(now)
        self._dispatch(self.weights.on_tick(self.roster.receivers(), now))
        self._request_scores(now)
        self._grant()
        self._serve(now)
        if self.files.status_due():
            self.files.status(self.status())
        if now > self._next_word:
            self._next_word = now + WORD_EVERY_S
            if self.phase == "waiting":
                log.info("waiting for %s", self.waiting_for())

    def _finished(self) -> bool:
        steps = self.config.run.steps
        return (
            self.pipeline.committed_step + 1 >= steps
            and self.weights.published >= steps
            and not self.weights.busy
            and self.schedule.finished(steps)
        )

    def _farewell(self) -> None:
        for peer in self.roster.all():
            self.router.send(peer.identity, wire.Stop(self.phase))
        deadline = time.monotonic() + FAREWELL_S
        while self.roster.all() and time.monotonic() < deadline:
            for identity, message in self.router.receive(TURN_S):
                known = self.roster.get(identity) is not None
                if known and isinstance(message, wire.Bye):
                    self.roster.remove(identity)
                elif known and isinstance(message, wire.Trajectories):
                    self._receive(identity, message)

    # ---- peers ----------------------------------------------------------------------------------

    def _receive(self, identity: bytes, message: Any) -> None:
        peer = self.roster.get(identity)
        if isinstance(message, Exception):
            who = peer.name if peer else identity[:40].decode(errors="replace")
            self.errors[type(message).__name__] += 1
            log.warning("bad message from %s: %s", who, message)
            return
        if isinstance(message, wire.Hello):
            self._on_hello(identity, message)
            return
        if peer is None:
            self.router.send(identity, wire.WhoAreYou())
            return
        peer.heard = time.monotonic()
        try:
            self._handlers[type(message)](peer, message)
        except (DataError, ProtocolError) as error:
            self.errors[type(error).__name__] += 1
            log.warning("%s from %s: %s", message.TAG, peer.name, error)
            if isinstance(message, wire.Fetch):
                self.router.send(identity, wire.Refused(str(error)))

    def _on_hello(self, identity: bytes, hello: wire.Hello) -> None:
        reason = self._objection(identity, hello)
        if reason:
            self.errors["refused_hello"] += 1
            log.warning("refused %s %s: %s", hello.role, hello.name, reason)
            self.router.send(identity, wire.Refused(reason))
            return
        known = self.roster.get(identity)
        self.roster.add(Peer(identity, hello, time.monotonic(), hello.version))
        if hello.role == "learner" and hello.rank == 0 and not self.learner_seen:
            self.learner_seen = True
            self.pipeline.start_at(hello.version)
            self.weights.published = max(self.weights.published, hello.version)
        if known is None:
            log.info(
                "%s %s joined (version %d, %s pid %d)", hello.role, hello.name, hello.version, hello.host, hello.pid
            )
        self.router.send(
            identity, wire.Welcome(self.files.run_id, self.weights.published, self.config.broker.heartbeat_s)
        )

    def _objection(self, identity: bytes, hello: wire.Hello) -> str:
        if hello.role not in ("actor", "replica", "learner"):
            return f"unknown role {hello.role!r}"
        if hello.run_id and hello.run_id != self.files.run_id:
            return (
                f"it belongs to run {hello.run_id}, this broker serves run {self.files.run_id}; "
                "restart it, or give it this run's checkpoint"
            )
        for other in self.roster.role(hello.role):
            same_place = other.hello.session == hello.session
            rival = other.hello.rank == 0 if hello.role == "learner" else other.hello.name == hello.name
            if same_place or not rival or other.identity == identity:
                continue
            if self.router.send(other.identity, wire.Pong(self.weights.published)):
                what = "another learner" if hello.role == "learner" else f"another {hello.role} named {hello.name!r}"
                return (
                    f"{what} is connected ({other.hello.host} pid {other.hello.pid}); stop it first, or start a broker "
                    "of its own for this one (broker.address)"
                )
            self._lose(other, "replaced by a new process")
        return ""

    def _look_after_peers(self, now: float) -> None:
        if now >= self._next_pong:
            self._next_pong = now + self.config.broker.heartbeat_s
            for peer in self.roster.all():
                if not self.router.send(peer.identity, wire.Pong(self.weights.published)):
                    self._lose(peer, "its connection closed")
        for peer in self.roster.silent(now, self.config.broker.peer_timeout_s):
            self._lose(peer, f"silent for {now - peer.heard:.0f} s (broker.peer_timeout_s)")

    def _lose(self, peer: Peer, reason: str, orderly: bool = False) -> None:
        if self.roster.remove(peer.identity) is None:
            return
        self.router.forget(peer.identity)
        self._fetches.pop(peer.identity, None)
        now = time.monotonic()
        given_up = 0
        if peer.role == "actor":
            given_up = self.pipeline.actor_lost(peer.name)
            self.schedule.lost(peer.name)
        if peer.role == "learner" and peer.hello.rank == 0:
            self.weights.on_learner_lost()
        else:
            self._dispatch(self.weights.on_lost(peer.name, self.roster.receivers(), now))
        if self._score_sent is not None and self._score_sent[0] == peer.identity:
            self._score_sent = None
        level = logging.INFO if orderly else logging.WARNING
        log.log(
            level, "%s %s left: %s%s", peer.role, peer.name, reason, f"; {given_up} groups given up" if given_up else ""
        )

    def _on_heartbeat(self, peer: Peer, message: wire.Heartbeat) -> None:
        peer.version = max(peer.version, message.version)
        peer.counters = message.counters

    # ---- rollouts -------------------------------------------------------------------------------

    def _newest_version(self) -> int:
        return max(self.weights.published, self.weights.under_way)

    def _on_trajectories(self, peer: Peer, message: wire.Trajectories) -> None:
        if message.run_id != self.files.run_id:
            raise ProtocolError(f"trajectories of run {message.run_id}, this broker serves {self.files.run_id}")
        ack = self.pipeline.admit(message, peer.name, self._newest_version())
        for reason, group, sibling in zip(ack.reasons, ack.groups, ack.siblings, strict=True):
            if reason and reason not in ("unknown_group", "actor_lost", "refused_sibling"):
                log.warning("refused trajectory %d.%d of %s: %s", group, sibling, peer.name, reason)
        self.router.send(peer.identity, ack)

    def _on_group_failed(self, peer: Peer, message: wire.GroupFailed) -> None:
        log.warning("%s gave group %d up: %s", peer.name, message.group, message.reason)
        self.pipeline.give_up(message.group, "actor_failed")

    def _on_evaluation(self, peer: Peer, message: wire.EvaluationResult) -> None:
        reward = float(message.rewards.mean()) if len(message.rewards) else 0.0
        if self.schedule.result(peer.name, message.evaluation, message.version_min, reward):
            self.files.metric(
                "eval",
                {
                    "version": message.version_min,
                    "version_max": message.version_max,
                    "reward": reward,
                    "prompts": len(message.rewards),
                    "length_mean": float(message.lengths.mean()) if len(message.lengths) else 0.0,
                },
            )
            log.info("version %d: held-out reward %.3f", message.version_min, reward)

    def _grant(self) -> None:
        version = self.weights.published
        if not self.learner_seen:
            return
        serving = [p for p in self.roster.role("actor") if p.version >= version]
        if not serving:
            return
        evaluate = self.schedule.due(version)
        hold = not self.schedule.first_done  # the starting model is evaluated before it changes
        share = -(-self.pipeline.ledger.grantable(version) // len(serving))
        for index, peer in enumerate(serving):
            free = peer.hello.capacity - self.pipeline.book.in_flight(peer.name)
            grant = None if hold else self.pipeline.grant(peer.name, min(share, free), version)
            if evaluate and index == 0:
                asked = self.schedule.ask(peer.name, version)
                none = np.zeros(0, np.int64)
                grant = grant or wire.Grant(version, -1, 0, none, none)
                grant.evaluation, grant.evaluation_prompts = asked.id, self.config.evaluation.prompts
            if grant is not None:
                self.router.send(peer.identity, grant)

    # ---- scores ---------------------------------------------------------------------------------

    def _request_scores(self, now: float) -> None:
        request = self.pipeline.assemble(self.weights.published) or self.pipeline.scoring
        if request is None:
            return
        if self._score_sent is not None and now - self._score_sent[1] < self.config.broker.score_timeout_s:
            return
        replicas = self.roster.role("replica")
        if not replicas:
            return
        if self._score_sent is not None:
            log.warning(
                "no scores within %.0f s (broker.score_timeout_s): asking again", self.config.broker.score_timeout_s
            )
        chosen = replicas[self._next_replica % len(replicas)]
        self._next_replica += 1
        self._score_sent = (chosen.identity, now)
        self.router.send(chosen.identity, request)

    def _on_scores(self, peer: Peer, message: wire.ScoreResult) -> None:
        self.pipeline.scored(message)
        self._score_sent = None
        self._score_seconds += message.seconds

    # ---- learner --------------------------------------------------------------------------------

    def _on_fetch(self, peer: Peer, message: wire.Fetch) -> None:
        if message.world != self.config.learner.ranks:
            raise ProtocolError(
                f"the learner runs {message.world} ranks, learner.ranks={self.config.learner.ranks}; make them equal"
            )
        self._fetches[peer.identity] = (message, 0.0)

    def _serve(self, now: float) -> None:
        for identity, (fetch, told) in list(self._fetches.items()):
            try:
                shard = self.pipeline.shard(fetch.step, fetch.rank, fetch.world)
            except ProtocolError as error:
                self.router.send(identity, wire.Refused(str(error)))
                del self._fetches[identity]
                continue
            if shard is not None:
                self.phase = "running"
                self.router.send(identity, shard)
                del self._fetches[identity]
            elif now - told > WAITING_EVERY_S:
                self.router.send(identity, wire.Waiting(fetch.step, self.waiting_for()))
                self._fetches[identity] = (fetch, now)

    def _on_commit(self, peer: Peer, message: wire.Commit) -> None:
        receipt = self.pipeline.commit(message.step)
        if receipt is None:
            return
        lags = {int(k): v for k, v in receipt["lag_histogram"].items()}
        self._lag_sum += sum(k * v for k, v in lags.items())
        self._lag_tokens += sum(lags.values())
        self._lag_max = max(self._lag_max, *lags)
        actor_seconds = sum(p.counters.get("seconds_decode", 0.0) for p in self.roster.role("actor"))
        line = {
            **receipt,
            "version": message.version,
            "tokens_generated": self.pipeline.counts["tokens_generated"],
            "queue_bytes": self.pipeline.queue_bytes,
            "queue_groups": self.pipeline.ledger.queued,
            "in_flight_groups": self.pipeline.ledger.promised,
            "seconds_rollout": max(0.0, actor_seconds - self._actor_seconds),
            "seconds_score": self._score_seconds,
            **message.metrics,
        }
        self._actor_seconds, self._score_seconds = actor_seconds, 0.0
        self._last_step = line
        self.files.metric("step", line)

    # ---- weights --------------------------------------------------------------------------------

    def _on_publish(self, peer: Peer, message: wire.Publish) -> None:
        newest = self.weights.newest_offered
        if message.version not in (newest, newest + 1):
            raise ProtocolError(f"version {message.version} offered after {newest}: versions come in order")
        self._dispatch(self.weights.on_publish(message, self.roster.receivers(), time.monotonic()))

    def _on_published(self, peer: Peer, message: wire.Published) -> None:
        self.files.metric("publish", {"version": message.version, "seconds": message.seconds, "digest": message.digest})
        self._dispatch(self.weights.on_published(message))

    def _on_publish_failed(self, peer: Peer, message: wire.PublishFailed) -> None:
        self._dispatch(self.weights.on_publish_failed(message, self.roster.receivers(), time.monotonic()))

    def _on_applied(self, peer: Peer, message: wire.Applied) -> None:
        peer.version = max(peer.version, message.version)
        self._dispatch(self.weights.on_applied(message, peer.name))

    def _dispatch(self, outgoing: Outgoing) -> None:
        for name, message in outgoing:
            peer = self.roster.learner() if name == LEARNER else self.roster.named(name)
            if peer is not None and not self.router.send(peer.identity, message):
                self._lose(peer, "its connection closed")
        self._resync()

    def _resync(self) -> None:
        """Ask the learner for its current version again when a receiver lacks it."""
        learner, version = self.roster.learner(), self.weights.published
        if learner is None or self.weights.busy:
            return
        now = time.monotonic()
        behind = [
            p.name
            for role in ("actor", "replica")
            for p in self.roster.role(role)
            if p.version < version and not self.weights.is_suspended(p.name)
        ]
        key = ",".join(behind)
        asked, when = self._resync_asked.get(key, (-1, 0.0))
        if behind and (asked != version or now - when > self.config.weights.deadline_s):
            self._resync_asked = {key: (version, now)}
            self.router.send(learner.identity, wire.Resync(f"{', '.join(behind)} lack version {version}"))

    # ---- figures --------------------------------------------------------------------------------

    def waiting_for(self) -> str:
        """What the run waits for, in words that name who is late."""
        if not self.learner_seen:
            return "a learner (python -m learner RUN.yaml)"
        actors = self.roster.role("actor")
        if not actors:
            return "an actor (python -m actor RUN.yaml)"
        if self.config.obrs.mode != "off" and not self.roster.role("replica"):
            return "a policy replica (python -m learner.score RUN.yaml)"
        if self.weights.busy:
            return self.weights.waiting_for()
        behind = [p.name for p in actors if p.version < self.weights.published]
        if len(behind) == len(actors):
            return f"{', '.join(behind)} to receive version {self.weights.published}"
        return self.pipeline.waiting_for()

    def status(self) -> dict[str, Any]:
        """What status.json holds."""
        counts, now = self.pipeline.counts, time.monotonic()
        self._rate.append((now, counts["tokens_generated"]))
        while len(self._rate) > 2 and now - self._rate[0][0] > RATE_WINDOW_S:
            self._rate.popleft()
        (t0, n0), (t1, n1) = self._rate[0], self._rate[-1]
        return {
            "run_id": self.files.run_id,
            "phase": "evaluating" if self.phase == "running" and self.schedule.pending else self.phase,
            "waiting_for": self.waiting_for() if self._fetches or self.phase == "waiting" else "",
            "step": self.pipeline.committed_step + 1,
            "steps": self.config.run.steps,
            "version": self.weights.published,
            "versions_published": self.weights.history,
            "reward": self._last_step.get("reward"),
            "lag_mean": self._lag_sum / self._lag_tokens if self._lag_tokens else 0.0,
            "lag_max": self._lag_max,
            "acceptance": self._last_step.get("acceptance"),
            "tokens_generated": counts["tokens_generated"],
            "tokens_proposed": counts["tokens_proposed"],
            "tokens_accepted": counts["tokens_accepted"],
            "tokens_per_s": (n1 - n0) / (t1 - t0) if t1 > t0 else 0.0,
            "queue_groups": self.pipeline.ledger.queued,
            "queue_bytes": self.pipeline.queue_bytes,
            "in_flight_groups": self.pipeline.ledger.promised,
            "peers": [
                {"peer": p.name, "role": p.role, "version": p.version, "silent_s": round(now - p.heard, 2)}
                for p in self.roster.all()
            ],
            "trajectories_acked": counts["trajectories_acked"],
            "trajectories_trained": counts["trajectories_trained"],
            "trajectories_queued": self.pipeline.queued,
            "trajectories_dropped": dict(self.pipeline.dropped),
            "trajectories_refused": dict(self.pipeline.refused),
            "bad_messages": dict(self.errors),
            "receivers_late": self.weights.late,
            "evaluations": [{"version": v, "reward": r} for v, r in self.schedule.results],
        }


def run_broker(config: RunConfig, stop: StopFlag) -> None:
    """Serve one run to its end. Raises what :class:`common.errors.CroupierError` covers."""
    BrokerService(config, stop).run()
