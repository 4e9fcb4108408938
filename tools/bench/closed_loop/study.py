"""``python -m tools.bench closed_loop``: auto beside every fixed budget, at three ratios of speeds.

::

    seed by seed, ratio by ratio: all budgets side by side -> versions judged off the clock
    -> docs/results/closed-loop.md, closed-loop.png

The budgets of one ratio and seed run at the same time, asleep for much of it: whatever else happens on the machine
happens to all of them. Runs that are done are kept in ``runs/bench-closed-loop``, so that an interrupted study goes
on. ``--reps`` is the number of seeds; ``python -m tools.bench.closed_loop`` takes more options.
"""

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from tools.bench.closed_loop.runs import (
    AUTO,
    BUDGETS,
    RATIOS,
    Cell,
    Done,
    at_the_end,
    finished,
    judge,
    judged,
    make,
    of_rollouts,
)
from tools.bench.harness import Row, forget
from tools.warmstart import ensure

START_EVERY_S = 1.0
DIRECTORY = Path("runs/bench-closed-loop")
ROLLOUTS, HELD_OUT = "rollouts' reward", "held-out reward"
MEASURES = (ROLLOUTS, HELD_OUT)


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
    reward: dict[tuple[str, Cell], float] = field(default_factory=dict)  # by measure, at equal wall-clock

    def rewards(self, measure: str, ratio: str, budget: str) -> list[float]:
        """By seed."""
        return [self.reward[measure, Cell(ratio, budget, seed)] for seed in self.options.seeds]

    def mean(self, measure: str, ratio: str, budget: str) -> float:
        """Over seeds."""
        return statistics.fmean(self.rewards(measure, ratio, budget))

    def best(self, measure: str, ratio: str) -> str:
        """The fixed budget with the greatest mean."""
        return max((b for b in self.options.budgets if b != AUTO), key=lambda b: self.mean(measure, ratio, b))

    def over_best(self, measure: str, ratio: str) -> list[float]:
        """Auto over the best fixed budget, seed by seed."""
        best = self.best(measure, ratio)
        pairs = zip(self.rewards(measure, ratio, AUTO), self.rewards(measure, ratio, best), strict=True)
        return [ours / theirs for ours, theirs in pairs]


def run_study(options: Options) -> Found:
    """Run what has not been run, judge it, and write the document."""
    root, console, found = options.directory, Console(stderr=True), Found(options)
    if options.fresh:
        forget(root, ["start", *(f"{ratio}-{budget}" for ratio in RATIOS for budget in BUDGETS)])
    for seed in options.seeds:
        for ratio in options.ratios:
            cells = [Cell(ratio, budget, seed) for budget in options.budgets]
            kept = {cell: done for cell in cells if (done := finished(cell, root)) is not None}
            if len(kept) < len(cells):
                ensure(cells[0].config(root))
            made = side_by_side([cell for cell in cells if cell not in kept], root)
            found.done |= kept | made
            for cell, done in made.items():
                console.print(f"{cell.name}: {done.speed():.2f} steps/s, budgets {chosen(done)}")
    if options.timed_only:
        return found
    for cell, done in found.done.items():
        found.reward[ROLLOUTS, cell] = of_rollouts(done)
        found.reward[HELD_OUT, cell] = at_the_end(done, judged(cell, root) or judge(cell, done, root))
    if options.docs is not None and set(options.ratios) == set(RATIOS) and AUTO in options.budgets:
        from tools.bench.closed_loop.report import write_report

        write_report(found, options.docs)
    return found


def side_by_side(cells: Sequence[Cell], root: Path) -> dict[Cell, Done]:
    """Make these runs at the same time; what one raises ends the study when the others are done."""
    with ThreadPoolExecutor(max(1, len(cells))) as pool:
        futures = {}
        for cell in cells:
            futures[cell] = pool.submit(make, cell, root)
            time.sleep(START_EVERY_S)
        return {cell: future.result() for cell, future in futures.items()}


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
    """Auto beside the best fixed budget of each ratio, by each measure."""
    return [_row(found, measure, ratio) for measure in MEASURES for ratio in found.options.ratios]


def _row(found: Found, measure: str, ratio: str) -> Row:
    best, ratios = found.best(measure, ratio), found.over_best(measure, ratio)
    return Row(
        "closed_loop", f"{measure}, {RATIOS[ratio].title}: auto", found.mean(measure, ratio, AUTO), "reward",
        f"budget {best}, the best", found.mean(measure, ratio, best), len(ratios),
        statistics.stdev(ratios) if len(ratios) > 1 else 0.0,
    )  # fmt: skip


def run(reps: int) -> list[Row]:
    """The whole study on ``reps`` seeds."""
    return rows(run_study(Options(tuple(range(reps)))))
