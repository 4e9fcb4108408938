"""Packed sequences: where each token lies, and how attention finds its own sequence.

Sequences are grouped by length and padded inside a group only, so the cost of attention follows the
sum of squared lengths and not the square of the pack. The plan of a pack is made once and shared by
all layers. Legend: N tokens, b sequences of a bucket, T their padded length.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from learner.device import to_device
from learner.mesh import Axis

PADDING = 1.125  # a bucket's longest sequence is at most this many times its shortest


@dataclass
class PackPlan:
    """Where the tokens of a pack lie in their buckets."""

    positions: Tensor  # [N] within each sequence
    gather: Tensor  # [sum b*T] packed token of each bucket cell; padding repeats token 0
    scatter: Tensor  # [N] bucket cell of each packed token
    shapes: list[tuple[int, int]]  # (b, T) of each bucket
    is_dense: bool  # one bucket, no padding: gather and scatter change nothing

    @classmethod
    def of(cls, cu_seqlens: ArrayLike, device: torch.device) -> "PackPlan":
        """The plan of sequences ``cu_seqlens[i]:cu_seqlens[i+1]``; host work, O(N)."""
        offsets = np.asarray(cu_seqlens, dtype=np.int64)
        lengths = np.diff(offsets)
        total = int(offsets[-1])
        positions = np.arange(total) - np.repeat(offsets[:-1], lengths)
        order = np.argsort(lengths, kind="stable")
        order = order[lengths[order] > 0]
        gather, scatter, shapes, cells = [], np.zeros(total, np.int64), [], 0
        start = 0
        while start < len(order):
            shortest = lengths[order[start]]
            end = int(np.searchsorted(lengths[order], max(shortest, int(shortest * PADDING)), side="right"))
            members = order[start:end]
            longest = int(lengths[members].max())
            within = np.arange(longest)
            valid = within[None, :] < lengths[members][:, None]
            tokens = np.where(valid, offsets[:-1][members][:, None] + within[None, :], 0)
            gather.append(tokens.reshape(-1))
            scatter[tokens[valid]] = cells + np.flatnonzero(valid.reshape(-1))
            shapes.append((len(members), longest))
            cells += tokens.size
            start = end
        flat = np.concatenate(gather) if gather else np.zeros(0, np.int64)
        dense = len(shapes) <= 1 and np.array_equal(flat, np.arange(total))
        return cls(to_device(positions, device), to_device(flat, device), to_device(scatter, device), shapes, dense)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention inside each sequence: ``q[N, Hq, D]``, ``k, v[N, Hk, D]`` -> ``[N, Hq*D]``."""
        if not self.is_dense:
            q, k, v = (t.index_select(0, self.gather) for t in (q, k, v))
        if q.is_cuda and q.dtype == torch.float32 and q.shape[1] != k.shape[1]:  # fused, that refuses enable_gqa
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        outputs, start = [], 0
        for count, length in self.shapes:
            cells = slice(start, start + count * length)
            start += count * length
            q_bHTD, k_bHTD, v_bHTD = (t[cells].unflatten(0, (count, length)).transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(
                q_bHTD, k_bHTD, v_bHTD, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
            )
            outputs.append(out.transpose(1, 2).flatten(0, 1).flatten(1))
        if not outputs:
            return q.flatten(1)  # no token, but a place in the graph
        mixed = torch.cat(outputs) if len(outputs) != 1 else outputs[0]
        return mixed if self.is_dense else mixed.index_select(0, self.scatter)


@dataclass
class Pack:
    """One micro-batch as every layer sees it. Under sequence parallelism a rank holds N/tp tokens."""

    token_ids: Tensor  # [N]
    plan: PackPlan
    cos: Tensor  # [N, 1, D]
    sin: Tensor
    tp: Axis
    experts: Tensor | None = None  # [N, layers, k] of the rollout (algorithms.md 7); -1 where not recorded

    @property
    def tokens(self) -> int:
        """N."""
        return len(self.token_ids)

    @property
    def local_rows(self) -> int:
        """Tokens that this rank holds between the parallel layers, the padding of the last ranks included."""
        return -(-self.tokens // self.tp.size)

    @property
    def local(self) -> slice:
        """Which tokens those are, without the padding."""
        start = min(self.tp.rank * self.local_rows, self.tokens)
        return slice(start, min(start + self.local_rows, self.tokens))
