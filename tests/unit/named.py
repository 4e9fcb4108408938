"""A model's tensors by the names of its files."""

import json

from safetensors.torch import save_file

from learner.layout import places, views


def hf_tensors(model):
    """(Hugging Face name, view of our parameter) of what this rank holds, in the order of the files."""
    held = views(model)
    for place in places(model.config):
        if place.name in held:
            yield place.name, held[place.name]


def write_hf(directory, model):
    """A sparse Qwen3 of plain rotary positions as a Hugging Face directory; returns what its config.json says."""
    directory.mkdir()
    said = {"model_type": "qwen3_moe"} | {k: v for k, v in vars(model.config).items() if isinstance(v, int | float)}
    (directory / "config.json").write_text(json.dumps(said))
    save_file({name: tensor.detach().clone() for name, tensor in hf_tensors(model)}, directory / "model.safetensors")
    return said
