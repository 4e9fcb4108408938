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


class _Sequences:
    """Sums over the tokens that count of each sequence, in float64: there may be 1e5 of them."""

    def __init__(self, lengths: Tensor, on: Tensor) -> None:
        self.lengths, self.on = lengths, on
        self.all_on = not on.is_cuda and bool(on.all())  # a look costs a GPU more than it saves
        self.counts = lengths.double() if self.all_on else self._sum(on.double())

    def _sum(self, values: Tensor) -> Tensor:
        return torch.segment_reduce(values, "sum", lengths=self.lengths, unsafe=True)

    def sum(self, values: Tensor) -> Tensor:
        """``values[n] -> [count]``."""
        return self._sum(values.double() if self.all_on else torch.where(self.on, values, 0.0).double())

    def mean(self, values: Tensor) -> Tensor:
        """0 for a sequence without tokens."""
        return self.sum(values) / self.counts.clamp_min(1)

    def spread(self, values: Tensor) -> Tensor:
        """``[count] -> [n]``."""
        return values.repeat_interleave(self.lengths, output_size=len(self.on))


def by_sequence(log_p: Tensor, tokens: Tokens, lengths: Tensor, section: LossSection) -> Tokens:
    """``tokens`` with the factor and the ratio that whole sequences decide, from ``log_p[n]`` of the trained policy.

    ``lengths`` (i64) cut the tokens into sequences. All sampled tokens of a sequence count, rejected
    ones too. In order: ``correction`` by the sum or the mean of ``log rho``; ``veto``; ``opsm``
    (DeepSeek-V3.2: negative advantage and mean ``log q - log pi`` above it); then GSPO's ratio.
    """
    if not len(log_p):
        return tokens
    of = _Sequences(lengths, tokens.sampled)
    anchor = log_p if section.anchor == "proximal" else tokens.log_q
    factor: Tensor | None = None  # [count]
    if section.correction in BY_SEQUENCE:
        factor = _correction(anchor - tokens.log_q, of, section)
    if section.veto > 0:
        bad = of.sum((anchor - tokens.log_q < math.log(section.veto)).double())
        factor = (bad == 0).double() if factor is None else factor * (bad == 0)
    per_token = None if factor is None else of.spread(factor.to(log_p.dtype))
    if section.opsm is not None:
        far = of.spread(of.mean(tokens.log_q - log_p) > section.opsm)
        near = torch.where(far & (tokens.advantages < 0), 0.0, torch.ones((), dtype=log_p.dtype, device=log_p.device))
        per_token = near if per_token is None else per_token * near
    ratio = None
    if section.kind == "gspo":
        drift = of.mean(log_p - anchor)
        ratio = of.spread(drift.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().to(log_p.dtype))
    return _with(tokens, per_token, ratio)


def _correction(log_rho: Tensor, of: _Sequences, section: LossSection) -> Tensor:
    """``[count]`` factor of each sequence, float64."""
    low, high = section.correction_low, section.correction_high
    if section.correction in ("k2", "k3"):
        terms = 0.5 * log_rho.square() if section.correction == "k2" else torch.expm1(log_rho) - log_rho
        return (of.mean(terms) <= high).double()
    if section.correction == "cap_sequence":
        return of.sum(log_rho).clamp(-MAX_LOG_RATIO, math.log(high) if high > 0 else -MAX_LOG_RATIO).exp()
    total = of.mean(log_rho) if section.correction == "mask_geometric" else of.sum(log_rho)
    return ((total >= _log(low)) & (total <= _log(high))).double()


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


def _with(tokens: Tokens, factor: Tensor | None, ratio: Tensor | None) -> Tokens:
    """``tokens`` with ``factor`` multiplied into theirs and the sequences' ratio."""
    whole = tokens[:]
    if factor is not None:
        whole.factor = factor if tokens.factor is None else tokens.factor * factor
    whole.sequence_ratio = tokens.sequence_ratio if ratio is None else ratio
    return whole
