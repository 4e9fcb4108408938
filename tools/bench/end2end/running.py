"""Runs one contestant once, and judges the versions that it saved.

::

    runs/bench-end2end/
      start-<seed>/              the model that all contestants of a seed begin from (larger-start-<seed>: the larger)
      <contestant>-<seed>/       timed.json when the run is done; rewards.json when its versions are judged
      apart-... larger-...       the same of the other arenas, for speed alone
      tried/                     the last of the short runs that settings are chosen by
"""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from common.errors import EngineError
from common.process import free_port
from learner.retention import CHECKPOINTS, complete, step_of
from tools.bench.end2end import trl_grpo
from tools.bench.end2end.analysis import Timed
from tools.bench.end2end.contestants import (
    TRL,
    Contestant,
    Setting,
    judge_config,
    overrides_of,
    run_config,
    trl_job,
)
from tools.bench.end2end.shapes import write_questions
from tools.bench.launching import launch
from tools.evaluate import held_out
from tools.export import export
from tools.run_files import Record, last_lines

LIMIT_S = 1800.0  # of one run
JUDGE_LIMIT_S = 300.0  # of one version
TIMED, REWARDS = "timed.json", "rewards.json"
FIGURES = {"lag": "lag_mean", "acceptance": "acceptance", "weight_ess": "weight_ess"}  # ours -> of a step's line


def recipe_of(one: Contestant, setting: Setting, seed: int, steps: int, model: Path) -> dict[str, Any]:
    """All that decides a run; the same recipe need not be run twice."""
    recipe: dict[str, Any] = {"overrides": overrides_of(one, setting, seed, steps, str(model))}
    return recipe | ({"threads": setting.threads, "experts": setting.experts} if one.key == TRL else {})


def finished(folder: Path, recipe: dict[str, Any]) -> Timed | None:
    """What an earlier run of the same recipe left in ``folder``; None where there is none."""
    try:
        timed = Timed.from_json((folder / TIMED).read_text())
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return timed if timed.recipe == recipe else None


def run_once(
    one: Contestant, setting: Setting, seed: int, steps: int, model: Path, folder: Path, python: Path
) -> Timed:
    """Train once from ``model`` into ``folder``, which is emptied first; ``python`` is TRL's.

    Raises :class:`EngineError` if the run fails or takes more than ``LIMIT_S``.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if one.key == TRL:
        timed = _run_trl(one, setting, seed, steps, model, folder, python)
    else:
        timed = _run_croupier(one, setting, seed, steps, model, folder)
    partial = folder / f"{TIMED}.part"
    partial.write_text(timed.to_json() + "\n")
    partial.replace(folder / TIMED)
    return timed


# ---- croupier -----------------------------------------------------------------------------------


def _run_croupier(one: Contestant, setting: Setting, seed: int, steps: int, model: Path, folder: Path) -> Timed:
    config = run_config(one, setting, seed, steps, str(model))
    config = replace(
        config,
        run=replace(config.run, name="run", dir=str(folder)),
        broker=replace(config.broker, address=f"tcp://127.0.0.1:{free_port()}"),
    )
    began = datetime.now(UTC).timestamp()
    lines = launch(config, folder, LIMIT_S)
    started_at = float(json.loads((config.run.path / "run.json").read_text())["started_at"])
    return of_lines(one, seed, recipe_of(one, setting, seed, steps, model), lines, started_at - began)


def of_lines(one: Contestant, seed: int, recipe: dict[str, Any], lines: list[Record], before_s: float) -> Timed:
    """A run of croupier by its step lines; ``before_s`` from the command to their clock's beginning."""
    first = lines[0]["time_s"]
    figures = {
        name: sum(values) / len(values)
        for name, key in FIGURES.items()
        if (values := [line[key] for line in lines if line.get(key) is not None])
    }
    return Timed(
        contestant=one.key,
        seed=seed,
        recipe=recipe,
        startup_s=before_s + first,
        at_s=[line["time_s"] - first for line in lines],
        samples=[line["trajectories"] for line in lines],
        tokens=[line["tokens_proposed"] for line in lines],
        figures=figures,
    )


# ---- TRL ----------------------------------------------------------------------------------------


def _run_trl(
    one: Contestant, setting: Setting, seed: int, steps: int, model: Path, folder: Path, python: Path
) -> Timed:
    questions, job_file, log = folder / "questions.jsonl", folder / "job.json", folder / "trl.log"
    config = run_config(one, setting, seed, steps, str(model))
    job = trl_job(config, setting, str(questions), str(folder))
    write_questions(questions, config, steps * job.prompts)
    job_file.write_text(json.dumps(asdict(job)))
    environment = os.environ | {"OMP_NUM_THREADS": str(setting.threads), "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    with log.open("wb") as output:
        try:
            done = subprocess.run(
                [str(python), trl_grpo.__file__, str(job_file)],
                stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment, timeout=LIMIT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired as late:
            raise EngineError(f"TRL was not done after {LIMIT_S:.0f} s; see {log}") from late
    if done.returncode != 0:
        tail = "\n".join(last_lines(log, 25))
        raise EngineError(f"TRL ended with exit code {done.returncode}:\n{tail}")
    lines = [json.loads(line) for line in (folder / "lines.jsonl").read_text().splitlines()]
    return of_trl_lines(one, seed, recipe_of(one, setting, seed, steps, model), lines, began)


def of_trl_lines(one: Contestant, seed: int, recipe: dict[str, Any], lines: list[Record], began: float) -> Timed:
    """A run of TRL by its lines, the first of which is step 0; ``began`` on their clock."""
    first = lines[1]["at_s"]
    return Timed(
        contestant=one.key,
        seed=seed,
        recipe=recipe,
        startup_s=first - began,
        at_s=[line["at_s"] - first for line in lines[1:]],
        samples=[b["samples"] - a["samples"] for a, b in pairwise(lines)],
        tokens=[b["tokens"] - a["tokens"] for a, b in pairwise(lines)],
        figures={"lag": 0.0},
    )


# ---- judging ------------------------------------------------------------------------------------


def judged(folder: Path) -> dict[int, float] | None:
    """Held-out reward by version, if the run in ``folder`` was judged."""
    try:
        found = json.loads((folder / REWARDS).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return {int(version): float(reward) for version, reward in found.items()}


def judge(folder: Path, seed: int, model: Path) -> dict[int, float]:
    """Held-out reward of every version that the run in ``folder`` saved, and of ``model``, its version 0.

    Everybody's versions are sampled by the same engine, with the same questions and the same noise.
    """
    rewards = {}
    config = judge_config(seed)
    with tempfile.TemporaryDirectory() as room:
        for version, directory in saved(folder, model, Path(room)):
            rewards[version] = float(held_out(config, directory, JUDGE_LIMIT_S)["reward"])
    partial = folder / f"{REWARDS}.part"
    partial.write_text(json.dumps(rewards) + "\n")
    partial.replace(folder / REWARDS)
    return rewards


def saved(folder: Path, model: Path, room: Path) -> Iterator[tuple[int, Path]]:
    """(version, model directory); checkpoints of croupier are exported into ``room`` when their turn comes."""
    yield 0, model
    for path in sorted(folder.glob("model-*"), key=_version):
        yield _version(path), path
    for checkpoint in complete(folder / "run" / CHECKPOINTS):
        version = step_of(checkpoint)
        yield version, export(folder / "run", version, room / str(version), torch.float32)


def _version(path: Path) -> int:
    return int(path.name.removeprefix("model-"))
