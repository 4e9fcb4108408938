"""Signs of a collapse in the lines of metrics.jsonl: what is wrong, since when, and what to do about it. Pure.

::

    each step's line -> is the figure out of bounds? -> for ``patience`` steps in a row -> raised
                                                     -> still so REPEAT_STEPS later     -> again
                        within bounds for as many    -> cleared

A figure that a line lacks (rejection switched off) or that is no number says nothing either way. What was
seen is the broker's state, so one that was restarted goes on counting where it was.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from common.observe import AlertSection

REPEAT_STEPS = 100  # an alert that lasts is said again after so many
REWARD_WINDOW = 20  # steps whose mean batch reward is compared
REWARD_ERRORS = 4.0  # standard errors that a gain and its loss must both exceed: batches are noisy

Line = dict[str, Any]  # of metrics.jsonl


@dataclass(frozen=True)
class Sign:
    """One figure with a bound."""

    name: str
    figures: tuple[str, ...]  # of a line; the first that is there counts
    setting: str  # of AlertSection; 0 switches the sign off
    above: bool  # whether more than the bound is bad, or less
    words: str  # "{value}", "{bound}" and "{side}" are filled in
    remedy: str


SIGNS = (
    Sign(
        "entropy", ("entropy",), "entropy_below", False,
        "the policy's entropy is {value} nats a token",
        "it hardly explores any more: raise loss.entropy, lower optim.lr, or begin a run from an earlier "
        "checkpoint (tools.export --step)",
    ),
    Sign(
        "kl", ("kl_after", "kl_to_behaviour"), "kl_above", True,
        "what is trained on is {value} nats a token away from the policy ({figure})",
        "lower staleness.budget or optim.lr; with obrs.mode=off, switch rejection on",
    ),
    Sign(
        "ess", ("weight_ess", "ess"), "ess_below", False,
        "the effective sample size is {value} of the batch ({figure})",
        "few tokens carry the gradient: lower staleness.budget; with obrs.mode=off switch rejection on, with "
        "obrs.z_weight=none set obrs.rethin_below=0.3",
    ),
    Sign(
        "truncated", ("truncated",), "truncated_above", True,
        "{value} of the trajectories are cut at their length limit",
        "raise rollout.max_tokens, or give the task a reward that falls with length",
    ),
)  # fmt: skip
UPDATES_REMEDY = "lower optim.lr or optim.max_grad_norm, and look for the last sound checkpoint"
REWARD_REMEDY = (
    "look at this run's entropy and KL, lower optim.lr, and begin a run from the best checkpoint (tools.export --best)"
)


@dataclass(frozen=True)
class Alert:
    """Something to say: a line of kind ``alert``."""

    sign: str
    state: str  # raised, again or cleared
    step: int
    since: int  # the first step of it
    value: float
    text: str

    def line(self) -> Line:
        """For metrics.jsonl."""
        return dict(vars(self))


@dataclass
class _Watch:
    """How long one sign has been bad, or good again."""

    bad: int = 0  # steps in a row
    good: int = 0
    since: int = -1
    said: int = -1  # the step at which it was last said; -1: it is not raised
    text: str = ""

    def look(self, sign: str, finding: "_Finding", step: int, patience: int) -> Alert | None:
        """One more step."""
        if not finding.is_bad:
            self.bad, self.good = 0, self.good + 1
            if self.said >= 0 and self.good >= patience:
                alert = Alert(sign, "cleared", step, self.since, finding.value, f"no longer: {self.text}")
                self.since = self.said = -1
                return alert
            return None
        if self.bad == 0 and self.said < 0:
            self.since = step
        self.bad, self.good = self.bad + 1, 0
        self.text = f"{finding.words} since step {self.since}; {finding.remedy}"
        if (self.said < 0 and self.bad < patience) or (self.said >= 0 and step - self.said < REPEAT_STEPS):
            return None
        state, self.said = "raised" if self.said < 0 else "again", step
        return Alert(sign, state, step, self.since, finding.value, self.text)


@dataclass(frozen=True)
class _Finding:
    is_bad: bool
    value: float
    words: str = ""
    remedy: str = ""


@dataclass
class _Rewards:
    """The mean batch reward of the last steps, beside the first and the best such mean."""

    recent: deque[float] = field(default_factory=lambda: deque(maxlen=REWARD_WINDOW))
    first: float | None = None
    best: float = -math.inf

    def look(self, reward: float, share: float) -> _Finding | None:
        """None while there are too few to tell."""
        self.recent.append(reward)
        count = len(self.recent)
        if count < REWARD_WINDOW:
            return None
        mean = math.fsum(self.recent) / count
        error = math.sqrt(2 * math.fsum((r - mean) ** 2 for r in self.recent) / (count - 1) / count)
        first = self.first = mean if self.first is None else self.first
        self.best = max(self.best, mean)
        lost, gained = self.best - mean, self.best - first
        is_bad = min(lost, gained) > REWARD_ERRORS * error and lost > share * gained
        words = (
            f"the mean batch reward of {count} steps fell from {self.best:.3g} to {mean:.3g}, more than "
            f"{share:.0%} of what was gained since {first:.3g} (alerts.reward_lost)"
        )
        return _Finding(is_bad, mean, words, REWARD_REMEDY)


class Alerts:
    """Fed every step's line; says what is to be said about it."""

    def __init__(self, section: AlertSection) -> None:
        self.section = section
        self._watches: dict[str, _Watch] = {}
        self._rewards = _Rewards()
        self._skipped = 0.0  # updates, when last heard

    def step(self, line: Line) -> list[Alert]:
        """What the line of one more step gives cause to say."""
        looks: dict[str, Callable[[], _Finding | None]] = {
            **{sign.name: partial(self._bounded, sign, line) for sign in SIGNS},
            "reward": partial(self._reward, line),
            "updates": partial(self._updates, line),
        }
        found = []
        for name, look in looks.items():
            finding = look()
            if finding is None:
                continue
            watch = self._watches.setdefault(name, _Watch())
            alert = watch.look(name, finding, int(line["step"]), self.section.patience)
            if alert is not None:
                found.append(alert)
        return found

    @property
    def raised(self) -> list[Line]:
        """What is wrong now, for status.json."""
        return [
            {"sign": name, "since": watch.since, "text": watch.text}
            for name, watch in self._watches.items()
            if watch.said >= 0
        ]

    def _bounded(self, sign: Sign, line: Line) -> _Finding | None:
        bound = float(getattr(self.section, sign.setting))
        figure = next((name for name in sign.figures if line.get(name) is not None), None)
        if bound == 0 or figure is None or not math.isfinite(line[figure]):
            return None
        value = float(line[figure])
        side, is_bad = ("above", value > bound) if sign.above else ("below", value < bound)
        words = f"{sign.words.format(value=f'{value:.3g}', figure=figure)}, {side} alerts.{sign.setting}={bound:g}"
        return _Finding(is_bad, value, words, sign.remedy)

    def _reward(self, line: Line) -> _Finding | None:
        reward = line.get("reward")
        if not self.section.reward_lost or reward is None or not math.isfinite(reward):
            return None
        return self._rewards.look(float(reward), self.section.reward_lost)

    def _updates(self, line: Line) -> _Finding | None:
        """Updates that were left out because a gradient was no number."""
        if line.get("skipped_updates") is None:
            return None
        skipped = float(line["skipped_updates"])
        more, self._skipped = skipped > self._skipped, skipped
        words = f"every update is skipped, {skipped:.0f} by now: gradients are not finite"
        return _Finding(more, skipped, words, UPDATES_REMEDY)

    # ---- a restart ------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs."""
        rewards = self._rewards
        return {
            "watches": {name: vars(watch).copy() for name, watch in self._watches.items()},
            "rewards": [list(rewards.recent), rewards.first, rewards.best if rewards.first is not None else None],
            "skipped": self._skipped,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up where :meth:`state` was written."""
        self._watches = {name: _Watch(**watch) for name, watch in state["watches"].items()}
        recent, first, best = state["rewards"]
        best = -math.inf if best is None else best
        self._rewards = _Rewards(deque(recent, maxlen=REWARD_WINDOW), first, best)
        self._skipped = state["skipped"]
