"""Products of matrices on a CPU: by the faster of the libraries that torch carries, in shapes that come again.

::

    a [n, k] @ b [k, m]:  n rows -> pieces of 8 sizes an octave, the largest first -> a product each, into one output

oneDNN (:mod:`common.onednn`) makes code for each shape that it has not met, in 300 to 700 us, and packed sequences
and what an expert is sent are of another length every time: so they are taken in pieces, of sizes that soon are all
known. Where oneDNN is not the faster one, and for small products, these are torch's own.

Legend: n rows, k and m widths.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.onednn import LEAST, by_onednn, onednn_is_faster

SIZE_BITS = 3  # of a piece's length behind the leading one: 8 sizes an octave
FEWEST_ROWS = 4  # for oneDNN, which is no faster with fewer
LONGER_BITS = 5  # of a length that is rounded up: 32 sizes an octave, and 1 row in 64 too many


def _add(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    return out.addmm_(a, b)


def _takes(a: Tensor) -> bool:
    """Whether products of rows ``a`` are made here."""
    if a.device.type != "cpu" or a.ndim != 2:
        return False
    return a.dtype == torch.bfloat16 or (a.dtype == torch.float32 and onednn_is_faster(torch))


def largest_piece(rows: int) -> int:
    """The largest of the known sizes that is no more than ``rows``."""
    return rows & -(1 << max(0, rows.bit_length() - 1 - SIZE_BITS))


def pieces(rows: int, work: int) -> Iterator[tuple[slice, bool]]:
    """``rows`` in pieces of known sizes, the largest first, and whether each is worth oneDNN's start.

    A row takes ``work`` multiplications. What is too little is the last piece.
    """
    start = 0
    while start < rows:
        left = rows - start
        size = largest_piece(left)
        enough = size >= FEWEST_ROWS and size * work >= LEAST
        end = start + size if enough else rows
        yield slice(start, end), enough
        start = end


def length_that_comes_again(rows: int, like: Tensor) -> int:
    """``rows``, or a few more where products of ``like``'s kind are faster in shapes that were met before."""
    if not _takes(like):
        return rows
    step = 1 << max(0, rows.bit_length() - 1 - LONGER_BITS)
    return -(-rows // step) * step


def at_once(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a[n, k] @ b[k, m]``, into ``out[n, m]``, in one piece, for shapes that come again; without gradient."""
    if out is None:
        out = a.new_empty(len(a), b.shape[1])
    _multiply(torch.mm, a, b, out, _takes(a) and len(a) >= FEWEST_ROWS and a.numel() * b.shape[1] >= LEAST)
    return out


def mm(a: Tensor, b: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """``a[n, k] @ b[k, m]``, into ``out[n, m]`` or on top of it; without gradient."""
    out, add = (a.new_empty(len(a), b.shape[1]), False) if out is None else (out, add)
    multiply = _add if add else torch.mm
    if not _takes(a):
        return multiply(a, b, out=out)
    for part, enough in pieces(len(a), b.numel()):
        _multiply(multiply, a[part], b, out[part], enough)
    return out


def outer(a: Tensor, b: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """``a[n, k].T @ b[n, m]``, the sum over rows, into ``out[k, m]`` or on top of it; without gradient."""
    out, add = (a.new_empty(a.shape[1], b.shape[1]), False) if out is None else (out, add)
    if not _takes(a) or a.dtype != torch.float32 or not len(a):  # sums of rounded sums would be rounded again
        return _add(a.T, b, out) if add else torch.mm(a.T, b, out=out)
    for part, enough in pieces(len(a), out.numel()):
        _multiply(_add if add or part.start else torch.mm, a[part].T, b[part], out, enough)
    return out


def _multiply(multiply: Callable[..., Tensor], a: Tensor, b: Tensor, out: Tensor, enough: bool) -> None:
    if enough and a.dtype == torch.float32:
        by_onednn(torch, lambda: multiply(a, b, out=out))
    else:
        multiply(a, b, out=out)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        if bias is None:
            return mm(x, weight.T)
        return mm(x, weight.T, out=bias.repeat(len(x), 1), add=True)  # rounded once

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x, weight), grad = ctx.saved_tensors, grads[0]
        wanted = ctx.needs_input_grad
        return (
            mm(grad, weight) if wanted[0] else None,
            outer(grad, x) if wanted[1] else None,
            grad.sum(dim=0) if wanted[2] else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x[n, k] @ weight[m, k].T + bias[m]``, with gradient."""
    if not _takes(x):
        return F.linear(x, weight, bias)
    result: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return result
