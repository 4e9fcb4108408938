"""What the simulator predicts beside what really happens: runs of other settings than those it was calibrated on.

::

    two real runs -> tools.simulate.measured -> costs  \\
    each of CONFIGURATIONS: settings --------------------> simulate -> predicted     } errors, their medians
                            the same, launched -------------------------> measured  /

A prediction sees the calibration runs and the settings of what it predicts, nothing else. Throughput and lag
are both counted from the commit of step FIRST_STEP to the last. Lags of runs with a budget of 0 are 0 in both
and left out of the median.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Qwen3MoeForCausalLM
from transformers.utils import logging as transformers_logging

from common.config import RunConfig, load, to_yaml
from common.process import free_port
from tools.bench.harness import Row
from tools.bench.launching import launch
from tools.bench.loop import bar_shape, loop_config
from tools.bench.predictions import Compared, Figures, figures_of, rows_of
from tools.run_files import outcome_of
from tools.runs import read_run
from tools.simulate import Setup, simulate
from tools.simulate.measured import measure
from tools.simulate.settings import override, replaced, settings_of

SCALE = (  # 240,000 rows in flight, 1.6 million completions of 2,000 tokens
    "machine.shared=false", "actor.count=10000", "actor.max_sequences=32", "rollout.groups_per_step=10000",
    "rollout.group_size=8", "rollout.max_tokens=8192", "length.kind=lognormal", "length.mean=2000", "length.sigma=0.8",
    "run.steps=20", "replica.count=8", "replica.score_token_s=2e-8", "learner.step_s=1", "learner.token_s=2e-7",
    "broker.message_s=5e-6", "broker.trajectory_s=5e-6", "weights.send_s=2", "weights.receive_s=2",
)  # fmt: skip
SCALE_BAR_S = 60.0  # of one core, for 10,000 actors

BASE = ("rollout.max_tokens=48", "staleness.budget=2", "run.steps=30")
CALIBRATION = {
    "calibration-1": (),
    "calibration-2": ("staleness.budget=0", "actor.count=2", "rollout.max_tokens=96", "run.steps=14"),
}
CONFIGURATIONS = {
    "budget-0": ("staleness.budget=0", "run.steps=24"),
    "budget-1": ("staleness.budget=1",),
    "budget-4": ("staleness.budget=4",),
    "budget-8": ("staleness.budget=8", "run.steps=36"),
    "actors-2": ("actor.count=2",),
    "actors-3": ("actor.count=3", "staleness.budget=4"),
    "actors-2-synchronous": ("actor.count=2", "staleness.budget=0", "run.steps=24"),
    "groups-8": ("rollout.groups_per_step=8", "staleness.budget=1", "run.steps=16"),
    "siblings-8": ("rollout.group_size=8", "run.steps=16"),
    "tokens-96": ("rollout.max_tokens=96", "run.steps=18"),
    "tokens-16": ("rollout.max_tokens=16", "staleness.budget=4", "run.steps=40"),
    "slow-actor": ("actor.slowdown=3", "staleness.budget=4", "run.steps=20"),
    "slow-learner": ("learner.slowdown=3", "staleness.budget=4", "run.steps=16"),
    "no-rejection": ("obrs.mode=off",),
    "replicas-2": ("replica.count=2",),  # one more receiver of every publish
    "slow-both": ("actor.count=2", "actor.slowdown=2", "learner.slowdown=2", "staleness.budget=1", "run.steps=18"),
}


def run(reps: int) -> list[Row]:
    """Launch everything once (``reps`` is not used: the medians are over configurations), compare, report."""
    with tempfile.TemporaryDirectory(prefix="croupier-bench-") as folder:
        launch_all(Path(folder))
        return [*rows_of(compare(Path(folder))), scale()]


def scale() -> Row:
    """CPU seconds of a simulation of 10,000 actors; it has one thread."""
    began = time.process_time()
    outcome = simulate(override(Setup(), SCALE))
    took = time.process_time() - began
    name = f"10,000 actors, {outcome.generated / 1e9:.1f} billion tokens: CPU seconds"
    return Row("simulate", name, took, "s", "bar: a minute", SCALE_BAR_S, 1)


def launch_all(folder: Path) -> None:
    """Run what is not finished below ``folder``/runs, one after the other; tools.launch sets a stump aside."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(bar_shape()).save_pretrained(folder / "model")
    todo = unfinished(folder)
    began = time.monotonic()
    for number, (name, overrides) in enumerate(todo.items(), 1):
        print(f"{number}/{len(todo)}  {name}: {' '.join(overrides) or 'base'}", file=sys.stderr, flush=True)
        launch(config_of(folder, name, overrides), folder)
    print(f"ran for {time.monotonic() - began:.0f} s", file=sys.stderr)


def unfinished(folder: Path) -> dict[str, tuple[str, ...]]:
    """Runs whose summary does not say that they came to their end, with their settings."""
    return {
        name: overrides
        for name, overrides in {**CALIBRATION, **CONFIGURATIONS}.items()
        if outcome_of(folder / "runs" / name) != "finished"
    }


def config_of(folder: Path, name: str, overrides: Sequence[str]) -> RunConfig:
    """The whole loop's benchmark with other settings."""
    file = folder / "base.yaml"
    file.write_text(to_yaml(loop_config(folder, folder / "model", f"tcp://127.0.0.1:{free_port()}")))
    return load(file, [*BASE, f"run.name={name}", *overrides])


def compare(folder: Path) -> list[Compared]:
    """Predict from the calibration runs, and look what came of each."""
    setup = measure([folder / "runs" / name for name in CALIBRATION]).setup
    found = []
    for name, overrides in CONFIGURATIONS.items():
        outcome = simulate(predicted_setup(setup, config_of(folder, name, overrides)))
        real = figures_of(read_run(folder / "runs" / name, timelines=False).steps)
        found.append(Compared(name, real, Figures(outcome.steps_per_s, outcome.lag_mean)))
    return found


def predicted_setup(costs: Setup, config: RunConfig) -> Setup:
    """What was measured elsewhere, with the settings of ``config``."""
    return replaced(costs, settings_of(config))


def main() -> int:
    """``python -m tools.bench.simulate DIR``: keep the runs in DIR and take up where it was left."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m tools.bench.simulate", description="Predictions beside real runs."
    )
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    launch_all(directory)
    for one in compare(directory):
        lag = "" if one.lag_error is None else f"{one.lag_error:.1%}"
        print(
            f"{one.name:22} {one.real.steps_per_s:6.3f} {one.predicted.steps_per_s:6.3f} {one.throughput_error:6.1%}   "
            f"{one.real.lag_mean:5.2f} {one.predicted.lag_mean:5.2f} {lag:>6}"
        )
    for row in rows_of(compare(directory))[-4:]:
        print(f"{row.name:50} {row.value:.1%}  ({row.reference})")
    row = scale()
    print(f"{row.name:50} {row.value:.1f} s  ({row.reference})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
