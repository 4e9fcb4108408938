"""Collectives with gradients. Each is the identity on an axis of one rank.

The convention: a loss is the sum of what the ranks compute, and a tensor that all ranks of an axis
hold has a gradient on each that is a share of the whole. So a gather goes back as a reduce-scatter
and a reduce-scatter as a gather, and nothing is ever divided.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from learner.mesh import Axis

# torch 2.13 gave these two new names and warns of the old ones; 2.11 has the old ones only.
gather_into: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_into: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _gather(x: Tensor, axis: Axis) -> Tensor:
    out = x.new_empty((x.shape[0] * axis.size, *x.shape[1:]))
    gather_into(out, x.contiguous(), group=axis.group)
    return out


def _reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    out = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    reduce_scatter_into(out, x.contiguous(), group=axis.group)
    return out


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _gather(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grads[0], ctx.axis), None


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _reduce_scatter(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather(grads[0], ctx.axis), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], axis: Axis) -> Tensor:
        ctx.send, ctx.receive, ctx.axis = send, receive, axis
        return _all_to_all(x, send, receive, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grads[0], ctx.receive, ctx.send, ctx.axis), None, None, None


def _all_to_all(x: Tensor, send: list[int], receive: list[int], axis: Axis) -> Tensor:
    out = x.new_empty((sum(receive), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=axis.group)
    return out


def gather_tokens(x: Tensor, axis: Axis) -> Tensor:
    """``[n, ...] -> [n * size, ...]`` in rank order; goes back as a reduce-scatter."""
    if axis.size == 1:
        return x
    result: Tensor = _GatherTokens.apply(x, axis)  # type: ignore[no-untyped-call]
    return result


def scatter_tokens(x: Tensor, axis: Axis) -> Tensor:
    """``[n * size, ...] -> [n, ...]``, summed over the ranks; goes back as a gather."""
    if axis.size == 1:
        return x
    result: Tensor = _ScatterTokens.apply(x, axis)  # type: ignore[no-untyped-call]
    return result


def exchange(x: Tensor, send: list[int], receive: list[int], axis: Axis) -> Tensor:
    """Rows to and from every rank: ``send[r]`` rows go to rank r, ``receive[r]`` come from it."""
    if axis.size == 1:
        return x
    result: Tensor = _Exchange.apply(x, send, receive, axis)  # type: ignore[no-untyped-call]
    return result


def exchange_counts(counts: Tensor, axis: Axis) -> Tensor:
    """``counts[size, ...]`` by receiver -> by sender; no gradient."""
    if axis.size == 1:
        return counts
    out = torch.empty_like(counts)
    dist.all_to_all_single(out, counts.contiguous(), group=axis.group)
    return out


def sum_over(x: Tensor, axis: Axis) -> Tensor:
    """All-reduce in place; no gradient."""
    if axis.size > 1:
        dist.all_reduce(x, group=axis.group)
    return x


def max_over(x: Tensor, axis: Axis) -> Tensor:
    """All-reduce in place; no gradient."""
    if axis.size > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=axis.group)
    return x
