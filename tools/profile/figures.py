"""What a run made of its time: tokens, waste, publishes, and what staleness did to the data. Pure."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from common.config import StalenessSection
from tools.profile.spent import NS, Process, Window
from tools.run_files import Record
from tools.timelines import Timelines
from tools.watch.sound import mapping, number, numbers

PUBLISHING = {"gather": "gather", "idle.receivers": "readiness", "send": "wire"}  # states of the learner


@dataclass(frozen=True)
class Rates:
    """Tokens are sampled ones, a second of wall-clock within the window."""

    steps_s: float
    generated_s: float  # acknowledged by the broker
    proposed_s: float  # of batches that were trained
    trained_s: float  # of those, accepted by rejection
    fleet_s: float | None  # what the actors would generate if they never waited
    learner_s: float | None  # proposed tokens that the learner would train if it never waited

    @property
    def ratio(self) -> float | None:
        """rollout:train: above 1 the fleet is the faster side."""
        return self.fleet_s / self.learner_s if self.fleet_s and self.learner_s else None


@dataclass(frozen=True)
class Waste:
    """Of the tokens generated within the window."""

    dropped: float  # share whose group was given up
    rejected: float  # share of the proposed ones
    reasons: dict[str, int] = field(default_factory=dict)  # trajectories dropped over the whole run


@dataclass(frozen=True)
class Publishes:
    """What versions cost the learner, and those who take them into use; seconds each."""

    count: int
    mean_s: float
    p95_s: float
    parts: dict[str, float]  # mean of gather, readiness (waiting for receivers), wire
    swap_s: float | None  # mean over receivers of taking one into use
    mbytes: float | None


@dataclass(frozen=True)
class Staleness:
    """Means over the window's tokens; nats a token."""

    budget: int | None  # None: not known, or moved by the broker
    lag_mean: float | None
    lag_max: int | None
    acceptance: float | None
    kl_before: float | None
    kl_after: float | None
    ess: float | None  # normalised, of what survived rejection
    moved: tuple[int, int] | None = None  # of a budget that the broker moves, the least and the greatest it was


def total(steps: Sequence[Record], key: str) -> float:
    """Summed over steps."""
    return sum(number(step.get(key)) or 0.0 for step in steps)


def weighted(steps: Sequence[Record], key: str) -> float | None:
    """Mean over steps, by their sampled tokens."""
    pairs = [
        (v, number(step.get("tokens_proposed")) or 1.0) for step in steps if (v := number(step.get(key))) is not None
    ]
    whole = sum(weight for _, weight in pairs)
    return sum(v * weight for v, weight in pairs) / whole if whole else None


def lags_of(steps: Sequence[Record]) -> Counter[int]:
    """Trained tokens by lag."""
    found: Counter[int] = Counter()
    for step in steps:
        for lag, count in mapping(step.get("lag_histogram")).items():
            if str(lag).isdecimal() and number(count) is not None:
                found[int(lag)] += int(count)
    return found


def rates_of(steps: Sequence[Record], seconds: float, processes: Sequence[Process]) -> Rates:
    """``steps``: those of the window, the one whose commit begins it first; its tokens are not counted."""
    counted = steps[1:]
    proposed, trained = total(counted, "tokens_proposed"), total(counted, "tokens_accepted")
    generated = _gained(steps, "tokens_generated")
    actors = [p for p in processes if p.role == "actor" and p.busy_s > 0]
    learners = [p for p in processes if p.role == "learner"][:1]  # rank 0 for all
    busy = sum(p.count * p.busy_s for p in actors)
    return Rates(
        len(counted) / seconds, generated / seconds, proposed / seconds, trained / seconds,
        generated * sum(p.count for p in actors) / busy if busy and generated else None,
        proposed / learners[0].busy_s if learners and learners[0].busy_s and proposed else None,
    )  # fmt: skip


def _gained(steps: Sequence[Record], name: str) -> float:
    """Of a sum so far, between the first step and the last that tell it."""
    told = [value for step in steps if (value := number(step.get(name))) is not None]
    return max(0.0, told[-1] - told[0]) if told else 0.0


def waste_of(steps: Sequence[Record]) -> Waste:
    """``steps`` as for :func:`rates_of`."""
    if not steps:
        return Waste(0.0, 0.0)
    last, generated, dropped = steps[-1], _gained(steps, "tokens_generated"), _gained(steps, "tokens_dropped")
    proposed, trained = total(steps[1:], "tokens_proposed"), total(steps[1:], "tokens_accepted")
    return Waste(
        dropped / generated if generated else 0.0,
        1 - trained / proposed if proposed else 0.0,
        {reason: int(count) for reason, count in numbers(last.get("dropped")).items()},
    )


def publishes_of(timelines: Timelines, window: Window, records: Sequence[Record]) -> Publishes | None:
    """From the timelines; from the broker's lines (without parts) where there are none."""
    by_version: dict[int, Counter[str]] = {}
    for life in timelines.of("learner"):
        if int(life.header.get("rank", 0)) != 0:
            continue
        for piece in life.slices:
            if piece.state in PUBLISHING and piece.step >= 0 and window.start <= piece.start < window.end:
                by_version.setdefault(piece.step, Counter())[PUBLISHING[piece.state]] += piece.end - piece.start
    nbytes = [
        number(span.args.get("bytes")) or 0.0
        for life in timelines.of("learner")
        for span in life.spans
        if span.name == "publish" and window.start <= span.start < window.end
    ]
    if by_version:
        whole = sorted(sum(parts.values()) * NS for parts in by_version.values())
        parts = {
            name: sum(found[name] for found in by_version.values()) * NS / len(by_version)
            for name in PUBLISHING.values()
        }
    else:
        whole = sorted(s for record in records if (s := number(record.get("seconds"))) is not None)
        parts = {}
    if not whole:
        return None
    p95 = whole[min(len(whole) - 1, math.ceil(0.95 * len(whole)) - 1)]
    mbytes = sum(nbytes) / len(nbytes) / 1e6 if nbytes else None
    return Publishes(len(whole), sum(whole) / len(whole), p95, parts, _swap_s(timelines, window), mbytes)


def _swap_s(timelines: Timelines, window: Window) -> float | None:
    """Mean time from the beginning of a load to its end, over actors and versions."""
    loads = [
        (span.end - span.start) * NS
        for life in timelines.of("actor")
        for span in life.spans
        if (span.track, span.name) == ("weights", "load") and window.start <= span.start < window.end
    ]
    return sum(loads) / len(loads) if loads else None


def budgets_told(steps: Sequence[Record]) -> list[int]:
    """The staleness budget in force at each step that tells it."""
    return [int(value) for step in steps if (value := number(step.get("staleness_budget"))) is not None]


def budgets_of(steps: Sequence[Record], section: StalenessSection) -> list[int]:
    """What ``staleness.budget=auto`` came to, a step at a time; where no step says, all that it may be."""
    return budgets_told(steps) or [0, section.most]


def staleness_of(steps: Sequence[Record], section: StalenessSection | None) -> Staleness:
    """``steps`` as for :func:`rates_of`."""
    counted = steps[1:]
    lags = lags_of(counted)
    tokens = sum(lags.values())
    proposed = total(counted, "tokens_proposed")
    budgets = budgets_of(counted, section) if section is not None and section.auto else []
    return Staleness(
        section.limit if section is not None and not section.auto else None,
        sum(lag * count for lag, count in lags.items()) / tokens if tokens else None,
        max(lags, default=None),
        total(counted, "tokens_accepted") / proposed if proposed else None,
        weighted(counted, "kl_before"),
        weighted(counted, "kl_after"),
        weighted(counted, "ess"),
        (min(budgets), max(budgets)) if budgets else None,
    )


def filled_of(timelines: Timelines, window: Window, slots: int) -> float | None:
    """Which share of its ``slots`` sequences an actor decodes while it decodes any; None where no timeline says."""
    filled = sampled = 0.0
    for life in timelines.lives:
        if life.role != "actor":
            continue
        rows, since = 0.0, window.start
        for at, values in [*life.levels, (min(life.end, window.end), {})]:
            lasted = max(0, min(at, window.end) - max(since, window.start))
            filled += lasted * min(1.0, rows / slots)
            sampled += lasted * (rows > 0)
            rows, since = values.get("rows", rows), at
    return filled / sampled if sampled else None
