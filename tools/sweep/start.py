"""One starting model for all runs of a sweep.

The warm start's model depends on ``run.seed``. Seeds of a sweep must begin from the same weights, and
must not make ``model.path`` again at every turn, so the sweep keeps a copy without the warm start's
stamp: nobody makes that again. A model that the warm start did not make is used where it lies.

::

    SWEEP_DIR/start/<fingerprint>/     config.json, weights, tokenizer
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from common.config import RunConfig, to_yaml
from common.errors import ModelError
from tools.run_files import last_lines
from tools.stamp import STAMP, ModelState, fingerprint, model_state, models_of

FOLDER = "start"
LIMIT_S = 180.0  # for the warm start, which gives itself 120 s
LOG_LINES = 10


def shared_start(config: RunConfig, directory: Path) -> RunConfig:
    """``config`` with the sweep's own copies in place of models that the warm start makes."""
    if not config.task.in_small_alphabet:
        return config
    policy, *rollout = (_copy_of(one, directory) for one in models_of(config))
    config = replace(config, model=replace(config.model, path=policy))
    return replace(config, joint=replace(config.joint, path=rollout[0])) if rollout else config


def _copy_of(one: RunConfig, directory: Path) -> str:
    foreign = model_state(one) is ModelState.FOREIGN
    return one.model.path if foreign else str(directory / FOLDER / fingerprint(one))


def prepare_start(
    originals: Iterable[RunConfig],
    directory: Path,
    make: Callable[[RunConfig, Path], None],
    say: Callable[[str], None] = lambda words: None,
) -> None:
    """Make every copy that is not there yet; ``make`` puts the model of a configuration at its ``model.path``.

    ``originals`` are the cells' configurations as they were loaded, before :func:`shared_start`.
    """
    for config in originals:
        if not config.task.in_small_alphabet:
            continue
        for one in models_of(config):
            copy = Path(_copy_of(one, directory))
            if copy.parent != directory / FOLDER:
                continue
            if not copy.exists():
                _fill(one, copy, make, say)
            (copy / STAMP).unlink(missing_ok=True)


def _fill(one: RunConfig, copy: Path, make: Callable[[RunConfig, Path], None], say: Callable[[str], None]) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    if model_state(one) is ModelState.CURRENT:
        part = copy.with_name(f"{copy.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(one.model.path, part)
        (part / STAMP).unlink()
        os.replace(part, copy)
        return
    found = "is of other settings" if Path(one.model.path).exists() else "is not there"
    say(f"model.path={one.model.path} {found}: runs begin from a new model, {copy}")
    make(replace(one, model=replace(one.model, path=str(copy))), copy.with_suffix(".log"))


def warm_start(config: RunConfig, log: Path) -> None:
    """``tools.warmstart`` in a process of its own. Raises :class:`ModelError` with its last words."""
    file = log.with_suffix(".yaml")
    file.write_text(to_yaml(config))
    with log.open("wb") as output:
        command = [sys.executable, "-m", "tools.warmstart", str(file)]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=LIMIT_S, check=False
        )
    if done.returncode != 0:
        said = "\n".join(last_lines(log, LOG_LINES))
        raise ModelError(f"the warm start ended with exit code {done.returncode}; the last lines of {log}:\n{said}")
