"""Hugging Face directories: weights in, weights out, and the names that travel to the fleet.

Experts are stacked in our model and one tensor each in the files, so one parameter of ours may
have many names; every name maps to a *view* of our parameter, and loading, saving and publishing
all go through those views.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.errors import ModelError
from learner.model.decoder import Decoder
from learner.model.moe import SparseMLP

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
STAMP = "warmstart.json"  # says that tools.warmstart may replace a directory: not for one that was trained
SHARD_BYTES = 4 << 30


def hf_tensors(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, view of our parameter) in a fixed order; a tied head has no name."""
    yield "model.embed_tokens.weight", model.embed_tokens.weight.data
    for index, layer in enumerate(model.layers):
        prefix = f"model.layers.{index}."
        for name, parameter in layer.named_parameters():
            if not name.startswith("mlp.") or not isinstance(layer.mlp, SparseMLP):
                yield prefix + name, parameter.data
        if isinstance(layer.mlp, SparseMLP):
            yield from _expert_tensors(prefix + "mlp.", layer.mlp)
    yield "model.norm.weight", model.norm.weight.data
    if model.lm_head is not None:
        yield "lm_head.weight", model.lm_head.data


def _expert_tensors(prefix: str, mlp: SparseMLP) -> Iterator[tuple[str, Tensor]]:
    yield prefix + "gate.weight", mlp.router.weight.data
    inner = mlp.gate_up.shape[1] // 2
    for expert in range(mlp.experts):
        gate_up = mlp.gate_up.data[expert]
        yield f"{prefix}experts.{expert}.gate_proj.weight", gate_up[:inner]
        yield f"{prefix}experts.{expert}.up_proj.weight", gate_up[inner:]
        yield f"{prefix}experts.{expert}.down_proj.weight", mlp.down.data[expert]


def _files(directory: Path) -> dict[str, list[str]]:
    """File -> tensor names."""
    index = directory / INDEX
    try:
        if index.is_file():
            files: dict[str, list[str]] = {}
            for name, file in json.loads(index.read_text())["weight_map"].items():
                files.setdefault(file, []).append(name)
            return files
        with safe_open(directory / SINGLE, framework="pt") as opened:
            return {SINGLE: list(opened.keys())}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ModelError(f"{directory}: cannot read the weights ({error}); copy the whole directory again") from error


@torch.no_grad()
def load_hf(directory: str | Path, model: Decoder) -> None:
    """Copy the directory's weights into ``model``, one tensor at a time.

    Raises :class:`ModelError` naming a file that is missing or damaged and tensors that are
    missing, unknown or of another shape.
    """
    directory = Path(directory)
    targets = dict(hf_tensors(model))
    waiting = set(targets)
    for file, names in sorted(_files(directory).items()):
        try:
            with safe_open(directory / file, framework="pt") as opened:
                for name in names:
                    if name == "lm_head.weight" and model.lm_head is None:
                        continue
                    _copy(opened.get_tensor(name), name, targets, directory / file)
                    waiting.discard(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{directory / file}: {error}; copy the whole directory again") from error
    if waiting:
        raise ModelError(f"{directory}: {len(waiting)} tensors are missing, among them {sorted(waiting)[0]}")


def _copy(source: Tensor, name: str, targets: dict[str, Tensor], file: Path) -> None:
    target = targets.get(name)
    if target is None:
        raise ModelError(f"{file}: unknown tensor {name}; config.json and the weights do not belong together")
    if target.shape != source.shape:
        raise ModelError(f"{file}: {name} has shape {list(source.shape)}, config.json implies {list(target.shape)}")
    target.copy_(source)


def save_hf(model: Decoder, source: str | Path, directory: str | Path) -> None:
    """Write a directory that transformers loads: weights of ``model``, all else copied from ``source``.

    Sharded above SHARD_BYTES; the same weights give the same bytes.
    """
    source, directory = Path(source), Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(".safetensors") and file.name not in (INDEX, STAMP):
            shutil.copyfile(file, directory / file.name)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in hf_tensors(model):
        if size + tensor.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards):
        file_name = SINGLE if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(shard, file_name))
        save_file({n: t.contiguous().cpu() for n, t in shard.items()}, directory / file_name, {"format": "pt"})
    if len(shards) > 1:
        total = sum(t.nbytes for _, t in hf_tensors(model))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
