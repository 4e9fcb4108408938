"""Hugging Face directories: each rank reads its part of every tensor, rank by rank what is written.

Reading touches one slice at a time and writing one file's worth, so the model is never held twice.
"""

import ctypes
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.config import RunConfig
from common.errors import ModelError
from learner.layout import Place, places, views
from learner.mesh import Mesh
from learner.model.config import UNQUANTISED, ModelConfig
from learner.model.decoder import Decoder

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
WEIGHTS = (".safetensors", ".bin", ".bin.index.json", ".pth", ".pt", ".gguf")
STAMP = "warmstart.json"  # says that tools.warmstart may replace a directory: not for one that was trained
SHARD_BYTES = 4 << 30
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of renameat2(2)
DTYPES = ("F32", "BF16", "F16")  # as safetensors calls them
DERIVED = ("rotary_emb.inv_freq",)  # old files carry these; they follow from the configuration


def files_of(directory: Path) -> dict[str, list[str]]:
    """File -> tensor names of a Hugging Face directory; :class:`ModelError` if it cannot be read."""
    index = directory / INDEX
    try:
        if index.is_file():
            files: dict[str, list[str]] = {}
            listed = json.loads(index.read_text())["weight_map"]
            if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
                raise TypeError(f"the weight_map of {INDEX} names no file for each tensor")
            for name, file in listed.items():
                files.setdefault(file, []).append(name)
            return files
        with safe_open(directory / SINGLE, framework="pt") as opened:
            return {SINGLE: list(opened.keys())}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{directory}: cannot read the weights ({error}); copy the whole directory again") from error


@torch.no_grad()
def load_hf(directory: str | Path, model: Decoder) -> None:
    """Copy this rank's part of the directory's weights into ``model``, one tensor at a time.

    Raises :class:`ModelError` naming a file that is missing or damaged and tensors that are
    missing, unknown, of another shape, quantised or not finite.
    """
    directory = Path(directory)
    config, mesh = model.config, model.mesh
    known = {place.name: place for place in places(config)}
    held = views(model)
    waiting = {name for name, place in known.items() if not place.optional}
    spare: Path | None = None  # where a tied head lies beside the embedding
    for file, names in sorted(files_of(directory).items()):
        try:
            with safe_open(directory / file, framework="pt") as opened:
                for name in names:
                    if name.endswith(DERIVED):
                        continue
                    if name == "lm_head.weight" and config.tie_word_embeddings:
                        spare = directory / file
                        continue
                    source = opened.get_slice(name)
                    _check(name, source, known, directory / file)
                    waiting.discard(name)
                    if name in held:
                        held[name].copy_(_finite(name, _part(source, known[name], mesh), directory / file))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{directory / file}: {error}; copy the whole directory again") from error
    if waiting:
        raise ModelError(f"{directory}: {len(waiting)} tensors are missing, among them {sorted(waiting)[0]}")
    if spare is not None and "model.embed_tokens.weight" in held:
        with safe_open(spare, framework="pt") as opened:
            head = _part(opened.get_slice("lm_head.weight"), known["model.embed_tokens.weight"], mesh)
        if not torch.equal(head.to(model.dtype), held["model.embed_tokens.weight"].cpu()):
            raise ModelError(
                f"{spare}: lm_head.weight is not model.embed_tokens.weight, but config.json says "
                "tie_word_embeddings=true; set it to false to train both"
            )


def _check(name: str, source: Any, known: dict[str, Place], file: Path) -> None:
    shape, dtype = tuple(source.get_shape()), source.get_dtype()
    if name not in known:
        raise ModelError(f"{file}: unknown tensor {name}; config.json and the weights do not belong together")
    if known[name].shape != shape:
        raise ModelError(f"{file}: {name} has shape {list(shape)}, config.json implies {list(known[name].shape)}")
    if dtype not in DTYPES:
        raise ModelError(f"{file}: {name} is {dtype}, and only {', '.join(DTYPES)} can be trained; {UNQUANTISED}")


def _finite(name: str, part: Tensor, file: Path) -> Tensor:
    """``part``, which has no NaN and no infinity; one pass, as fast as a copy."""
    if part.numel() and not torch.stack(part.aminmax()).isfinite().all():
        raise ModelError(f"{file}: {name} is not finite; copy the whole directory again, or take an earlier checkpoint")
    return part


def _part(source: Any, place: Place, mesh: Mesh) -> Tensor:
    """This rank's part of a tensor in a file; reads no more than that."""
    if place.dim is None or mesh.tp.size == 1:
        return torch.as_tensor(source[:])
    each = place.shape[place.dim] // mesh.tp.size
    rows = slice(mesh.tp.rank * each, (mesh.tp.rank + 1) * each)
    return torch.as_tensor(source[rows] if place.dim == 0 else source[:, rows])


def model_config(config: RunConfig) -> ModelConfig:
    """The architecture at ``model.path``, with a bias on its experts if the run moves one."""
    return ModelConfig.from_hf_dir(config.model.path).with_bias(config.loss.expert_bias_rate > 0)


def load_model(config: RunConfig, mesh: Mesh, *, recompute: bool = False, path: str = "") -> Decoder:
    """This rank's share of the model at ``model.path``, as ``learner.dtype`` and ``learner.compile`` want it.

    ``path``: another model's directory; its routers get no bias.
    """
    shape = ModelConfig.from_hf_dir(path) if path else model_config(config)
    torch.set_default_dtype(getattr(torch, config.learner.dtype))
    try:
        with mesh.device:  # neither on a GPU's host nor in float32 first
            model = Decoder(shape, mesh, recompute=recompute)
    finally:
        torch.set_default_dtype(torch.float32)
    model.prepare(compiled=config.learner.compile)
    load_hf(path or config.model.path, model)
    return model


def copy_extras(source: str | Path, directory: str | Path) -> None:
    """Everything of a model directory but weights, in whatever format: configuration, tokenizer, chat template."""
    source, directory = Path(source), Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(WEIGHTS) and file.name not in (INDEX, STAMP):
            shutil.copyfile(file, directory / file.name)


def save_hf(
    tensors: Iterable[tuple[str, Tensor]], source: str | Path, directory: str | Path, config: ModelConfig | None = None
) -> None:
    """Write a directory that transformers loads: weights from ``tensors``, all else from ``source``.

    One file's worth is held at a time (SHARD_BYTES); the same weights give the same bytes. config.json
    says the tensors' dtype and, with ``config``, whether the routers have a bias. All is written beside
    ``directory`` and takes its place when it is whole. Raises :class:`ModelError` if the disk does not
    take it.
    """
    directory = Path(directory).resolve()  # what a link points to is replaced, not the link
    part = directory.with_name(f".{directory.name}.part")
    try:
        if directory.exists() and not directory.is_dir():
            raise NotADirectoryError(f"{directory} is no directory")
        shutil.rmtree(part, ignore_errors=True)
        copy_extras(source, part)
        dtype = _write(tensors, part)
        _describe(part / "config.json", dtype, config is not None and config.expert_bias)
        _take_place(part, directory)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{directory}: cannot write the model ({error}); is the disk full?") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _describe(file: Path, dtype: torch.dtype, expert_bias: bool) -> None:
    """Say in a config.json what the weights beside it are: transformers loads them as it says."""
    found = json.loads(file.read_text())
    name = str(dtype).removeprefix("torch.")
    found["dtype"] = name
    if "torch_dtype" in found:  # as it was called before transformers 4.56
        found["torch_dtype"] = name
    if expert_bias:
        found["expert_bias"] = True
    file.write_text(json.dumps(found, indent=2) + "\n")


def _take_place(part: Path, directory: Path) -> None:
    """``part`` becomes ``directory``; what was there may be left as ``part``.

    Where names cannot be exchanged, a kill between the two renames leaves the earlier model in
    ``.NAME.old`` and the new one in ``part``.
    """
    old = directory.with_name(f".{directory.name}.old")
    if not directory.exists():
        part.rename(directory)
    elif not exchange(part, directory):
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
        part.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Let two directories swap their names at once; False where the C library or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    where = (AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other))
    return rename is not None and rename(*where, RENAME_EXCHANGE) == 0


def _write(tensors: Iterable[tuple[str, Tensor]], directory: Path) -> torch.dtype:
    """Returns the dtype that most bytes have."""
    files: list[list[str]] = []
    held: dict[str, Tensor] = {}
    bytes_of: Counter[torch.dtype] = Counter()
    size = 0

    def flush() -> None:
        save_file(held, directory / f"model-{len(files) + 1:05d}.part", {"format": "pt"})
        files.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if size + tensor.nbytes > SHARD_BYTES and held:
            flush()
            size = 0
        held[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
        bytes_of[tensor.dtype] += tensor.nbytes
    flush()
    weight_map = {}
    for number, names in enumerate(files, 1):
        final = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        (directory / f"model-{number:05d}.part").replace(directory / final)
        weight_map.update(dict.fromkeys(names, final))
    if len(files) > 1:
        index = {"metadata": {"total_size": bytes_of.total()}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return bytes_of.most_common(1)[0][0]
