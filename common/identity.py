"""What a model directory must have in common with every other process's, so that one run trains one model."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import ModelError

FACTS = ("architecture", "shape", "vocabulary", "tokenizer")
TOKENS = ("vocabulary", "tokenizer")  # what two models must share whose log-probabilities of a token are compared
SHAPE_KEYS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "moe_intermediate_size", "num_experts", "num_experts_per_tok", "tie_word_embeddings",
)  # fmt: skip


def model_identity(directory: str | Path) -> dict[str, str]:
    """Architecture, vocabulary, shape and tokenizer of a Hugging Face directory; what cannot be read is left out."""
    path, found = Path(directory), {}
    try:
        config = json.loads((path / "config.json").read_text())
        found["architecture"] = str(config["model_type"])
        found["shape"] = " ".join(f"{key}={config[key]}" for key in SHAPE_KEYS if config.get(key) is not None)
        found["vocabulary"] = str(config["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # whoever loads the model says so with its remedy
    tokenizer = path / "tokenizer.json"
    if tokenizer.is_file():
        found["tokenizer"] = hashlib.blake2b(tokenizer.read_bytes(), digest_size=8).hexdigest()
    return found


def differing_identity(ours: Mapping[str, str], theirs: Mapping[str, str], facts: Sequence[str] = FACTS) -> str:
    """The first of ``facts`` in which two directories differ, in words; "" if what both know is equal."""
    for what in facts:
        if what in ours and what in theirs and ours[what] != theirs[what]:
            return f"{what} {theirs[what]} where this run has {ours[what]}"
    return ""


def other_tokens(words: str, key: str, differs: str) -> str:
    """Why a frozen model (``words``, whose path the YAML has at ``key``) cannot score the policy's tokens."""
    return (
        f"{words} ({key}) has {differs}: its log-probabilities would be of other tokens; name a model with "
        "model.path's tokenizer and vocabulary"
    )


def check_same_tokens(policy: str | Path, rollout: str | Path) -> None:
    """Raises :class:`ModelError` unless the rollout model's token ids mean what the policy's do."""
    if differs := differing_identity(model_identity(policy), model_identity(rollout), TOKENS):
        raise ModelError(
            f"joint.path={rollout} has {differs} (model.path={policy}): the policy would score other tokens than it "
            "sampled; name a smaller model of the policy's family"
        )
