"""Cells compared: rewards at equal time and at equal samples, bands over seeds, Pareto fronts. Pure.

::

    {cell: [Measured, ...]}  ->  compare()  ->  Comparison: T, S, a reward per cell and seed, the two-way fit
                             ->  curve()    ->  mean and band along time or samples
    (cost, worth) by cell    ->  front()
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tools.intervals import Floats, TwoWay, half_width, pooled, two_way
from tools.sweep.measure import Measured, Point, at

GRID = 160  # places along a curve
Runs = Mapping[str, Sequence[Measured]]  # cell's name -> its runs


def by_time(point: Point) -> float:
    """Seconds of training."""
    return point.time_s


def by_samples(point: Point) -> float:
    """Trajectories generated."""
    return point.samples


@dataclass(frozen=True)
class Comparison:
    """Held-out rewards at one place, of every run that had been evaluated on both sides of it."""

    where: float  # seconds or samples; nan if no run was evaluated twice
    rewards: Mapping[tuple[str, int], float]  # (cell, seed) -> reward there
    errors: Mapping[tuple[str, int], float]  # standard error over held-out prompts
    fit: TwoWay | None  # None without rewards
    left_out: Sequence[str] = field(default=())  # "cell, seed n: why"

    def cells(self) -> list[str]:
        """Those that can be compared, in the sweep's order."""
        return list(dict.fromkeys(cell for cell, _ in self.rewards))

    def level(self, cell: str) -> float:
        """The cell's reward, as if every cell had every seed."""
        assert self.fit is not None, "no rewards were compared"
        return self.fit.level(cell)

    def half(self, cell: str) -> float:
        """Half of the 95 % interval of the cell's mean, the seeds' spread pooled over the cells.

        With one seed everywhere: of the evaluation alone, which does not know what another seed would do.
        """
        groups = [[reward for (name, _), reward in self.rewards.items() if name == other] for other in self.cells()]
        own = sum(1 for name, _ in self.rewards if name == cell)
        deviation, freedom = pooled(groups)
        return half_width(deviation, freedom, own) if freedom else 1.96 * self._error(cell)

    def difference(self, first: str, second: str) -> tuple[float, float]:
        """``first - second`` and half of its 95 % interval, paired by seed; with one seed, of evaluations alone."""
        assert self.fit is not None, "no rewards were compared"
        mean, half = self.fit.difference(first, second)
        if not self.fit.freedom and first != second:
            return mean, 1.96 * math.hypot(self._error(first), self._error(second))
        return mean, half

    @property
    def knows_seeds(self) -> bool:
        """Whether intervals include what another seed would change."""
        return self.fit is not None and self.fit.freedom > 0

    def _error(self, cell: str) -> float:
        errors = [error for (name, _), error in self.errors.items() if name == cell]
        return math.sqrt(sum(error**2 for error in errors)) / len(errors)


def compare(runs: Runs, along: Callable[[Point], float]) -> Comparison:
    """Rewards at the last place that every run reached: the least total time, or the fewest samples."""
    judged = {(cell, run.seed): run.points for cell, found in runs.items() for run in found}
    left_out = [
        f"{cell}, seed {seed}: {len(points)} evaluation(s), and a curve takes two"
        for (cell, seed), points in judged.items()
        if len(points) < 2
    ]
    judged = {key: points for key, points in judged.items() if len(points) > 1}
    if not judged:
        return Comparison(math.nan, {}, {}, None, left_out)
    where = min(along(points[-1]) for points in judged.values())
    rewards, errors = {}, {}
    for (cell, seed), points in judged.items():
        found = at(points, where, along)
        if found is None:
            left_out.append(f"{cell}, seed {seed}: not evaluated before {where:.4g}")
            continue
        rewards[cell, seed], errors[cell, seed] = found
    return Comparison(where, rewards, errors, two_way(rewards), left_out)


@dataclass(frozen=True)
class Curve:
    """A cell's mean reward along time or samples, as far as all its runs go."""

    x: Floats  # [n]
    mean: Floats  # [n]
    half: Floats  # [n] of the 95 % band; nan where no cell has two seeds


def curves(runs: Runs, along: Callable[[Point], float]) -> dict[str, Curve]:
    """A curve for every cell that has one; bands pool the seeds' spread over the cells at the same share of the way."""
    judged = {cell: [run.points for run in found if len(run.points) > 1] for cell, found in runs.items()}
    judged = {cell: found for cell, found in judged.items() if found}
    grids = {
        cell: np.linspace(
            max(along(points[0]) for points in found), min(along(points[-1]) for points in found), GRID
        )
        for cell, found in judged.items()
    }  # fmt: skip
    values = {
        cell: np.array([np.interp(grids[cell], *_arrays(points, along)) for points in found])
        for cell, found in judged.items()
    }
    halves = {cell: np.full(GRID, np.nan) for cell in judged}
    for place in range(GRID):
        deviation, freedom = pooled([found[:, place].tolist() for found in values.values()])
        for cell, found in values.items():
            halves[cell][place] = half_width(deviation, freedom, len(found)) if freedom else np.nan
    return {cell: Curve(grids[cell], found.mean(axis=0), halves[cell]) for cell, found in values.items()}


def _arrays(points: Sequence[Point], along: Callable[[Point], float]) -> tuple[list[float], list[float]]:
    return [along(point) for point in points], [point.reward for point in points]


def samples_at(runs: Runs, comparison: Comparison) -> dict[str, float]:
    """Trajectories that each compared cell had generated at the comparison's time, mean over its seeds."""
    found: dict[str, list[float]] = {}
    for cell, its in runs.items():
        for run in its:
            if (cell, run.seed) in comparison.rewards:
                times, samples = [p.time_s for p in run.points], [p.samples for p in run.points]
                found.setdefault(cell, []).append(float(np.interp(comparison.where, times, samples)))
    return {cell: sum(values) / len(values) for cell, values in found.items()}


def means(runs: Runs) -> dict[str, dict[str, float]]:
    """``figure -> cell -> mean over seeds``; cells without the figure are not in it."""
    found: dict[str, dict[str, float]] = {}
    for cell, its in runs.items():
        for name in dict.fromkeys(name for run in its for name in run.figures):
            values = [run.figures[name] for run in its if name in run.figures]
            found.setdefault(name, {})[cell] = sum(values) / len(values)
    return found


def front(places: Mapping[str, tuple[float, float]]) -> list[str]:
    """Of ``cell -> (cost, worth)`` those that no other beats: as cheap and as good, and better in one. Cheap first.

    O(n log n): by rising cost, each that is worth more than all cheaper ones.
    """
    ordered = sorted(places, key=lambda cell: (places[cell][0], -places[cell][1]))
    found: list[str] = []
    for cell in ordered:
        cost, worth = places[cell]
        if not found or worth > places[found[-1]][1] or (cost, worth) == places[found[-1]]:
            found.append(cell)
    return found
