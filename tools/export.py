"""A checkpoint as a Hugging Face directory, while the run goes on or after it.

::

    python -m tools.export RUN_DIR                      the newest checkpoint, to RUN_DIR/export-STEP
    python -m tools.export RUN_DIR --best               the best evaluated one (evaluation.keep_best)
    python -m tools.export RUN_DIR --step 40 --out DIR --dtype bfloat16
    python -m tools.export RUN_DIR --rollout            the rollout model that was trained beside it (joint.path)

Reads one tensor at a time, whatever mesh wrote the checkpoint; the directory appears when it is whole.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from common.errors import CheckpointError, CroupierError
from learner.checkpoint import BESIDE, CheckpointReader, latest
from learner.hf import files_of, model_config, save_hf
from learner.layout import places
from learner.model.config import ModelConfig
from learner.retention import CHECKPOINTS, complete, path_of, read_best, step_of
from tools.console import make_console, print_error
from tools.run_files import check_run_dir
from tools.runs import known_config, print_notes


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m tools.export", description="A checkpoint to a model directory."
    )
    parser.add_argument("run_dir", type=Path)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    which.add_argument("--best", action="store_true", help="the one with the best held-out reward")
    parser.add_argument("--out", type=Path, help="the directory to make (default: RUN_DIR/export-STEP)")
    parser.add_argument("--rollout", action="store_true", help="the rollout model that was trained beside the policy")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    given = parser.parse_args(arguments)
    console = make_console()
    try:
        check_run_dir(given.run_dir)
        print_notes(console, known_config(given.run_dir)[1])
        step = best_step(given.run_dir) if given.best else given.step
        out = export(given.run_dir, step, given.out, getattr(torch, given.dtype), rollout=given.rollout)
    except CroupierError as error:
        print_error(console, error)
        return 2
    console.print(f"{out}: written; transformers and SGLang load it")
    return 0


def best_step(run_dir: Path) -> int:
    """The step of the best evaluated checkpoint. Raises :class:`CheckpointError` if none was kept."""
    best = read_best(run_dir / CHECKPOINTS)
    if best is None:
        raise CheckpointError(
            f"{run_dir}: no best checkpoint was kept: evaluation.keep_best was false, or no evaluation was better than "
            "the starting model's"
        )
    return best.version


def export(run_dir: Path, step: int | None, out: Path | None, dtype: torch.dtype, *, rollout: bool = False) -> Path:
    """Write the checkpoint of ``step`` (None: the newest) into ``out``; returns where it lies.

    ``rollout``: not the policy but the rollout model that was trained beside it. Raises
    :class:`CheckpointError` if there is none, or if ``out`` exists.
    """
    config, _ = known_config(run_dir)
    reader = open_checkpoint(run_dir, step, rollout=rollout)
    out = out or run_dir / f"export-{'rollout-' if rollout else ''}{reader.state.step}"
    if out.exists():
        raise CheckpointError(f"{out}: exists already; name another directory with --out")
    source = config.joint.path if rollout else config.model.path
    shape = ModelConfig.from_hf_dir(source) if rollout else model_config(config)
    save_hf(_tensors(reader, shape, Path(source), dtype), source, out, shape)
    return out


def steps_there(run_dir: Path) -> str:
    """Which checkpoints a run has, in words for an error."""
    have = ", ".join(str(step_of(p)) for p in complete(run_dir / CHECKPOINTS)) or "none"
    return f"has: {have} (they are written every learner.checkpoint_every steps, and where a run is stopped)"


def open_checkpoint(run_dir: Path, step: int | None, *, rollout: bool = False) -> CheckpointReader:
    """That of ``step`` (None: the newest). Raises :class:`CheckpointError` if there is none, or not of this model."""
    directory = run_dir / CHECKPOINTS
    path = latest(directory) if step is None else path_of(directory, step)
    if path is None or not path.is_dir():
        wanted = "any step" if step is None else f"step {step}"
        raise CheckpointError(f"{run_dir}: no checkpoint of {wanted}; {steps_there(run_dir)}")
    reader = CheckpointReader(path, BESIDE if rollout else "")
    if rollout and reader.state.rollout is None:
        raise CheckpointError(f"{path}: holds the policy alone; no rollout model was trained beside it (joint.path)")
    return reader


def _tensors(
    reader: CheckpointReader, config: ModelConfig, model: Path, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor: the trained ones from the checkpoint, frozen ones from the starting model."""
    trained = reader.names()
    where = {name: file for file, names in files_of(model).items() for name in names}
    for place in places(config):
        if place.name in trained:
            yield place.name, reader.part("weight", place, 0, 1).to(torch.float32 if place.optional else dtype)
        else:
            with safe_open(model / where[place.name], framework="pt") as opened:
                yield place.name, opened.get_tensor(place.name).to(dtype)


if __name__ == "__main__":
    sys.exit(main())
