"""Model directories that cannot be trained are refused by name; what an export takes over from one."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import ModelError
from learner.hf import INDEX, load_hf, save_hf
from learner.model.config import ModelConfig
from learner.model.decoder import Decoder
from tests.unit.named import hf_tensors, write_hf
from tests.unit.test_step import model_of

NORM, EXPERT = "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.experts.2.up_proj.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "sound"
    write_hf(directory, model_of())
    return directory


@pytest.fixture
def copy(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "model")
    return tmp_path / "model"


def loaded(directory):
    model = Decoder(ModelConfig.from_hf_dir(directory))
    load_hf(directory, model)
    return model


def change_weights(directory, change):
    file = directory / "model.safetensors"
    save_file({name: change(name, tensor) for name, tensor in load_file(file).items()}, file)


def change_config(directory, **keys):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_the_precision_is_read(copy, dtype):
    change_weights(copy, lambda _, tensor: tensor.to(dtype))
    expected = load_file(copy / "model.safetensors")
    assert all(torch.equal(tensor, expected[name].float()) for name, tensor in hf_tensors(loaded(copy)))


@pytest.mark.parametrize(
    ("dtype", "called"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.float64, "F64")]
)
def test_weights_of_other_types_are_refused_by_name(copy, dtype, called):
    change_weights(copy, lambda name, tensor: tensor.to(dtype) if name == EXPERT else tensor)
    with pytest.raises(ModelError, match=rf"model\.safetensors: {EXPERT} is {called}, and only F32, BF16, F16 can"):
        loaded(copy)


def test_a_quantised_model_is_refused_by_name(copy):
    change_config(copy, quantization_config={"quant_method": "fp8", "ignored_layers": ["lm_head"] * 1000})
    with pytest.raises(
        ModelError, match=r"config\.json: quantization_config={'quant_method': 'fp8', .{1,80} is not supp"
    ):
        loaded(copy)
    change_config(copy, quantization_config=None)
    loaded(copy)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [NORM, EXPERT])
def test_weights_that_are_not_finite_are_refused_by_name(copy, name, bad):
    change_weights(copy, lambda n, tensor: tensor.index_fill(0, torch.tensor([5]), bad) if n == name else tensor)
    with pytest.raises(ModelError, match=rf"model\.safetensors: {name} is not finite"):
        loaded(copy)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", b"[1]", r"config\.json: holds a list instead of keys and values"),
        ("config.json", b"\xff\xfe{}", r"config\.json: not valid JSON .*utf-8"),
        (INDEX, b"[]", "model: cannot read the weights"),
        (INDEX, b"{}", "model: cannot read the weights"),
        (INDEX, b'{"weight_map": []}', r"the weight_map of model\.safetensors\.index\.json names no file"),
        (INDEX, b'{"weight_map": {"lm_head.weight": null}}', "names no file for each tensor"),
        (INDEX, b"\xff\xfe{}", "model: cannot read the weights .*utf-8"),
    ],
)
def test_files_that_hold_something_else_are_named(copy, name, content, words):
    (copy / name).write_bytes(content)
    with pytest.raises(ModelError, match=words):
        loaded(copy)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
LLAMA = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *(
            ({name: value}, f"{name}={value} must be at least 1")
            for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts_per_tok",
                         "moe_intermediate_size")
            for value in (0, -4)
        ),
        ({"num_key_value_heads": -2}, "num_key_value_heads=-2 must be at least 1"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads=0 must be at least 1"),
        ({"head_dim": -8}, "head_dim=-8 must be at least 1"),
        ({"mlp_only_layers": [1]}, "intermediate_size=0 must be at least 1"),
        (
            {"model_type": "qwen2_moe", "qkv_bias": True, "shared_expert_intermediate_size": -1},
            "shared_expert_intermediate_size=-1 must be at least 0",
        ),
        ({"hidden_size": math.inf}, "a size is not a number"),
        ({"model_type": ["qwen3"]}, r"model_type=\['qwen3'\]"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps=-1 must be positive"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0 must be positive"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps=nan must be positive"),
        ({"rope_theta": 0, "rope_parameters": None}, "rope_theta=0 must be a number above 1"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": math.nan}}, "rope_theta=nan must be a number"),
        ({"rope_parameters": {**YARN, "factor": 0}}, "factor=0 must be a number above 0"),
        ({"rope_parameters": {**YARN, "beta_slow": -1}}, "beta_slow=-1 must be a number above 0"),
        ({"rope_parameters": {**YARN, "original_max_position_embeddings": None}}, "original_max_pos.*=0 must be a num"),
        ({"rope_parameters": {**LLAMA, "high_freq_factor": 1.0}}, "high_freq_factor=1 must .* above 1, its low_freq"),
    ],
)  # fmt: skip
def test_sizes_that_no_model_can_have_are_refused_with_the_number(copy, change, words):
    change_config(copy, rope_parameters=LLAMA)
    loaded(copy)
    change_config(copy, **change)
    with pytest.raises(ModelError, match=words):
        loaded(copy)


def test_an_export_takes_over_no_weights_of_other_formats(copy, tmp_path):
    old = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "optimizer.pt", "model-q4.gguf")
    for name in (*old, "tokenizer.json"):
        (copy / name).write_text("{}")
    save_hf(hf_tensors(loaded(copy)), copy, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
