"""The acceptance rate ``Z`` of every context, bounded from the top-k of ``q`` (algorithms.md 1.5, 1.6).

Rejection at threshold ``lam`` accepts a token drawn in context t with probability
``Z_t = sum_x min(q(x), p(x)/lam)``, a sum over the vocabulary. Knowing ``q`` and ``p`` on a few ids
only, the rest of ``q`` and ``p`` (``R_q``, ``R_p``) may overlap in full or not at all::

    core = sum over known ids of min(q, p/lam)  <=  Z  <=  core + min(R_q, R_p/lam) = upper

Unbiased learning needs none of this (algorithms.md 1.4): it serves the paper's Z-weighted loss.
Every exponent here is a log-probability or lower, at most 0, so float64 sums of ``exp`` are as
stable as the ``logsumexp`` form of algorithms.md 1.11. A row shorter than ``K`` is padded with -inf.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.obrs import LOG_Q_TOLERANCE, Floats, check_scores

Doubles = NDArray[np.float64]
Bools = NDArray[np.bool_]
MASS_TOLERANCE = 1e-3  # rounding of float32 log-probabilities is far below, a repeated id mostly above


class ZBounds(NamedTuple):
    """Probabilities, float32 ``[N]``; see :func:`z_bounds`."""

    core: Floats  # at most Z, up to rounding
    upper: Floats  # at least Z, up to rounding
    missing_q: Floats  # R_q, the mass of q outside the known ids


def check_topk(
    topk_log_q: Floats, topk_log_p: Floats, log_q: Floats, log_p: Floats, sampled_in_topk: Bools, log_threshold: float
) -> None:
    """Raise :class:`DataError` unless shapes agree and every density is one that a model returns."""
    check_scores(log_p, log_q)
    if not np.isfinite(log_threshold):
        raise DataError(f"log_threshold={log_threshold} must be finite; clamp it (solve_threshold does)")
    shapes = {"topk_log_q": topk_log_q.shape, "topk_log_p": topk_log_p.shape, "sampled_in_topk": sampled_in_topk.shape}
    n = len(log_q)
    if topk_log_q.ndim != 2 or len(topk_log_q) != n or topk_log_p.shape != topk_log_q.shape:
        raise DataError(f"top-k rows must be [{n}, K] like the {n} sampled tokens, got {shapes}")
    if sampled_in_topk.shape != (n,) or sampled_in_topk.dtype != np.bool_:
        raise DataError(f"sampled_in_topk must be bool [{n}], got {sampled_in_topk.dtype} {sampled_in_topk.shape}")
    for name, rows in (("topk_log_q", topk_log_q), ("topk_log_p", topk_log_p)):
        bad = np.isnan(rows) | (rows > LOG_Q_TOLERANCE)
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            raise DataError(
                f"{name}[{row}, {column}]={rows[row, column]} is no log-probability ({int(bad.sum())} such entries); "
                "pad short rows with -inf"
            )


def without_impossible(
    topk_log_q: Floats, topk_log_p: Floats, log_q: Floats, log_p: Floats, sampled_in_topk: Bools
) -> tuple[Floats, Floats, int]:
    """Rows ``[N, K]`` whose mass under q or p exceeds 1 (made up, ids listed twice) become -inf; and their number."""
    bad = np.zeros(len(log_q), np.bool_)
    for rows, sampled in ((topk_log_q, log_q), (topk_log_p, log_p)):
        bad |= np.exp(with_sampled(rows, sampled, sampled_in_topk)).sum(axis=1) > 1 + MASS_TOLERANCE
    nothing = np.float32(-np.inf)
    return np.where(bad[:, None], nothing, topk_log_q), np.where(bad[:, None], nothing, topk_log_p), int(bad.sum())


def with_sampled(topk_log: Floats, log_sampled: Floats, sampled_in_topk: Bools) -> Doubles:
    """Log-probabilities of ``top-k and {y}``, ``[N, K+1]``: -inf in the last column where the top-k holds y."""
    column = np.where(sampled_in_topk, -np.inf, log_sampled)
    return np.concatenate([topk_log, column[:, None]], axis=1, dtype=np.float64)


def missing_mass(name: str, log_known: Doubles) -> Doubles:
    """``1 - sum exp`` of every row of ``[N, K]``, at least 0; ``name`` is for the error."""
    known = np.exp(log_known).sum(axis=1)
    if known.max(initial=0.0) > 1 + MASS_TOLERANCE:
        row = int(known.argmax())
        raise DataError(
            f"row {row} of {name} holds a mass of {known[row]:.6g} > 1: "
            "its ids repeat, or sampled_in_topk[row] is False though the row holds the sampled token"
        )
    rest: Doubles = np.maximum(0.0, 1.0 - known)
    return rest


def z_bounds(
    topk_log_q: Floats, topk_log_p: Floats, log_q: Floats, log_p: Floats, sampled_in_topk: Bools, log_threshold: float
) -> ZBounds:
    """``core <= Z <= upper`` and ``R_q`` of every context, float32 ``[N]`` (algorithms.md 1.5).

    ``topk_log_q[N, K]`` and ``topk_log_p[N, K]`` are taken at the same ids, ``log_q[N]`` and
    ``log_p[N]`` at the sampled token, which counts as known too where ``sampled_in_topk[N]`` is
    False. Wide intervals ask for a larger K: the width is at most ``R_q``.
    """
    check_topk(topk_log_q, topk_log_p, log_q, log_p, sampled_in_topk, log_threshold)
    lq = with_sampled(topk_log_q, log_q, sampled_in_topk)
    lp = with_sampled(topk_log_p, log_p, sampled_in_topk)
    rest_q, rest_p = missing_mass("topk_log_q", lq), missing_mass("topk_log_p", lp)
    core = np.exp(np.minimum(lq, lp - log_threshold)).sum(axis=1)
    with np.errstate(divide="ignore"):  # log 0
        shared = np.exp(np.minimum(np.log(rest_q), np.log(rest_p) - log_threshold))
    upper = np.minimum(1.0, core + shared)
    return ZBounds(np.minimum(1.0, core).astype(np.float32), upper.astype(np.float32), rest_q.astype(np.float32))


def enumerated_acceptance(
    topk_log_q: Floats, topk_log_p: Floats, log_q: Floats, log_p: Floats, sampled_in_topk: Bools, log_threshold: float
) -> float:
    """Unbiased estimate of the mean acceptance that enumerates rejection on the top-k (algorithms.md 1.6).

    The mean over t of ``1 - sum over top-k of (q - p/lam)_+  -  [y not in top-k] (1 - a(y))``;
    arguments as :func:`z_bounds`. Less noisy than the mean of ``a(y)``. Only the mean is returned:
    a single term depends on y and must not weigh it. 1 without tokens.
    """
    check_topk(topk_log_q, topk_log_p, log_q, log_p, sampled_in_topk, log_threshold)
    if len(log_q) == 0:
        return 1.0
    lq, lp = topk_log_q.astype(np.float64), topk_log_p.astype(np.float64)
    missing_mass("topk_log_q", with_sampled(topk_log_q, log_q, sampled_in_topk))
    excess = np.exp(lq) - np.exp(np.minimum(lq, lp - log_threshold))
    log_ratio = log_p.astype(np.float64) - log_q
    rejected = np.where(sampled_in_topk, 0.0, 1.0 - np.exp(np.minimum(0.0, log_ratio - log_threshold)))
    return float(np.mean(1.0 - excess.sum(axis=1) - rejected))


def interpolate(core: Floats, upper: Floats, acceptance: float) -> tuple[Floats, float]:
    """``Z_t`` between its bounds whose mean is ``acceptance``: ``(z[N], theta)`` (algorithms.md 1.6).

    ``z = core + theta (upper - core)`` with one ``theta`` in [0, 1] for the whole batch, which
    must be the global one. A ``theta`` of 0 or 1 means that ``acceptance`` lies outside
    ``[mean core, mean upper]`` (noise) and is not met, or that the bounds coincide (0).
    """
    _check_acceptance(acceptance)
    low = core.astype(np.float64)
    width = upper - low
    mean_width = float(width.mean()) if len(width) else 0.0
    theta = float(np.clip((acceptance - low.mean()) / mean_width, 0.0, 1.0)) if mean_width > 0 else 0.0
    return (low + theta * width).astype(np.float32), theta


def kappa(core: Floats, acceptance: float) -> tuple[Floats, float]:
    """The paper's estimate ``Z_t = kappa core_t``, ``kappa = acceptance / mean core``: ``(z[N], kappa)``.

    Its mean over the batch, which must be the global one, is ``acceptance``. As in the paper nothing
    caps it: single ``z`` may exceed 1 and the upper bound (algorithms.md 1.6; :func:`interpolate`
    cannot). ``kappa`` is 1 where ``core`` is all 0, which no factor mends.
    """
    _check_acceptance(acceptance)
    mean_core = float(core.mean(dtype=np.float64)) if len(core) else 0.0
    factor = acceptance / mean_core if mean_core > 0 else 1.0
    return (core.astype(np.float64) * factor).astype(np.float32), factor


def _check_acceptance(acceptance: float) -> None:
    if not 0.0 <= acceptance <= 1.0:
        raise DataError(f"acceptance={acceptance} must lie in [0, 1]: pass the mean of a(y) over the whole batch")
