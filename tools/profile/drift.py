"""What a larger lag would do to the data, from the run's own steps: ``KL after rejection = c * lag ** k``. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tools.profile.figures import lags_of
from tools.run_files import Record
from tools.watch.sound import number

LEAST_STEPS = 8
LEAST_SPREAD = 1.25  # of the lags, the 90th centile over the 10th: below it k cannot be told
USUAL_POWER = 1.0  # taken for k then: the KL of an update that goes on from the one before
POWERS = (0.0, 3.0)  # k is kept within
KL_FLOOR = 1e-9  # nats; below it is rounding
FURTHEST = 2.0  # times the largest lag seen: no prediction beyond


@dataclass(frozen=True)
class Drift:
    """A fit by least squares of the logarithms, one point a step."""

    c: float  # nats a token at lag 1
    k: float
    steps: int
    r2: float | None  # of the logarithms; None where k was not fitted
    largest: float  # lag seen

    def at(self, lag: float) -> float | None:
        """Nats a token at a mean lag, none without one; None beyond FURTHEST times the largest seen."""
        if lag <= 0:
            return 0.0
        if lag > FURTHEST * self.largest:
            return None
        return float(self.c * lag**self.k)

    @property
    def basis(self) -> str:
        """Where it is from, in words."""
        how = f"r² {self.r2:.2f}" if self.r2 is not None else "the lags differ too little to tell the power, so 1"
        return f"KL ≈ {self.c:.2g}·lag^{self.k:.2f}, fitted over {self.steps} steps ({how})"


def fit(steps: Sequence[Record]) -> Drift | None:
    """From steps that had a lag and a KL; None for fewer than LEAST_STEPS."""
    points = []
    for step in steps:
        lag, kl = number(step.get("lag_mean")), number(step.get("kl_after"))
        if lag is not None and kl is not None and lag > 0 and kl > KL_FLOOR:
            points.append((math.log(lag), math.log(kl)))
    if len(points) < LEAST_STEPS:
        return None
    n = len(points)
    x, y = sum(p[0] for p in points) / n, sum(p[1] for p in points) / n
    logs = sorted(p[0] for p in points)
    spread = math.exp(logs[int(0.9 * (n - 1))] - logs[int(0.1 * (n - 1))])
    largest = float(max(lags_of(steps), default=0)) or math.exp(logs[-1])
    if spread < LEAST_SPREAD:
        return Drift(math.exp(y - USUAL_POWER * x), USUAL_POWER, n, None, largest)
    sxx, sxy = sum((a - x) ** 2 for a, _ in points), sum((a - x) * (b - y) for a, b in points)
    syy = sum((b - y) ** 2 for _, b in points)
    k = min(POWERS[1], max(POWERS[0], sxy / sxx))
    left = sum((b - y - k * (a - x)) ** 2 for a, b in points)
    return Drift(math.exp(y - k * x), k, n, max(0.0, 1 - left / syy) if syy > 0 else 0.0, largest)
