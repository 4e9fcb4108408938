"""What experts compute: SwiGLU on the rows that were sent to them, and the sum of what comes back.

Assignments are sorted by expert. Gates multiply before the down projection, on the narrow side.
Every row is written once and sums run in a fixed order, so results repeat bit for bit.

::

    x_RC --rows of expert 0, 1, ...--> gate|up --> silu(gate) * up * weight --> down --> sum per row

Legend: R rows, C hidden width, E experts of this rank, k assignments a row, A = R*k assignments,
I expert width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from learner.device import compile_rows
from learner.products import at_once, length_that_comes_again

LOG2_E = math.log2(math.e)
GROUPED_ALIGNMENT = 16  # bytes: grouped GEMMs refuse rows whose stride is not a multiple
BLACKWELL, GROUPED_MAJORS = (10, 0), (9, 10)  # compute capability
Pair = tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor, Tensor]]]  # swiglu and its way back


@dataclass
class Assignment:
    """Which rows go to which expert."""

    source_A: Tensor  # row of each assignment, sorted by expert
    inverse_Rk: Tensor  # sorted place of each row's assignments
    counts_E: Tensor  # assignments to each expert

    @classmethod
    def of(cls, experts_Rk: Tensor, num_experts: int) -> "Assignment":
        """``experts_Rk``: the experts of every row."""
        flat = experts_Rk.reshape(-1)
        order_A = flat.argsort(stable=True)
        inverse = torch.empty_like(order_A)
        inverse[order_A] = torch.arange(len(order_A), device=order_A.device)
        counts = count_each(flat, num_experts)
        return cls(order_A // experts_Rk.shape[1], inverse.view(experts_Rk.shape), counts)

    def sort(self, values_Rk: Tensor) -> Tensor:
        """``[R, k] -> [A]`` in expert order, with gradient."""
        out = values_Rk.new_empty(values_Rk.numel())
        return out.scatter(0, self.inverse_Rk.reshape(-1), values_Rk.reshape(-1))


def count_each(flat: Tensor, size: int) -> Tensor:
    """How often each of 0 to ``size - 1`` is in ``flat [A]``, i64 ``[size]``.

    ``bincount`` looks for the greatest first, and so has the host wait for a GPU.
    """
    if flat.device.type == "cpu":
        return torch.bincount(flat, minlength=size)
    return flat.new_zeros(size).scatter_add_(0, flat, torch.ones_like(flat))


@dataclass
class ExpertSettings:
    """How experts are computed; which way is faster depends on the device (``tools.bench learner``)."""

    grouped: bool = False  # one grouped GEMM for all (GPUs); else each has its turn, its rows in cache (CPUs)
    compiled: bool = False  # torch.compile for what lies between the products


def run_experts(
    x_RC: Tensor, weights_A: Tensor, gate_up_E: Tensor, down_E: Tensor, assignment: Assignment, how: ExpertSettings
) -> Tensor:
    """``[R, C] -> [R, C]``: the weighted sum of each row's experts.

    Without any row no grouped GEMM is asked for: not every kernel takes empty operands.
    """
    pair = _compiled_pair() if how.compiled else (swiglu, swiglu_back)
    way = _AllAtOnce if how.grouped and len(weights_A) else _InTurn
    result: Tensor = way.apply(x_RC, weights_A, gate_up_E, down_E, assignment, pair)  # type: ignore[no-untyped-call]
    return result


def swiglu(both: Tensor, weight: Tensor) -> Tensor:
    """``[n, 2I], [n] -> [n, I]``: silu(gate) * up * weight."""
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate).mul_(up).mul_(weight[:, None])


def swiglu_back(grad: Tensor, both: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``grad[n, I]`` -> gradients of ``both`` and ``weight``, and :func:`swiglu` again. ``grad`` is used up."""
    gate, up = both.chunk(2, dim=-1)
    active = F.silu(gate)
    product = active * up
    grad_weight = (grad * product).sum(dim=1)
    grad.mul_(weight[:, None])
    grad_both = torch.empty_like(both)
    grad_gate, grad_up = grad_both.chunk(2, dim=-1)
    torch.mul(grad, active, out=grad_up)
    grad_gate.copy_(torch.ops.aten.silu_backward(grad.mul_(up), gate))
    return grad_both, product.mul_(weight[:, None]), grad_weight


def _fused(both: Tensor, weight: Tensor) -> Tensor:
    """:func:`swiglu` as torch.compile likes it: one expression, in float32, exponentials in base 2."""
    gate, up = both.float().chunk(2, dim=-1)
    return (gate / (1 + torch.exp2(gate * -LOG2_E)) * up * weight[:, None]).to(both.dtype)


def _fused_back(grad: Tensor, both: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = both.float().chunk(2, dim=-1)
    sigmoid = 1 / (1 + torch.exp2(gate * -LOG2_E))
    active = gate * sigmoid
    product, grad = active * up, grad.float()
    weighted = grad * weight[:, None]
    grad_gate = weighted * up * (sigmoid + active * (1 - sigmoid))
    grad_both = torch.cat((grad_gate.to(both.dtype), (weighted * active).to(both.dtype)), dim=1)  # not rounded later
    return grad_both, (product * weight[:, None]).to(both.dtype), (grad * product).sum(dim=1).to(weight.dtype)


@cache
def _compiled_pair() -> Pair:
    return compile_rows(_fused), compile_rows(_fused_back)


def sum_rows(out_AC: Tensor, inverse_Rk: Tensor) -> Tensor:
    """``[A, C] -> [R, C]``: each row's assignments added up, in order."""
    if inverse_Rk.shape[1] == 1:
        return out_AC.index_select(0, inverse_Rk.squeeze(1))
    if out_AC.device.type == "cpu":  # one pass, no [R, k, C] between
        summed: Tensor = F.embedding_bag(inverse_Rk, out_AC, mode="sum")
        return summed
    rows = out_AC.index_select(0, inverse_Rk.reshape(-1)).view(*inverse_Rk.shape, out_AC.shape[1])
    return rows.sum(dim=1)


class _Turn(NamedTuple):
    """Rows of an expert: ``start`` to ``end``; computed to ``stop``, a length that comes again, over the next one's."""

    expert: int
    start: int
    end: int
    stop: int


def _turns(counts_E: Tensor, like: Tensor) -> list[_Turn]:
    """The experts that have rows, in order: what one computes beyond its own is written over by the next."""
    turns, start = [], 0
    for expert, rows in enumerate(counts_E.tolist()):
        if rows:
            turns.append(_Turn(expert, start, start + rows, start + length_that_comes_again(rows, like)))
            start += rows
    return turns


class _InTurn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RC: Tensor,
        weights_A: Tensor,
        gate_up_E: Tensor,
        down_E: Tensor,
        assignment: Assignment,
        pair: Pair,
    ) -> Tensor:
        turns = _turns(assignment.counts_E, x_RC)
        room = max((turn.stop for turn in turns), default=0)
        source = F.pad(assignment.source_A, (0, room - len(weights_A)))
        weights = F.pad(weights_A.detach(), (0, room - len(weights_A)))
        pre = x_RC.new_empty((room, gate_up_E.shape[1]))
        out = x_RC.new_empty((room, x_RC.shape[1]))
        for expert, start, _, stop in turns:
            rows = x_RC.index_select(0, source[start:stop])
            both = at_once(rows, gate_up_E[expert].T, out=pre[start:stop])
            at_once(pair[0](both, weights[start:stop]), down_E[expert].T, out=out[start:stop])
        ctx.save_for_backward(x_RC, weights_A, gate_up_E, down_E, pre, source)
        ctx.inverse_Rk, ctx.turns, ctx.back = assignment.inverse_Rk, turns, pair[1]
        return sum_rows(out, assignment.inverse_Rk)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:
        x_RC, weights_A, gate_up_E, down_E, pre, source = (tensor.detach() for tensor in ctx.saved_tensors)
        grad_RC, turns = grads[0], ctx.turns
        grad_gate_up, grad_down = torch.empty_like(gate_up_E), torch.empty_like(down_E)
        for expert in {*range(len(gate_up_E))} - {turn.expert for turn in turns}:
            grad_gate_up[expert], grad_down[expert] = 0, 0
        grad_weights = torch.empty_like(weights_A)
        grad_rows = x_RC.new_empty((len(pre), x_RC.shape[1]))
        for expert, start, end, stop in turns:
            grad = grad_RC.index_select(0, source[start:stop])
            weights = F.pad(weights_A[start:end], (0, stop - end))  # what comes behind it adds zeros
            grad_both, hidden, found = ctx.back(at_once(grad, down_E[expert]), pre[start:stop], weights)
            grad_weights[start:end] = found[: end - start]
            at_once(grad.T, hidden, out=grad_down[expert])
            at_once(grad_both.T, x_RC.index_select(0, source[start:stop]), out=grad_gate_up[expert])
            at_once(grad_both, gate_up_E[expert], out=grad_rows[start:stop])
        return sum_rows(grad_rows, ctx.inverse_Rk), grad_weights, grad_gate_up, grad_down, None, None


class _TakeRows(torch.autograd.Function):
    """``x[source]``; goes back as a sum in fixed order, where index_select's would race on a GPU."""

    @staticmethod
    def forward(ctx: Any, x_RC: Tensor, source_A: Tensor, inverse_Rk: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_Rk)
        return x_RC.index_select(0, source_A)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return sum_rows(grads[0], ctx.saved_tensors[0]), None, None


class _SumRows(torch.autograd.Function):
    """:func:`sum_rows`; goes back as a gather."""

    @staticmethod
    def forward(ctx: Any, out_AC: Tensor, source_A: Tensor, inverse_Rk: Tensor) -> Tensor:
        ctx.save_for_backward(source_A)
        return sum_rows(out_AC, inverse_Rk)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


def take_rows(x_RC: Tensor, assignment: Assignment) -> Tensor:
    """``[R, C] -> [A, C]`` in expert order."""
    result: Tensor = _TakeRows.apply(x_RC, assignment.source_A, assignment.inverse_Rk)  # type: ignore[no-untyped-call]
    return result


def combine(out_AC: Tensor, assignment: Assignment) -> Tensor:
    """``[A, C] -> [R, C]``: :func:`sum_rows` with gradient."""
    result: Tensor = _SumRows.apply(out_AC, assignment.source_A, assignment.inverse_Rk)  # type: ignore[no-untyped-call]
    return result


def has_grouped_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a GPU has one kernel for all experts: of bfloat16, on Hopper and Blackwell (torch 2.11 to 2.13).

    Elsewhere torch looks on the host where each expert's rows end, in every product, and makes them one by one.
    """
    return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] in GROUPED_MAJORS


def spoils_idle(device: torch.device) -> bool:
    """Whether grouped GEMMs leave garbage in the weight gradients of idle experts: on Blackwell (pytorch#172439)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= BLACKWELL


def clear_idle(grad_E: Tensor, counts_E: Tensor) -> None:
    """Zeros for experts that had no rows, whatever stood there, in place: ``grad_E [E, ., .]``."""
    grad_E.masked_fill_((counts_E == 0)[:, None, None], 0.0)


class _AllAtOnce(torch.autograd.Function):
    """One grouped GEMM for each of the six products; ``pair`` does what lies between."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RC: Tensor,
        weights_A: Tensor,
        gate_up_E: Tensor,
        down_E: Tensor,
        assignment: Assignment,
        pair: Pair,
    ) -> Tensor:
        ends_E = assignment.counts_E.cumsum(0).to(torch.int32)
        rows = x_RC.index_select(0, assignment.source_A)
        pre = F.grouped_mm(rows, gate_up_E.transpose(1, 2), offs=ends_E)
        out = F.grouped_mm(pair[0](pre, weights_A.detach()), down_E.transpose(1, 2), offs=ends_E)
        ctx.save_for_backward(x_RC, weights_A, gate_up_E, down_E, pre, ends_E)
        ctx.assignment, ctx.back = assignment, pair[1]
        return sum_rows(out, assignment.inverse_Rk)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:
        x_RC, weights_A, gate_up_E, down_E, pre, ends_E = (tensor.detach() for tensor in ctx.saved_tensors)
        source_A = ctx.assignment.source_A
        grad = grads[0].index_select(0, source_A)
        grad_hidden = F.grouped_mm(grad, down_E, offs=ends_E)
        grad_both, hidden, grad_weights = ctx.back(grad_hidden, pre, weights_A)
        grad_down = F.grouped_mm(grad.t(), hidden, offs=ends_E)
        grad_gate_up = F.grouped_mm(grad_both.t(), x_RC.index_select(0, source_A), offs=ends_E)
        if spoils_idle(grad.device):
            clear_idle(grad_down, ctx.assignment.counts_E)
            clear_idle(grad_gate_up, ctx.assignment.counts_E)
        grad_rows = F.grouped_mm(grad_both, gate_up_E, offs=ends_E)
        return sum_rows(grad_rows, ctx.assignment.inverse_Rk), grad_weights, grad_gate_up, grad_down, None, None
