"""Held-out reward of model directories or of checkpoints of a run, without its processes.

::

    python -m tools.evaluate RUN_DIR                    the starting models and the trained ones
    python -m tools.evaluate RUN_DIR --step 20          checkpoints (several --step, several lines)
    python -m tools.evaluate RUN_DIR --model DIR        any directory with the run's tokenizer

Plays the run's task on its held-out prompts with an engine of its own, as actors do
(``evaluation.prompts``, ``.samples``, ``.temperature``). Where actors run a rollout model (joint.path),
the run's own evaluations are of that one; this is how the policy is judged. Every model is given the
same noise, so differences between two of them are less uncertain than their intervals say.
"""

import argparse
import math
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from actor.play import Play, open_task
from actor.service import make_engine
from broker.heldout import evaluate
from common import wire
from common.config import RunConfig
from common.errors import CheckpointError, ConfigError, CroupierError, DeadlineError, EngineError, ModelError
from common.joint import JointSection
from tools.console import make_console, print_error
from tools.evaluations import interval
from tools.export import export, open_checkpoint, steps_there
from tools.run_files import is_under_way
from tools.runs import known_config, print_notes

STEP_S = 0.05  # how long an engine that samples elsewhere may wait for something to end


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m tools.evaluate", description="Held-out reward of a run's models."
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as evaluation.prompts=2048")
    parser.add_argument("--step", type=int, action="append", default=[], help="a checkpoint; may be repeated")
    parser.add_argument("--model", type=Path, action="append", default=[], help="a model directory; may be repeated")
    parser.add_argument("--limit-s", type=float, default=3600.0, help="seconds that one model may take (3600)")
    given = parser.parse_intermixed_args(arguments)
    console = make_console()
    try:
        if not 0 < given.limit_s < math.inf:
            raise ConfigError(f"--limit-s {given.limit_s:g}: must be a finite number of seconds above 0")
        config, notes = known_config(given.run_dir, given.overrides)
        print_notes(console, notes)
        _evaluate_all(config, given, console)
    except CroupierError as error:
        print_error(console, error)
        return 2
    return 0


def _evaluate_all(config: RunConfig, given: argparse.Namespace, console: Console) -> None:
    """One after the other; the table of what was done is shown also where the rest could not be."""
    if config.actor.engine == "sglang" and config.engine.addresses and is_under_way(given.run_dir):
        raise ConfigError(
            f"engine.addresses: these servers sample for the run in {given.run_dir}, which is under way, and would be "
            "given other weights; add engine.launch=1 engine.addresses=[], or wait for its end"
        )
    table = Table("model", "held-out reward", "prompts", "samples", "mean length", box=None, padding=(0, 2))
    try:
        with tempfile.TemporaryDirectory() as room:
            for words, path in models_of(config, given.run_dir, given.step, given.model, Path(room)):
                found = held_out(config, path, given.limit_s)
                reward = interval(found["reward"], found["reward_low"], found["reward_high"])
                row = (words, reward, str(found["prompts"]), str(found["samples"]), f"{found['length_mean']:.1f}")
                table.add_row(*row)
                if console.is_terminal:
                    console.print(f"{words}: {reward}")
    finally:
        if table.row_count:
            console.print(table)


def models_of(
    config: RunConfig, run_dir: Path, steps: Sequence[int], directories: Sequence[Path], room: Path
) -> Iterator[tuple[str, Path]]:
    """(words, directory) of what was asked for, each once; a checkpoint is exported into ``room`` in its turn.

    Raises :class:`CheckpointError` or :class:`ModelError`, before the first, if one of them is not there.
    """
    named = [("policy", config.model.path, "model")]
    if config.joint.path:
        named.append(("rollout model", config.joint.path, "rollout_model"))
    trained = [words for words, _, _ in named][: 1 + config.joint.trains]
    checkpoints = [(step, words) for step in dict.fromkeys(steps) for words in trained]
    for step, words in checkpoints:
        open_checkpoint(run_dir, step, rollout=words != "policy")
    there = [(str(directory), directory) for directory in dict.fromkeys(directories)]
    if not steps and not directories:
        if not (run_dir / "model").is_dir():
            raise CheckpointError(
                f"{run_dir}: no model there yet; name a checkpoint with --step N; {steps_there(run_dir)}"
            )
        for words, start, end in named:
            there.append((f"{words}, at the start", Path(start)))
            if (run_dir / end).is_dir():
                there.append((f"{words}, at the end", run_dir / end))
    for _, directory in there:
        if not (directory / "config.json").is_file():
            raise ModelError(f"{directory}: no model directory, without a config.json; name another with --model")

    def exported() -> Iterator[tuple[str, Path]]:
        for step, words in checkpoints:
            out = room / f"{step}-{words.split()[0]}"
            yield f"{words}, step {step}", export(run_dir, step, out, torch.float32, rollout=words != "policy")
            shutil.rmtree(out, ignore_errors=True)  # room for one is enough

    return chain(exported(), there)


def held_out(config: RunConfig, directory: Path, limit_s: float) -> dict[str, Any]:
    """The figures of :func:`broker.heldout.evaluate` for one directory.

    Raises :class:`EngineError` where the run evaluates nothing, and :class:`DeadlineError` after ``limit_s``.
    """
    section = config.evaluation
    if section.prompts == 0:
        raise EngineError("evaluation.prompts=0: the run has no held-out prompts; add evaluation.prompts=512, say")
    one = replace(config, model=replace(config.model, path=str(directory)), joint=JointSection())
    results: list[Any] = []
    task, engine = open_task(one), make_engine(one, "evaluate")
    play = Play(one, task, engine, Counter(), results.append)
    deadline = time.monotonic() + limit_s
    try:
        play.start_evaluation(0, section.prompts, section.samples)
        while not results:
            play.follow_agents()
            play.collect(engine.step(STEP_S))
            if time.monotonic() > deadline:
                raise DeadlineError(f"{directory}: not evaluated within {limit_s:g} s; raise --limit-s")
    finally:
        play.close()
        engine.close()
    result = results[0]
    assert isinstance(result, wire.EvaluationResult)
    return evaluate(result, section.pass_at, config.task.labels, config.task.mixture)


if __name__ == "__main__":
    sys.exit(main())
