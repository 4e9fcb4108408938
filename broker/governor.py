"""``staleness.budget: auto``: moves the budget by what the learner and the fleet idle for, within the targets.

::

    every committed step:  Totals -> Governor.observe -> Move (old, new, reason) or None

Let L be the share of its time that the learner waits for data, F the share of their slots' time that actors wait for
credits or for weights (one that samples with half of its slots empty waits half), R the share that the replicas wait
for requests. Where one side is never idle it sets the pace; where all are, the pace is set by how much may be under
way, which is the budget: admission costs ``min(L, F, R)`` of the throughput. That loss, and the side that idles least,
decide; every move is judged an interval later. (F falls for a while after any raise, until what was granted is there:
so L is believed unless another side idles clearly less, and where slots were empty in any case.)

- a loss above STARVING: raise, by 1 and then by twice as much while it pays, or by as much as makes up for the loss if
  throughput grows with what is under way (Little's law). A raise that leaves the waiting as it was is taken back, and
  not tried again for a while that doubles each time. A loss above GLARING is believed after half an interval;
- below SLACK, or where raising did not pay: lower, by a quarter at most. If then all starve, and more than before,
  that is taken back, and not tried again for a while that doubles;
- KL after rejection or ESS off target: halve at once, whatever idles.

No clock, no randomness: a function of what it is told. Its moves are inputs of the pipeline and are journaled; what
it has learned is not, so a broker that comes back keeps the budget and learns anew.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.config import StalenessSection

STARVING = 0.04  # of the throughput lost to admission, above which the budget is raised
GLARING = 0.15  # a loss that half an interval shows well enough
SLACK = 0.02  # below which a smaller one is tried; between the two nothing is done
PAYS = 0.02  # more work done by the side that idles least pays for a raise; as much less may be lost by lowerings
CLEARLY = 0.5  # of the learner's idle share: a side below it sets the pace
MARGIN = 0.8  # of a target that may be used up when the budget is raised
RECENT = 8  # steps whose median of KL and of ESS stands for them: a few bad batches are not yet a bad budget
SETTLES = 2  # steps that are under way when the budget moves
CALM = 2  # intervals in a row that must give cause for a lowering
MOST_STRIDE = 8  # versions that the budget is raised by at once
CLEAR_GAIN, SUREST = 0.08, 4  # by each of these more or less work is done, patience is as much longer, up to 4 times
PATIENCE = 4  # intervals until what failed is tried again, doubled each time up to ...
TARGET_PATIENCE = 16  # the same after a target was missed
MOST_PATIENCE = 64
LEARNER, FLEET, REPLICAS = "learner", "fleet", "replicas"
WANT = {  # by what we call a side: its role, and the states in which it has nothing to do for want of data or credits
    FLEET: ("actor", ("idle.credits", "idle.weights")),
    REPLICAS: ("replica", ("idle.requests", "idle.weights")),
}


@dataclass(frozen=True)
class Totals:
    """Sums since the broker began, at the commit of ``step``; KL and ESS are the step's own, None if unknown."""

    step: int
    wall_s: float
    parked: Mapping[str, float]  # seconds that the learner waited for a shard, by cause
    states: Mapping[str, Mapping[str, float]]  # role -> state -> seconds of all its processes (common.trace.STATES)
    kl: float | None  # after rejection, nats a token
    ess: float | None  # normalised, of the learner's weights
    unfilled_s: float = 0.0  # of actors that sampled: their time times the share of their slots without credits


@dataclass(frozen=True)
class Interval:
    """What happened between two Totals."""

    steps: int
    wall_s: float
    idle: Mapping[str, float]  # side -> share of its time; a side that tells nothing is left out
    unfilled: float = 0.0  # what of the fleet's share are empty slots of actors that sample

    @property
    def loss(self) -> float:
        """The share of the throughput that admission costs."""
        return min(self.idle.values())

    @property
    def pace(self) -> str:
        """The side that idles least, and so sets the pace; the learner unless another is clearly less idle."""
        least = min(self.idle, key=lambda side: self.idle[side])
        return least if self.idle[least] < CLEARLY * self.idle[LEARNER] else LEARNER

    def gain_over(self, before: "Interval") -> float:
        """How much more work the side did that set the pace ``before``, relatively."""
        side = before.pace if before.pace in self.idle else LEARNER
        if side == FLEET and max(self.unfilled, before.unfilled) > SLACK:
            side = LEARNER  # fuller engines are not yet more tokens: what is trained tells
        return (1 - self.idle[side]) / max(1e-9, 1 - before.idle[side]) - 1

    @property
    def rate(self) -> float:
        """Steps a second."""
        return self.steps / self.wall_s

    @classmethod
    def between(cls, before: Totals, now: Totals) -> "Interval":
        """``now`` less ``before``."""
        wall_s = max(1e-9, now.wall_s - before.wall_s)
        idle = {LEARNER: min(1.0, (sum(now.parked.values()) - sum(before.parked.values())) / wall_s)}
        unfilled = 0.0
        for side, (role, wanting) in WANT.items():
            then, this = before.states.get(role, {}), now.states.get(role, {})
            lived = sum(this.values()) - sum(then.values())
            if lived > 0:
                nothing = sum(this.get(s, 0.0) - then.get(s, 0.0) for s in wanting) / lived
                if side == FLEET:
                    unfilled = max(0.0, now.unfilled_s - before.unfilled_s) / lived
                    nothing += unfilled
                idle[side] = min(1.0, nothing)
        return cls(now.step - before.step, wall_s, idle, unfilled)


@dataclass(frozen=True)
class Move:
    """The budget goes from ``old`` to ``new``, for ``reason``."""

    old: int
    new: int
    reason: str
    figures: dict[str, float | None]


@dataclass
class Barrier:
    """A budget that is not crossed for ``left`` intervals: each time that it is set for longer."""

    least: int = PATIENCE  # intervals that it is first set for
    at: int = -1
    left: int = 0
    patience: int = 0
    quiet: int = 0  # intervals beyond it that went well

    def __post_init__(self) -> None:
        """Begin patiently."""
        self.patience = self.least

    def set(self, at: int, by: float = 0.0) -> None:
        """What lies behind ``at`` was tried in vain; what differed much, relatively ``by``, is not soon doubted."""
        surely = min(SUREST, max(1, round(abs(by) / CLEAR_GAIN)))
        self.at, self.left, self.quiet = at, self.patience * surely, 0
        self.patience = min(MOST_PATIENCE, 2 * self.patience)

    def crossed(self) -> None:
        """It was right to try again."""
        self.patience = max(self.least, self.patience // 2)

    def went_well(self) -> None:
        """An interval beyond it; as many as it is first set for show that it was right."""
        self.quiet += 1
        if self.quiet >= self.least:
            self.quiet = 0
            self.crossed()

    def tick(self) -> None:
        """An interval has passed."""
        self.left = max(0, self.left - 1)


class Governor:
    """Decides where the budget goes. Starts at ``section.first``; moves lie in ``[0, section.most]``."""

    def __init__(self, section: StalenessSection, budget: int, least_s: float) -> None:
        """``least_s``: what an interval lasts at least, several heartbeats, which bring the actors' seconds."""
        self.section, self.budget, self._least_s = section, budget, least_s
        self._kl: deque[float] = deque(maxlen=RECENT)
        self._ess: deque[float] = deque(maxlen=RECENT)
        self._heeded = (False, False)  # whether KL, ESS were known when the budget gave way to a target
        self._floor, self._ceiling, self._allowed = Barrier(), Barrier(), Barrier(TARGET_PATIENCE)
        self._stride = 1  # of the next raise
        self._calm = 0  # intervals in a row after which a smaller budget might do
        self._tried: tuple[int, Interval] | None = None  # the budget that was just left, and how it fared there
        self._reference: Interval | None = None  # before the first of a row of lowerings
        self._start: Totals | None = None  # of the present interval
        self._from = -1  # the step from which it counts: what was granted under another budget is trained by then
        self._heed_from = -1  # KL and ESS of earlier steps do not count: their data are of another budget

    def observe(self, now: Totals) -> Move | None:
        """A step was committed."""
        if self._from < 0:
            self._from, self._heed_from = now.step + self.section.every // 2, now.step + self.section.every  # it fills
        if now.step >= self._heed_from:
            for recent, value in ((self._kl, now.kl), (self._ess, now.ess)):
                recent.extend([] if value is None or not math.isfinite(value) else [value])
            if reason := self._off_target():
                return self._give_way(now, reason)
        if now.step < self._from:
            return None
        if self._start is None:
            self._start = now
            return None
        interval = Interval.between(self._start, now)
        glaring = self._tried is None and FLEET in interval.idle and interval.loss > GLARING
        least = self.section.every // 2 if glaring else self.section.every
        if interval.steps < least or interval.wall_s < self._least_s:
            return None
        self._start = now
        return self._decide(now, interval)

    # ---- targets --------------------------------------------------------------------------------

    @property
    def kl(self) -> float | None:
        """Of the last steps, nats a token; None as long as there are too few."""
        return _middle(self._kl)

    @property
    def ess(self) -> float | None:
        """The same of the effective sample size."""
        return _middle(self._ess)

    def _off_target(self) -> str:
        """Which target is missed, in words; "" for none."""
        section = self.section
        if self.kl is not None and self.kl > section.kl_target:
            return f"KL after rejection is {self.kl:.3g}, above staleness.kl_target={section.kl_target:g}"
        if self.ess is not None and self.ess < section.ess_target:
            return f"ESS is {self.ess:.3g}, below staleness.ess_target={section.ess_target:g}"
        return ""

    def _give_way(self, now: Totals, reason: str) -> Move | None:
        if self.budget == 0:
            return None
        old = self.budget
        self._heeded = (self.kl is not None, self.ess is not None)
        self._allowed.set(old - 1)
        self._stride, self._tried = 1, None
        move = self._move(now, old // 2, reason, None)
        self._heed_from = now.step + old + SETTLES  # what was promised under the old budget is trained by then
        self._kl.clear()
        self._ess.clear()
        return move

    def _room(self) -> bool:
        """Whether the targets leave room for older data; after one was missed, only where it is known again."""
        kl, ess, section = self.kl, self.ess, self.section
        if any(heeded and value is None for heeded, value in zip(self._heeded, (kl, ess), strict=True)):
            return False
        kl_fits = kl is None or kl <= MARGIN * section.kl_target
        return kl_fits and (ess is None or 1 - ess <= MARGIN * (1 - section.ess_target))

    # ---- what idles -----------------------------------------------------------------------------

    def _decide(self, now: Totals, here: Interval) -> Move | None:
        if FLEET not in here.idle:  # actors that do not tell what they do
            return None
        for barrier in (self._floor, self._ceiling, self._allowed):
            barrier.tick()
        if self.budget > self._allowed.at and not self._allowed.left:
            self._allowed.went_well()
        tried, self._tried = self._tried, None
        if tried is not None and (move := self._judge(now, here, *tried)) is not None:
            return move
        if tried is None or self.budget > tried[0]:
            self._reference = here
        if here.loss > STARVING and not (self._ceiling.left and self.budget >= self._ceiling.at):
            return self._raise(now, here)
        if here.loss <= STARVING:
            self._stride = 1
        self._calm = self._calm + 1 if here.loss < SLACK or here.loss > STARVING else 0
        return self._lower(now, here) if self._calm >= CALM else None

    def _judge(self, now: Totals, here: Interval, left: int, there: Interval) -> Move | None:
        """Whether the last move, from ``left``, is to be taken back."""
        if self.budget < left:
            gain = here.gain_over(self._reference or there)
            if here.loss > STARVING and gain < -PAYS:
                self._floor.set(left, gain)
                return self._move(now, left, f"with {self.budget} all wait", here)
            self._floor.crossed()
        elif (gain := here.gain_over(there)) < PAYS:
            self._ceiling.set(left)
            self._stride = 1
            return self._move(now, left, f"{self.budget} bought nothing", here)
        else:
            self._ceiling.crossed()
            self._floor.set(self.budget, gain)  # less was not enough
        return None

    def _raise(self, now: Totals, here: Interval) -> Move | None:
        tops = [barrier.at for barrier in (self._ceiling, self._allowed) if barrier.left]
        under_way = math.ceil((self.budget + 1) / max(1e-9, 1 - here.loss))  # that would do, in steps' worth of groups
        stride = min(MOST_STRIDE, max(self._stride, under_way - 1 - self.budget))
        new = min(self.section.most, self.budget + stride, *tops)
        if new <= self.budget or not self._room():
            return None
        self._tried = (self.budget, here)
        self._stride = min(MOST_STRIDE, 2 * self._stride)
        return self._move(now, new, "all wait for want of it", here)

    def _lower(self, now: Totals, here: Interval) -> Move | None:
        least = max(1, self._floor.at) if self._floor.left else 1
        new = max(least, self.budget - max(1, self.budget // 4))
        if new >= self.budget:
            return None
        self._tried = (self.budget, here)
        why = f"the {here.pace} set the pace" if here.loss < SLACK else "more would buy nothing"
        return self._move(now, new, f"{why}: a smaller one may do", here)

    def _move(self, now: Totals, new: int, reason: str, here: Interval | None) -> Move:
        figures: dict[str, float | None] = {"kl_after": _rounded(self.kl), "ess": _rounded(self.ess)}
        if here is not None:
            figures |= {f"idle_{side}": _rounded(share) for side, share in here.idle.items()}
            figures["steps_per_s"] = _rounded(here.rate)
            reason = f"{reason} (idle: {', '.join(f'{side} {share:.0%}' for side, share in here.idle.items())})"
        old, self.budget = self.budget, new
        self._start, self._calm, self._from = None, 0, now.step + abs(old - new) + SETTLES
        return Move(old, new, reason, figures)


def _middle(recent: Sequence[float]) -> float | None:
    return statistics.median(recent) if len(recent) > RECENT // 2 else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
