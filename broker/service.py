"""The broker process: the only file here that holds sockets.

One thread, one loop::

    receive -> handle (pipeline, coordinator, schedule) -> assemble -> grant -> serve -> status

A turn never blocks for longer than TURN_S; what is heavy (collating, coins, packing) is numpy over
whole batches.
"""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from broker.evaluation import EvaluationSchedule
from broker.figures import Figures
from broker.honesty import Honesty
from broker.journal import Journal
from broker.outlet import Outlet
from broker.peers import Peer, Roster
from broker.pipeline import Pipeline, scores_of
from broker.publishing import LEARNER, Outgoing, PublishCoordinator
from broker.recorder import Recorder, recover
from broker.runfiles import RunFiles
from common import wire
from common.config import RunConfig
from common.errors import DataError, ModelError, ProtocolError
from common.process import StopFlag
from common.sockets import RouterSocket

TURN_S = 0.05
WAITING_EVERY_S = 1.0  # how often a parked learner is told what it waits for
JOURNAL = "journal"  # within the run directory
HELD_TURN_S = 0.001  # while answers wait for the disk
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
        self.pipeline = Pipeline(config, vocab_size)
        journal = self._journal()
        self.figures = Figures()
        self.honesty = Honesty(config.broker.verify_rate, config.run.seed)
        self.weights = PublishCoordinator(config.weights.deadline_s, self.files.generation)
        self.schedule = EvaluationSchedule(config.evaluation, config.run.steps, self.files.generation << 16)
        self.roster = Roster()
        self.phase = "waiting"
        self.learner_seen = False
        self._fetches: dict[bytes, tuple[wire.Fetch, float]] = {}
        self._score_sent: tuple[bytes, float] | None = None
        self._next_replica = 0
        self._next_pong = 0.0
        self._next_word = time.monotonic() + WORD_EVERY_S
        self._resync_asked: dict[str, tuple[int, float]] = {}
        self._sending = 0  # newest version whose collective was started
        self._noted = 0  # versions of the history that the journal has
        self._sessions: dict[str, str] = {}  # of actors, also from before a restart
        self._awaited: dict[str, float] = {}  # actors that owe groups since before a restart, and until when
        self.recorder = Recorder(self.pipeline, journal, self._state)
        self.outlet = Outlet(self.recorder)
        if journal is not None and journal.last >= 0:
            self._recover(journal)
        else:
            self.recorder.begin(self.files.generation)
        self._handlers: dict[type[Any], Callable[[Peer, Any], None]] = {
            wire.Heartbeat: self._on_heartbeat,
            wire.Bye: lambda peer, m: self._lose(peer, m.reason or "bye", orderly=True),
            wire.Trajectories: self._on_trajectories,
            wire.GroupFailed: self._on_group_failed,
            wire.EvaluationResult: self._on_evaluation,
            wire.ScoreResult: self._on_scores,
            wire.Fetch: self._on_fetch,
            wire.Commit: self._on_commit,
            wire.Checkpointed: lambda peer, m: self.recorder.checkpointed(m.step),
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
            if self.recorder.journal is not None:
                self.recorder.journal.close()

    def turn(self) -> None:
        """One turn of the loop."""
        for identity, message in self.router.receive(HELD_TURN_S if self.outlet.holding else TURN_S):
            self._receive(identity, message)
        self.outlet.release()
        now = time.monotonic()
        self._look_after_peers(now)
        self._dispatch(self.weights.on_tick(self.roster.receivers(), now))
        self._request_scores(now)
        self._grant()
        self._serve(now)
        self.outlet.release()
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
            self._send(peer, wire.Stop(self.phase))
        deadline = time.monotonic() + FAREWELL_S
        while self.outlet.holding and time.monotonic() < deadline:
            self.outlet.release()
            time.sleep(HELD_TURN_S)
        while self.roster.all() and time.monotonic() < deadline:
            for identity, message in self.router.receive(TURN_S):
                known = self.roster.get(identity) is not None
                if known and isinstance(message, wire.Bye):
                    self.roster.remove(identity)
                elif known and isinstance(message, wire.Trajectories):
                    self._receive(identity, message)
            self.outlet.release()

    def _send(self, peer: Peer, message: Any) -> None:
        """To ``peer``, once everything decided so far is on disk; an unreachable peer is lost."""

        def action() -> None:
            if not self.router.send(peer.identity, message) and self.roster.get(peer.identity) is peer:
                self._lose(peer, "its connection closed")

        self.outlet.do(action)

    # ---- after a restart ------------------------------------------------------------------------

    def _journal(self) -> Journal | None:
        limit = self.config.broker.journal_mb
        return Journal(self.files.directory / JOURNAL, self.files.run_id, limit) if limit > 0 else None

    def _state(self) -> dict[str, Any]:
        """What the broker must find again beside the pipeline."""
        return {
            "figures": self.figures.state(),
            "published": self.weights.history,
            "evaluated": [list(r) for r in self.schedule.results],
            "sessions": self._sessions,
            "learner_seen": self.learner_seen,
            "sending": self._sending,
        }

    def _recover(self, journal: Journal) -> None:
        found = recover(self.pipeline, journal)
        state = found.service
        published, evaluated = list(state.get("published", [])), list(state.get("evaluated", []))
        self._sessions, self.learner_seen = dict(state.get("sessions", {})), bool(state.get("learner_seen", False))
        self._sending = int(state.get("sending", 0))
        if "figures" in state:
            self.figures.restore(state["figures"])
        for what, values in found.notes:
            match what:
                case "published":
                    published.append(values["version"])
                case "evaluated":
                    evaluated.append([values["version"], values["reward"]])
                case "joined":
                    self._sessions[values["actor"]] = values["session"]
                case "sending":
                    self._sending = values["version"]
                case "learner":
                    self.learner_seen = True
        self.weights.restore(published)
        self._noted = len(self.weights.history)
        self.schedule.restore(evaluated)
        written = self.files.last_step()
        for receipt, metrics in found.commits:
            line = self.figures.committed(receipt, metrics, self.pipeline, self.roster)
            if receipt["step"] > written:
                self.files.metric("step", line)
        for odd in found.differences[:5]:
            log.warning("the journal was decided differently by the program that wrote it: %s", odd)
        deadline = time.monotonic() + self.config.broker.peer_timeout_s
        self._awaited = {e: deadline for e in self.pipeline.book.actors()}
        log.info(
            "recovered from the journal: %d events, step %d next, %d trajectories waiting",
            found.events, self.pipeline.committed_step + 1, self.pipeline.queued,
        )  # fmt: skip

    # ---- peers ----------------------------------------------------------------------------------

    def _receive(self, identity: bytes, message: Any) -> None:
        peer = self.roster.get(identity)
        if isinstance(message, Exception):
            who = peer.name if peer else identity[:40].decode(errors="replace")
            self.figures.errors[type(message).__name__] += 1
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
            self.figures.errors[type(error).__name__] += 1
            if isinstance(message, wire.ScoreResult):
                self._score_sent = None  # ask again, the next replica if there is one
            log.warning("%s from %s: %s", message.TAG, peer.name, error)
            if isinstance(message, wire.Fetch):
                self.router.send(identity, wire.Refused(str(error)))

    def _on_hello(self, identity: bytes, hello: wire.Hello) -> None:
        reason = self._objection(identity, hello)
        if reason:
            self.figures.errors["refused_hello"] += 1
            log.warning("refused %s %s: %s", hello.role, hello.name, reason)
            self.router.send(identity, wire.Refused(reason))
            return
        known = self.roster.get(identity)
        self.roster.add(Peer(identity, hello, time.monotonic(), hello.version))
        if hello.role == "learner" and hello.rank == 0:
            self._on_learner(hello.version)
        if known is None:
            log.info(
                "%s %s joined (version %d, %s pid %d)", hello.role, hello.name, hello.version, hello.host, hello.pid
            )
        peer = self.roster.get(identity)
        if peer is not None:
            self._send(peer, wire.Welcome(self.files.run_id, self.weights.published, self.config.broker.heartbeat_s))
            if hello.role == "actor":
                self._on_actor(peer)

    def _on_learner(self, version: int) -> None:
        """``version``: the newest that it has offered, so all steps before it are trained."""
        if not self.learner_seen:
            self.learner_seen = True
            self.recorder.note("learner", {})
            self.recorder.start_at(version)
        for step in range(self.pipeline.committed_step + 1, version):
            self._commit(step, {})  # the broker ended before it heard of these
        self.weights.known(version)
        self._note_published()

    def _on_actor(self, peer: Peer) -> None:
        """A process of its name before it takes its groups with it; what it owes itself is granted again."""
        name, session = peer.name, peer.hello.session
        if self._sessions.get(name, session) != session:
            given_up = self.recorder.actor_lost(name)
            log.info("%s is a new process: %d groups of the one before given up", name, given_up)
        if self._sessions.get(name) != session:
            self._sessions[name] = session
            self.recorder.note("joined", {"actor": name, "session": session})
        self._awaited.pop(name, None)
        owed = self.pipeline.book.of_actor(name)
        for version in sorted({self.pipeline.book.min_version(g) for g in owed}):
            groups = [g for g in owed if self.pipeline.book.min_version(g) == version]
            prompts = [self.pipeline.book.prompt(g) for g in groups]
            self._send(peer, wire.Grant(version, -1, 0, np.array(groups, np.int64), np.array(prompts, np.int64)))

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
        for name in [n for n, deadline in self._awaited.items() if now > deadline]:
            del self._awaited[name]
            given_up = self.recorder.actor_lost(name)
            log.warning("%s did not come back after the restart: %d groups given up", name, given_up)
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
            given_up = self.recorder.actor_lost(peer.name)
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
        return max(self.weights.published, self.weights.under_way, self._sending)

    def _on_trajectories(self, peer: Peer, message: wire.Trajectories) -> None:
        if message.run_id != self.files.run_id:
            raise ProtocolError(f"trajectories of run {message.run_id}, this broker serves {self.files.run_id}")
        ack = self.recorder.admit(message, peer.name, self._newest_version())
        for reason, group, sibling in zip(ack.reasons, ack.groups, ack.siblings, strict=True):
            if reason and reason not in ("unknown_group", "actor_lost", "refused_sibling"):
                log.warning("refused trajectory %d.%d of %s: %s", group, sibling, peer.name, reason)
        self._send(peer, ack)

    def _on_group_failed(self, peer: Peer, message: wire.GroupFailed) -> None:
        what = f"group {message.group}" if message.sibling < 0 else f"trajectory {message.group}.{message.sibling}"
        log.warning("%s failed at %s: %s", peer.name, what, message.reason)
        self.recorder.failed(message.group, message.sibling, "environment")

    def _on_evaluation(self, peer: Peer, message: wire.EvaluationResult) -> None:
        reward = float(message.rewards.mean()) if len(message.rewards) else 0.0
        if self.schedule.result(peer.name, message.evaluation, message.version_min, reward):
            self.recorder.note("evaluated", {"version": message.version_min, "reward": reward})
            line = {
                "version": message.version_min,
                "version_max": message.version_max,
                "reward": reward,
                "prompts": len(message.rewards),
                "length_mean": float(message.lengths.mean()) if len(message.lengths) else 0.0,
            }
            self.outlet.do(lambda: self.files.metric("eval", line))
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
            grant = None if hold else self.recorder.grant(peer.name, min(share, free), version)
            if evaluate and index == 0:
                asked = self.schedule.ask(peer.name, version)
                none = np.zeros(0, np.int64)
                grant = grant or wire.Grant(version, -1, 0, none, none)
                grant.evaluation, grant.evaluation_prompts = asked.id, self.config.evaluation.prompts
            if grant is not None:
                self._send(peer, grant)

    # ---- scores ---------------------------------------------------------------------------------

    def _request_scores(self, now: float) -> None:
        step = -1
        while self.pipeline.ledger.next_step > step:  # with rejection off several may be due
            step = self.pipeline.ledger.next_step
            self.recorder.assemble(self.weights.published)
        request = self.pipeline.scoring
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
        self._send(chosen, request)

    def _on_scores(self, peer: Peer, message: wire.ScoreResult) -> None:
        step = self.pipeline.scoring_step
        self.recorder.scored(message)
        self._score_sent = None
        decided = None if step is None else self.pipeline.step(step)
        if decided is not None:
            for sentence in self.honesty.check(decided.batch, scores_of(message)):
                log.warning("%s", sentence)
        self.figures.score_seconds += message.seconds

    # ---- learner --------------------------------------------------------------------------------

    def _on_fetch(self, peer: Peer, message: wire.Fetch) -> None:
        if message.world != self.config.learner.ranks:
            raise ProtocolError(
                f"the learner runs {message.world} ranks, learner.ranks={self.config.learner.ranks}; make them equal"
            )
        self._fetches[peer.identity] = (message, 0.0)

    def _serve(self, now: float) -> None:
        for identity, (fetch, told) in list(self._fetches.items()):
            peer = self.roster.get(identity)
            if peer is None:
                del self._fetches[identity]
                continue
            try:
                shard = self.recorder.shard(fetch.step, fetch.rank, fetch.world)
            except ProtocolError as error:
                self._send(peer, wire.Refused(str(error)))
                del self._fetches[identity]
                continue
            if shard is not None:
                self.phase = "running"
                self._send(peer, shard)
                del self._fetches[identity]
            elif now - told > WAITING_EVERY_S:
                self._send(peer, wire.Waiting(fetch.step, self.waiting_for()))
                self._fetches[identity] = (fetch, now)

    def _on_commit(self, peer: Peer, message: wire.Commit) -> None:
        self._commit(message.step, message.metrics)

    def _commit(self, step: int, metrics: dict[str, float]) -> None:
        receipt = self.recorder.commit(step, metrics)
        if receipt is None:
            return
        line = self.figures.committed(receipt, metrics, self.pipeline, self.roster)
        self.outlet.do(lambda: self.files.metric("step", line))

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
        going = [message.version for _, message in outgoing if isinstance(message, wire.Go)]
        if going and max(going) > self._sending:
            self._sending = max(going)  # written down before anybody can have it
            self.recorder.note("sending", {"version": self._sending})
        for name, message in outgoing:
            peer = self.roster.learner() if name == LEARNER else self.roster.named(name)
            if peer is not None:
                self._send(peer, message)
        self._note_published()
        self._resync()

    def _note_published(self) -> None:
        for version in self.weights.history[self._noted :]:
            self.recorder.note("published", {"version": version})
        self._noted = len(self.weights.history)

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
            self._send(learner, wire.Resync(f"{', '.join(behind)} lack version {version}"))

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
        return {
            "run_id": self.files.run_id,
            "phase": "evaluating" if self.phase == "running" and self.schedule.pending else self.phase,
            "waiting_for": self.waiting_for() if self._fetches or self.phase == "waiting" else "",
            "step": self.pipeline.committed_step + 1,
            "steps": self.config.run.steps,
            "version": self.weights.published,
            "versions_published": self.weights.history,
            "receivers_late": self.weights.late,
            "evaluations": [{"version": v, "reward": r} for v, r in self.schedule.results],
            "suspects": self.honesty.suspects,
            **self.figures.status(self.pipeline, self.roster),
        }


def run_broker(config: RunConfig, stop: StopFlag) -> None:
    """Serve one run to its end. Raises what :class:`common.errors.CroupierError` covers."""
    BrokerService(config, stop).run()
