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

from common.errors import DataError
from learner.mesh import ALONE, Axis
from learner.parallel.collectives import max_over, sum_over

LOG2_E, LN_2 = math.log2(math.e), math.log(2.0)
MEGABYTE = 1 << 20
CACHE_ELEMENTS = 1 << 18  # logits worked on at once on a CPU: 1 MB, so that later passes find them in cache

PerToken = Callable[[Tensor, slice], Tensor]  # (log p of some tokens, which) -> their share of the loss


@dataclass(frozen=True)
class Head:
    """The output embedding and how its logits are read."""

    weight: Tensor  # [v, C]
    temperature: float = 1.0
    chunk_mb: float = 256.0  # of float32 logits that exist at once
    tp: Axis = ALONE
    in_float32: bool = False  # the product itself in float32, also for bfloat16 weights

    @property
    def rows(self) -> int:
        """Tokens of a chunk."""
        return max(1, int(self.chunk_mb * MEGABYTE) // (4 * len(self.weight)))

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


class _Product:
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
        return torch.mm(hidden.float() * self.scale, self.weight.T, out=self.buffer)

    def back(self, grad_logits: Tensor, part: slice, grad_hidden: Tensor, grad_head: Tensor) -> None:
        """From the gradient of natural logits over temperature, ``[n, v]``, to hidden states and head."""
        if self.mixed:
            low = grad_logits.to(self.weight.dtype)
            grad_hidden[part] = torch.mm(low, self.weight)
            grad_head += torch.mm(low.T, self.hidden[part], out_dtype=torch.float32)
            return
        grad_hidden[part] = torch.mm(grad_logits, self.weight).to(grad_hidden.dtype)
        grad_head.addmm_(grad_logits.T, self.hidden[part].float())


def _local(ids: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Ids among this rank's rows of the head, and whether they are there."""
    local = ids - head.tp.rank * len(head.weight)
    return local.clamp(0, len(head.weight) - 1), (local >= 0) & (local < len(head.weight))


def _at(logits: Tensor, ids: Tensor, head: Head) -> Tensor:
    """This rank's share of the logits at ``ids[n, k]``: 0 where another rank holds the id."""
    if head.tp.size == 1:
        return logits.gather(1, ids)
    local, mine = _local(ids, head)
    return logits.gather(1, local).mul_(mine)


def _normalise(logits: Tensor, head: Head, *, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``(lse[n], sum[n], entropy[n])`` of base-2 logits, the entropy in nats; destroys them.

    With ``keep`` the logits become ``2^(x - max)``, which over ``sum`` is this rank's probabilities.
    """
    top = max_over(logits.amax(dim=1), head.tp)
    sums = torch.empty((2, len(logits)), device=logits.device)
    step = max(1, CACHE_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(logits))
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        z = logits[rows].sub_(top[rows, None])
        e = torch.exp2(z)
        torch.sum(e, dim=1, out=sums[0, rows])
        torch.sum(z.mul_(e), dim=1, out=sums[1, rows])
        if keep:
            z.copy_(e)
    sum_over(sums, head.tp)
    log_sum = sums[0].log2()
    return top + log_sum, sums[0], (log_sum - sums[1] / sums[0]) * LN_2


# ---- training -----------------------------------------------------------------------------------


class _LossThroughHead(torch.autograd.Function):
    """Loss, log p and entropy in one pass, gradients included: the logits are made once."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, head: Head, per_token: PerToken
    ) -> tuple[Tensor, Tensor, Tensor]:
        product = _Product(hidden, head)
        logp = torch.empty(len(targets), device=hidden.device)
        entropy = torch.empty_like(logp)
        loss = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros(weight.shape, device=weight.device)
        for part in head.chunks(len(targets)):
            logits = product.logits(part)
            at_target = sum_over(_at(logits, targets[part, None], head).squeeze(1), head.tp)
            lse, sums, entropy[part] = _normalise(logits, head, keep=True)
            logp[part] = (at_target - lse) * LN_2
            with torch.enable_grad():
                own = logp[part].detach().requires_grad_()
                share = per_token(own, part)
                (grad,) = torch.autograd.grad(share, own)
            loss += share.detach()
            _grad_logits(logits, sums, targets[part], grad / head.temperature, head)
            product.back(logits, part, grad_hidden, grad_head)
        ctx.save_for_backward(grad_hidden, grad_head.to(weight.dtype))
        ctx.mark_non_differentiable(logp, entropy)
        return loss, logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grads[0], grad_head * grads[0], None, None, None


def _grad_logits(exponentials: Tensor, sums: Tensor, targets: Tensor, grad: Tensor, head: Head) -> None:
    """In place: ``2^(x - max)[n, v]`` -> ``grad[n] * (onehot(target) - p)``."""
    exponentials.mul_((-grad / sums)[:, None])
    local, mine = _local(targets, head)
    exponentials.scatter_add_(1, local[:, None], (grad * mine)[:, None])


def loss_through_head(
    hidden: Tensor, head: Head, targets: Tensor, per_token: PerToken
) -> tuple[Tensor, Tensor, Tensor]:
    """``(loss, log p[N], entropy[N])`` of ``targets[N]`` given ``hidden[N, C]``; only the loss has a gradient.

    ``per_token(log_p[n], part)`` is the summed loss of the tokens ``part``, and may look at their
    own log p alone; then no logit is computed twice. Losses that tie tokens together take
    :func:`token_logprobs`.
    """
    result: tuple[Tensor, Tensor, Tensor] = _LossThroughHead.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, targets, head, per_token
    )
    return result


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        product = _Product(hidden, head)
        logp = torch.empty(len(targets), device=hidden.device)
        entropy = torch.empty_like(logp)
        for part in head.chunks(len(targets)):
            logits = product.logits(part)
            at_target = sum_over(_at(logits, targets[part, None], head).squeeze(1), head.tp)
            lse, _, entropy[part] = _normalise(logits, head, keep=False)
            logp[part] = (at_target - lse) * LN_2
        ctx.save_for_backward(hidden, weight, targets)
        ctx.head = head
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, targets = ctx.saved_tensors
        head: Head = ctx.head
        product = _Product(hidden, head)
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros(weight.shape, device=weight.device)
        for part in head.chunks(len(targets)):
            logits = product.logits(part)
            _, sums, _ = _normalise(logits, head, keep=True)
            _grad_logits(logits, sums, targets[part], grads[0][part] / head.temperature, head)
            product.back(logits, part, grad_hidden, grad_head)
        return grad_hidden, grad_head.to(weight.dtype), None, None


def token_logprobs(hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor]:
    """``(log p[N] with gradient, entropy[N] without)``; the backward pass computes the logits again."""
    result: tuple[Tensor, Tensor] = _TokenLogprobs.apply(hidden, head.weight, targets, head)  # type: ignore[no-untyped-call]
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
    n, device = len(targets), hidden.device
    product = _Product(hidden, head)
    out = Scores(
        torch.empty(n, device=device), torch.empty(n, device=device), torch.empty(ids.shape, device=device),
        torch.empty(n, device=device), torch.empty((n, top), dtype=torch.int64, device=device),
        torch.empty((n, top), device=device),
    )  # fmt: skip
    asked = torch.cat((targets[:, None], ids), dim=1)
    for part in head.chunks(n):
        logits = product.logits(part)
        found = sum_over(_at(logits, asked[part], head), head.tp)
        if top:
            out.top_ids[part], best = _top(logits, top, head)
        lse, _, out.entropy[part] = _normalise(logits, head, keep=False)
        if top:
            out.top_logp[part] = (best - lse[:, None]) * LN_2
        found = (found - lse[:, None]) * LN_2
        out.logp[part], out.at_ids[part] = found[:, 0], found[:, 1:]
    # the residual by expm1 of the alternatives' log-sum: 1 - sum would lose it all near 1
    out.residual[:] = torch.log((-torch.expm1(out.at_ids.logsumexp(dim=1))).clamp_min(0.0))
    return out


def _top(logits: Tensor, top: int, head: Head) -> tuple[Tensor, Tensor]:
    """The ``top`` greatest of each row over the whole vocabulary: ids and values, greatest first."""
    values, ids = top_of_rows(logits, min(top, logits.shape[1]))
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


BLOCK = 32  # a row's greatest k lie in the k blocks with the greatest maxima


def top_of_rows(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``x.topk(k, dim=1)``: one pass for the maxima of blocks, then only the best k blocks are looked at.

    Exact; among equal values another index may be chosen than torch's.
    """
    n, width = x.shape
    if width < 4 * BLOCK * k:
        values, ids = x.topk(k, dim=1)
        return values, ids
    whole = width - width % BLOCK
    maxima = x[:, :whole].unflatten(1, (-1, BLOCK)).amax(dim=2)
    _, blocks = top_of_rows(maxima, k)
    columns = (blocks[:, :, None] * BLOCK + torch.arange(BLOCK, device=x.device)).flatten(1)
    if whole < width:
        columns = torch.cat((columns, torch.arange(whole, width, device=x.device).expand(n, -1)), dim=1)
    values, at = x.gather(1, columns).topk(k, dim=1)
    return values, columns.gather(1, at)
