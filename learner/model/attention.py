"""Causal attention over packed sequences, without a ``[N, N]`` mask.

Sequences are grouped by length and padded inside a group only, so the cost follows the sum of
squared lengths and not the square of the pack. The plan of a pack is made once and shared by all
layers. Legend: N tokens, Hq query heads, Hk key heads, D head width, b sequences of a bucket, T
their padded length.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn

from learner.model.config import ModelConfig
from learner.model.norm import RMSNorm

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
        to = torch.from_numpy
        return cls(to(positions).to(device), to(flat).to(device), to(scatter).to(device), shapes, dense)


def rotary(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin ``[N, 1, D]`` of rotary embeddings (transformers' half-split layout)."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float()[:, None] * (1.0 / theta**exponent)[None, :]
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos(), angles.sin()


def rotate(x_NHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embeddings."""
    first, second = x_NHD.chunk(2, dim=-1)
    return x_NHD * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x_NC: Tensor, plan: PackPlan, cos: Tensor, sin: Tensor) -> Tensor:
        """``[N, C] -> [N, C]``."""
        q = rotate(self.q_norm(self.q_proj(x_NC).unflatten(-1, (self.heads, -1))), cos, sin)
        k = rotate(self.k_norm(self.k_proj(x_NC).unflatten(-1, (self.kv_heads, -1))), cos, sin)
        v = self.v_proj(x_NC).unflatten(-1, (self.kv_heads, -1))
        if not plan.is_dense:
            q, k, v = (t.index_select(0, plan.gather) for t in (q, k, v))
        outputs, start = [], 0
        for count, length in plan.shapes:
            cells = slice(start, start + count * length)
            start += count * length
            q_bHTD, k_bHTD, v_bHTD = (t[cells].unflatten(0, (count, length)).transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(
                q_bHTD, k_bHTD, v_bHTD, is_causal=True, enable_gqa=self.heads != self.kv_heads
            )
            outputs.append(out.transpose(1, 2).flatten(0, 1).flatten(1))
        mixed = torch.cat(outputs) if len(outputs) != 1 else outputs[0]
        if not plan.is_dense:
            mixed = mixed.index_select(0, plan.scatter)
        projected: Tensor = self.o_proj(mixed)
        return projected
