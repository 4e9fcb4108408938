"""Grouped-query attention over packed sequences. Under tp a rank holds some of the heads.

Legend: N tokens, n tokens of this rank, C hidden width, Hq query heads, Hk key heads, D head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learner.model.config import ModelConfig
from learner.model.norm import RMSNorm
from learner.model.packing import Pack
from learner.model.rope import rotate
from learner.parallel.collectives import gather_tokens, scatter_tokens
from learner.products import linear


class Attention(nn.Module):
    """Queries, keys and values from one product; heads are cut over tp."""

    def __init__(self, config: ModelConfig, tp: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads // tp, config.num_key_value_heads // tp
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.widths = (width, kv_width, kv_width)
        self.qkv = nn.Parameter(torch.empty(sum(self.widths), config.hidden_size))
        self.qkv_bias = nn.Parameter(torch.empty(sum(self.widths))) if config.qkv_bias else None
        self.o = nn.Parameter(torch.empty(config.hidden_size, width))
        self.o_bias = nn.Parameter(torch.empty(config.hidden_size)) if config.o_bias else None
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x_nC: Tensor, pack: Pack) -> Tensor:
        """``[n, C] -> [n, C]``."""
        x_NC = gather_tokens(x_nC, pack.tp)[: pack.tokens]
        q, k, v = linear(x_NC, self.qkv, self.qkv_bias).split(self.widths, dim=-1)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        mixed = pack.plan.attend(rotate(q, pack.cos, pack.sin), rotate(k, pack.cos, pack.sin), v)
        out = linear(mixed, self.o)
        out = scatter_tokens(pad_rows(out, pack.local_rows * pack.tp.size), pack.tp)
        return out if self.o_bias is None else out + self.o_bias


def pad_rows(x: Tensor, rows: int) -> Tensor:
    """Zero rows at the end, up to ``rows``."""
    return x if len(x) == rows else F.pad(x, (0, 0, 0, rows - len(x)))
