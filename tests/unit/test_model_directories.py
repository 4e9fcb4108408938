"""Model directories that cannot be trained are refused by name; what an export takes over from one."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import ModelError
from learner.hf import load_hf, save_hf
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


def test_an_export_takes_over_no_weights_of_other_formats(copy, tmp_path):
    old = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "optimizer.pt", "model-q4.gguf")
    for name in (*old, "tokenizer.json"):
        (copy / name).write_text("{}")
    save_hf(hf_tensors(loaded(copy)), copy, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
