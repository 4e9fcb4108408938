"""The learner's and the replica's side of the service: scores in, shards out, commits in."""

import functools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from broker.alerts import Alert
from broker.door import SHOWN, Door
from broker.figures import Figures
from broker.fleet import PACKING, PUBLISH, ROLLOUTS, SCORING
from broker.governor import Governor, Totals
from broker.honesty import Honesty
from broker.peers import Peer
from broker.recorder import Recorder
from broker.runfiles import RunFiles
from broker.scoring import Asked
from broker.steps import scores_of
from common import wire
from common.config import RunConfig
from common.errors import DataError, ProtocolError
from common.frozen import POLICY, words_of

HEARTBEATS = 4  # at least in an interval of the governor: they bring the actors' seconds
REFUSALS = 5  # of a request by each process that could score it, after which nobody ever will
WAITING_EVERY_S = 1.0  # how often a parked learner is told what it waits for

log = logging.getLogger("broker.training")


class Training:
    """Steps: assembled, scored, served and committed."""

    def __init__(
        self,
        config: RunConfig,
        recorder: Recorder,
        door: Door,
        files: RunFiles,
        figures: Figures,
        waiting_for: Callable[[], str],
    ) -> None:
        self.config, self.recorder, self.door = config, recorder, door
        self.files, self.figures, self._waiting_for = files, figures, waiting_for
        self.pipeline = recorder.pipeline
        self.honesty = Honesty(config.broker.verify_rate, config.run.seed, config.advantage.chooses)
        least_s = HEARTBEATS * config.broker.heartbeat_s
        self.governor = (
            Governor(config.staleness, self.pipeline.ledger.budget, least_s) if config.staleness.auto else None
        )
        self.learner_seen = False  # in this life of the broker or an earlier one
        self.learner_met = False  # in this one
        self._claimed = 0  # the version that the learner came with
        self.serving = False  # a shard has left
        self._ess = 1.0  # normalised, of the learner's weights at its last step
        self._fetches: dict[bytes, tuple[wire.Fetch, float]] = {}
        self._sent: dict[int, tuple[bytes, float]] = {}  # of each request under way, to whom and when
        self._unable: dict[int, set[bytes]] = {}  # of each request, who said that it cannot score it
        self._refusals: dict[int, tuple[int, str]] = {}  # how often that was said, and why the last time
        self._turns: Counter[str] = Counter()  # of each scorer's processes
        self.handlers: dict[type[Any], Callable[[Peer, Any], None]] = {
            wire.ScoreResult: self._on_scores,
            wire.ScoreFailed: self._on_score_failed,
            wire.Fetch: self._on_fetch,
            wire.Commit: self._on_commit,
            wire.Checkpointed: self._on_checkpointed,
        }

    def recovered(self) -> None:
        """The budget is where it was, or what the configuration says now; what moved it there is learned anew."""
        section, budget = self.config.staleness, self.pipeline.ledger.budget
        allowed = min(budget, section.limit) if section.auto else section.first
        if allowed != budget:
            log.info("staleness budget %d -> %d: the configuration says so", budget, allowed)
            self._move_budget(allowed, "the configuration was changed", {})
        if self.governor is not None:
            self.governor.budget = allowed

    def heed(self, line: Mapping[str, Any]) -> None:
        """What the last committed step's line says of the learner's weights."""
        ess = line.get("weight_ess")
        if ess is not None and math.isfinite(ess):
            self._ess = ess

    def _move_budget(self, value: int, reason: str, figures: dict[str, Any]) -> None:
        line = self.recorder.set_budget(value, reason, **figures)
        self.figures.budget_move = line
        self.door.outlet.do(lambda: self.files.metric("budget", line))

    @property
    def parked(self) -> bool:
        """Whether a learner waits for a shard."""
        return bool(self._fetches)

    def learner_joined(self, version: int) -> None:
        """``version``: the newest that it has offered, so all steps before it are trained."""
        self.learner_met = True
        if not self.learner_seen:
            self.learner_seen = True
            if self.recorder.journal is None:  # nobody knows what came behind
                self.files.forget_from(version)
            self.recorder.start_at(version)  # first: a broker killed between the two does it again
            self.recorder.note("learner", {})
        self._claimed = version
        self._infer(version - 1)  # the newest one's own commit may be on its way

    def _infer(self, version: int) -> None:
        """The steps before ``version`` are trained: the broker ended, or a connection, before it heard of that."""
        for step in range(self.pipeline.committed_step + 1, version):
            if self.pipeline.steps.was_served(step):
                self.commit(step, {})

    def objection(self, hello: wire.Hello) -> str:
        """Why a learner cannot hold the version that it claims; "" if it can, and for everybody else."""
        if hello.role != "learner":
            return ""
        steps, next_step = self.config.run.steps, self.pipeline.ledger.next_step
        if not 0 <= hello.version <= steps:
            return f"it holds version {hello.version}, this run ends with {steps} (run.steps)"
        if self.learner_seen and hello.rank == 0 and hello.version > next_step + 1:
            return (
                f"it holds version {hello.version}, and no step after {next_step - 1} was made here: it belongs "
                "to another life of this run; start it from an older checkpoint, or the broker from the right directory"
            )
        first = self.pipeline.steps.first_from(hello.version, next_step)
        if hello.rank == 0 and hello.version < min(first, self.pipeline.committed_step):  # it says so behind a commit
            return f"it holds version {hello.version}, and this run has forgotten all steps before {first}: " + (
                f"its checkpoints are missing from {self.config.run.path / 'checkpoints'}; bring them back, or begin "
                "a new run"
                if self.pipeline.checkpointed_step >= hello.version
                else "no later checkpoint was completed; begin a new run, with more checkpoints "
                "(learner.checkpoint_every) or more steps that are kept (broker.retain_mb, broker.journal_mb)"
            )
        return ""

    def ask_again(self, peer: Peer) -> None:
        """What ``peer`` was asked: it is gone, or was welcomed, and has forgotten it then."""
        self._sent = {number: sent for number, sent in self._sent.items() if sent[0] != peer.identity}

    def left(self, peer: Peer) -> None:
        """Nothing more is owed to it, or expected of it."""
        self._fetches.pop(peer.identity, None)
        self.ask_again(peer)
        if peer.leads:
            self._infer(self._claimed)

    # ---- scores ---------------------------------------------------------------------------------

    def request_scores(self, version: int, now: float) -> None:
        """Assemble what is due at ``version`` and have it scored; ask another process when one is late."""
        if self._ess < self.config.obrs.rethin_below:
            self.recorder.rethin(version, version)  # the step that this version trains
        step = -1
        while self.pipeline.ledger.next_step > step:  # with rejection off several may be due
            step = self.pipeline.ledger.next_step
            self.recorder.assemble(version)
        for scorer, request in self.pipeline.requests.items():
            self._ask(scorer, request, now)

    def _ask(self, scorer: str, request: wire.ScoreRequest, now: float) -> None:
        """Send a request to one of the scorer's processes, or to the next one when that is late or unable.

        Where all are unable they are asked again as often as one that is late. Raises :class:`DataError` once each
        has been unable REFUSALS times.
        """
        timeout_s, sent = self.config.broker.score_timeout_s, self._sent.get(request.request)
        if sent is not None and now - sent[1] < timeout_s:
            return
        able, scorers = self._able(scorer, request.request), self.door.roster.scorers(scorer)
        if not scorers:
            return
        refusals, reason = self._refusals.get(request.request, (0, ""))
        if not able and refusals >= REFUSALS * len(scorers):
            kept = "; what was sampled is kept" if self.recorder.journal is not None else ""
            raise DataError(
                f"step {self.pipeline.scoring_step} cannot be scored by {words_of(scorer)}, asked {refusals} times: "
                f"{reason}; does it have the policy's vocabulary, and memory for a batch? mend it and start again{kept}"
            )
        scorers = able or scorers
        if sent is not None:
            late = self.door.roster.get(sent[0])
            log.warning(
                "no scores from %s within %g s (broker.score_timeout_s): asking again",
                late.name if late else words_of(scorer), timeout_s,
            )  # fmt: skip
        chosen = scorers[self._turns[scorer] % len(scorers)]
        self._turns[scorer] += 1
        self._sent[request.request] = (chosen.identity, now)
        self.door.send(chosen, request)

    def _able(self, scorer: str, request: int) -> list[Peer]:
        """The scorer's processes but for those that said that they cannot score the request."""
        unable = self._unable.get(request, ())
        return [peer for peer in self.door.roster.scorers(scorer) if peer.identity not in unable]

    def _asked(self, peer: Peer, request: int) -> Asked | None:
        """What ``peer`` answers; None for what nobody waits for any more."""
        asked = self.pipeline.steps.asked(request)
        if asked is not None and asked.scorer != peer.hello.serves:
            raise ProtocolError(
                f"{peer.name} ({words_of(peer.hello.serves)}) answers what {words_of(asked.scorer)} was asked"
            )
        return asked

    def _on_score_failed(self, peer: Peer, message: wire.ScoreFailed) -> None:
        asked, sent = self._asked(peer, message.request), self._sent.get(message.request)
        if asked is None:
            return
        self.figures.errors["score_failed"] += 1
        words = "%s cannot score request %d: %s"
        self.door.warn(peer, "score_failed", words, peer.name, message.request, message.reason)
        self._unable.setdefault(message.request, set()).add(peer.identity)
        if sent is None or sent[0] != peer.identity:
            return
        self._refusals[message.request] = (self._refusals.get(message.request, (0, ""))[0] + 1, message.reason[:SHOWN])
        if self._able(asked.scorer, message.request):
            del self._sent[message.request]  # the next one is asked at once

    def _on_scores(self, peer: Peer, message: wire.ScoreResult) -> None:
        scoring, asked = self.pipeline.steps.scoring, self._asked(peer, message.request)
        started = time.perf_counter()
        if asked is not None:
            self._sent.pop(message.request, None)  # what is refused is asked again, of the next one if there is one
        self.recorder.scored(message)
        self._unable.pop(message.request, None)
        self._refusals.pop(message.request, None)
        seconds = time.perf_counter() - started
        if asked is None or scoring is None:
            return
        self.figures.decide_seconds += seconds
        if asked.scorer != POLICY:
            self.figures.frozen_seconds += message.seconds
            return
        self.figures.score_seconds += message.seconds
        if not scoring.again:  # what survived a thinning says less of its actor
            for sentence in self.honesty.check(scoring.batch, scores_of(message)):
                log.warning("%s", sentence)

    # ---- learner --------------------------------------------------------------------------------

    def _on_fetch(self, peer: Peer, message: wire.Fetch) -> None:
        try:
            self._check_fetch(peer, message)
        except ProtocolError as error:
            self.door.send(peer, wire.Refused(str(error)))
            raise
        self._fetches[peer.identity] = (message, 0.0)
        if peer.leads:
            if message.step >= self._claimed:
                self._infer(self._claimed)
            self.recorder.trail.mark(message.step, "asked")

    def _check_fetch(self, peer: Peer, message: wire.Fetch) -> None:
        learner, hello = self.config.learner, peer.hello
        if hello.world != learner.ranks or message.world != learner.data_ranks:
            raise ProtocolError(
                f"the learner runs {hello.world} ranks over {message.world} shards, the broker's configuration says "
                f"{learner.ranks} over {learner.data_ranks} (learner.pp, .dp_replicate, .dp_shard, .ep, .tp); "
                "start both from the same file"
            )
        if message.rank != learner.data_rank_of(hello.rank):
            raise ProtocolError(
                f"rank {hello.rank} of {hello.world} asks for shard {message.rank} of {message.world}; "
                f"its own is {learner.data_rank_of(hello.rank)}"
            )
        if not 0 <= message.step < self.config.run.steps:
            raise ProtocolError(f"step {message.step} is none of this run's {self.config.run.steps} (run.steps)")

    def serve(self, now: float) -> None:
        """Send every shard that is wanted and ready."""
        for identity, (fetch, told) in list(self._fetches.items()):
            peer = self.door.roster.get(identity)
            if peer is None:
                del self._fetches[identity]
                continue
            try:
                held = self._is_to_be_rethinned(fetch.step)
                shard = None if held else self.recorder.shard(fetch.step, fetch.rank, fetch.world)
            except ProtocolError as error:
                del self._fetches[identity]
                self.door.send(peer, wire.Refused(str(error)))
                self.door.bad_message(identity, "fetch", error)
                continue
            if shard is not None:
                self.serving = True
                self.door.send(peer, shard)
                self.door.outlet.do(functools.partial(self.recorder.trail.mark, fetch.step, "served"))
                self._fetches.pop(identity, None)
            elif now - told > WAITING_EVERY_S:
                self._fetches[identity] = (fetch, now)
                self.door.send(peer, wire.Waiting(fetch.step, self._waiting_for()))
        self.figures.fleet.waits(self._cause() if self._fetches else "", now)

    def _cause(self) -> str:
        """What a parked learner waits for, in a word."""
        if self.pipeline.scoring_step is not None:
            return SCORING
        step = self.pipeline.committed_step + 1
        if self._is_to_be_rethinned(step):
            return PUBLISH
        if self.pipeline.step(step) is not None:
            return PACKING
        return ROLLOUTS if self.pipeline.ledger.select() is None else PUBLISH

    def _is_to_be_rethinned(self, step: int) -> bool:
        """Whether ``step`` should wait for the version that trains it, which the learner is about to publish."""
        return self._ess < self.config.obrs.rethin_below and self.pipeline.steps.may_rethin(step, step)

    def _on_commit(self, peer: Peer, message: wire.Commit) -> None:
        step = message.step
        if message.version != step + 1:
            raise ProtocolError(f"step {step} makes version {step + 1}, not {message.version}")
        if step > self.pipeline.committed_step and not self.pipeline.steps.was_served(step):
            raise ProtocolError(f"step {step} cannot have been trained: this broker has not served it")
        self._infer(step)
        self.commit(step, message.metrics)

    def _on_checkpointed(self, peer: Peer, message: wire.Checkpointed) -> None:
        self._infer(min(self._claimed, message.step + 1))
        if message.step > self.pipeline.committed_step:
            raise ProtocolError(
                f"a checkpoint of step {message.step}, and only those up to {self.pipeline.committed_step} are trained"
            )
        self.recorder.checkpointed(message.step)

    def commit(self, step: int, metrics: dict[str, float]) -> None:
        """``step`` is trained."""
        receipt = self.recorder.commit(step, metrics)
        if receipt is None:
            return
        self.heed(metrics)
        line, alerts = self.figures.committed(receipt, metrics, self.pipeline)
        self.door.outlet.do(lambda: self.write_step(line, alerts))
        if self.governor is not None:
            self._govern(self.governor, receipt, metrics)

    def _govern(self, governor: Governor, receipt: dict[str, Any], metrics: dict[str, float]) -> None:
        """Let the governor look at a step that is trained, and do what it says."""
        fleet = self.figures.fleet
        states = {role: dict(seconds) for role, seconds in fleet.seconds.items()}
        states["replica"] = dict(fleet.policy_seconds)
        kl = receipt.get("kl_after")
        if kl is None:  # rejection is off: nobody scored the batch but the learner
            kl = metrics.get("kl_to_behaviour")
        step, now_s = receipt["step"], self.files.seconds()
        ess, unfilled_s = metrics.get("weight_ess"), fleet.unfilled_s
        move = governor.observe(Totals(step, now_s, dict(fleet.parked), states, kl, ess, unfilled_s))
        if move is not None:
            log.info("step %d: staleness budget %d -> %d: %s", step, move.old, move.new, move.reason)
            self._move_budget(move.new, move.reason, move.figures)

    def write_step(self, line: dict[str, Any], alerts: list[Alert]) -> None:
        """Write the line of a step that is trained, and say what it gives cause to."""
        self.files.metric("step", line, *(("alert", alert.line()) for alert in alerts))
        for alert in alerts:
            level = logging.INFO if alert.state == "cleared" else logging.WARNING
            log.log(level, "alert, step %d: %s", alert.step, alert.text)
