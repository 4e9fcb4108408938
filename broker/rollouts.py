"""The actors' side of the service: grants out, trajectories and evaluations in."""

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from broker.acks import Acks
from broker.alerts import Alert
from broker.door import Door
from broker.evaluation import Evaluation, EvaluationSchedule
from broker.heldout import evaluate
from broker.overdue import Overdue
from broker.peers import Peer
from broker.recorder import Recorder
from broker.runfiles import RunFiles
from broker.setbacks import Setbacks
from common import wire
from common.config import RunConfig
from common.errors import DataError, ProtocolError

OVERDUE = "overdue"
NOBODYS_FAULT = (
    "unknown_group", "actor_lost", "refused_sibling", "no_signal", "environment", "sibling_failed", OVERDUE
)  # fmt: skip
FAILING = "rollouts"  # the alert's sign, before an actor's name
REASON = 200  # characters of a failure that are said again
MAX_SESSIONS = 10_000  # of actors that are remembered; who owes nothing and is gone is forgotten first

log = logging.getLogger("broker.rollouts")


class Rollouts:
    """What actors are asked for, and what comes of it."""

    def __init__(
        self, config: RunConfig, recorder: Recorder, door: Door, files: RunFiles, newest_version: Callable[[], int]
    ) -> None:
        """``newest_version``: the newest that anybody may have sampled with."""
        self.config, self.recorder, self.door, self.files = config, recorder, door, files
        self.pipeline = recorder.pipeline
        self.schedule = EvaluationSchedule(config.evaluation, config.run.steps, files.generation << 16)
        self._newest_version = newest_version
        self.sessions: dict[str, str] = {}  # of actors, also from before a restart
        self._awaited: dict[str, float] = {}  # actors that owe groups since before a restart, and until when
        self._told: tuple[int, ...] = ()  # the learner, of what is best
        self._overdue = Overdue(config.broker.group_timeout_s)
        self._setbacks = Setbacks(config.rollout.groups_per_step)
        self.acks = Acks(self._acknowledge)  # to be flushed after every look at the socket
        self.handlers: dict[type[Any], Callable[[Peer, Any], None]] = {
            wire.Trajectories: self._on_trajectories,
            wire.GroupFailed: self._on_group_failed,
            wire.EvaluationResult: self._on_evaluation,
        }

    def recovered(self) -> None:
        """Actors of before the restart may come back within ``broker.peer_timeout_s``; their groups' time is anew."""
        now, book = time.monotonic(), self.pipeline.book
        self._awaited = {e: now + self.config.broker.peer_timeout_s for e in book.actors()}
        self.pipeline.setbacks.clear()
        self._overdue.granted((group for group in book.groups() if book.awaits(group, -1)), now)

    def objection(self, hello: wire.Hello) -> str:
        """Why an actor's tasks are not this run's; "" if they are, and for everybody else."""
        return self.pipeline.curriculum.objection(hello.questions) if hello.role == "actor" else ""

    def joined(self, peer: Peer) -> None:
        """A process of its name before it takes its groups with it; what it owes itself is granted again."""
        name, session = peer.name, peer.hello.session
        if peer.hello.questions and not self.pipeline.curriculum.sizes:
            self.recorder.questions(peer.hello.questions)
        if self.sessions.get(name, session) != session:
            given_up = self._lost(name)
            log.info("%s is a new process: %d groups of the one before given up", name, given_up)
        if self.sessions.get(name) != session:
            self._forget_sessions()
            self.sessions[name] = session
            self.recorder.note("joined", {"actor": name, "session": session})
        self._awaited.pop(name, None)
        owed = self.pipeline.book.of_actor(name)
        for version in sorted({self.pipeline.book.min_version(g) for g in owed}):
            groups = [g for g in owed if self.pipeline.book.min_version(g) == version]
            prompts = [self.pipeline.book.prompt(g) for g in groups]
            self.door.send(peer, wire.Grant(version, -1, 0, np.array(groups, np.int64), np.array(prompts, np.int64)))
        if (evaluation := self.schedule.asked_of(name)) is not None:
            self.door.send(peer, self._with_evaluation(None, evaluation))

    def _forget_sessions(self) -> None:
        while len(self.sessions) >= MAX_SESSIONS:
            here = {p.name for p in self.door.roster.role("actor")} | self.pipeline.book.actors()
            gone = next((name for name in self.sessions if name not in here), None)
            if gone is None:
                return
            del self.sessions[gone]

    def learner_joined(self) -> None:
        """One that knows nothing yet of what is best."""
        self._told = ()

    def left(self, peer: Peer) -> str:
        """Returns what its going costs, in words."""
        given_up = self._lost(peer.name)
        self.schedule.lost(peer.name)
        return f"{given_up} groups given up" if given_up else ""

    def _lost(self, actor: str) -> int:
        """Another process of its name begins anew; returns how many of its groups were given up."""
        if actor in self._setbacks.lasting:
            self._alert(actor, "cleared", f"{actor}, whose groups all failed, is gone")
        self._setbacks.forget(actor)
        given_up = self.recorder.actor_lost(actor)
        self.pipeline.setbacks.pop(actor, None)
        return given_up

    def look_after_awaited(self, now: float) -> None:
        """Give up on actors that did not come back after a restart."""
        for name in [n for n, deadline in self._awaited.items() if now > deadline]:
            del self._awaited[name]
            given_up = self._lost(name)
            log.warning("%s did not come back after the restart: %d groups given up", name, given_up)

    def look_after_overdue(self, now: float) -> None:
        """Wait no longer than ``broker.group_timeout_s`` for a group of an actor that is alive."""
        book = self.pipeline.book
        for group in self._overdue.take(now, lambda group: book.awaits(group, -1)):
            actor, reason = book.actor(group), f"not back {self._overdue.timeout_s:g} s after its grant"
            log.warning(
                "group %d of %s: %s (broker.group_timeout_s); what is missing is waited for no longer",
                group, actor, reason,
            )  # fmt: skip
            self._setbacks.note(actor, reason)
            self.recorder.failed(group, -1, OVERDUE)

    def _on_trajectories(self, peer: Peer, message: wire.Trajectories) -> None:
        if message.run_id != self.files.run_id:
            raise ProtocolError(f"trajectories of run {message.run_id}, this broker serves {self.files.run_id}")
        ack = self.recorder.admit(message, peer.name, self._newest_version())
        self.acks.add(peer.identity, ack)
        faulty = 0
        for reason, group, sibling in zip(ack.reasons, ack.groups, ack.siblings, strict=True):
            if reason and reason not in NOBODYS_FAULT:
                faulty += 1
                self._setbacks.note(peer.name, f"trajectory refused: {reason}")
                self.door.warn(peer, "refused", "refused trajectory %d.%d of %s: %s", group, sibling, peer.name, reason)
        if faulty:
            self.door.offence(peer.identity, "refused_trajectory", faulty)

    def _acknowledge(self, identity: bytes, ack: wire.Ack) -> None:
        peer = self.door.roster.get(identity)
        if peer is not None:
            self.door.send(peer, ack)

    def _on_group_failed(self, peer: Peer, message: wire.GroupFailed) -> None:
        what = f"group {message.group}" if message.sibling < 0 else f"trajectory {message.group}.{message.sibling}"
        if self.pipeline.book.refusal(message.group, 0, peer.name) == "granted_to_another_actor":
            raise ProtocolError(f"{what} was granted to another actor")
        self.door.warn(peer, "failed", "%s failed at %s: %s", peer.name, what, message.reason)
        self._setbacks.note(peer.name, message.reason[:REASON])
        self.recorder.failed(message.group, message.sibling, "environment")

    def _on_evaluation(self, peer: Peer, message: wire.EvaluationResult) -> None:
        asked, section, task = self.schedule.asked_of(peer.name), self.config.evaluation, self.config.task
        if asked is None or asked.id != message.evaluation:
            return
        if message.samples != section.samples or len(message.rewards) != section.prompts * section.samples:
            self.schedule.lost(peer.name)
            raise DataError(
                f"evaluation_result: {len(message.rewards)} completions, {message.samples} a prompt; asked for "
                f"{section.prompts} prompts, {section.samples} completions each"
            )
        found = evaluate(message, section.pass_at, task.labels, task.mixture)
        low, high = found["reward_low"], found["reward_high"]
        self.schedule.result(peer.name, message.evaluation, message.version_min, found["reward"], low, high)
        line = {
            "version": message.version_min, "version_max": message.version_max, "version_asked": asked.version, **found
        }  # fmt: skip
        self.recorder.note("evaluated", {"result": self.schedule.state()[-1], "line": line})
        self.door.outlet.do(lambda: self.files.metric("eval", line))

    def grant(self, version: int) -> None:
        """Promise room to the actors that have had ``version``, in equal shares; a model that stays as it is, has all.

        One that evaluates gets what the others have no room for: its groups would wait behind held-out prompts.
        """
        stays = self.config.joint.stays
        serving = [p for p in self.door.roster.role("actor") if stays or p.reached >= version]
        if not serving:
            return
        busy = {p.name: self.pipeline.book.in_flight(p.name) for p in serving}
        asked: dict[str, Evaluation] = {}
        if self.schedule.due(version):
            failing = self._setbacks.lasting
            evaluator = min(serving, key=lambda p: (p.name in failing, busy[p.name])).name
            asked[evaluator] = self.schedule.ask(evaluator, version)
        hold = not self.schedule.first_done  # the starting model is evaluated before it changes
        now = time.monotonic()
        self._look_at_setbacks(serving, now)
        resets = self.pipeline.curriculum.resets
        evaluating = [p for p in serving if self.schedule.asked_of(p.name) is not None]
        for peers in ([p for p in serving if p not in evaluating], evaluating):
            share = -(-self.pipeline.ledger.grantable(version) // max(1, len(peers)))
            for peer in peers:
                wanted = min(share, peer.hello.capacity - busy[peer.name])
                held = hold or self._setbacks.holds_back(peer.name, now)
                grant = None if held else self.recorder.grant(peer.name, wanted, version)
                if grant is not None:
                    self._setbacks.granted(peer.name, now)
                    self._overdue.granted(grant.groups.tolist(), now)
                if peer.name in asked:
                    grant = self._with_evaluation(grant, asked[peer.name])
                if grant is not None:
                    self.door.send(peer, grant)
        if self.pipeline.curriculum.resets > resets:
            log.warning(
                "every training question of a task was passed in at least advantage.skip_passed=%g of its attempts: "
                "all are asked again and their history begins anew; harder questions would teach more",
                self.config.advantage.skip_passed,
            )

    def _look_at_setbacks(self, serving: list[Peer], now: float) -> None:
        """Say who does nothing but fail, and who does no longer. Raises TaskError if nobody ever did anything else."""
        pipeline, setbacks = self.pipeline, self._setbacks
        step, book = pipeline.committed_step + 1, pipeline.book
        for peer in serving:
            match setbacks.look(peer.name, pipeline.setbacks[peer.name], step, now):
                case "raised":
                    self._alert(peer.name, "raised", setbacks.words(peer.name))
                case "cleared":
                    self._alert(peer.name, "cleared", f"groups of {peer.name} come to be whole again")
                    setbacks.forget(peer.name)
        if not pipeline.counts["groups_whole"] and pipeline.committed_step < 0 and setbacks.lasting:
            actors = [peer.name for peer in self.door.roster.role("actor")]
            if not any(book.in_flight(actor) for actor in actors):
                setbacks.check(actors)

    def _alert(self, actor: str, state: str, text: str) -> None:
        step, since = self.pipeline.committed_step + 1, self._setbacks.lasting[actor]
        alert = Alert(f"{FAILING}:{actor}", state, step, since, self.pipeline.setbacks[actor], text)
        self.files.metric("alert", alert.line())
        log.log(logging.WARNING if state == "raised" else logging.INFO, "alert, step %d: %s", step, text)

    def alerts(self) -> list[dict[str, Any]]:
        """What is wrong now, for status.json."""
        lasting, words = self._setbacks.lasting, self._setbacks.words
        return [{"sign": f"{FAILING}:{actor}", "since": step, "text": words(actor)} for actor, step in lasting.items()]

    def _with_evaluation(self, grant: wire.Grant | None, asked: Evaluation) -> wire.Grant:
        none, section = np.zeros(0, np.int64), self.config.evaluation
        grant = grant or wire.Grant(asked.version, -1, 0, none, none)
        grant.evaluation, grant.evaluation_prompts = asked.id, section.prompts
        grant.evaluation_samples = section.samples
        return grant

    def tell_best(self, version: int) -> None:
        """Tell the learner which checkpoints to keep, if that has changed; ``version`` is the newest published."""
        learner = self.door.roster.learner()
        if learner is None or not self.config.evaluation.keep_best:
            return
        verdict = self.schedule.verdict(version)
        told = (verdict.version, verdict.pending, verdict.decided // self.config.evaluation.every)
        if told != self._told:
            self._told = told
            self.door.send(learner, verdict)
