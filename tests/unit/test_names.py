from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM as Auto
from transformers import LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from actor.engine.names import checkpoint_views

SHAPE = {
    "vocab_size": 17,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
CONFIGS = {
    "moe": Qwen3MoeConfig(**SHAPE, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[1]),
    "moe-tied": Qwen3MoeConfig(
        **SHAPE, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2, tie_word_embeddings=True
    ),
    "qwen3": Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**{k: v for k, v in SHAPE.items() if k != "head_dim"}),
    "llama": LlamaConfig(**SHAPE),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_names_and_values_are_those_of_the_checkpoint(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Auto.from_config(CONFIGS[family])
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    views = checkpoint_views(model)
    assert views.keys() == saved.keys()
    for name, view in views.items():
        assert torch.equal(view, saved[name]), name


def test_views_write_through_to_what_a_checkpoint_of_the_new_weights_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = Auto.from_config(CONFIGS["moe"]), Auto.from_config(CONFIGS["moe"])
    other.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    with torch.no_grad():
        for name, view in checkpoint_views(model).items():
            view.copy_(saved[name])
    ids = torch.arange(10)[None]
    assert torch.equal(model(ids).logits, other(ids).logits)
