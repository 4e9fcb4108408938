"""Choosing the rejection threshold ``lam`` for an acceptance rate (algorithms.md 1.5, 1.10).

The rate is ``Z(lam) = mean over contexts of sum_x min(q(x), p(x)/lam)``. In ``s = 1/lam`` everything
that we know of it has one form, concave, piecewise linear and non-decreasing::

    f(s) = 1/n sum_i min(A_i, s B_i)      A, B >= 0, breakpoints A_i / B_i

with ``A = 1, B = p/q`` at sampled tokens (an unbiased estimate of Z), or ``A = q, B = p`` on top-k
rows (a bound of Z). One threshold serves a whole batch: that is optimal, and contexts then reject
in proportion to their mismatch. All arithmetic is float64.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.errors import DataError
from common.obrs import Floats, check_scores
from common.zbounds import Bools, Doubles, check_topk, missing_mass, with_sampled

LOG_LIMIT = float(np.log(4.0))  # |log lam| at most, unless told otherwise (algorithms.md 1.10)
LOG_RANGE = 300.0  # finite logs are clipped here: products stay in float64, and p > 0 stays > 0
ROUNDING = 1e-12  # a budget above the attainable rate by no more than this, relatively, equals it


class Support(NamedTuple):
    """``f(s) = 1/n sum_i min(a_i, s b_i)``, the acceptance rate as a function of ``s = 1/lam``."""

    a: Doubles  # [M] probability under q, or 1 for a sampled token
    b: Doubles  # [M] probability under p, or p/q for a sampled token; 0 where p is 0
    n: int  # contexts

    @classmethod
    def sampled(cls, log_ratio: NDArray[np.floating]) -> "Support":
        """From ``log p - log q`` of sampled tokens, ``[N]``: f estimates Z without bias."""
        return cls(np.ones(len(log_ratio)), exp_of(log_ratio), len(log_ratio))

    @classmethod
    def rows(
        cls,
        log_q: NDArray[np.floating],
        log_p: NDArray[np.floating],
        rest_q: Doubles | None = None,
        rest_p: Doubles | None = None,
    ) -> "Support":
        """From ``log q`` and ``log p`` at the same ids, ``[N, K]``; entries may be -inf.

        Without residual masses f is a lower bound of Z (core). With both, ``[N]``, every context
        gains a pseudo-token ``min(rest_q, s rest_p)`` and f is an upper bound.
        """
        a, b = exp_of(log_q).reshape(-1), exp_of(log_p).reshape(-1)
        if rest_q is not None and rest_p is not None:
            a, b = np.concatenate([a, rest_q]), np.concatenate([b, rest_p])
        return cls(a, b, len(log_q))

    def acceptance(self, s: float) -> float:
        """``f(s)``."""
        return float(np.minimum(self.a, s * self.b).sum()) / self.n


def exp_of(logs: NDArray[np.floating]) -> Doubles:
    """``exp`` in float64, 0 at -inf, of logs clipped to ``±LOG_RANGE``."""
    logs = np.asarray(logs, np.float64)
    result: Doubles = np.where(np.isneginf(logs), 0.0, np.exp(np.clip(logs, -LOG_RANGE, LOG_RANGE)))
    return result


def _problem(a: ArrayLike, b: ArrayLike, n: int, budget: float) -> tuple[Doubles, Doubles, float]:
    """The pairs with ``a, b > 0`` and the sum to reach, ``inf`` where it is out of reach."""
    if n < 1:
        raise DataError("no tokens to choose a threshold from; keep the last threshold")
    if not 0.0 < budget <= 1.0:
        raise DataError(f"budget={budget} must lie in (0, 1]: it is the share of tokens to accept")
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise DataError(f"A {a.shape} and B {b.shape} must be flat and equally long")
    for name, values in (("A", a), ("B", b)):
        if not (np.isfinite(values) & (values >= 0)).all():
            raise DataError(f"{name} must be finite and at least 0; check log_p and log_q for nan")
    positive = (a > 0) & (b > 0)
    a, b = a[positive], b[positive]
    attainable, target = float(a.sum()), budget * n
    if target > attainable * (1 + ROUNDING):
        return a, b, np.inf
    return a, b, min(target, attainable)


def _last_breakpoint(a: Doubles, b: Doubles) -> float:
    return float((a / b).max())


def newton_iterates(a: ArrayLike, b: ArrayLike, n: int, budget: float) -> Iterator[float]:
    """Newton's iterates from ``s0 = budget n / sum b``, increasing, never above the solution.

    ``f`` is concave: a tangent lies above it and meets the budget before ``f`` does. An iterate
    solves the problem once it passes no breakpoint, so the last one is exact up to rounding.
    ``inf`` alone where the budget is infeasible.
    """
    a, b, target = _problem(a, b, n, budget)
    if target == np.inf:
        yield np.inf
        return
    if target == a.sum():  # the top: the smallest of many solutions
        yield _last_breakpoint(a, b)
        return
    s, settled = 0.0, 0.0  # settled: sum of the a whose breakpoint s has passed
    while True:
        # Rounding may neither walk back nor beyond the last breakpoint.
        s = min(max(s, (target - settled) / float(b.sum())), _last_breakpoint(a, b))
        yield s
        linear = s * b < a
        if linear.all() or not linear.any():
            return
        settled += float(a[~linear].sum())
        a, b = a[linear], b[linear]


def solve_newton(a: ArrayLike, b: ArrayLike, n: int, budget: float) -> float:
    """The smallest ``s`` with ``f(s) = budget``, ``inf`` where there is none; a handful of passes."""
    *_, s = newton_iterates(a, b, n, budget)
    return s


def solve_sorted(a: ArrayLike, b: ArrayLike, n: int, budget: float) -> float:
    """As :func:`solve_newton`, by sorting the breakpoints: the reference."""
    a, b, target = _problem(a, b, n, budget)
    if target == np.inf:
        return np.inf
    if target == a.sum():
        return _last_breakpoint(a, b)
    breakpoints = a / b
    order = np.argsort(breakpoints, kind="stable")
    a, b, breakpoints = a[order], b[order], breakpoints[order]
    passed = np.cumsum(a) - a  # at breakpoint j: the sum of a below it,
    slope = np.cumsum(b[::-1])[::-1]  # and of b from it on
    values = np.maximum.accumulate(passed + breakpoints * slope)
    j = min(int(np.searchsorted(values, target)), len(values) - 1)  # its segment ends at breakpoint j
    return (target - float(a[:j].sum())) / float(b[j:].sum())


def solve_bisection(a: ArrayLike, b: ArrayLike, n: int, budget: float) -> float:
    """As :func:`solve_newton`, by halving an interval of ``log s`` 64 times."""
    a, b, target = _problem(a, b, n, budget)
    if target == np.inf:
        return np.inf
    low, high = np.log(target / b.sum()), np.log(_last_breakpoint(a, b))  # f(low) <= target <= f(high)
    for _ in range(64):
        middle = 0.5 * (low + high)
        if np.minimum(a, np.exp(middle) * b).sum() >= target:
            high = middle
        else:
            low = middle
    return float(np.exp(high))


@dataclass(frozen=True)
class ThresholdChoice:
    """A threshold and what it promises; see :func:`solve_threshold`."""

    log_threshold: float  # log lam, within the limits
    expected_acceptance: float  # mean a at that threshold, over the tokens it was chosen on
    feasible: bool  # whether any threshold at all meets the budget
    clamped: bool  # whether the limits kept us from the solution


def solve_threshold(log_p: Floats, log_q: Floats, budget: float, *, limit: float = LOG_LIMIT) -> ThresholdChoice:
    """The threshold at which ``mean min(1, p/(lam q))`` over sampled tokens ``[N]`` is ``budget``.

    The largest one where several do. A budget above the share of tokens with ``p > 0`` is
    infeasible and gets the smallest threshold allowed. ``|log lam| <= limit``. Tokens that the
    threshold is chosen on must not be thinned with it (:class:`BudgetController`).
    """
    check_scores(log_p, log_q)
    return _choose(log_p - log_q, budget, limit)


def _choose(log_ratio: NDArray[np.floating], budget: float, limit: float) -> ThresholdChoice:
    _check_limit(limit)
    support = Support.sampled(log_ratio)
    s = solve_newton(*support, budget)
    solution = -float(np.log(s))  # -inf where infeasible
    chosen = min(max(solution, -limit), limit)
    return ThresholdChoice(chosen, support.acceptance(float(np.exp(-chosen))), s < np.inf, chosen != solution)


def _check_limit(limit: float) -> None:
    if not 0.0 <= limit <= LOG_RANGE:
        raise DataError(f"limit={limit} must lie in [0, {LOG_RANGE:g}]: it bounds |log lambda|, by default log 4")


class ThresholdBounds(NamedTuple):
    """``log lam_lo <= log lam* <= log lam_hi``, not clamped; -inf where that bound of Z misses the budget."""

    log_lower: float  # guarantees an acceptance of at least the budget
    log_upper: float  # guarantees at most the budget


def threshold_bounds(
    topk_log_q: Floats, topk_log_p: Floats, log_q: Floats, log_p: Floats, sampled_in_topk: Bools, budget: float
) -> ThresholdBounds:
    """Thresholds between which the one with ``mean Z = budget`` must lie (algorithms.md 1.5).

    They solve ``mean core = budget`` and ``mean upper = budget`` for the bounds of
    :func:`common.zbounds.z_bounds`, whose arguments these are.
    """
    check_topk(topk_log_q, topk_log_p, log_q, log_p, sampled_in_topk, 0.0)
    lq = with_sampled(topk_log_q, log_q, sampled_in_topk)
    lp = with_sampled(topk_log_p, log_p, sampled_in_topk)
    core = Support.rows(lq, lp)
    upper = Support.rows(lq, lp, missing_mass("topk_log_q", lq), missing_mass("topk_log_p", lp))
    lower_s, upper_s = solve_newton(*core, budget), solve_newton(*upper, budget)
    return ThresholdBounds(-float(np.log(lower_s)), -float(np.log(upper_s)))


class ThresholdController(ABC):
    """Chooses the threshold of the next batch from the last ones: what it learns from a batch serves the next.

    A threshold fitted to the very tokens that it thins would make their coins depend on each other
    (algorithms.md 1.5), so :attr:`log_threshold` never knows the batch that it is used on::

        thin(log_p, log_q, uniforms, controller.log_threshold)
        controller.update(log_p, log_q)

    It starts at ``log lam = 0`` and is then solved exactly on the last ``window`` batches taken
    together. A function of the batches alone: no clock, no randomness.
    """

    def __init__(self, *, window: int = 1, limit: float = LOG_LIMIT) -> None:
        if window < 1:
            raise DataError(f"window={window} must be at least 1 batch")
        _check_limit(limit)
        self.limit = limit
        self.log_threshold = 0.0  # for the next batch
        # The current batch makes up the window; a window of 1 keeps nothing.
        self._earlier: deque[Floats] = deque(maxlen=window - 1)  # log p - log q of batches gone by

    @abstractmethod
    def choose(self, log_ratio: NDArray[np.floating]) -> ThresholdChoice:
        """The threshold that suits ``log p - log q`` of sampled tokens, ``[N]``, ``N`` > 0."""

    def update(self, log_p: Floats, log_q: Floats) -> ThresholdChoice | None:
        """Learn from a batch already decided, ``[N]``; None, and nothing changes, if it is empty."""
        check_scores(log_p, log_q)
        if len(log_q) == 0:
            return None
        log_ratio = np.subtract(log_p, log_q, dtype=np.float32)  # what obrs.log_acceptance compares
        choice = self.choose(np.concatenate([*self._earlier, log_ratio]))
        self._earlier.append(log_ratio)
        self.log_threshold = choice.log_threshold
        return choice

    def state(self) -> dict[str, Any]:
        """All that :meth:`restore` needs to continue bit for bit: a float and float32 arrays, oldest first."""
        return {"log_threshold": self.log_threshold, "log_ratios": list(self._earlier)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state`; one from a longer window or a wider limit is cut to ours."""
        log_threshold = float(state["log_threshold"])
        log_ratios = [np.array(ratio, np.float32) for ratio in state["log_ratios"]]
        if not np.isfinite(log_threshold) or any(
            r.ndim != 1 or (np.isnan(r) | (r == np.inf)).any() for r in log_ratios
        ):
            raise DataError("controller state: log_threshold and log_ratios must be numbers; start afresh without it")
        self.log_threshold = min(max(log_threshold, -self.limit), self.limit)
        self._earlier = deque(log_ratios, maxlen=self._earlier.maxlen)


class BudgetController(ThresholdController):
    """Keeps the acceptance rate near ``budget``."""

    def __init__(self, budget: float, *, window: int = 1, limit: float = LOG_LIMIT) -> None:
        if not 0.0 < budget <= 1.0:
            raise DataError(f"budget={budget} must lie in (0, 1]: it is the share of tokens to accept")
        super().__init__(window=window, limit=limit)
        self.budget = budget

    def choose(self, log_ratio: NDArray[np.floating]) -> ThresholdChoice:
        """See :func:`solve_threshold`."""
        return _choose(log_ratio, self.budget, self.limit)
