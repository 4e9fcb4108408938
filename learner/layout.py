"""The names of a model's tensors, and which rank holds which part of each.

Weights are known by their Hugging Face names wherever they leave a rank: files, checkpoints and
the wire. Our parameters are stacked (q, k and v; gate and up; all experts), so a name stands for a
*view* of a parameter, and every view is contiguous in it. A checkpoint of one mesh is read, and a
version is gathered, by names and parts alone.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from common.weights import EXPERT_BIAS, ITEM_BYTES
from learner.mesh import Mesh, spread
from learner.model.config import ModelConfig
from learner.model.decoder import Decoder, Layer
from learner.model.moe import DenseMLP, SparseMLP

BIAS = f"mlp.gate.{EXPERT_BIAS}"
FIRST, LAST = -1, -2  # in place of a layer: with the embedding, with the head


@dataclass(frozen=True)
class Place:
    """One tensor of the model."""

    name: str
    shape: tuple[int, ...]  # whole
    layer: int  # or FIRST, LAST
    dim: int | None = None  # what tp cuts; None: every tp rank holds it whole
    expert: int | None = None
    optional: bool = False  # zeros where a checkpoint has none; not trained by gradient; always float32

    def owners(self, config: ModelConfig, mesh: Mesh) -> list[int]:
        """The ranks that answer for it, in the order of its parts along ``dim``."""
        pp = _stage_of(self.layer, config, mesh)
        if self.expert is not None:
            ep, tp = divmod(self.expert // (config.num_experts // mesh.experts.size), mesh.tp.size)
            return [mesh.rank_of(pp=pp, ep=ep, tp=tp)]
        parts = 1 if self.dim is None else mesh.tp.size
        return [mesh.rank_of(pp=pp, tp=tp) for tp in range(parts)]

    def part_shape(self, parts: int) -> tuple[int, ...]:
        """The shape of one of ``parts`` parts along ``dim``."""
        if self.dim is None:
            return self.shape
        return tuple(n // parts if i == self.dim else n for i, n in enumerate(self.shape))


def _stage_of(layer: int, config: ModelConfig, mesh: Mesh) -> int:
    if layer in (FIRST, LAST):
        return 0 if layer == FIRST else mesh.pp.size - 1
    for stage in range(mesh.pp.size):
        first, last = spread(config.num_hidden_layers, mesh.pp.size, stage)
        if first <= layer < last:
            return stage
    raise AssertionError(f"layer {layer} lies on no stage")


def places(config: ModelConfig) -> list[Place]:
    """Every tensor, in the order in which files and the wire carry them; a tied head has no name."""
    table = (config.vocab_size, config.hidden_size)
    found = [Place("model.embed_tokens.weight", table, FIRST, 0)]
    for layer in range(config.num_hidden_layers):
        found += _layer_places(config, layer)
    found.append(Place("model.norm.weight", (config.hidden_size,), LAST))
    if not config.tie_word_embeddings:
        found.append(Place("lm_head.weight", table, LAST, 0))
    return found


def nbytes_of(config: ModelConfig, dtype: str) -> int:
    """Bytes of all tensors of a model in ``dtype``."""
    return sum(math.prod(p.shape) * ITEM_BYTES["float32" if p.optional else dtype] for p in places(config))


def _layer_places(config: ModelConfig, layer: int) -> list[Place]:
    hidden, head = config.hidden_size, config.head_dim
    width, kv_width = config.num_attention_heads * head, config.num_key_value_heads * head

    def place(name: str, *shape: int, dim: int | None = None, expert: int | None = None) -> Place:
        return Place(f"model.layers.{layer}.{name}", shape, layer, dim, expert)

    found = [place("input_layernorm.weight", hidden)]
    for letter, rows in (("q", width), ("k", kv_width), ("v", kv_width)):
        found.append(place(f"self_attn.{letter}_proj.weight", rows, hidden, dim=0))
        if config.qkv_bias:
            found.append(place(f"self_attn.{letter}_proj.bias", rows, dim=0))
    found.append(place("self_attn.o_proj.weight", hidden, width, dim=1))
    if config.o_bias:
        found.append(place("self_attn.o_proj.bias", hidden))
    if config.qk_norm:
        found += [place(f"self_attn.{letter}_norm.weight", head) for letter in "qk"]
    found.append(place("post_attention_layernorm.weight", hidden))
    if not config.is_sparse(layer):
        inner = config.intermediate_size
        for letter in ("gate", "up"):
            found.append(place(f"mlp.{letter}_proj.weight", inner, hidden, dim=0))
            if config.mlp_bias:
                found.append(place(f"mlp.{letter}_proj.bias", inner, dim=0))
        found.append(place("mlp.down_proj.weight", hidden, inner, dim=1))
        if config.mlp_bias:
            found.append(place("mlp.down_proj.bias", hidden))
        return found
    found.append(place("mlp.gate.weight", config.num_experts, hidden))
    if config.expert_bias:
        name = f"model.layers.{layer}.{BIAS}"
        found.append(Place(name, (config.num_experts,), layer, optional=True))
    inner = config.moe_intermediate_size
    for expert in range(config.num_experts):
        found.append(place(f"mlp.experts.{expert}.gate_proj.weight", inner, hidden, expert=expert))
        found.append(place(f"mlp.experts.{expert}.up_proj.weight", inner, hidden, expert=expert))
        found.append(place(f"mlp.experts.{expert}.down_proj.weight", hidden, inner, expert=expert))
    if config.shared_expert_intermediate_size:
        inner = config.shared_expert_intermediate_size
        found.append(place("mlp.shared_expert.gate_proj.weight", inner, hidden))
        found.append(place("mlp.shared_expert.up_proj.weight", inner, hidden))
        found.append(place("mlp.shared_expert.down_proj.weight", hidden, inner))
        found.append(place("mlp.shared_expert_gate.weight", 1, hidden))
    return found


def views(model: Decoder) -> dict[str, Tensor]:
    """This rank's part of every tensor it holds: views of the parameters, without gradient."""
    found: dict[str, Tensor] = {}
    if model.embed is not None:
        found["model.embed_tokens.weight"] = model.embed.data
    for index, layer in model.layers.items():
        assert isinstance(layer, Layer)
        for name, tensor in _layer_views(layer):
            found[f"model.layers.{index}.{name}"] = tensor
    if model.norm is not None:
        found["model.norm.weight"] = model.norm.weight.data
    if model.lm_head is not None:
        found["lm_head.weight"] = model.lm_head.data
    return found


def _layer_views(layer: Layer) -> Iterator[tuple[str, Tensor]]:
    attention = layer.self_attn
    yield "input_layernorm.weight", layer.input_layernorm.weight.data
    yield "post_attention_layernorm.weight", layer.post_attention_layernorm.weight.data
    for kind, stacked in (("weight", attention.qkv), ("bias", attention.qkv_bias)):
        if stacked is not None:
            for letter, part in zip("qkv", stacked.data.split(attention.widths), strict=True):
                yield f"self_attn.{letter}_proj.{kind}", part
    yield "self_attn.o_proj.weight", attention.o.data
    if attention.o_bias is not None:
        yield "self_attn.o_proj.bias", attention.o_bias.data
    if attention.q_norm is not None and attention.k_norm is not None:
        yield "self_attn.q_norm.weight", attention.q_norm.weight.data
        yield "self_attn.k_norm.weight", attention.k_norm.weight.data
    mlp = layer.mlp
    if isinstance(mlp, SparseMLP):
        yield from _sparse_views(mlp)
    elif isinstance(mlp, DenseMLP):
        yield from _swiglu_views("mlp.", mlp.gate_up.data, mlp.down.data)
        if mlp.gate_up_bias is not None and mlp.down_bias is not None:
            gate, up = mlp.gate_up_bias.data.chunk(2)
            yield from (
                ("mlp.gate_proj.bias", gate),
                ("mlp.up_proj.bias", up),
                ("mlp.down_proj.bias", mlp.down_bias.data),
            )


def _sparse_views(mlp: SparseMLP) -> Iterator[tuple[str, Tensor]]:
    yield "mlp.gate.weight", mlp.router.data
    if mlp.bias is not None:
        yield BIAS, mlp.bias
    first = mlp.axis.rank * mlp.held
    for at, (gate_up, down) in enumerate(zip(mlp.gate_up.data.unbind(0), mlp.down.data.unbind(0), strict=True)):
        yield from _swiglu_views(f"mlp.experts.{first + at}.", gate_up, down)
    if mlp.shared is not None:
        yield from _swiglu_views("mlp.shared_expert.", mlp.shared.gate_up.data, mlp.shared.down.data)
        yield "mlp.shared_expert_gate.weight", mlp.shared.gate.data


def _swiglu_views(prefix: str, gate_up: Tensor, down: Tensor) -> Iterator[tuple[str, Tensor]]:
    gate, up = gate_up.chunk(2)
    yield prefix + "gate_proj.weight", gate
    yield prefix + "up_proj.weight", up
    yield prefix + "down_proj.weight", down
