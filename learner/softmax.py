"""What a softmax needs of rows of base-2 logits, and the greatest of each row: in as few passes as will do.

A pass over logits is bound by memory or by exponentials, according to the device and the way; ``tools.bench
learner`` compares them. Legend: n rows, v logits of a row, k wanted of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from learner.device import compile_rows

CACHE_ELEMENTS = 1 << 19  # logits worked on at once on a CPU: 2 MB, so that later passes find them in cache
MODERATE = (-16.0, 32.0)  # a greatest base-2 logit between these needs no shift before exp2
FEW_ROWS = 8  # below that, a dot product a row is faster than a product and its sums
BLOCK, FINE_BLOCK = 64, 16  # a row's greatest k lie in the k blocks with the greatest maxima
LANES = 16  # of the compiled pass: as many blocks side by side as a vector has elements
BIAS, MANTISSA_BITS = 127, 23  # of a float32
EXP2 = (  # 2^f for |f| <= 1/2, the highest power first: the polynomial of least relative error, 7.5e-8
    1.3276469524346978e-3, 9.675541314872138e-3, 5.550713281131956e-2,
    2.402211972432657e-1, 6.931469670600837e-1, 1.0000000716545343,
)  # fmt: skip


@dataclass(frozen=True)
class Maxima:
    """The greatest of each block of a row; ``lanes`` blocks lie side by side, their elements taking turns."""

    values: Tensor  # [n, blocks]
    block: int = BLOCK  # elements
    lanes: int = 1

    def whole(self, width: int) -> int:
        """How many of ``width`` elements lie in blocks."""
        return width - width % (self.block * self.lanes)

    def columns(self, blocks: Tensor) -> Tensor:
        """Where the elements of ``blocks [n, k]`` are in their rows, ``[n, k * block]``."""
        first = blocks // self.lanes * (self.block * self.lanes) + blocks % self.lanes
        return (first[:, :, None] + torch.arange(self.block, device=blocks.device) * self.lanes).flatten(1)


@dataclass(frozen=True)
class Sums:
    """Of each row x, with z = x - shift."""

    shift: Tensor  # [n]
    sums: Tensor  # [n] of 2^z
    products: Tensor  # [n] of z 2^z
    maxima: Maxima | None = None


def sums_of(logits: Tensor, *, keep: bool, maxima: bool, compiled: bool) -> Sums:
    """Sums over ``logits [n, v]``, float32; with ``keep`` they become ``2^z``.

    Maxima are there if they were asked for, or came along.
    """
    if logits.is_cuda:
        return _at_once(logits, keep, compiled)
    if not compiled or not len(logits):
        return _in_cache(logits, keep, maxima)
    if keep or logits.shape[1] < BLOCK * LANES:
        return _at_once(logits, keep, compiled)
    return _in_lanes(logits)


def _is_moderate(greatest: Tensor) -> bool:
    """Whether the exponentials of rows with these greatest logits are in range as they are."""
    least, most = torch.aminmax(greatest)
    return bool(least > MODERATE[0] and most < MODERATE[1])


def _with_rest(greatest: Tensor, rest: Tensor) -> Tensor:
    """``greatest [n]`` of the blocks and of the ``rest [n, r]`` that is in none."""
    return torch.maximum(greatest, rest.amax(dim=1)) if rest.shape[1] else greatest


# ---- in cache -----------------------------------------------------------------------------------


def _in_cache(logits: Tensor, keep: bool, maxima: bool) -> Sums:
    """A few rows at a time, so that all passes but the first find them in cache. Rows whose greatest logit
    is moderate are not shifted."""
    n, width = logits.shape
    whole = width - width % BLOCK
    out = torch.zeros((3, n))
    blocks = torch.empty((n, whole // BLOCK)) if maxima and whole else None
    step = max(1, CACHE_ELEMENTS // width)
    room = torch.empty((min(step, n), width))
    for start in range(0, n, step):
        z = logits[start : start + step]
        end = start + len(z)
        shift, sums, products = out[0, start:end], out[1, start:end], out[2, start:end]
        if blocks is None:
            top = z.amax(dim=1)
        else:
            part = torch.amax(z[:, :whole].unflatten(1, (-1, BLOCK)), dim=2, out=blocks[start:end])
            top = _with_rest(part.amax(dim=1), z[:, whole:])
        if not _is_moderate(top):
            shift.copy_(top)
            if keep:
                z.sub_(top[:, None])
            else:
                z = z - top[:, None]
        e = torch.exp2(z, out=room[: len(z)])
        torch.sum(e, dim=1, out=sums)
        if len(z) <= FEW_ROWS:
            for row in range(len(z)):
                torch.dot(z[row], e[row], out=products[row])
        else:
            torch.sum(z * e, dim=1, out=products)
        if keep:
            z.copy_(e)
    return Sums(out[0], out[1], out[2], None if blocks is None else Maxima(blocks))


# ---- at once ------------------------------------------------------------------------------------


def _at_once(logits: Tensor, keep: bool, compiled: bool) -> Sums:
    shift, sums, products, blocks, e = (_compiled_sums() if compiled else _sums_in_place)(logits, keep)
    if keep and e is not None:
        logits.copy_(e)
    return Sums(shift, sums, products, None if blocks is None else Maxima(blocks))


def _all_sums(x: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """As torch.compile likes it."""
    shift, blocks = _greatest(x)
    z = x - shift[:, None]
    e = torch.exp2(z)
    return shift, e.sum(dim=1), (e * z).sum(dim=1), blocks, e if keep else None


def _sums_in_place(x: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """:func:`_all_sums` step by step: beside x there is one tensor of its size, or two where x is not to change."""
    shift, blocks = _greatest(x)
    z = x.sub_(shift[:, None]) if keep else x - shift[:, None]
    e = torch.exp2(z)
    return shift, e.sum(dim=1), z.mul_(e).sum(dim=1), blocks, e if keep else None


def _greatest(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Of each row and, where a row holds one, of each of its blocks."""
    width = x.shape[1]
    whole = width - width % BLOCK
    blocks = x[:, :whole].unflatten(1, (-1, BLOCK)).amax(dim=2) if whole else None
    return x.amax(dim=1) if blocks is None else _with_rest(blocks.amax(dim=1), x[:, whole:]), blocks


@cache
def _compiled_sums() -> Callable[[Tensor, bool], tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]:
    return compile_rows(_all_sums)


# ---- in lanes -----------------------------------------------------------------------------------


def _in_lanes(logits: Tensor) -> Sums:
    """One pass of a CPU's vectors, none of them added up within itself; where logits must be shifted, two more."""
    greatest, sums, products = _compiled_lanes()(logits)
    rest = logits[:, greatest.shape[1] * BLOCK * LANES :]
    if not _is_moderate(_with_rest(greatest.amax(dim=(1, 2)), rest)):
        return _at_once(logits, False, True)
    e = torch.exp2(rest)
    total = sums.sum(dim=(1, 2)) + e.sum(dim=1)
    products = products.sum(dim=(1, 2)) + e.mul_(rest).sum(dim=1)
    return Sums(torch.zeros(len(logits)), total, products, Maxima(greatest.flatten(1), BLOCK, LANES))


def _lanes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each block the greatest, the sum of ``2^x`` and that of ``x 2^x``, ``[n, blocks / LANES, LANES]`` each."""
    chunks = x.shape[1] // (BLOCK * LANES)
    y = x[:, : chunks * BLOCK * LANES].unflatten(1, (chunks, BLOCK, LANES))
    e = _exp2(y)
    return y.amax(dim=2), e.sum(dim=2), (e * y).sum(dim=2)


def _exp2(x: Tensor) -> Tensor:
    """``2^x`` to 3e-7, for finite x below 128; what would be denormal is 0. Compiled, in half the library's time."""
    exponent = torch.round(x)
    rest = x - exponent
    power = EXP2[0] * rest + EXP2[1]
    for coefficient in EXP2[2:]:
        power = power * rest + coefficient
    return power * ((exponent.to(torch.int32) + BIAS).clamp_min(0) << MANTISSA_BITS).view(torch.float32)


@cache
def _compiled_lanes() -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    return compile_rows(_lanes, **{"cpp.enable_floating_point_contract_flag": "fast"})  # a * b + c rounds once


# ---- the greatest -------------------------------------------------------------------------------


def top_of_rows(x: Tensor, k: int, maxima: Maxima | None = None) -> tuple[Tensor, Tensor]:
    """``x.topk(k, dim=1)``: one pass for the maxima of blocks, then only the best k blocks are looked at.

    Exact; among equal values another index may be chosen than torch's. ``maxima`` saves that pass.
    """
    width = x.shape[1]
    if maxima is None or maxima.values.shape[1] < k:
        lanes = width // FINE_BLOCK
        if lanes < 2 * k:
            values, ids = x.topk(k, dim=1)
            return values, ids
        maxima = Maxima(x[:, : FINE_BLOCK * lanes].unflatten(1, (FINE_BLOCK, lanes)).amax(dim=1), FINE_BLOCK, lanes)
    _, best = top_of_rows(maxima.values, k)
    columns, whole = maxima.columns(best), maxima.whole(width)
    inside = columns.shape[1]
    if whole == width:
        values, at = top_of_rows(x.gather(1, columns), k)
        return values, columns.gather(1, at)
    values, at = top_of_rows(torch.cat((x.gather(1, columns), x[:, whole:]), dim=1), k)
    return values, torch.where(at < inside, columns.gather(1, at.clamp_max(inside - 1)), at - inside + whole)
