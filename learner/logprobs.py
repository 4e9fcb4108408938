"""Log-probabilities without logits: the head applied to chunks of tokens, forward and backward.

``[N, vocab]`` never exists: a chunk's logits live only while the chunk is worked on. Everything
after the product is float32 and in base 2, whose exponential is the faster one; temperature and
log2(e) are folded into the hidden states. The head may be cut over tp (each rank holds V/tp rows).

Per-token arrays are aligned at the token they describe: ``log p[t]`` is that of token t given those
before it in its sequence, so the hidden state that predicts it is ``hidden[t - 1]``, and a
sequence's first token has none. Legend: N scored tokens, n tokens of a chunk, C hidden width, V
vocabulary, v = V/tp, k alternatives.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.config import MEGABYTE
from common.errors import DataError
from learner.mesh import ALONE, Axis, held_rows
from learner.parallel.collectives import max_over, sum_over
from learner.products import largest_piece, mm, outer
from learner.softmax import Maxima, sums_of, top_of_rows

LOG2_E, LN_2 = math.log2(math.e), math.log(2.0)
SMALLEST = 1e-37  # a probability whose logarithm is finite


@dataclass(frozen=True)
class Share:
    """Some tokens' share of a loss, and how it changes with what the policy says of them."""

    loss: Tensor  # []
    slope: Tensor  # [n] d loss / d log p
    entropy_slope: Tensor | None = None  # [n] d loss / d entropy, where the loss has the entropy in it


PerToken = Callable[[Tensor, Tensor, slice], Share]  # (log p[n], entropy[n], which tokens of all N)


def by_autograd(per_token: Callable[[Tensor, slice], Tensor]) -> PerToken:
    """A loss of ``log p`` alone as torch differentiates it: ``per_token(log p[n], which) -> []``."""

    def share(logp: Tensor, _entropy: Tensor, part: slice) -> Share:
        with torch.enable_grad():
            own = logp.detach().requires_grad_()
            loss = per_token(own, part)
            (slope,) = torch.autograd.grad(loss, own)
        return Share(loss.detach(), slope)

    return share


@dataclass(frozen=True)
class Head:
    """The output embedding and how its logits are read."""

    weight: Tensor  # [v, C]
    temperature: float = 1.0
    chunk_mb: float = 256.0  # of float32 logits of one chunk
    tp: Axis = ALONE
    in_float32: bool = False  # the product itself in float32, also for bfloat16 weights
    compiled: bool = False  # torch.compile for what follows the product

    @property
    def rows(self) -> int:
        """Tokens of a chunk, which one product takes in one piece."""
        return max(1, largest_piece(int(self.chunk_mb * MEGABYTE) // (4 * len(self.weight))))

    def chunks(self, n: int) -> Iterator[slice]:
        """[0, n) in chunks."""
        for start in range(0, n, self.rows):
            yield slice(start, min(n, start + self.rows))


def target_positions(cu_seqlens: NDArray[np.int32], wanted: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Packed positions of the tokens to score: where ``wanted[N]`` is 1.

    Raises :class:`DataError` if a sequence's first token is among them: nothing predicts it.
    """
    starts = np.asarray(cu_seqlens[:-1], np.int64)
    starts = starts[np.diff(cu_seqlens) > 0]
    if np.asarray(wanted)[starts].any():
        raise DataError("the first token of a sequence has no log-probability: nothing comes before it")
    return np.flatnonzero(wanted).astype(np.int64)


# ---- one chunk ----------------------------------------------------------------------------------


class Product:
    """``hidden -> logits`` in base 2 and float32, chunk by chunk, and the way back."""

    def __init__(self, hidden: Tensor, head: Head) -> None:
        self.hidden, self.head = hidden, head
        self.scale = LOG2_E / head.temperature
        low = head.weight.dtype != torch.float32
        self.mixed = low and head.weight.is_cuda and not head.in_float32  # bf16 product, float32 sums
        self.weight = head.weight if self.mixed else head.weight.float()
        self.buffer = torch.empty(0)

    def logits(self, part: slice) -> Tensor:
        """``[n, v]``; the next call overwrites it."""
        hidden = self.hidden[part]
        if self.mixed:
            return torch.mm(hidden, self.weight.T, out_dtype=torch.float32).mul_(self.scale)
        shape = (len(hidden), len(self.weight))
        if self.buffer.shape != shape:
            self.buffer = torch.empty(shape, device=hidden.device)
        return mm(hidden.float() * self.scale, self.weight.T, out=self.buffer)

    def back(self, grad_logits: Tensor, part: slice, grad_hidden: Tensor, grad_head: Tensor) -> None:
        """From the gradient of natural logits over temperature, ``[n, v]``, to hidden states and head."""
        if self.mixed:
            low = grad_logits.to(self.weight.dtype)
            grad_hidden[part] = torch.mm(low, self.weight)
            grad_head += torch.mm(low.T, self.hidden[part], out_dtype=torch.float32)
            return
        grad_hidden[part] = mm(grad_logits, self.weight).to(grad_hidden.dtype)
        outer(grad_logits, self.hidden[part].float(), out=grad_head, add=True)


def _at(logits: Tensor, ids: Tensor, head: Head) -> Tensor:
    """This rank's share of the logits at ``ids[n, k]``: 0 where another rank holds the id."""
    if head.tp.size == 1:
        return logits.gather(1, ids)
    local, mine = held_rows(ids, len(head.weight), head.tp)
    return logits.gather(1, local).mul_(mine)


@dataclass
class _Normal:
    """What a softmax over base-2 logits needs, over the whole vocabulary."""

    lse: Tensor  # [n] base 2
    scale: Tensor  # [n] turns this rank's exponentials into probabilities
    entropy: Tensor  # [n] nats
    maxima: Maxima | None  # of this rank's logits
    asked: Tensor  # [n, k] log p in nats of the ids that were asked for


def _normalise(logits: Tensor, asked: Tensor, head: Head, *, keep: bool, maxima: bool = False) -> _Normal:
    """Normalises base-2 logits and finds log p at ``asked[n, k]``; two small all-reduces over tp.

    With ``keep`` the logits become exponentials, see :attr:`_Normal.scale`.
    """
    found = _at(logits, asked, head)
    of = sums_of(logits, keep=keep, maxima=maxima, compiled=head.compiled)
    highest = max_over(of.shift.clone(), head.tp) if head.tp.size > 1 else of.shift
    away = of.shift - highest  # of this rank's zero from the common one
    factor = torch.exp2(away)
    mine = torch.stack((of.sums * factor, (of.products + of.sums * away) * factor), dim=1)
    both = sum_over(torch.cat((mine, found), dim=1), head.tp)
    total, log_sum = both[:, 0], both[:, 0].log2()
    lse = highest + log_sum
    entropy = (log_sum - both[:, 1] / total) * LN_2
    return _Normal(lse, factor / total, entropy, of.maxima, (both[:, 2:] - lse[:, None]) * LN_2)


# ---- training -----------------------------------------------------------------------------------


class _LossThroughHead(torch.autograd.Function):
    """Loss, log p and entropy in one pass, gradients included: the logits are made once."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, head: Head, per_token: PerToken
    ) -> tuple[Tensor, Tensor, Tensor]:
        product = Product(hidden, head)
        logp = torch.empty(len(targets), device=hidden.device)
        entropy = torch.empty_like(logp)
        loss = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros(weight.shape, device=weight.device)
        for part in head.chunks(len(targets)):
            logits = product.logits(part)
            normal = _normalise(logits, targets[part, None], head, keep=True)
            logp[part], entropy[part] = normal.asked[:, 0], normal.entropy
            share = per_token(logp[part], entropy[part], part)
            loss += share.loss
            _grad_logits(logits, normal, targets[part], share.slope / head.temperature, head, share.entropy_slope)
            product.back(logits, part, grad_hidden, grad_head)
        ctx.save_for_backward(grad_hidden, grad_head.to(weight.dtype))
        ctx.mark_non_differentiable(logp, entropy)
        return loss, logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden.mul_(grads[0]), grad_head.mul_(grads[0]), None, None, None  # they are nobody else's


def _grad_logits(
    exponentials: Tensor, normal: _Normal, targets: Tensor, grad: Tensor, head: Head, of_entropy: Tensor | None = None
) -> None:
    """In place: exponentials ``[n, v]`` -> ``grad[n] * (onehot(target) - p)``.

    With the loss's slope ``of_entropy[n]`` over the temperature added: ``-of_entropy * p * (log p + entropy)``.
    """
    if of_entropy is None:
        exponentials.mul_((-grad * normal.scale)[:, None])
    else:
        slope = (of_entropy / head.temperature)[:, None]
        p = exponentials.mul_(normal.scale[:, None])
        p.mul_(p.clamp_min(SMALLEST).log_().add_(normal.entropy[:, None]).mul_(-slope).sub_(grad[:, None]))
    local, mine = held_rows(targets, len(head.weight), head.tp)
    exponentials.scatter_add_(1, local[:, None], (grad * mine)[:, None])


def loss_through_head(
    hidden: Tensor, head: Head, targets: Tensor, per_token: PerToken
) -> tuple[Tensor, Tensor, Tensor]:
    """``(loss, log p[N], entropy[N])`` of ``targets[N]`` given ``hidden[N, C]``; only the loss has a gradient.

    ``per_token(log p[n], entropy[n], part)`` is the share of the tokens ``part``; it may look at
    their own log p and entropy and at what is fixed before, so that no logit is computed twice.
    """
    result: tuple[Tensor, Tensor, Tensor] = _LossThroughHead.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, targets, head, per_token
    )
    return result


# ---- scoring ------------------------------------------------------------------------------------


@dataclass
class Scores:
    """What the policy says of some tokens, natural logarithms."""

    logp: Tensor  # [N] of the token itself
    entropy: Tensor  # [N]
    at_ids: Tensor  # [N, k] at the asked ids
    residual: Tensor  # [N] log(1 - sum_k p); -inf where the ids hold everything
    top_ids: Tensor  # [N, top] the likeliest tokens
    top_logp: Tensor  # [N, top]


@torch.no_grad()
def score_tokens(hidden: Tensor, head: Head, targets: Tensor, ids: Tensor, top: int = 0) -> Scores:
    """Everything the broker asks about ``targets[N]``, ``ids[N, k]`` and the ``top`` likeliest, in one pass."""
    product = Product(hidden, head)
    asked = torch.cat((targets[:, None], ids), dim=1)
    parts = [score_logits(product.logits(part), asked[part], top, head) for part in head.chunks(len(targets))]
    if not parts:
        parts = [score_logits(hidden.new_zeros((0, len(head.weight)), dtype=torch.float32), asked, top, head)]
    found, entropy, top_ids, top_logp = (torch.cat(column) for column in zip(*parts, strict=True))
    at_ids = found[:, 1:]
    # the residual by expm1 of the alternatives' log-sum: 1 - sum would lose it all near 1
    residual = torch.log((-torch.expm1(at_ids.logsumexp(dim=1))).clamp_min(0.0))
    return Scores(found[:, 0], entropy, at_ids, residual, top_ids, top_logp)


def score_logits(logits: Tensor, asked: Tensor, top: int, head: Head) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(log p[n, k] at asked[n, k], entropy[n], top ids[n, top], their log p)`` of base-2 logits."""
    normal = _normalise(logits, asked, head, keep=False, maxima=top > 0)
    if top == 0:
        nothing = normal.asked[:, :0]
        return normal.asked, normal.entropy, nothing.long(), nothing
    top_ids, best = _top(logits, normal.maxima, top, head)
    return normal.asked, normal.entropy, top_ids, (best - normal.lse[:, None]) * LN_2


def _top(logits: Tensor, maxima: Maxima | None, top: int, head: Head) -> tuple[Tensor, Tensor]:
    """The ``top`` greatest of each row over the whole vocabulary: ids and values, greatest first."""
    values, ids = top_of_rows(logits, min(top, logits.shape[1]), maxima)
    ids = ids + head.tp.rank * len(head.weight)
    if head.tp.size > 1:
        shape = (head.tp.size, *values.shape)
        all_values, all_ids = values.new_zeros(shape), ids.new_zeros(shape)
        all_values[head.tp.rank], all_ids[head.tp.rank] = values, ids
        sum_over(all_values, head.tp)
        sum_over(all_ids, head.tp)
        values, at = all_values.movedim(0, 1).flatten(1).topk(top, dim=1)
        ids = all_ids.movedim(0, 1).flatten(1).gather(1, at)
    return ids, values
