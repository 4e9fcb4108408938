"""The decoder, over packed sequences: ids in, final hidden states out.

The head is not applied here: :mod:`learner.logprobs` does that in chunks, so ``[N, vocab]`` never
exists. Legend: N tokens, C hidden width, L sparse layers, E experts.
"""

from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from learner.model.attention import Attention, PackPlan, rotary
from learner.model.config import ModelConfig
from learner.model.moe import DenseMLP, RouterStats, SparseMLP
from learner.model.norm import RMSNorm


@dataclass
class Forward:
    """One forward pass."""

    hidden: Tensor  # [N, C] after the final norm
    prob_sums_LE: Tensor  # router probabilities summed over tokens, with gradient
    counts_LE: Tensor  # assignments to each expert, no gradient


class Layer(nn.Module):
    """Attention, then experts or a dense feed-forward, each behind a norm."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: nn.Module = SparseMLP(config) if config.is_sparse(index) else DenseMLP(config)

    def forward(self, x_NC: Tensor, plan: PackPlan, cos: Tensor, sin: Tensor) -> tuple[Tensor, RouterStats | None]:
        """``[N, C] -> [N, C]``."""
        x_NC = x_NC + self.self_attn(self.input_layernorm(x_NC), plan, cos, sin)
        mixed, stats = self.mlp(self.post_attention_layernorm(x_NC))
        return x_NC + mixed, stats


class Decoder(nn.Module):
    """Qwen3-MoE (or dense Qwen3); parameters uninitialised until :func:`learner.hf.load_hf`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        )

    @property
    def head(self) -> Tensor:
        """The output embedding ``[V, C]``."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        return self.embed_tokens.weight.device

    def use_grouped_experts(self, grouped: bool) -> None:
        """Grouped GEMM for the experts (the choice on GPUs), or one slice an expert (CPU)."""
        for module in self.modules():
            if isinstance(module, SparseMLP):
                module.grouped = grouped

    def uniform_expert_fraction(self) -> Tensor:
        """``[L, E]`` of an evenly loaded router: the balance loss starts from it."""
        shape = (self.config.sparse_layers, self.config.num_experts)
        return torch.full(shape, 1.0 / max(1, self.config.num_experts), device=self.device)

    def hidden(self, token_ids: Tensor, cu_seqlens: ArrayLike) -> Forward:
        """``token_ids[N]`` of sequences ``cu_seqlens[i]:cu_seqlens[i+1]``; N may be 0."""
        shape = (self.config.sparse_layers, self.config.num_experts)
        if len(token_ids) == 0:
            zeros = torch.zeros(shape, device=self.device)
            nothing = self.embed_tokens(token_ids)
            return Forward(nothing, zeros + nothing.sum(), torch.zeros(shape, dtype=torch.int64, device=self.device))
        plan = PackPlan.of(cu_seqlens, self.device)
        cos, sin = rotary(plan.positions, self.config.head_dim, self.config.rope_theta)
        x_NC = self.embed_tokens(token_ids)
        cos, sin = cos.to(x_NC.dtype), sin.to(x_NC.dtype)
        found: list[RouterStats] = []
        for layer in self.layers:
            x_NC, stats = layer(x_NC, plan, cos, sin)
            if stats is not None:
                found.append(stats)
        if not found:
            empty = torch.zeros(shape, device=self.device)
            return Forward(self.norm(x_NC), empty, empty.long())
        return Forward(
            self.norm(x_NC),
            torch.stack([s.prob_sums_E for s in found]),
            torch.stack([s.counts_E for s in found]),
        )
