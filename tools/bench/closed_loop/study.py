"""``python -m tools.bench closed_loop``: auto beside every fixed budget, at three ratios of speeds.

::

    ratio by ratio, seed by seed, budgets in turn -> versions judged off the clock -> docs/results/closed-loop.md, .png

Runs that are done are kept in ``runs/bench-closed-loop``, so that an interrupted study goes on. ``--reps`` is the
number of seeds; ``python -m tools.bench.closed_loop`` takes more options.
"""

import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from common.config import load
from tools.bench.closed_loop.runs import (
    AUTO,
    BUDGETS,
    CONFIG,
    RATIOS,
    Cell,
    Done,
    at_the_end,
    finished,
    judge,
    judged,
    make,
)
from tools.bench.harness import Row
from tools.warmstart import ensure

DIRECTORY = Path("runs/bench-closed-loop")


@dataclass(frozen=True)
class Options:
    """What is to be run, and where it is kept."""

    seeds: tuple[int, ...]
    ratios: tuple[str, ...] = tuple(RATIOS)
    budgets: tuple[str, ...] = BUDGETS
    directory: Path = DIRECTORY
    docs: Path | None = Path("docs")  # None: no document
    timed_only: bool = False  # run, and judge another time
    fresh: bool = False


@dataclass
class Found:
    """What the runs came to."""

    options: Options
    done: dict[Cell, Done] = field(default_factory=dict)
    reward: dict[Cell, float] = field(default_factory=dict)  # held out, at equal wall-clock

    def rewards(self, ratio: str, budget: str) -> list[float]:
        """By seed."""
        return [self.reward[Cell(ratio, budget, seed)] for seed in self.options.seeds]

    def mean(self, ratio: str, budget: str) -> float:
        """Over seeds."""
        return statistics.fmean(self.rewards(ratio, budget))

    def best(self, ratio: str) -> str:
        """The fixed budget with the greatest mean."""
        return max((b for b in self.options.budgets if b != AUTO), key=lambda b: self.mean(ratio, b))

    def over_best(self, ratio: str) -> list[float]:
        """Auto over the best fixed budget, seed by seed."""
        pairs = zip(self.rewards(ratio, AUTO), self.rewards(ratio, self.best(ratio)), strict=True)
        return [ours / theirs for ours, theirs in pairs]


def run_study(options: Options) -> Found:
    """Run what has not been run, judge it, and write the document."""
    root, console, found = options.directory, Console(stderr=True), Found(options)
    if options.fresh:
        shutil.rmtree(root, ignore_errors=True)
    ensure(load(CONFIG))
    cells = [Cell(r, b, seed) for seed in options.seeds for r in options.ratios for b in turns(options.budgets, seed)]
    for number, cell in enumerate(cells, 1):
        done = finished(cell, root)
        if done is None:
            done = make(cell, root)
            console.print(f"{number}/{len(cells)} {cell.name}: {done.speed():.2f} steps/s, budgets {chosen(done)}")
        found.done[cell] = done
    if options.timed_only:
        return found
    for cell, done in found.done.items():
        found.reward[cell] = at_the_end(done, judged(cell, root) or judge(cell, done, root))
    if options.docs is not None and set(options.ratios) == set(RATIOS) and AUTO in options.budgets:
        from tools.bench.closed_loop.report import write_report

        write_report(found, options.docs)
    return found


def turns(budgets: Sequence[str], seed: int) -> list[str]:
    """Every seed begins with another budget, so that a machine that slows down is nobody's fault."""
    shift = (3 * seed) % len(budgets)
    return [*budgets[shift:], *budgets[:shift]]


def chosen(done: Done) -> str:
    """The budgets in force, in order, with the steps that each was."""
    found: list[tuple[int, int]] = []
    for budget in done.budgets:
        if found and found[-1][0] == budget:
            found[-1] = (budget, found[-1][1] + 1)
        else:
            found.append((budget, 1))
    return " ".join(f"{budget}×{steps}" for budget, steps in found)


def rows(found: Found) -> list[Row]:
    """Auto beside the best fixed budget of each ratio."""
    made = []
    for ratio in found.options.ratios:
        best, ratios = found.best(ratio), found.over_best(ratio)
        made.append(
            Row(
                "closed_loop", f"held-out reward, {RATIOS[ratio].title}: auto", found.mean(ratio, AUTO), "reward",
                f"budget {best}, the best", found.mean(ratio, best), len(ratios),
                statistics.stdev(ratios) if len(ratios) > 1 else 0.0,
            )
        )  # fmt: skip
    return made


def run(reps: int) -> list[Row]:
    """The whole study on ``reps`` seeds."""
    return rows(run_study(Options(tuple(range(reps)))))
