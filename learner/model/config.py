"""The architecture, read from a Hugging Face directory's config.json."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ModelError

MODEL_TYPES = ("qwen3_moe", "qwen3")
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
    rope_theta: float
    tie_word_embeddings: bool
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    def is_sparse(self, layer: int) -> bool:
        """Whether ``layer`` has experts (transformers' rule)."""
        return (
            self.num_experts > 0
            and layer not in self.mlp_only_layers
            and (layer + 1) % max(1, self.decoder_sparse_step) == 0
        )

    @property
    def sparse_layers(self) -> int:
        """How many layers have experts."""
        return sum(self.is_sparse(i) for i in range(self.num_hidden_layers))

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
            return cls.from_dict(json.loads(path.read_text()), str(path))
        except json.JSONDecodeError as error:
            raise ModelError(f"{path}: not valid JSON ({error}); the directory may be half written") from error

    @classmethod
    def from_dict(cls, hf: dict[str, Any], source: str) -> "ModelConfig":
        """From the content of a config.json; ``source`` names it in errors."""
        _refuse_unsupported(hf, source)
        rope = hf.get("rope_parameters") or {}
        try:
            heads = int(hf["num_attention_heads"])
            return cls(
                vocab_size=int(hf["vocab_size"]),
                hidden_size=int(hf["hidden_size"]),
                intermediate_size=int(hf["intermediate_size"]),
                num_hidden_layers=int(hf["num_hidden_layers"]),
                num_attention_heads=heads,
                num_key_value_heads=int(hf.get("num_key_value_heads") or heads),
                head_dim=int(hf.get("head_dim") or int(hf["hidden_size"]) // heads),
                rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
                rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 10000.0))),
                tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
                num_experts=int(hf.get("num_experts") or hf.get("num_local_experts") or 0)
                if hf["model_type"] == "qwen3_moe"
                else 0,
                num_experts_per_tok=int(hf.get("num_experts_per_tok") or 0),
                moe_intermediate_size=int(hf.get("moe_intermediate_size") or 0),
                norm_topk_prob=bool(hf.get("norm_topk_prob", False)),
                decoder_sparse_step=int(hf.get("decoder_sparse_step", 1)),
                mlp_only_layers=tuple(hf.get("mlp_only_layers") or ()),
            )
        except KeyError as error:
            raise ModelError(f"{source}: {error.args[0]} is missing; the directory may be half written") from error


def _refuse_unsupported(hf: dict[str, Any], source: str) -> None:
    if hf.get("model_type") not in MODEL_TYPES:
        raise ModelError(f"{source}: model_type={hf.get('model_type')!r}; this learner trains {', '.join(MODEL_TYPES)}")
    rope = hf.get("rope_parameters") or {}
    scaling = hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", scaling.get("rope_type", scaling.get("type", "default")))
    for key, value, usable in (
        ("rope_type", kind, kind == "default"),
        ("use_sliding_window", hf.get("use_sliding_window"), not hf.get("use_sliding_window")),
        ("attention_bias", hf.get("attention_bias"), not hf.get("attention_bias")),
        ("hidden_act", hf.get("hidden_act", "silu"), hf.get("hidden_act", "silu") == "silu"),
    ):
        if not usable:
            raise ModelError(f"{source}: {key}={value!r} is not supported; use a checkpoint without it")
