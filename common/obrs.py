"""Optimal budgeted rejection of single tokens (Jackpot, arXiv 2602.06107; algorithms.md 1).

For a token that the behaviour policy ``q`` sampled, a target ``p`` and a threshold ``lam``::

    a(x) = min(1, p(x) / (lam q(x)))        acceptance probability
    m(x) = q(x) a(x) = min(q(x), p(x)/lam)  inclusion density: all that a learner must know

A learner that weighs an accepted token by ``pi(x) / m(x)`` estimates an expectation under ``pi``
without bias, whatever ``pi`` it chooses later. Everything is in log space, over whole batches.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.philox import STREAM_COINS, coin_uniforms

Floats = NDArray[np.float32]
LOG_Q_TOLERANCE = 1e-6  # a log-probability may exceed 0 by rounding, not by more


def log_acceptance(log_p: Floats, log_q: Floats, log_threshold: float) -> Floats:
    """``log a = min(0, log p - log q - log lam)``, float32 ``[N]``; ``log_p`` may be -inf (then -inf)."""
    threshold = np.float32(log_threshold)
    # p = q with lam = 1 must give exactly 0, so subtract before the threshold does.
    result: Floats = np.minimum(np.float32(0), (log_p - log_q) - threshold)
    return result


def log_inclusion(log_p: Floats, log_q: Floats, log_threshold: float) -> Floats:
    """``log m = min(log q, log p - log lam)``, float32 ``[N]`` (algorithms.md 1.4)."""
    result: Floats = np.minimum(log_q, log_p - np.float32(log_threshold))
    return result


def coins(
    seed: int, groups: NDArray[np.int64], siblings: NDArray[np.int32], lengths: NDArray[np.int64], version: int
) -> Floats:
    """Uniform float32 in (0, 1) for every token of ``B`` packed trajectories, ``[sum of lengths]``.

    ``groups[B]`` and ``siblings[B]`` name the trajectories, ``lengths[B]`` counts their tokens,
    ``version`` is the policy that scored them (algorithms.md 1.4). The coin of a token is a pure
    function of (seed, version, group, sibling, position): word ``position % 4`` of the Philox
    block ``position // 4``. Order, sharding and batch layout cannot matter.
    """
    lengths = np.asarray(lengths, np.int64)
    blocks = -(-lengths // 4)
    owner = np.repeat(np.arange(len(blocks)), blocks)
    first = np.cumsum(blocks) - blocks  # block at which each trajectory starts
    block = np.arange(len(owner)) - first[owner]
    group = np.asarray(groups, np.int64)[owner]
    drawn = coin_uniforms(
        seed, STREAM_COINS + version, block, np.asarray(siblings)[owner], group & 0xFFFFFFFF, (group >> 32) & 0xFFFFFFFF
    ).reshape(-1)
    if len(drawn) == int(lengths.sum()):
        return drawn
    position = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return drawn[np.repeat(4 * first, lengths) + position]


@dataclass(frozen=True)
class Thinning:
    """What rejection decided for ``[N]`` trainable tokens."""

    accept: NDArray[np.bool_]  # [N]
    log_a: Floats  # [N] log acceptance probability, -inf where p is 0
    log_m: Floats  # [N] log inclusion density


def check_scores(log_p: Floats, log_q: Floats) -> None:
    """Raise :class:`DataError` for densities that no model returns; -inf is legal for ``log_p`` only."""
    if log_p.shape != log_q.shape:
        raise DataError(f"log_p {log_p.shape} and log_q {log_q.shape} must be equally long")
    bad_q = ~np.isfinite(log_q) | (log_q > LOG_Q_TOLERANCE)
    bad_p = np.isnan(log_p) | (log_p > LOG_Q_TOLERANCE)
    for name, bad, values in (("log_q", bad_q, log_q), ("log_p", bad_p, log_p)):
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            raise DataError(f"{name}[{at}]={values[at]} is no log-probability ({int(bad.sum())} such tokens)")


def thin(log_p: Floats, log_q: Floats, uniforms: Floats, log_threshold: float) -> Thinning:
    """Toss the coins: accept token t iff ``log u < log a``. All arrays float32 ``[N]``."""
    check_scores(log_p, log_q)
    log_a = log_acceptance(log_p, log_q, log_threshold)
    return Thinning(np.log(uniforms) < log_a, log_a, log_inclusion(log_p, log_q, log_threshold))


@dataclass(frozen=True)
class Divergence:
    """Batch estimates beside a thinning; see :func:`divergence`."""

    kl_before: float  # KL(p || q), nats a token
    kl_after: float  # KL(p || q after rejection), nats a token
    expected_acceptance: float  # mean a, free of coin noise
    ess: float  # normalised effective sample size of the accepted tokens' weights p/m
    kl_before_se: float = 0.0  # standard errors, tokens taken as independent
    kl_after_se: float = 0.0


def divergence(log_p: Floats, log_q: Floats, thinning: Thinning) -> Divergence:
    """KL to the target before and after rejection, estimated from the sampled tokens.

    Over the joint law of contexts and tokens (algorithms.md 1.5) rejection turns ``d(s) q(x|s)``
    into ``d(s) m(x|s) / Z``, with ``Z = E[a]``. With ``r = p/q`` and ``r' = Z p/m`` both
    divergences are means of ``r log r - r + 1 >= 0``: under q for the first, under the accepted
    density (weights ``a / sum a``, so without the coins' noise) for the second.
    """
    if len(log_q) == 0:
        return Divergence(0.0, 0.0, 1.0, 1.0)
    lp, lq = log_p.astype(np.float64), log_q.astype(np.float64)
    a = np.exp(thinning.log_a.astype(np.float64))
    mean_a = float(a.mean())
    if mean_a == 0.0:
        before, error = _mean_kl_term(lp - lq, np.ones_like(lq))
        return Divergence(before, 0.0, 0.0, 0.0, error)
    possible = a > 0  # elsewhere p and m are both 0
    log_weight = np.full_like(lp, -np.inf)
    np.subtract(lp, thinning.log_m, out=log_weight, where=possible)
    log_ratio_after = log_weight + np.log(mean_a)
    weight = np.exp(log_weight, where=thinning.accept, out=np.zeros_like(lp))
    ess = effective_sample_size(weight, int(thinning.accept.sum()))
    before, before_se = _mean_kl_term(lp - lq, np.ones_like(lq))
    after, after_se = _mean_kl_term(log_ratio_after, a)
    return Divergence(before, after, mean_a, ess, before_se, after_se)


def effective_sample_size(weight: NDArray[np.float64], count: int) -> float:
    """``(sum w)^2 / (count sum w^2)``, normalised: 1 where ``count`` weights are equal and the others 0."""
    total = float(weight.sum())
    return total**2 / (count * float((weight**2).sum())) if count and total > 0 else 0.0


def _mean_kl_term(log_ratio: NDArray[np.float64], weights: NDArray[np.float64]) -> tuple[float, float]:
    """Weighted mean of ``r log r - r + 1`` and its standard error."""
    finite = np.where(np.isfinite(log_ratio), log_ratio, 0.0)
    ratio = np.where(np.isneginf(log_ratio), 0.0, np.exp(finite))
    terms = ratio * finite - ratio + 1.0
    total = float(weights.sum())
    mean = float((weights * terms).sum()) / total
    return mean, float(np.sqrt(np.square(weights * (terms - mean)).sum())) / total


def wilson_interval(successes: float, trials: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a proportion; ``(0, 1)`` without trials."""
    if trials == 0:
        return 0.0, 1.0
    rate, square = successes / trials, z * z
    centre = (rate + square / (2 * trials)) / (1 + square / trials)
    half = z * np.sqrt(rate * (1 - rate) / trials + square / (4 * trials**2)) / (1 + square / trials)
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))
