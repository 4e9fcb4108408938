"""The broker process: one thread, one loop::

    receive -> handle (rollouts, training, distribution) -> assemble -> grant -> serve -> status

A turn never blocks for longer than TURN_S; what is heavy (collating, coins, packing) is numpy over
whole batches.
"""

import json
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from broker import exports
from broker.distribution import Distribution
from broker.door import Door
from broker.farewell import Farewell
from broker.figures import Figures
from broker.identities import Identities
from broker.journal import Journal
from broker.outlet import Outlet
from broker.peers import Peer
from broker.pipeline import Pipeline
from broker.recorder import Recorder
from broker.recovery import recover
from broker.rollouts import Rollouts
from broker.runfiles import RunFiles
from broker.training import Training
from common import wire
from common.config import MEGABYTE, RunConfig, to_yaml
from common.errors import CroupierError, DataError, ModelError, ProtocolError
from common.exporter import open_exporter
from common.frozen import command_of, words_of
from common.identity import check_same_tokens
from common.keys import broker_keys
from common.process import StopFlag, collect_seldom, keep_freed_memory
from common.routing import read_routing
from common.sockets import RouterSocket
from common.trace import Tracer, open_tracer, silent

TURN_S = 0.05
JOURNAL = "journal"  # within the run directory
WORD_EVERY_S = 10.0  # a log line while nothing can be done
RESUME = "python -m learner RUN.yaml learner.resume=true"

SENDERS: dict[type[Any], tuple[str, ...]] = {  # what is left out, everybody may send
    **dict.fromkeys((wire.Trajectories, wire.GroupFailed, wire.EvaluationResult), ("actor",)),
    **dict.fromkeys((wire.Ready, wire.Applied, wire.ReceiveFailed), ("actor", "replica")),
    **dict.fromkeys((wire.Fetch, wire.Commit, wire.Checkpointed), ("learner",)),
    **dict.fromkeys((wire.Publish, wire.Published, wire.PublishFailed), ("learner",)),
    **dict.fromkeys((wire.ScoreResult, wire.ScoreFailed), ("replica",)),
}

ACTORS_SHOWN, VERSIONS_SHOWN = 64, 1000  # in status.json, which is written twice a second; of evaluations as many

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

    def __init__(self, config: RunConfig, stop: StopFlag, tracer: Tracer | None = None) -> None:
        self.config = config
        self.tracer = tracer or silent("broker", "broker")
        self.stop = stop
        vocab_size, routing = read_vocab_size(config.model.path), read_routing(config)
        if config.joint.path:
            check_same_tokens(config.model.path, config.joint.path)
        self.pipeline = Pipeline(config, vocab_size, routing)  # refuses what cannot be before anybody can connect
        self.router = RouterSocket(
            config.broker.address,
            keys=broker_keys(config.broker),
            max_message_bytes=config.broker.max_message_bytes,
        )
        try:
            self.files = RunFiles(config.run.path, lambda: stop.is_set)
            journal = self._journal()
        except BaseException:
            self.router.close()
            raise
        self.figures = Figures(config.alerts, self.tracer.seconds)
        self.recorder = Recorder(self.pipeline, journal, self._state, self.tracer)
        self.outlet = Outlet(self.recorder)
        identities = Identities(config)
        self.door = Door(config.broker, self.router, self.outlet, self.figures, self.files.run_id, identities)
        self.door.on_joined, self.door.on_left = self._joined, self._left
        self.distribution = Distribution(config.weights.deadline_s, config.joint, self.recorder, self.door, self.files)
        self.rollouts = Rollouts(config, self.recorder, self.door, self.files, self.distribution.newest_version)
        self.training = Training(config, self.recorder, self.door, self.files, self.figures, self.waiting_for)
        self.door.objection = lambda hello: self.rollouts.objection(hello) or self.training.objection(hello)
        self.phase = "waiting"
        self.told: dict[str, Any] = {}  # what status.json was last made of
        self._began = time.monotonic()
        self._next_word = self._began + WORD_EVERY_S
        if journal is not None and journal.last >= 0:
            self._recover(journal)
        else:
            self.recorder.begin(self.files.generation)
        self.files.keep_config(to_yaml(config))
        self._handlers: dict[type[Any], Callable[[Peer, Any], None]] = {
            wire.Heartbeat: self._on_heartbeat,
            wire.Bye: lambda peer, m: self.door.lose(peer, m.reason or "bye", m.orderly),
            **self.rollouts.handlers,
            **self.training.handlers,
            **self.distribution.handlers,
        }

    # ---- the loop -------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until the last version is published, evaluated and in a checkpoint, or until asked to stop."""
        log.info("run %s on %s", self.files.run_id, self.config.broker.address)
        with ExitStack() as closing:
            closing.callback(self.router.close)
            if self.recorder.journal is not None:
                closing.callback(self.recorder.journal.close)  # before the router: it wakes it
            closing.callback(self.files.close)
            try:
                while not self.stop.is_set and not self._finished():
                    self.turn()
                self.phase = "stopped" if self.stop.is_set else "finished"
                self.tracer.state("end")
                self._write_status()
                self._farewell()
            except BaseException:
                with suppress(CroupierError):  # what ended the run is what is to be heard of
                    self._write_status()
                raise
            self._write_status()

    def turn(self) -> None:
        """One turn of the loop."""
        does = self.tracer.state
        does("journal" if self.outlet.holding else "idle.messages")
        arrived = self.router.wait(TURN_S)  # or until the journal has written
        does("receive")
        for identity, message in self.door.receive(0.0) if arrived else ():
            self._receive(identity, message)
        does("send")
        self._answer()
        does("receive")
        now = time.monotonic()
        self.door.look_after(now)
        self.rollouts.look_after_awaited(now)
        self.rollouts.look_after_overdue(now)
        self.distribution.tick(now)
        streams = self.distribution.streams
        does("collate")
        self.training.request_scores(streams.policy.published, now)
        does("grant")
        if self.training.learner_seen:
            self.rollouts.grant(streams.rollout.published)
            self.rollouts.tell_best(streams.published)
        does("pack")
        self.training.serve(now)
        if self.training.serving:
            self.phase = "running"
        does("send")
        self.outlet.release()
        if not self.outlet.holding:  # a restart writes no line of metrics.jsonl again that a snapshot lies behind
            self.recorder.snapshot_if_due()
            self.recorder.make_room()
        does("status")
        self.recorder.trail.levels()
        if self.files.status_due():
            self._write_status()
        if now > self._next_word:
            self._next_word = now + WORD_EVERY_S
            if self.phase == "waiting" or self._lacks_learner or self._all_but_safe:
                log.info("waiting for %s", self.waiting_for())

    @property
    def _all_but_safe(self) -> bool:
        """Whether all is done but perhaps the learner's last checkpoint."""
        steps, weights = self.config.run.steps, self.distribution.streams
        return (
            self.pipeline.committed_step + 1 >= steps
            and weights.published >= steps
            and not weights.busy
            and self.rollouts.schedule.finished(steps)
        )

    def _finished(self) -> bool:
        """Not before a learner was met: one that was killed at the end may come back to write the model."""
        if not self._all_but_safe or self.pipeline.checkpointed_step + 1 < self.config.run.steps:
            return False
        return self.training.learner_met or time.monotonic() - self._began > self.config.learner.wait_s

    def _farewell(self) -> None:
        Farewell(self.door, self._receive, self._answer).say(self.phase)

    def _answer(self) -> None:
        """Acknowledge what one look at the socket brought."""
        self.rollouts.acks.flush()
        self.outlet.release()

    # ---- after a restart ------------------------------------------------------------------------

    def _journal(self) -> Journal | None:
        limit = self.config.broker.journal_mb
        if limit <= 0:
            return None
        return Journal(self.files.directory / JOURNAL, self.files.run_id, limit, on_commit=self.router.wake)

    def _state(self) -> dict[str, Any]:
        """What the broker must find again beside the pipeline."""
        return {
            "figures": self.figures.state(),
            "honesty": self.training.honesty.state(),
            "published": self.distribution.state(),
            "evaluated": self.rollouts.schedule.state(),
            "sessions": self.rollouts.sessions,
            "learner_seen": self.training.learner_seen,
            "sending": self.distribution.sending,
        }

    def _recover(self, journal: Journal) -> None:
        found = recover(self.pipeline, journal)
        state = found.service
        published: dict[str, list[int]] = {name: list(found) for name, found in state.get("published", {}).items()}
        evaluated, lines = list(state.get("evaluated", [])), list[dict[str, Any]]()
        self.rollouts.sessions.update(state.get("sessions", {}))
        self.training.learner_seen = bool(state.get("learner_seen", False))
        sending = int(state.get("sending", 0))
        if "figures" in state:
            self.figures.restore(state["figures"])
        self.training.honesty.restore(state.get("honesty", []))
        for what, values in found.notes:
            match what:
                case "published":
                    published.setdefault(values["stream"], []).append(values["version"])
                case "evaluated":
                    evaluated.append(values["result"])
                    lines.append(values["line"])
                case "joined":
                    self.rollouts.sessions[values["actor"]] = values["session"]
                case "sending":
                    sending = values["version"]
                case "learner":
                    self.training.learner_seen = True
        self.distribution.restore(published, sending)
        self.rollouts.schedule.restore(evaluated)
        self.rollouts.recovered()
        written, moves = self.files.last("step", "step"), self.files.last("budget", "move")
        for move in found.moves:
            self.figures.budget_move = move
            if move["move"] > moves:
                self.files.metric("budget", move)
        told = self.files.last("eval", "version_asked")
        for line in lines:
            if line["version_asked"] > told:
                self.files.metric("eval", line)
        self.training.recovered()
        for receipt, metrics in found.commits:
            line, alerts = self.figures.committed(receipt, metrics, self.pipeline)
            if receipt["step"] > written:
                self.training.write_step(line, alerts)
        self.training.heed(self.figures.last_step)
        for odd in found.differences[:5]:
            log.warning("the journal was decided differently by the program that wrote it: %s", odd)
        log.info(
            "recovered from the journal: %d events, step %d next, %d trajectories waiting",
            found.events, self.pipeline.committed_step + 1, self.pipeline.queued,
        )  # fmt: skip

    # ---- peers ----------------------------------------------------------------------------------

    def _receive(self, identity: bytes, message: Any) -> None:
        peer = self.door.roster.get(identity)
        if isinstance(message, Exception):
            self.door.bad_message(identity, "bad message", message)
            if peer is not None and peer.role == "actor":
                self.rollouts.schedule.lost(peer.name)  # it may have been the result of an evaluation
            return
        if isinstance(message, wire.Hello):
            self.door.hello(identity, message)
            return
        if peer is None:
            self.router.send(identity, wire.WhoAreYou())
            return
        peer.heard = time.monotonic()
        try:
            if peer.role not in SENDERS.get(type(message), (peer.role,)):
                raise ProtocolError(f"a {peer.role} has no business to send it")
            self._handlers[type(message)](peer, message)
        except (DataError, ProtocolError) as error:
            self.door.bad_message(identity, message.TAG, error)

    def _joined(self, peer: Peer, known: bool) -> None:
        if peer.leads:
            self.training.learner_joined(peer.hello.version)
            self.rollouts.learner_joined()
            self.distribution.learner_joined(peer.hello.version)
        self.door.welcome(peer)
        if peer.role == "actor":
            self.rollouts.joined(peer)
        elif peer.role == "replica":
            self.training.ask_again(peer)

    def _left(self, peer: Peer) -> str:
        self.training.left(peer)
        loss = self.rollouts.left(peer) if peer.role == "actor" else ""
        self.distribution.left(peer, time.monotonic())
        return loss

    def _on_heartbeat(self, peer: Peer, message: wire.Heartbeat) -> None:
        peer.holds(message.version)
        self.figures.fleet.heard(peer, message.seconds, message.counters)
        pong = wire.Pong(self.door.version, message.sent_ns, time.monotonic_ns(), time.monotonic_ns())
        self.router.send(peer.identity, pong)  # at once: the shorter the way, the better its clock is known

    # ---- figures --------------------------------------------------------------------------------

    def waiting_for(self) -> str:
        """What the run waits for, in words that name who is late."""
        roster, weights = self.door.roster, self.distribution.streams
        if self._lacks_learner:
            return f"a learner (python -m learner RUN.yaml{' learner.resume=true' * self.training.learner_seen})"
        if self._all_but_safe:
            is_there = bool(roster.role("learner"))
            return "the learner's last checkpoint" if is_there else f"a learner, should the model be missing ({RESUME})"
        actors = roster.role("actor")
        if not actors:
            return "an actor (python -m actor RUN.yaml)"
        if missing := [scorer for scorer in self.config.scorers if not roster.scorers(scorer)]:
            return f"{words_of(missing[0])} ({command_of(missing[0])})"
        if weights.busy:
            return weights.waiting_for()
        newest = weights.rollout.published
        behind = [p.name for p in actors if p.version < newest and not self.config.joint.stays]
        if len(behind) == len(actors):
            return f"{', '.join(behind)} to receive version {newest}"
        servers = sum(p.counters.get("servers", 0) for p in actors)
        if servers and not any(p.counters.get("servers_serving", 0) for p in actors):
            return f"{', '.join(p.name for p in actors)}: none of {servers:.0f} SGLang servers serves yet"
        found = self._room_wanted() or self.pipeline.waiting_for()
        failing = [alert["text"] for alert in self.rollouts.alerts()]
        more = [f"{len(failing) - 1} other actors fare alike"] if len(failing) > 1 else []
        return "; ".join([found, *failing[:1], *more])

    @property
    def _lacks_learner(self) -> bool:
        """Whether one is missed: what is trained and in a checkpoint needs it no more."""
        is_safe = self.pipeline.checkpointed_step + 1 >= self.config.run.steps
        return not is_safe and not self.door.roster.role("learner")

    @property
    def _waits(self) -> bool:
        return self.training.parked or self.phase == "waiting" or self._lacks_learner or self._all_but_safe

    def _room_wanted(self) -> str:
        """What is full where nothing more can be granted for it."""
        ledger, section = self.pipeline.ledger, self.config.broker
        if ledger.promised or not ledger.grantable(self.distribution.streams.rollout.published):
            return ""
        if not self.pipeline.groups_that_fit():
            return f"room in the queue: {self.pipeline.queue_bytes >> 20} MB wait to be trained (broker.queue_mb)"
        if not self.recorder.room():
            return (
                f"room in the journal: it is full (broker.journal_mb={section.journal_mb:g}), and only checkpoints of "
                f"the learner empty it (learner.checkpoint_every={self.config.learner.checkpoint_every})"
            )
        return ""

    def _write_status(self) -> None:
        self.told = self.status()
        self.files.status(self.told)

    def status(self) -> dict[str, Any]:
        """What status.json holds."""
        schedule, weights = self.rollouts.schedule, self.distribution.streams
        best = schedule.best if self.config.evaluation.keep_best else None
        return {
            "run_id": self.files.run_id,
            "phase": "evaluating" if self.phase == "running" and schedule.pending else self.phase,
            "waiting_for": self.waiting_for() if self._waits else "",
            "step": self.pipeline.committed_step + 1,
            "steps": self.config.run.steps,
            "staleness_budget": self.pipeline.ledger.budget,
            "queue_limit_bytes": int(self.config.broker.queue_mb * MEGABYTE),
            "version": weights.published,
            "versions_published": weights.history[-VERSIONS_SHOWN:],
            "receivers_late": weights.late,
            "evaluations": [
                {"version": r.version, "reward": r.reward, "low": r.low, "high": r.high}
                for r in schedule.results[-VERSIONS_SHOWN:]
            ],
            "best": {"version": best.asked, "reward": best.reward} if best else None,
            "actors": {
                p.name: {"version": p.version, **p.counters} for p in self.door.roster.role("actor")[:ACTORS_SHOWN]
            },
            "suspects": self.training.honesty.suspects,
            "offences": self.door.conduct.counts,
            "impostors": dict(self.router.impostors),
            **self.figures.status(self.pipeline, self.door.roster),
            "alerts": self.figures.alerts.raised + self.rollouts.alerts(),
        }


def run_broker(config: RunConfig, stop: StopFlag) -> None:
    """Serve one run to its end. Raises what :class:`common.errors.CroupierError` covers."""
    keep_freed_memory()
    collect_seldom()
    with open_tracer(config, "broker", "broker") as tracer, open_exporter(config, tracer) as exporter:
        service = BrokerService(config, stop, tracer)
        exporter.families = lambda: exports.families(service.told, service.figures.last_step)
        service.run()
