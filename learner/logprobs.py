"""Log-probabilities without logits: the head applied to chunks of tokens, forward and backward.

``[N, vocab]`` never exists; a chunk's logits live only while the chunk is worked on, and are
computed again in the backward pass. All in float32. Per-token arrays are aligned at the token
they describe: ``log p[t]`` is that of token t given those before it in its sequence, so the hidden
state that predicts it is ``hidden[t - 1]``, and a sequence's first token has none. Legend: N
scored tokens, C hidden width, V vocabulary, k alternatives.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import DataError


def target_positions(cu_seqlens: NDArray[np.int32], wanted: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Packed positions of the tokens to score: where ``wanted[N]`` is 1.

    Raises :class:`DataError` if a sequence's first token is among them: nothing predicts it.
    """
    starts = np.asarray(cu_seqlens[:-1], np.int64)
    starts = starts[np.diff(cu_seqlens) > 0]
    if np.asarray(wanted)[starts].any():
        raise DataError("the first token of a sequence has no log-probability: nothing comes before it")
    return np.flatnonzero(wanted).astype(np.int64)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        n = len(targets)
        logp = torch.empty(n, device=hidden.device, dtype=torch.float32)
        entropy = torch.empty_like(logp)
        for start in range(0, n, chunk):
            part = slice(start, start + chunk)
            log_probs = _log_softmax(hidden[part], head, temperature)
            logp[part] = log_probs.gather(1, targets[part, None]).squeeze(1)
            entropy[part] = torch.special.entr(log_probs.exp()).sum(dim=1)
        ctx.save_for_backward(hidden, head, targets)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, head, targets = ctx.saved_tensors
        grad_logp = grads[0]
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros(head.shape, device=head.device, dtype=torch.float32)
        weight = head.float()
        for start in range(0, len(targets), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            grad_logits = _log_softmax(hidden[part], head, ctx.temperature).exp_().neg_()
            grad_logits.scatter_add_(1, targets[part, None], torch.ones_like(grad_logits[:, :1]))
            grad_logits.mul_(grad_logp[part, None] / ctx.temperature)
            grad_hidden[part] = (grad_logits @ weight).to(hidden.dtype)
            grad_head.addmm_(grad_logits.T, hidden[part].float())
        return grad_hidden, grad_head.to(head.dtype), None, None, None


def _log_softmax(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    logits = hidden.float() @ head.float().T
    if temperature != 1.0:
        logits /= temperature
    return logits.log_softmax(dim=1)


def token_logprobs(
    hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, chunk: int
) -> tuple[Tensor, Tensor]:
    """``(log p[N] with gradient, entropy[N] without)`` of ``targets[N]`` given ``hidden[N, C]``, ``head[V, C]``."""
    result: tuple[Tensor, Tensor] = _TokenLogprobs.apply(hidden, head, targets, temperature, chunk)  # type: ignore[no-untyped-call]
    return result


@torch.no_grad()
def score_tokens(
    hidden: Tensor, head: Tensor, targets: Tensor, ids: Tensor, temperature: float, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``log p[N]`` of the targets, ``log p[N, k]`` at ``ids[N, k]``, and ``log(1 - sum_k p)`` ``[N]``.

    The residual is taken by ``expm1`` of the alternatives' log-sum and clipped at no mass (-inf).
    """
    logp = torch.empty(len(targets), device=hidden.device, dtype=torch.float32)
    at_ids = torch.empty(ids.shape, device=hidden.device, dtype=torch.float32)
    for start in range(0, len(targets), chunk):
        part = slice(start, start + chunk)
        log_probs = _log_softmax(hidden[part], head, temperature)
        logp[part] = log_probs.gather(1, targets[part, None]).squeeze(1)
        at_ids[part] = log_probs.gather(1, ids[part])
    residual = torch.log((-torch.expm1(at_ids.logsumexp(dim=1))).clamp_min(0.0))
    return logp, at_ids, residual
