"""The architecture, read from a Hugging Face directory's config.json."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.errors import ConfigError, ModelError
from learner.model.rope import RopeConfig

# Family -> what it has that its configuration does not say.
FAMILIES: dict[str, dict[str, bool]] = {
    "qwen3_moe": {"qk_norm": True},
    "qwen3": {"qk_norm": True},
    "qwen2_moe": {"qkv_bias": True},
    "qwen2": {"qkv_bias": True},
    "llama": {},
}
SPARSE = ("qwen3_moe", "qwen2_moe")
UNQUANTISED = "use the checkpoint that was quantised, or one converted back to bfloat16"
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of one decoder; names as in the Hugging Face configuration."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: RopeConfig = field(default_factory=RopeConfig)
    qk_norm: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0  # 0: no shared expert
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    expert_bias: bool = False  # a bias that chooses experts and weighs none (DeepSeek-V3, 2408.15664)

    def check(self, source: str) -> None:
        """Raises :class:`ModelError` with the numbers of sizes that are too small or contradict each other."""
        sparse = len(self.sparse_layers)
        least = {
            "vocab_size": 1, "hidden_size": 1, "num_hidden_layers": 1, "num_attention_heads": 1,
            "num_key_value_heads": 1, "head_dim": 1, "intermediate_size": int(sparse < self.num_hidden_layers),
            "num_experts_per_tok": int(sparse > 0), "moe_intermediate_size": int(sparse > 0),
            "shared_expert_intermediate_size": 0,
        }  # fmt: skip
        for name, size in least.items():
            if getattr(self, name) < size:
                raise ModelError(f"{source}: {name}={getattr(self, name)} must be at least {size}")
        if not 0 < self.rms_norm_eps < math.inf:
            raise ModelError(f"{source}: rms_norm_eps={self.rms_norm_eps:g} must be positive")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelError(
                f"{source}: num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ModelError(
                f"{source}: num_experts_per_tok={self.num_experts_per_tok} is more than num_experts={self.num_experts}"
            )

    def check_mesh(self, sizes: Mapping[str, int], whose: str = "learner") -> None:
        """Raises :class:`ConfigError` with the numbers if a mesh of these ``sizes`` does not divide the model."""
        pp, ep, tp = (sizes.get(axis, 1) for axis in ("pp", "ep", "tp"))
        wanted = [
            ("num_attention_heads", self.num_attention_heads, "tp", tp),
            ("num_key_value_heads", self.num_key_value_heads, "tp", tp),
            ("vocab_size", self.vocab_size, "tp", tp),
        ]
        if len(self.sparse_layers) < self.num_hidden_layers:
            wanted.append(("intermediate_size", self.intermediate_size, "tp", tp))
        if self.sparse_layers:
            wanted.append(("num_experts", self.num_experts, "ep*tp", ep * tp))
        for what, number, axis, size in wanted:
            if number % size:
                raise ConfigError(
                    f"{whose}: {what}={number} is not a multiple of {axis}={size}; choose another {axis} for this model"
                )
        if pp > self.num_hidden_layers:
            raise ConfigError(
                f"{whose}: pp={pp} stages for num_hidden_layers={self.num_hidden_layers}; lower {whose}.pp"
            )

    def with_bias(self, wanted: bool) -> "ModelConfig":
        """The same, with a bias on the experts if that is ``wanted`` or it has one; for sparse models only."""
        if wanted and not self.num_experts:
            raise ModelError("loss.expert_bias_rate: this model has no experts; set it to 0")
        return replace(self, expert_bias=self.expert_bias or wanted)

    def is_sparse(self, layer: int) -> bool:
        """Whether ``layer`` has experts (transformers' rule)."""
        return (
            self.num_experts > 0
            and layer not in self.mlp_only_layers
            and (layer + 1) % max(1, self.decoder_sparse_step) == 0
        )

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The layers with experts."""
        return tuple(i for i in range(self.num_hidden_layers) if self.is_sparse(i))

    @classmethod
    def from_hf_dir(cls, directory: str | Path) -> "ModelConfig":
        """Read ``config.json``. Raises :class:`ModelError` for what is missing or not supported."""
        directory = Path(directory)
        if not directory.is_dir():
            raise ModelError(
                f"model.path={directory}: no such directory; make the quick-start model with "
                "`python -m tools.warmstart RUN.yaml` or name a Hugging Face directory"
            )
        path = directory / "config.json"
        if not path.is_file():
            raise ModelError(f"{directory}: config.json is missing; copy the whole Hugging Face directory")
        if not any((directory / name).is_file() for name in WEIGHT_FILES):
            raise ModelError(f"{directory}: none of {', '.join(WEIGHT_FILES)} is there; copy the whole directory")
        try:
            found = json.loads(path.read_text())
        except ValueError as error:  # no JSON, or no UTF-8
            raise ModelError(f"{path}: not valid JSON ({error}); the directory may be half written") from error
        if not isinstance(found, dict):
            raise ModelError(f"{path}: holds a {type(found).__name__} instead of keys and values; copy it again")
        return cls.from_dict(found, str(path))

    @classmethod
    def from_dict(cls, hf: dict[str, Any], source: str) -> "ModelConfig":
        """From the content of a config.json; ``source`` names it in errors."""
        _refuse_unsupported(hf, source)
        family = hf["model_type"]
        bias = bool(hf.get("attention_bias", False))
        try:
            heads = int(hf["num_attention_heads"])
            found = cls(
                vocab_size=int(hf["vocab_size"]),
                hidden_size=int(hf["hidden_size"]),
                intermediate_size=int(hf["intermediate_size"]),
                num_hidden_layers=int(hf["num_hidden_layers"]),
                num_attention_heads=heads,
                num_key_value_heads=int(hf.get("num_key_value_heads") or heads),
                head_dim=int(hf.get("head_dim") or int(hf["hidden_size"]) // max(1, heads)),
                rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
                tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
                rope=RopeConfig.from_dict(hf, source),
                qk_norm=FAMILIES[family].get("qk_norm", False),
                qkv_bias=bias or FAMILIES[family].get("qkv_bias", False),
                o_bias=bias,
                mlp_bias=bool(hf.get("mlp_bias", False)),
                **(_sparse_part(hf, family) if family in SPARSE else {}),
            )
            found.check(source)
            return found
        except KeyError as error:
            raise ModelError(f"{source}: {error.args[0]} is missing; the directory may be half written") from error
        except (TypeError, ValueError, OverflowError) as error:
            raise ModelError(f"{source}: a size is not a number ({error})") from error


def _sparse_part(hf: dict[str, Any], family: str) -> dict[str, Any]:
    shared = int(hf["shared_expert_intermediate_size"]) if family == "qwen2_moe" else 0
    return {
        "num_experts": int(hf.get("num_experts") or hf.get("num_local_experts") or 0),
        "num_experts_per_tok": int(hf["num_experts_per_tok"]),
        "moe_intermediate_size": int(hf["moe_intermediate_size"]),
        "shared_expert_intermediate_size": shared,
        "norm_topk_prob": bool(hf.get("norm_topk_prob", False)),
        "decoder_sparse_step": int(hf.get("decoder_sparse_step", 1)),
        "mlp_only_layers": tuple(hf.get("mlp_only_layers") or ()),
        "expert_bias": bool(hf.get("expert_bias", False)),
    }


def _refuse_unsupported(hf: dict[str, Any], source: str) -> None:
    family = hf.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ModelError(f"{source}: model_type={family!r}; this learner trains {', '.join(FAMILIES)}")
    bias, qkv_bias = hf.get("attention_bias"), hf.get("qkv_bias", True)
    activation = hf.get("hidden_act", "silu")
    for key, value, usable in (
        ("use_sliding_window", hf.get("use_sliding_window"), not hf.get("use_sliding_window")),
        ("attention_bias", bias, not bias or family in ("llama", "qwen3", "qwen3_moe")),
        ("qkv_bias", qkv_bias, qkv_bias or family != "qwen2_moe"),
        ("hidden_act", activation, activation == "silu"),
    ):
        if not usable:
            raise ModelError(f"{source}: {key}={value!r} is not supported; use a checkpoint without it")
    if quantised := hf.get("quantization_config"):
        raise ModelError(f"{source}: quantization_config={quantised!r:.80} is not supported; {UNQUANTISED}")
