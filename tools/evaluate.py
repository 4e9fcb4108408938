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
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from actor.play import Play, open_task
from actor.service import make_engine
from broker.heldout import evaluate
from common import wire
from common.config import RunConfig
from common.errors import CheckpointError, CroupierError, DeadlineError, EngineError
from common.joint import JointSection
from tools.console import make_console, print_error
from tools.evaluations import interval
from tools.export import export
from tools.runs import load_config

STEP_S = 0.05  # how long an engine that samples elsewhere may wait for something to end


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.evaluate", description="Held-out reward of a run's models.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as evaluation.prompts=2048")
    parser.add_argument("--step", type=int, action="append", default=[], help="a checkpoint; may be repeated")
    parser.add_argument("--model", type=Path, action="append", default=[], help="a model directory; may be repeated")
    parser.add_argument("--limit-s", type=float, default=3600.0, help="seconds that one model may take (3600)")
    given = parser.parse_intermixed_args(arguments)
    console = make_console()
    try:
        config = load_config(given.run_dir, given.overrides)
        table = Table("model", "held-out reward", "prompts", "samples", "mean length", box=None, padding=(0, 2))
        with tempfile.TemporaryDirectory() as room:
            for words, path in models_of(config, given.run_dir, given.step, given.model, Path(room)):
                found = held_out(config, path, given.limit_s)
                reward = interval(found["reward"], found["reward_low"], found["reward_high"])
                row = (words, reward, str(found["prompts"]), str(found["samples"]), f"{found['length_mean']:.1f}")
                table.add_row(*row)
                if console.is_terminal:
                    console.print(f"{words}: {reward}")
    except CroupierError as error:
        print_error(console, error)
        return 2
    console.print(table)
    return 0


def models_of(
    config: RunConfig, run_dir: Path, steps: Sequence[int], directories: Sequence[Path], room: Path
) -> Iterator[tuple[str, Path]]:
    """(words, directory) of what was asked for; checkpoints are exported into ``room`` when their turn comes.

    Raises :class:`CheckpointError` if there is nothing.
    """
    named = [("policy", config.model.path, "model")]
    if config.joint.path:
        named.append(("rollout model", config.joint.path, "rollout_model"))
    for step in steps:
        for words, _, _ in named if config.joint.trains else named[:1]:
            out = room / f"{step}-{words.split()[0]}"
            yield f"{words}, step {step}", export(run_dir, step, out, torch.float32, rollout=words != "policy")
    for directory in directories:
        yield str(directory), directory
    if steps or directories:
        return
    for words, start, end in named:
        yield f"{words}, at the start", Path(start)
        if (run_dir / end).is_dir():
            yield f"{words}, at the end", run_dir / end
    if not (run_dir / "model").is_dir():
        raise CheckpointError(f"{run_dir}: no model there yet; name a checkpoint with --step N")


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
