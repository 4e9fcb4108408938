"""Choosing the rejection threshold ``lam`` for an effective sample size of the learner's weights (``obrs.mode: ess``).

A token sampled with density q is accepted with probability ``a = min(1, r/lam)``, ``r = p/q``, and weighs ``w =
p/m = r/a = max(r, lam)`` for a learner at the version p (algorithms.md 1.3, 1.4). Over what was sampled::

    ESS(lam) = E[a w]^2 / (E[a] E[a w^2]) = (E r)^2 / (E min(1, r/lam)  E r max(r, lam))

is the expected normalised ESS of a *trained* token. It never falls as ``lam`` grows: with ``A = E min(1, r/lam)``,
``B = E r max(r, lam)`` and ``S = E[r; r < lam]`` the denominator has the derivative ``A'B + AB' = S (A - B/lam^2)``,
and ``x = r/lam`` gives ``A - B/lam^2 = E[min(1, x) - x max(x, 1)] <= 0`` term by term. It is ``(E r)^2 /
(P(r > 0) E r^2)`` where nothing is rejected and 1 from the greatest r on, so every target below 1 is met, at the
price of tokens: algorithms.md 1.3 has ESS a *generated* token fall at the same time.

Between two neighbouring ratios ``lam A B`` is a quadratic in ``lam``, so the solution is exact.
"""

import numpy as np
from numpy.typing import NDArray

from common.budget import LOG_LIMIT, ThresholdChoice, ThresholdController, exp_of
from common.errors import DataError
from common.zbounds import Doubles


def ess_of(ratio: Doubles, threshold: float) -> float:
    """``ESS(lam)`` over sampled ratios ``p/q[N]``; 0 where all are 0."""
    total = float(ratio.sum())
    spread = float(np.minimum(1.0, ratio / threshold).sum()) * float((ratio * np.maximum(ratio, threshold)).sum())
    return total * total / spread if spread > 0 else 0.0


def solve_ess(ratio: Doubles, target: float) -> float:
    """The smallest ``lam`` with ``ESS(lam) >= target`` over ``ratio[N]``: what rejects least.

    0 where it is met without rejecting anything, ``inf`` where no ratio is positive. Raises :class:`DataError`
    for a target outside (0, 1) or ratios that are none.
    """
    if not 0.0 < target < 1.0:
        raise DataError(f"target_ess={target} must lie in (0, 1): 1 is reached by no finite number of tokens")
    if not (np.isfinite(ratio) & (ratio >= 0)).all():
        raise DataError("ratios must be finite and at least 0; check log_p and log_q for nan")
    r = np.sort(ratio[ratio > 0])
    if len(r) == 0:
        return np.inf
    r /= r[-1]  # the greatest is 1: squares stay in float64
    scale = float(ratio.max())
    n = len(r)
    wanted = float(r.sum()) ** 2 / target  # what A B may be, N^2 apart
    below = np.concatenate(([0.0], np.cumsum(r)))  # [n + 1] sum of the k smallest
    squares = np.concatenate((np.cumsum((r * r)[::-1])[::-1], [0.0]))  # [n + 1] sum of squares from the k-th on
    count = np.arange(n, -1, -1.0)  # [n + 1] how many from the k-th on
    at = np.arange(n)  # at lam = r[k]: k ratios are smaller
    product = (count[at] + below[at] / r) * (r * below[at] + squares[at])
    k = int(np.argmax(np.minimum.accumulate(product) <= wanted))  # the last is n sum(r) or less: always found
    if k == 0:
        return 0.0
    # between r[k - 1] and r[k], k ratios are smaller: n S lam^2 + (n Q + S^2 - wanted) lam + S Q = 0
    a, b, c = count[k] * below[k], count[k] * squares[k] + below[k] ** 2 - wanted, below[k] * squares[k]
    divisor = -b + np.sqrt(max(0.0, b * b - 4 * a * c))
    root = 2 * c / divisor if divisor > 0 else r[k]  # the smaller one, without cancellation
    return float(min(max(root, r[k - 1]), r[k])) * scale


class EssController(ThresholdController):
    """Keeps the ESS of the learner's weights near ``target``, per trained token; see :class:`ThresholdController`."""

    def __init__(self, target: float, *, window: int = 1, limit: float = LOG_LIMIT) -> None:
        if not 0.0 < target < 1.0:
            raise DataError(f"target_ess={target} must lie in (0, 1): 1 is reached by no finite number of tokens")
        super().__init__(window=window, limit=limit)
        self.target = target

    def choose(self, log_ratio: NDArray[np.floating]) -> ThresholdChoice:
        """The smallest threshold within the limits that attains the target, or the greatest if none does."""
        ratio = exp_of(log_ratio)
        solution = solve_ess(ratio, self.target)
        log_solution = float(np.log(solution)) if solution > 0 else -np.inf
        chosen = min(max(log_solution, -self.limit), self.limit)
        acceptance = float(np.minimum(1.0, ratio / np.exp(chosen)).mean())
        return ThresholdChoice(chosen, acceptance, log_solution <= self.limit, chosen != log_solution)
