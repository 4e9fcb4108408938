"""A run's past, from the lines of metrics.jsonl, in bounded memory."""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from tools.lived import Lived
from tools.run_files import Record
from tools.watch.bins import Bins
from tools.watch.sound import counts, mapping, number, numbers, text, whole

MEANS = (
    "reward", "acceptance", "acceptance_low", "acceptance_high", "kl_before", "kl_after", "ess", "weight_ess",
    "threshold", "lag_mean", "lag_max", "entropy", "grad_norm", "loss", "length_mean", "truncated",
    "queue_groups", "in_flight_groups", "queue_bytes",
)  # fmt: skip
EVALUATED = ("reward", "reward_low", "reward_high")
RECEIPTS, MOVES, ALERTS = 50, 100, 100  # kept, the last of each
LEARNER = {"seconds_fetch": "idle.shard", "seconds_train": "train", "seconds_publish": "publish"}
TEXT = 240  # characters of a reason or an alert


@dataclass(frozen=True)
class Receipt:
    """One trained step, as a row."""

    step: int
    reward: float | None
    lag_mean: float | None
    lag_max: int | None
    acceptance: float | None
    kl_before: float | None
    kl_after: float | None
    ess: float | None
    threshold: float | None
    tokens: int | None
    dropped: dict[str, int]  # trajectories since the step before, by reason


@dataclass(frozen=True)
class Move:
    """The governor moved the staleness budget."""

    step: int
    before: int | None
    budget: int
    reason: str


@dataclass(frozen=True)
class Alert:
    """A sign of a collapse, or its end."""

    step: int
    sign: str
    state: str  # raised, again or cleared
    text: str


@dataclass
class History:
    """What the lines said so far."""

    steps: Bins = field(default_factory=Bins)
    evaluations: Bins = field(default_factory=Bins)
    receipts: deque[Receipt] = field(default_factory=lambda: deque(maxlen=RECEIPTS))
    moves: deque[Move] = field(default_factory=lambda: deque(maxlen=MOVES))
    alerts: deque[Alert] = field(default_factory=lambda: deque(maxlen=ALERTS))
    budget: int | None = None  # after the last move
    damaged: int = 0  # lines that are no JSON object
    lines: int = 0
    last: dict[str, float] = field(default_factory=dict)  # figures of the last step
    _lived: Lived = field(default_factory=Lived)
    _sums: Counter[str] = field(default_factory=Counter)  # since the first step, of what is told step by step
    _dropped: dict[str, float] = field(default_factory=dict)

    def take(self, lines: Sequence[bytes]) -> None:
        """Lines of metrics.jsonl; those that cannot be read are counted."""
        for line in lines:
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError:
                record = None
            if not isinstance(record, dict):
                self.damaged += bool(line.strip())
                continue
            self.lines += 1
            self._take(record)

    def _take(self, record: Record) -> None:
        match record.get("kind"):
            case "step":
                self._step(record)
            case "eval":
                self._evaluation(record)
            case "budget":
                self._move(record)
            case "alert":
                self._alert(record)

    def _step(self, record: Record) -> None:
        step = whole(record.get("step"))
        if step is None or step < 0:
            self.damaged += 1
            return
        means = {name: value for name in MEANS if (value := number(record.get(name))) is not None}
        budget = whole(record.get("staleness_budget", self.budget))
        if budget is not None:
            means["budget"] = float(budget)
        self.last = means
        self.steps.add(step, means, levels=self._levels(record), lags=counts(record.get("lag_histogram")))
        self._receipt(step, record)

    def _levels(self, record: Record) -> dict[str, float]:
        """What has come together since the start: ``time_s``, tokens, and seconds as ``state ROLE STATE``.

        ``lived_s`` is ``time_s`` without the pauses of a run that was resumed.
        """
        for name in ("tokens", "tokens_accepted", *LEARNER):
            self._sums[name] += number(record.get(name)) or 0.0  # type: ignore[assignment]
        levels = {
            "through_learner": float(self._sums["tokens"]),
            "tokens_accepted": float(self._sums["tokens_accepted"]),
        }
        for name in ("time_s", "tokens_generated"):
            if (value := number(record.get(name))) is not None:
                levels[name] = value
        if (lived := self._lived.take(record)) is not None:
            levels["lived_s"] = lived
        states = {role: numbers(seconds) for role, seconds in mapping(record.get("states")).items()}
        if not states.get("learner"):
            states["learner"] = {state: float(self._sums[name]) for name, state in LEARNER.items()}
        for role, seconds in states.items():
            levels.update({f"state {text(role)} {state}": value for state, value in seconds.items()})
        levels.update({f"parked {cause}": value for cause, value in numbers(record.get("parked")).items()})
        return levels

    def _receipt(self, step: int, record: Record) -> None:
        dropped = numbers(record.get("dropped"))
        fresh = {reason: int(count - self._dropped.get(reason, 0)) for reason, count in dropped.items()}
        self._dropped = dropped
        while self.receipts and self.receipts[-1].step >= step:
            self.receipts.pop()
        values: dict[str, Any] = {
            name: number(record.get(name))
            for name in ("reward", "lag_mean", "acceptance", "kl_before", "kl_after", "threshold")
        }
        ess = number(record.get("weight_ess"))
        values["ess"] = ess if ess is not None else number(record.get("ess"))
        self.receipts.append(
            Receipt(
                step=step,
                lag_max=whole(record.get("lag_max")),
                tokens=whole(record.get("tokens_accepted")),
                dropped={reason: count for reason, count in fresh.items() if count > 0},
                **values,
            )
        )

    def _evaluation(self, record: Record) -> None:
        version = whole(record.get("version"))
        means = {name: value for name in EVALUATED if (value := number(record.get(name))) is not None}
        if version is not None and version >= 0 and "reward" in means:
            self.evaluations.add(version, means)

    def _move(self, record: Record) -> None:
        budget = whole(record.get("value"))
        if budget is None:
            self.damaged += 1
            return
        step, before = whole(record.get("step")) or 0, whole(record.get("old"))
        self.moves.append(Move(step, before, budget, text(record.get("reason"), TEXT)))
        self.budget = budget

    def _alert(self, record: Record) -> None:
        step, state = whole(record.get("step")) or 0, text(record.get("state"))
        self.alerts.append(Alert(step, text(record.get("sign")), state, text(record.get("text"), TEXT)))

    def pace(self) -> float | None:
        """Seconds a step over the newer half of the run, which leaves the start-up out; None before two bins."""
        known = [one for one in self.steps.bins if "lived_s" in one.levels]
        if len(known) < 2:
            return None
        end, start = known[-1], known[(len(known) - 1) // 2]
        seconds = end.levels["lived_s"] - start.levels["lived_s"]
        return seconds / (end.last - start.last) if seconds > 0 and end.last > start.last else None
