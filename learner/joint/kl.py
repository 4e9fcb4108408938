"""Distillation through two heads, chunk by chunk: the student's own loss and its divergence from the teacher.

::

    chunk of hidden states -> logits of both -> loss of log p, KL -> gradient of the student's logits -> back

``[N, vocab]`` never exists: a chunk's logits live only while it is worked on, and the student's are
made once for both parts of its loss. Logits z are natural and over the temperature; s is the
student's distribution, t the teacher's, which has no gradient. Over the whole vocabulary

========= ======================= =======================
direction divergence              its gradient d / dz_j
========= ======================= =======================
forward   sum t (log t - log s)   s_j - t_j
reverse   sum s (log s - log t)   s_j (log s_j - log t_j - KL)
========= ======================= =======================

With ``top_k`` the outcomes are the teacher's k likeliest tokens and one bucket of all others, with
S and T the masses of that bucket. A token outside then has ``s_j (1 - T/S)`` forward and
``s_j (log S/T - KL)`` reverse; by the data-processing inequality this divergence is the smaller.

Legend: N tokens, n tokens of a chunk, C hidden width, V vocabulary, k tokens kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.joint import Direction
from learner.logprobs import LN_2, SMALLEST, Head, Product

PerToken = Callable[[Tensor, slice], tuple[Tensor, Tensor]]  # (log s of some tokens, which) -> their loss, its slope


@dataclass(frozen=True)
class Divergence:
    """Which divergence from the teacher is taken."""

    direction: Direction = "forward"
    top_k: int = 0  # 0: the whole vocabulary


@dataclass
class Distilled:
    """What came of some tokens, without gradient."""

    logp: Tensor  # [N] of the token itself under the student
    divergence: Tensor  # [N] nats


# ---- one chunk ----------------------------------------------------------------------------------


def _log_softmax(logits: Tensor) -> Tensor:
    """Base-2 logits ``[n, V]`` -> natural log-probabilities, in place."""
    logits.mul_(LN_2)
    return logits.sub_(logits.logsumexp(dim=1, keepdim=True))


def diverge(log_s: Tensor, log_t: Tensor, how: Divergence) -> tuple[Tensor, Tensor]:
    """``(divergence[n], its gradient over z [n, V])``; overwrites both arguments."""
    if 0 < how.top_k < log_s.shape[1]:
        return _bucketed(log_s, log_t, how)
    t, s = log_t.exp(), log_s.exp()
    if how.direction == "forward":
        divergence = log_t.sub_(log_s).mul_(t).sum(dim=1)
        return divergence, s.sub_(t)
    gap = log_s.sub_(log_t)
    divergence = (s * gap).sum(dim=1)
    return divergence, gap.sub_(divergence[:, None]).mul_(s)


def _bucketed(log_s: Tensor, log_t: Tensor, how: Divergence) -> tuple[Tensor, Tensor]:
    kept_t, ids = log_t.topk(how.top_k, dim=1)
    kept_s = log_s.gather(1, ids)
    s, t = log_s.exp_().scatter_(1, ids, 0.0), log_t.exp_().scatter_(1, ids, 0.0)
    # the bucket's mass is summed up: one minus the others' would lose it where they hold nearly all
    tail_s, tail_t = s.sum(dim=1, keepdim=True), t.sum(dim=1, keepdim=True)
    gap, tail_gap = kept_s - kept_t, (tail_s.clamp_min(SMALLEST) / tail_t.clamp_min(SMALLEST)).log()
    if how.direction == "forward":
        divergence = -(kept_t.exp() * gap).sum(dim=1) - (tail_t * tail_gap)[:, 0]
        return divergence, s.mul_(1 - torch.exp(-tail_gap)).scatter_(1, ids, kept_s.exp() - kept_t.exp())
    divergence = (kept_s.exp() * gap).sum(dim=1) + (tail_s * tail_gap)[:, 0]
    below = divergence[:, None]
    return divergence, s.mul_(tail_gap - below).scatter_(1, ids, kept_s.exp() * (gap - below))


# ---- all of them --------------------------------------------------------------------------------


class _Distill(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        head: Head,
        teacher: tuple[Tensor, Head],
        targets: Tensor,
        pull: Tensor,
        per_token: PerToken,
        how: Divergence,
    ) -> tuple[Tensor, Tensor, Tensor]:
        student, taught = Product(hidden, head), Product(*teacher)
        logp, divergence = torch.empty(len(targets), device=hidden.device), torch.empty_like(pull)
        loss = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros(weight.shape, device=weight.device)
        for part in head.chunks(len(targets)):
            log_s, log_t = _log_softmax(student.logits(part)), _log_softmax(taught.logits(part))
            at = targets[part, None]
            logp[part] = log_s.gather(1, at)[:, 0]
            share, slope = per_token(logp[part], part)
            own = log_s.exp().mul_(-slope[:, None]).scatter_add_(1, at, slope[:, None])
            divergence[part], grad = diverge(log_s, log_t, how)
            loss += share
            loss += torch.dot(pull[part], divergence[part])
            own.addcmul_(grad, pull[part, None]).div_(head.temperature)
            student.back(own, part, grad_hidden, grad_head)
        ctx.save_for_backward(grad_hidden, grad_head.to(weight.dtype))
        ctx.mark_non_differentiable(logp, divergence)
        return loss, logp, divergence

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden.mul_(grads[0]), grad_head.mul_(grads[0]), None, None, None, None, None, None


def distill_through_heads(
    hidden: Tensor,
    head: Head,
    teacher: tuple[Tensor, Head],
    targets: Tensor,
    pull: Tensor,
    per_token: PerToken,
    how: Divergence,
) -> tuple[Tensor, Distilled]:
    """``sum of per_token's losses + sum pull[N] * divergence[N]``, with gradient for ``hidden[N, C]`` and ``head``.

    ``teacher``: its hidden states ``[N, C']`` at the same tokens, and its head over the same
    vocabulary. ``per_token(log s[n], part)`` gives the summed loss of the tokens ``part`` and its
    slope in each log s. The head's chunks hold the logits of both models and as much again.
    """
    loss, logp, divergence = _Distill.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head, teacher, targets, pull, per_token, how
    )
    return loss, Distilled(logp, divergence)


@torch.no_grad()
def divergence_of(hidden: Tensor, head: Head, teacher: tuple[Tensor, Head], how: Divergence) -> Tensor:
    """The divergence ``[N]`` alone."""
    student, taught = Product(hidden, head), Product(*teacher)
    parts = [
        diverge(_log_softmax(student.logits(part)), _log_softmax(taught.logits(part)), how)[0]
        for part in head.chunks(len(hidden))
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)
