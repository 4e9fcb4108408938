"""A Hugging Face directory -> a transformers model ready to decode, or what its configuration says."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from actor.engine.experts import use_expert_bias, use_lean_experts
from actor.engine.products import use_fast_products
from common.errors import ModelError
from common.weights import is_frozen

HEAD = "lm_head.weight"
MODEL_TYPES = ("qwen3_moe", "qwen3", "qwen2", "llama")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class ModelFacts:
    """What an actor knows of a model that runs elsewhere."""

    vocab_size: int
    stop_ids: list[int]  # tokens that end a completion, the main one first
    architectures: list[str]
    shapes: dict[str, tuple[int, ...]]  # of its tensors, by name; a head tied to the embedding is none


def differing(own: Mapping[str, tuple[int, ...]], tensors: Mapping[str, tuple[int, ...]], frozen: Sequence[str]) -> str:
    """How ``tensors`` (name -> shape) of a version differ from a model's ``own``; "" if they do not.

    What ``frozen`` matches may be missing.
    """
    missing = {name for name in own.keys() - tensors.keys() if not is_frozen(name, frozen)}
    unknown = tensors.keys() - own.keys()
    if missing or unknown:
        return (
            f"{len(missing)} tensors are missing (first: {min(missing, default='none')}) and "
            f"{len(unknown)} unknown (first: {min(unknown, default='none')}); publish this model's own checkpoint"
        )
    for name, shape in tensors.items():
        if shape != own[name]:
            return f"{name} has shape {shape}, the model has {own[name]}"
    return ""


def read_model_facts(directory: Path, max_length: int, margin: int = 0) -> ModelFacts:
    """From config.json, generation_config.json and the headers of the weights; ``margin`` tokens are never used.

    Raises ModelError for a directory that cannot be read, sequences that are too long for the model, and one that
    no server knows.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
        longest, vocab_size = int(config["max_position_embeddings"]), int(config["vocab_size"])
        beside = directory / "generation_config.json"
        generation = json.loads(beside.read_text()) if beside.is_file() else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); name a complete Hugging Face directory in "
            "model.path"
        ) from error
    if max_length + margin > longest:
        spare = f" (and {margin} that the engine keeps free)" if margin else ""
        raise ModelError(f"{directory}: max_length={max_length}{spare} exceeds max_position_embeddings={longest}")
    if config.get("expert_bias"):
        raise ModelError(
            f"{path}: expert_bias: its routers have a bias (loss.expert_bias_rate) that servers do not know; sample it "
            "with actor.engine=local"
        )
    shapes = tensor_shapes(directory)
    if config.get("tie_word_embeddings"):
        shapes.pop(HEAD, None)
    named = [source.get("eos_token_id") for source in (config, generation)]
    ids = [i for one in named if one is not None for i in (one if isinstance(one, list) else [one])]
    return ModelFacts(
        vocab_size=vocab_size,
        stop_ids=list(dict.fromkeys(ids)),
        architectures=list(config.get("architectures") or []),
        shapes=shapes,
    )


def tensor_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the directory's tensors; reads no weights. Raises ModelError if a file is damaged."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors has one error class of its own and passes OSError on
            raise ModelError(f"{file}: cannot be read ({error}); copy the whole directory") from error
    if not shapes:
        raise ModelError(f"{directory}: has none of {', '.join(WEIGHT_FILES)}; copy the whole directory")
    return shapes


def load_model(directory: Path, max_length: int, dtype: torch.dtype, expert_bias: bool = False) -> Any:
    """Load from local files only; ``expert_bias`` gives routers one even if the directory has none.

    Raises ModelError for a directory that is missing, half written or unsupported.
    """
    for path in (directory, directory / "config.json"):
        if not path.exists():
            raise ModelError(f"{path}: not there; name a Hugging Face directory, or make one with tools.warmstart")
    if not any((directory / name).is_file() for name in WEIGHT_FILES):
        raise ModelError(f"{directory}: has none of {', '.join(WEIGHT_FILES)}; copy the whole directory")
    transformers_logging.disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation="sdpa", local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # transformers and safetensors raise many kinds for a bad directory
        raise ModelError(f"{directory}: cannot be loaded ({type(error).__name__}: {error})") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"{directory}: {len(missing)} tensors are missing, {missing[0]} first; copy the whole directory"
        )
    _check_supported(model.config, directory, max_length)
    model.eval().requires_grad_(False)
    use_lean_experts(model)
    use_fast_products(model)
    if expert_bias or getattr(model.config, "expert_bias", False):
        _load_bias(directory, use_expert_bias(model))
    return model


def _load_bias(directory: Path, biases: dict[str, torch.Tensor]) -> None:
    """What a directory that was exported with biases has of them; transformers does not know the name."""
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in set(opened.keys()) & set(biases):
                biases[name].copy_(opened.get_tensor(name))


def _check_supported(config: Any, directory: Path, max_length: int) -> None:
    if config.model_type not in MODEL_TYPES:
        raise ModelError(f"{directory}: model_type={config.model_type!r}; the embedded engine runs {MODEL_TYPES}")
    if getattr(config, "use_sliding_window", False):
        raise ModelError(f"{directory}: use_sliding_window=true is not supported; use a checkpoint without it")
    if max_length > config.max_position_embeddings:
        raise ModelError(
            f"{directory}: max_length={max_length} exceeds max_position_embeddings={config.max_position_embeddings}"
        )


def stop_ids(model: Any) -> list[int]:
    """Tokens that end a completion, the main one first; empty if the model names none."""
    named = model.config.eos_token_id
    if named is None:
        named = model.generation_config.eos_token_id
    ids = [] if named is None else [named] if isinstance(named, int) else list(named)
    extra = model.generation_config.eos_token_id
    extra = [] if extra is None else [extra] if isinstance(extra, int) else list(extra)
    return list(dict.fromkeys([*ids, *extra]))
