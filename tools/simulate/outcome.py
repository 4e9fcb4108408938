"""What a simulation found, counted between two commits as :mod:`tools.bench.launching` counts real runs."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tools.simulate.settings import Setup


@dataclass(frozen=True)
class Outcome:
    """Rates are of the time between the commit of step ``run.first`` and that of the last."""

    steps_per_s: float
    generated_per_s: float  # tokens of completions for training, cancelled siblings included
    trained_per_s: float  # tokens
    accepted_per_s: float  # tokens that rejection lets through, of those trained
    lag_mean: float  # versions, of a trained token
    lag_p95: int
    lag_max: int
    lags: dict[int, int]  # tokens by lag
    idle: dict[str, float]  # role -> share of its processes' time
    shares: dict[str, dict[str, float]]  # role -> state -> share
    waste: float  # share of the tokens sampled that taught nothing: cancelled, or rejected
    cancelled: int  # tokens of siblings that were started in vain
    generated: int
    trained: int
    seconds: float  # simulated, from the start to the last commit
    events: int
    commits: list[float] = field(default_factory=list)  # when each step was trained, seconds

    @property
    def learner_idle(self) -> float:
        """Share of the learner's time in which it waits."""
        return self.idle.get("learner", 0.0)

    def to_json(self) -> dict[str, Any]:
        """Without the single commits."""
        found = {key: value for key, value in self.__dict__.items() if key != "commits"}
        found["lags"] = {str(lag): tokens for lag, tokens in self.lags.items()}
        return found


@dataclass
class Counts:
    """What is counted while a simulation runs."""

    commits: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # trained, by step
    lags: list[Counter[int]] = field(default_factory=list)  # tokens by lag, by step
    generated: list[int] = field(default_factory=list)  # up to each commit
    seconds: list[dict[str, Counter[str]]] = field(default_factory=list)  # at the first and the last commit


def outcome(setup: Setup, counts: Counts, cancelled: int, events: int) -> Outcome:
    """Figures of a whole simulation."""
    first, last = first_step(setup), len(counts.commits) - 1
    window = max(counts.commits[last] - (counts.commits[first] if last > first else 0.0), 1e-12)
    steps = range(first + 1, last + 1) if last > first else range(last + 1)
    lags: Counter[int] = Counter()
    for step in steps:
        lags.update(counts.lags[step])
    rejected = sum(n * min(1.0, setup.obrs.rejected_per_lag * lag) for lag, n in lags.items())
    tokens, generated = sum(counts.tokens[step] for step in steps), counts.generated[last]
    before = counts.generated[first] if last > first else 0
    shares = _shares(*counts.seconds) if last > first else _shares({}, counts.seconds[-1])
    trained = sum(counts.tokens)
    return Outcome(
        steps_per_s=len(steps) / window,
        generated_per_s=(generated - before) / window,
        trained_per_s=tokens / window,
        accepted_per_s=(tokens - rejected) / window,
        lag_mean=sum(lag * n for lag, n in lags.items()) / max(1, tokens),
        lag_p95=quantile(lags, 0.95),
        lag_max=max(lags, default=0),
        lags=dict(sorted(lags.items())),
        idle={role: sum(s for state, s in of.items() if state.startswith("idle.")) for role, of in shares.items()},
        shares=shares,
        waste=(cancelled + trained * rejected / max(1, tokens)) / max(1, generated),
        cancelled=cancelled,
        generated=generated,
        trained=trained,
        seconds=counts.commits[last],
        events=events,
        commits=counts.commits,
    )


def first_step(setup: Setup) -> int:
    """The step after whose commit figures begin: ``run.first``, or earlier where so few are trained."""
    return min(setup.run.first, max(0, setup.run.steps - 2))


def quantile(counts: Counter[int], share: float) -> int:
    """The least value that ``share`` of everything counted does not exceed."""
    total, found = counts.total() * share, 0
    for value in sorted(counts):
        found += counts[value]
        if found >= total:
            return value
    return 0


def _shares(before: dict[str, Counter[str]], after: dict[str, Counter[str]]) -> dict[str, dict[str, float]]:
    found = {}
    for role, seconds in after.items():
        spent = {state: s - before.get(role, Counter())[state] for state, s in seconds.items()}
        total = sum(spent.values()) or 1.0
        found[role] = {state: s / total for state, s in sorted(spent.items())}
    return found
