"""Masks and caps that are fixed before the loss: by token, by sequence and by batch (algorithms.md 6).

They look at ``rho = anchor / behaviour`` or at the trained policy itself, never through a gradient.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from common.objective import BY_SEQUENCE, LossSection
from learner.losses.tokens import MAX_LOG_RATIO, Tokens

SumOver = Callable[[Tensor], Tensor]  # adds a tensor up over the ranks that hold different tokens, in place


def needs_sequences(section: LossSection) -> bool:
    """Whether something is decided by whole sequences."""
    return section.kind == "gspo" or section.correction in BY_SEQUENCE or section.veto > 0 or section.opsm is not None


def icepop(log_rho: Tensor, low: float, high: float) -> Tensor:
    """``[n]`` bool: ``low <= rho <= high``, closed (2510.18855)."""
    return (log_rho >= _log(low)) & (log_rho <= _log(high))


def _log(bound: float) -> float:
    return math.log(bound) if bound > 0 else -math.inf


def _by_sequence(values: Tensor, tokens: Tokens, on: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sums of ``values`` over each sequence's tokens ``on`` in float64, and how many those are, ``[count]`` each."""
    assert tokens.sequence is not None
    masked = torch.where(on, values, torch.zeros_like(values)).double()
    sums = masked.new_zeros(count).index_add_(0, tokens.sequence, masked)
    return sums, masked.new_zeros(count).index_add_(0, tokens.sequence, on.double())


def by_sequence(log_p: Tensor, tokens: Tokens, section: LossSection) -> Tokens:
    """``tokens`` with the factor and the ratio that whole sequences decide, from ``log_p[n]`` of the trained policy.

    All sampled tokens of a sequence count, rejected ones too. In order: ``correction`` by the sum or
    the mean of ``log rho``; ``veto``; ``opsm`` (DeepSeek-V3.2: negative advantage and mean
    ``log q - log pi`` above it); then GSPO's ratio.
    """
    if tokens.sequence is None or not len(log_p):
        return tokens
    on = tokens.sampled & log_p.isfinite()
    count, of = int(tokens.sequence.max()) + 1, tokens.sequence
    anchor = log_p if section.anchor == "proximal" else tokens.log_q
    log_rho = anchor - tokens.log_q
    factor = torch.ones_like(log_p)
    if section.correction in BY_SEQUENCE:
        factor = factor * _correction(log_rho, tokens, on, count, section)[of]
    if section.veto > 0:
        bad = (on & (log_rho < math.log(section.veto))).to(log_p.dtype)
        factor = factor * (log_p.new_zeros(count).index_add_(0, of, bad) == 0)[of]
    if section.opsm is not None:
        drift, tokens_of = _by_sequence(tokens.log_q - log_p, tokens, on, count)
        far = drift > section.opsm * tokens_of
        factor = factor * ~(far[of] & (tokens.advantages < 0))
    ratio = None
    if section.kind == "gspo":
        total, tokens_of = _by_sequence(log_p - anchor, tokens, on, count)
        ratio = (total / tokens_of.clamp_min(1)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().to(log_p.dtype)[of]
    return _with(tokens, factor, ratio)


def _correction(log_rho: Tensor, tokens: Tokens, on: Tensor, count: int, section: LossSection) -> Tensor:
    """``[count]`` factor of each sequence."""
    low, high = section.correction_low, section.correction_high
    if section.correction in ("k2", "k3"):
        terms = 0.5 * log_rho.square() if section.correction == "k2" else torch.expm1(log_rho) - log_rho
        total, of = _by_sequence(terms, tokens, on, count)
        return (total <= high * of).to(log_rho.dtype)
    total, of = _by_sequence(log_rho, tokens, on, count)
    if section.correction == "cap_sequence":
        return total.clamp(-MAX_LOG_RATIO, math.log(high) if high > 0 else -MAX_LOG_RATIO).exp().to(log_rho.dtype)
    if section.correction == "mask_geometric":
        total = total / of.clamp_min(1)
    return ((total >= _log(low)) & (total <= _log(high))).to(log_rho.dtype)


def m2po(log_p: Tensor, tokens: Tokens, threshold: float, sum_over: SumOver) -> Tokens:
    """``tokens`` without the worst harmful ones of the whole batch (M2PO, 2510.01161; algorithms.md 6).

    Harmful are those whose ratio to the behaviour has moved the way their advantage pushes it. They
    are left out from the greatest squared log-ratio down until the mean over those left is at most
    ``threshold``; equal values go together. ``sum_over`` adds up over ranks: all find one bound.
    """
    log_ratio = log_p - tokens.log_q
    on = (tokens.accept == 1) & log_ratio.isfinite()
    harmful = on & (log_ratio * tokens.advantages > 0)
    squares = torch.where(harmful, log_ratio.square(), torch.zeros_like(log_ratio)).float()
    bound = m2_bound(squares[harmful], threshold, sum_over)
    return _with(tokens, (~(harmful & (squares > bound))).to(log_p.dtype), None)


def m2_bound(values: Tensor, threshold: float, sum_over: SumOver) -> Tensor:
    """The greatest value up to which the mean of ``values[h] >= 0`` (over all ranks) is at most ``threshold``, ``[]``.

    Bisection on the bits of a float32, which are ordered as the numbers are: exact in 31 rounds of one
    small sum, whatever way the values lie on the ranks.
    """
    bits, ordered = values.view(torch.int32), values.double()
    low, high = -1, torch.finfo(torch.float32).max
    top = int(torch.tensor(high).view(torch.int32))
    while low < top:
        middle = (low + top + 1) // 2
        kept = bits <= middle
        sums = sum_over(torch.stack((torch.where(kept, ordered, 0.0).sum(), kept.double().sum())))
        if float(sums[0]) <= threshold * float(sums[1]):
            low = middle
        else:
            top = middle - 1
    if low < 0:  # not even the least of them
        return values.new_tensor(-1.0)
    return torch.tensor(low, dtype=torch.int32, device=values.device).view(torch.float32)


def _with(tokens: Tokens, factor: Tensor, ratio: Tensor | None) -> Tokens:
    """``tokens`` with ``factor`` multiplied into theirs and the sequences' ratio."""
    whole = tokens[:]
    whole.factor = factor if tokens.factor is None else tokens.factor * factor
    whole.sequence_ratio = tokens.sequence_ratio if ratio is None else ratio
    return whole
