"""The width of an expert record, against transformers' own modules, and models that have none."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from common.config import ModelSection, RolloutSection, RunConfig
from common.errors import ModelError
from common.routing import Routing, read_routing


def run_of(directory, replay=True):
    return RunConfig(model=ModelSection(path=str(directory)), rollout=RolloutSection(routing_replay=replay))


@pytest.mark.parametrize(
    "shape",
    [{}, {"mlp_only_layers": [0, 3]}, {"decoder_sparse_step": 2}, {"decoder_sparse_step": 2, "mlp_only_layers": [1]}],
)
def test_sparse_layers_are_those_that_transformers_builds(tmp_path, shape):
    config = Qwen3MoeConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, moe_intermediate_size=8, num_hidden_layers=5,
        num_attention_heads=1, num_key_value_heads=1, head_dim=8, num_experts=6, num_experts_per_tok=3, **shape,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sparse = tuple(i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "gate"))
    routing = read_routing(run_of(tmp_path))
    assert routing == Routing(sparse, experts=6, per_token=3)
    assert routing.width == 3 * len(sparse)


@pytest.mark.parametrize(
    ("hf", "says"),
    [
        ({"model_type": "llama"}, "llama.*has no experts; set rollout.routing_replay=false"),
        ({"model_type": "qwen3_moe", "num_hidden_layers": 2, "num_experts": 0}, "has no experts"),
        (
            {"model_type": "qwen3_moe", "num_hidden_layers": 2, "num_experts": 70_000, "num_experts_per_tok": 2},
            "70000 experts a layer",
        ),
        ({"num_experts": 4}, "cannot be read"),
        ({"model_type": "qwen3_moe", "num_hidden_layers": "many"}, "cannot be read"),
        ({"model_type": "qwen3_moe", "num_hidden_layers": 2, "mlp_only_layers": 1}, "mlp_only_layers=1 is no list"),
        ([], "cannot be read"),
    ],
)
def test_models_without_a_usable_mixture_are_refused(tmp_path, hf, says):
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ModelError, match=says):
        read_routing(run_of(tmp_path))
    assert read_routing(run_of(tmp_path, replay=False)) is None


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json: cannot be read"):
        read_routing(run_of(tmp_path / "none"))
