"""One run of the quick start at one budget and one ratio of speeds, ended by the clock; and what became of it.

::

    runs/bench-closed-loop/<ratio>-<budget>-<seed>/
      done.json     when each step ended, what the budget was: the run is done
      rewards.json  held-out reward of the versions of its last part: it is judged

The clock starts when the first step is done, so start-up is left out; a run ends a little after TIME_S.
"""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.config import RunConfig, load, to_yaml
from common.errors import EngineError
from common.process import free_port
from learner.retention import CHECKPOINTS, complete, step_of
from tools.evaluate import held_out
from tools.export import export
from tools.run_files import Record, last_lines, of_kind, read_metrics

CONFIG = "configs/quickstart.yaml"
TIME_S = 420.0  # of the clock, at whose end runs are compared
HALF = 0.5  # of it, over whose last part the rollouts' reward is averaged
LAST = 0.2  # the same of the held-out reward, of which every version costs seconds
MARGIN_S = 20.0  # beyond it, so that a version from after it is saved
START_LIMIT_S, END_LIMIT_S = 120.0, 90.0
POLL_S = 0.5
SAVE_EVERY = 8  # steps between versions that are judged
DONE, REWARDS = "done.json", "rewards.json"
HELD_OUT = 1024  # prompts that a version is judged by: one standard error is about .015
JUDGE_LIMIT_S = 120.0


@dataclass(frozen=True)
class Ratio:
    """How fast actors and learner are beside each other."""

    title: str
    overrides: tuple[str, ...]
    steps_per_s: float  # of the slower side, if nothing else took time


SLOW_S, FAST_S = 2.0, 0.8  # a step of the slower side and of the faster; seven runs then use two thirds of two cores
ANSWER, IN_FLIGHT = 8, 2  # tokens of an answer; steps' worth of trajectories that two actors can decode at once


def _ratio(title: str, rollout_s: float, train_s: float) -> Ratio:
    """``rollout_s`` to sample a step's trajectories where the fleet is full, ``train_s`` to train on them."""
    token_s = rollout_s * IN_FLIGHT / ANSWER
    return Ratio(title, (f"actor.pace_s={token_s:g}", f"learner.pace_s={train_s:g}"), 1 / max(rollout_s, train_s))


RATIOS = {
    "slow-actors": _ratio("actors 2.5 times slower", SLOW_S, FAST_S),
    "even": _ratio("equally fast", SLOW_S, SLOW_S),
    "slow-learner": _ratio("learner 2.5 times slower", FAST_S, SLOW_S),
}
AUTO = "auto"
BUDGETS = ("0", "1", "2", "4", "8", "16", AUTO)


@dataclass(frozen=True)
class Cell:
    """What is run."""

    ratio: str
    budget: str
    seed: int

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{self.ratio}-{self.budget}-{self.seed}"

    @property
    def model(self) -> str:
        """Name of the model's directory that all runs of the seed begin from."""
        return f"start-{self.seed}"

    def overrides(self) -> list[str]:
        """All that differs from the quick start, but for the places of its files."""
        return [
            f"run.seed={self.seed}", "run.steps=100000", f"staleness.budget={self.budget}",
            "optim.schedule=constant", "evaluation.prompts=0", "learner.checkpoint_keep=100000",
            f"learner.checkpoint_every={SAVE_EVERY}", *RATIOS[self.ratio].overrides,
        ]  # fmt: skip

    def config(self, root: Path) -> RunConfig:
        """The run, with an address of its own."""
        found = load(CONFIG, [*self.overrides(), f"model.path={root / self.model}"])
        return replace(
            found,
            run=replace(found.run, name="run", dir=str(root / self.name)),
            broker=replace(found.broker, address=f"tcp://127.0.0.1:{free_port()}"),
        )


@dataclass(frozen=True)
class Done:
    """A run that was made."""

    overrides: list[str]
    at_s: list[float]  # when step i was done; at_s[0] is 0
    rewards: list[float]  # of its batch
    budgets: list[int]  # in force when it was done
    lags: list[float]  # of its tokens, the mean
    idle: dict[str, float]  # the learner's share of the clock parked, by cause
    machine_idle: float  # share of the cores' time, from the first step to the end

    @property
    def lag_mean(self) -> float:
        """Over all steps."""
        return float(np.mean(self.lags))

    def speed(self) -> float:
        """Steps a second until TIME_S."""
        steps = sum(at <= TIME_S for at in self.at_s) - 1
        return steps / TIME_S


def make(cell: Cell, root: Path) -> Done:
    """Make the run. Raises :class:`EngineError` if it fails or is late."""
    folder = root / cell.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = cell.config(root)
    done = of_lines(cell, *_until(config, folder, TIME_S + MARGIN_S))
    _write(folder / DONE, asdict(done))
    return done


def of_lines(cell: Cell, steps: list[Record], machine_idle: float) -> Done:
    """From the step lines of its metrics."""
    first, last = steps[0], steps[-1]
    clock = last["time_s"] - first["time_s"]
    parked = {cause: (last["parked"][cause] - first["parked"].get(cause, 0.0)) / clock for cause in last["parked"]}
    return Done(
        cell.overrides(), [s["time_s"] - first["time_s"] for s in steps], [s["reward"] for s in steps],
        [s["staleness_budget"] for s in steps], [s["lag_mean"] for s in steps], parked, machine_idle,
    )  # fmt: skip


def _cores() -> tuple[int, int]:
    """``(idle, all)`` of the machine's cores since it was started, in ticks."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def _until(config: RunConfig, folder: Path, clock_s: float) -> tuple[list[Record], float]:
    """Launch ``config`` and end it once ``clock_s`` have passed since its first step.

    Returns its step lines, and which share of the cores' time was idle meanwhile.
    """
    file, log = folder / "run.yaml", folder / "launch.log"
    file.write_text(to_yaml(config))
    with log.open("wb") as output:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "tools.launch", str(file)],
            stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            began, first, before = time.monotonic(), None, _cores()
            while first is None or time.monotonic() < first + clock_s:
                time.sleep(POLL_S)
                if launcher.poll() is not None or time.monotonic() - began > START_LIMIT_S + clock_s:
                    raise EngineError("the run did not come to its end:\n" + "\n".join(last_lines(log, 25)))
                if first is None and of_kind(read_metrics(config.run.path), "step"):
                    first, before = time.monotonic(), _cores()
            after = _cores()
            launcher.send_signal(signal.SIGINT)
            launcher.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired as late:
            raise EngineError(f"the run did not end within {END_LIMIT_S:.0f} s of Ctrl-C; see {log}") from late
        finally:
            if launcher.poll() is None:
                launcher.kill()
                launcher.wait()
    return of_kind(read_metrics(config.run.path), "step"), (after[0] - before[0]) / max(1, after[1] - before[1])


def finished(cell: Cell, root: Path) -> Done | None:
    """What an earlier run of the same settings left; None where there is none."""
    try:
        done = Done(**json.loads((root / cell.name / DONE).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return done if done.overrides == cell.overrides() else None


# ---- rewards ------------------------------------------------------------------------------------


def of_rollouts(done: Done) -> float:
    """Reward of the answers that were trained on, to questions hardly any of which is asked twice, over the last half.

    Each step's answers are those of the version that gave them, at the moment when that was made: so many steps
    before as its lag says. Beyond the last version that was trained on its reward stands.
    """
    steps = np.arange(len(done.at_s))
    made_at = np.interp(steps - np.array(done.lags) - 1, steps, done.at_s)  # version v: when step v - 1 was done
    order = np.argsort(made_at, kind="stable")
    grid = np.linspace((1 - HALF) * TIME_S, TIME_S, 400)
    return float(np.interp(grid, made_at[order], np.array(done.rewards)[order]).mean())


def judged(cell: Cell, root: Path) -> dict[int, float] | None:
    """Held-out reward by version, if the run was judged."""
    try:
        found = json.loads((root / cell.name / REWARDS).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return {int(version): float(reward) for version, reward in found.items()}


def judge(cell: Cell, done: Done, root: Path) -> dict[int, float]:
    """Judge the versions that :func:`at_the_end` needs; everybody's with the same questions and noise."""
    folder = root / cell.name
    versions = needed([step_of(path) for path in complete(folder / "run" / CHECKPOINTS)], done)
    config = load(
        CONFIG, [f"run.seed={cell.seed}", f"model.path={root / cell.model}", f"evaluation.prompts={HELD_OUT}"]
    )
    rewards: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as room:
        for version in versions:
            directory = export(folder / "run", version, Path(room) / str(version), torch.float32)
            rewards[version] = float(held_out(config, directory, JUDGE_LIMIT_S)["reward"])
    _write(folder / REWARDS, rewards)
    shutil.rmtree(folder / "run" / CHECKPOINTS)
    return rewards


def needed(versions: list[int], done: Done) -> list[int]:
    """Of saved ``versions``: those of the last part of the clock, with a neighbour on either side.

    Raises :class:`EngineError` if they do not enclose it.
    """
    at = {version: done.at_s[version - 1] for version in sorted(versions) if 1 <= version <= len(done.at_s)}
    before = [v for v, s in at.items() if s <= (1 - LAST) * TIME_S]
    after = [v for v, s in at.items() if s >= TIME_S]
    inside = [v for v, s in at.items() if (1 - LAST) * TIME_S < s < TIME_S]
    if not before or not (after or inside):
        raise EngineError(
            f"versions at {[round(s, 1) for s in at.values()]} s do not enclose the last part of the clock"
        )
    return [before[-1], *inside, *after[:1]]


def at_the_end(done: Done, rewards: dict[int, float]) -> float:
    """Held-out reward over the last part of the clock: the mean of straight lines between judged versions."""
    versions = sorted(rewards)
    grid = np.linspace((1 - LAST) * TIME_S, TIME_S, 100)
    return float(np.interp(grid, [done.at_s[v - 1] for v in versions], [rewards[v] for v in versions]).mean())


def _write(path: Path, value: Any) -> None:
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(value) + "\n")
    partial.replace(path)
