"""The decoder, over packed sequences: ids in, final hidden states out.

The head is not applied here: :mod:`learner.logprobs` does that in chunks, so ``[N, vocab]`` never
exists. A rank holds the layers of its pipeline stage, and of each its share over tp and ep.
Legend: N tokens, n = N/tp tokens of this rank, C hidden width, L sparse layers, E experts.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from learner.mesh import Mesh, held_rows, single, spread
from learner.model.attention import Attention, pad_rows
from learner.model.config import ModelConfig
from learner.model.experts import GROUPED_ALIGNMENT, ExpertSettings, has_grouped_kernel
from learner.model.moe import DenseMLP, RouterStats, SparseMLP
from learner.model.norm import RMSNorm
from learner.model.packing import Pack, PackPlan
from learner.model.rope import rotary
from learner.parallel.collectives import gather_tokens, scatter_tokens


@dataclass
class Routing:
    """All routers' statistics over this rank's tokens and layers; rows of other stages are zero."""

    prob_sums_LE: Tensor  # with gradient
    z_sums_L: Tensor  # with gradient
    counts_LE: Tensor  # no gradient
    replayed: Tensor
    rerouted: Tensor


class Layer(nn.Module):
    """Attention, then experts or a dense feed-forward, each behind a norm."""

    def __init__(self, config: ModelConfig, index: int, mesh: Mesh) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, mesh.tp.size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        sparse = config.is_sparse(index)
        self.sparse_index = sum(config.is_sparse(i) for i in range(index))
        self.mlp: nn.Module = SparseMLP(config, mesh.experts) if sparse else DenseMLP(config, mesh.tp.size)

    def forward(self, x_nC: Tensor, pack: Pack) -> tuple[Tensor, RouterStats | None]:
        """``[n, C] -> [n, C]``."""
        x_nC = x_nC + self.self_attn(self.input_layernorm(x_nC), pack)
        mixed, stats = self.mlp(self.post_attention_layernorm(x_nC), self.sparse_index, pack)
        return x_nC + mixed, stats


class Decoder(nn.Module):
    """One of the families of :mod:`learner.model.config`; uninitialised until :func:`learner.hf.load_hf`."""

    def __init__(self, config: ModelConfig, mesh: Mesh | None = None, *, recompute: bool = False) -> None:
        """``recompute`` keeps only each layer's input for the backward pass (activation checkpointing)."""
        super().__init__()
        mesh = mesh or single()
        config.check_mesh(mesh.sizes)
        self.config, self.mesh, self.recompute = config, mesh, recompute
        first, last = spread(config.num_hidden_layers, mesh.pp.size, mesh.pp.rank)
        shape = (config.vocab_size // mesh.tp.size, config.hidden_size)
        needs_table = mesh.is_first_stage or (mesh.is_last_stage and config.tie_word_embeddings)
        self.embed = nn.Parameter(torch.empty(shape)) if needs_table else None
        self.layers = nn.ModuleDict({str(i): Layer(config, i, mesh) for i in range(first, last)})
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps) if mesh.is_last_stage else None
        untied = mesh.is_last_stage and not config.tie_word_embeddings
        self.lm_head = nn.Parameter(torch.empty(shape)) if untied else None

    @property
    def head(self) -> Tensor:
        """The output embedding ``[V/tp, C]``; on the last stage."""
        table = self.embed if self.lm_head is None else self.lm_head
        assert table is not None, "the head lies on the last stage"
        return table

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters, and of what stages hand on."""
        return next(self.parameters()).dtype

    def use_experts(self, how: ExpertSettings) -> None:
        """How all layers compute their experts."""
        for module in self.modules():
            if isinstance(module, SparseMLP):
                module.how = how

    def move_expert_bias(self, counts_LE: Tensor, rate: float) -> None:
        """After a step: every router's bias, by the whole batch's loads (algorithm 1 of 2408.15664)."""
        for layer in self.layers.values():
            assert isinstance(layer, Layer)
            if isinstance(layer.mlp, SparseMLP):
                layer.mlp.move_bias(counts_LE[layer.sparse_index], rate)

    def prepare(self, *, compiled: bool) -> None:
        """Choose what is fastest on the parameters' device; ``compiled`` takes torch.compile where it helps."""
        for module in self.modules():
            if isinstance(module, SparseMLP) and module.bias is not None:
                module.bias = module.bias.float()
        widths = (self.config.hidden_size, self.config.moe_intermediate_size)
        aligned = all(width * self.dtype.itemsize % GROUPED_ALIGNMENT == 0 for width in widths)
        on_gpu = self.device.type == "cuda"
        grouped = aligned and (has_grouped_kernel(self.device, self.dtype) if on_gpu else compiled)
        self.use_experts(ExpertSettings(grouped=grouped, compiled=compiled))

    def uniform_expert_fraction(self) -> Tensor:
        """``[L, E]`` of an evenly loaded router: the balance loss starts from it."""
        shape = (len(self.config.sparse_layers), self.config.num_experts)
        return torch.full(shape, 1.0 / max(1, self.config.num_experts), device=self.device)

    def pack(self, token_ids: Tensor, cu_seqlens: ArrayLike, experts: Tensor | None = None) -> Pack:
        """``token_ids[N]`` of sequences ``cu_seqlens[i]:cu_seqlens[i+1]``; N may be 0.

        ``experts[N, L, k]`` (integers) replays the rollout's routing; -1 where there is no record.
        """
        experts = None if experts is None else experts.long()
        plan = PackPlan.of(cu_seqlens, token_ids.device)
        cos, sin = rotary(plan.positions, self.config.rope, self.config.head_dim)
        return Pack(token_ids, plan, cos.to(self.dtype), sin.to(self.dtype), self.mesh.tp, experts)

    def embed_tokens(self, pack: Pack) -> Tensor:
        """``[n, C]``: each rank looks up its part of the vocabulary."""
        assert self.embed is not None, "the embedding lies on the first stage"
        held, tp = len(self.embed), self.mesh.tp
        if tp.size == 1:
            return F.embedding(pack.token_ids, self.embed)
        local, mine = held_rows(pack.token_ids, held, tp)
        rows = F.embedding(local, self.embed) * mine[:, None].to(self.dtype)
        return scatter_tokens(pad_rows(rows, pack.local_rows * tp.size), tp)

    def stage(self, pack: Pack, x_nC: Tensor | None) -> tuple[Tensor, Routing]:
        """This stage's layers on ``x_nC`` (None: embed first); the last stage ends with the final norm."""
        x = self.embed_tokens(pack) if x_nC is None else x_nC
        found: dict[int, RouterStats] = {}
        for layer in self.layers.values():
            assert isinstance(layer, Layer)
            if self.recompute and torch.is_grad_enabled():
                x, stats = checkpoint(layer, x, pack, use_reentrant=False, preserve_rng_state=False)
            else:
                x, stats = layer(x, pack)
            if stats is not None:
                found[layer.sparse_index] = stats
        if self.norm is not None:
            x = self.norm(x)
        return x, self._routing(found)

    def _routing(self, found: dict[int, RouterStats]) -> Routing:
        layers, experts = len(self.config.sparse_layers), self.config.num_experts
        zero_E, zero = torch.zeros(experts, device=self.device), torch.zeros((), device=self.device)
        none = RouterStats(zero_E, zero, zero_E.long(), zero, zero)
        rows = [found.get(i, none) for i in range(layers)]
        if not rows:
            return Routing(zero_E.view(0, experts), zero_E[:0], zero_E.long().view(0, experts), zero, zero)
        return Routing(
            torch.stack([r.prob_sums_E for r in rows]),
            torch.stack([r.z_sum for r in rows]),
            torch.stack([r.counts_E for r in rows]),
            torch.stack([r.replayed for r in rows]).sum(),
            torch.stack([r.rerouted for r in rows]).sum(),
        )

    def whole(self, x_nC: Tensor, pack: Pack) -> Tensor:
        """``[n, C]`` of each tp rank -> ``[N, C]`` on all of them."""
        return gather_tokens(x_nC, self.mesh.tp)[: pack.tokens]

    def hidden(self, token_ids: Tensor, cu_seqlens: ArrayLike, experts: Tensor | None = None) -> Tensor:
        """Final hidden states ``[N, C]``, where the whole depth lies on this rank (pp = 1)."""
        pack = self.pack(token_ids, cu_seqlens, experts)
        return self.whole(self.stage(pack, None)[0], pack)
