"""Checkpoints without pickle: safetensors for tensors, JSON for the rest, written atomically.

::

    checkpoints/step-00000012/{model,optimizer,extra}.safetensors + state.json

A directory without a state.json was not finished and is never picked; the temporary directory is
renamed only after every byte is on the disk.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.errors import CheckpointError
from learner.optim import Optimizer

STATE = "state.json"
PREFIX = "step-"


@dataclass(frozen=True)
class CheckpointState:
    """What came back beside the tensors that were loaded in place."""

    step: int  # the next step to train
    version: int
    run_id: str
    expert_fraction: Tensor


def save(
    directory: Path,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    step: int,
    version: int,
    run_id: str,
    expert_fraction: Tensor,
    keep: int,
) -> Path:
    """Write ``directory/step-<step>`` and delete all but the last ``keep``."""
    final = directory / f"{PREFIX}{step:08d}"
    temporary = directory / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    parameters = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    moments = {name: t.detach().cpu().contiguous() for name, t in optimizer.state().items()}
    extra = {"expert_fraction": expert_fraction.detach().cpu().contiguous(), "rng": torch.get_rng_state()}
    for name, tensors in (("model", parameters), ("optimizer", moments), ("extra", extra)):
        save_file(tensors, temporary / f"{name}.safetensors")
    state = {
        "step": step, "version": version, "run_id": run_id,
        "updates": optimizer.steps, "skipped_updates": optimizer.skipped,
    }  # fmt: skip
    (temporary / STATE).write_text(json.dumps(state, indent=1) + "\n")
    for file in temporary.iterdir():
        _sync(file)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    _sync(directory)
    for old in _complete(directory)[:-keep]:
        shutil.rmtree(old)
    return final


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _complete(directory: Path) -> list[Path]:
    return sorted(p for p in directory.glob(f"{PREFIX}*") if (p / STATE).is_file())


def latest(directory: Path) -> Path | None:
    """The newest finished checkpoint, or None."""
    found = _complete(directory)
    return found[-1] if found else None


def load(path: Path, model: nn.Module, optimizer: Optimizer) -> CheckpointState:
    """Load into ``model`` and ``optimizer`` in place.

    Raises :class:`CheckpointError` naming the file, or the tensor that does not fit.
    """
    try:
        state = json.loads((path / STATE).read_text())
        parameters, moments, extra = (load_file(path / f"{n}.safetensors") for n in ("model", "optimizer", "extra"))
        step, version, run_id = int(state["step"]), int(state["version"]), str(state["run_id"])
        optimizer.steps, optimizer.skipped = int(state["updates"]), int(state["skipped_updates"])
        fraction, rng = extra["expert_fraction"], extra["rng"]
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged ({error!r}); remove it to resume from an older one") from error
    ours = dict(model.named_parameters())
    _compare(path, {n: p.shape for n, p in ours.items()}, {n: t.shape for n, t in parameters.items()})
    for name in moments:
        if name.split(".", 1)[1] not in ours:
            raise CheckpointError(f"{path}: optimizer state {name} belongs to no parameter of this model")
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(parameters[name])
    optimizer.load_state(moments)
    torch.set_rng_state(rng)
    device = next(iter(ours.values())).device
    return CheckpointState(step, version, run_id, fraction.to(device))


def _compare(path: Path, ours: dict[str, torch.Size], theirs: dict[str, torch.Size]) -> None:
    for name in sorted(set(ours) | set(theirs)):
        if ours.get(name) != theirs.get(name):
            raise CheckpointError(
                f"{path}: {name} is {list(theirs.get(name, ()))} there and {list(ours.get(name, ()))} in model.path; "
                "it belongs to another model"
            )
