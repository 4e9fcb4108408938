"""Predictions beside what happened: errors, and their medians beside the bars. Pure."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tools.bench.harness import Row
from tools.bench.launching import FIRST_STEP
from tools.run_files import Record

THROUGHPUT_BAR, LAG_BAR = 0.10, 0.15  # median errors at most


@dataclass(frozen=True)
class Figures:
    """Of one configuration, run or simulated."""

    steps_per_s: float
    lag_mean: float


@dataclass(frozen=True)
class Compared:
    """One configuration."""

    name: str
    real: Figures
    predicted: Figures

    @property
    def throughput_error(self) -> float:
        """Relative."""
        return abs(self.predicted.steps_per_s / self.real.steps_per_s - 1)

    @property
    def lag_error(self) -> float | None:
        """Relative; None where no token can be stale."""
        if self.real.lag_mean == 0 and self.predicted.lag_mean == 0:
            return None
        return abs(self.predicted.lag_mean - self.real.lag_mean) / max(self.real.lag_mean, 1e-9)


def figures_of(steps: Sequence[Record]) -> Figures:
    """Of a real run, between the commits of FIRST_STEP and of the last step."""
    steady = [step for step in steps if step["step"] >= FIRST_STEP]
    seconds = steady[-1]["time_s"] - steady[0]["time_s"]
    lags = sum(step["lag_mean"] * step["tokens_proposed"] for step in steady[1:])
    return Figures((len(steady) - 1) / seconds, lags / sum(step["tokens_proposed"] for step in steady[1:]))


def rows_of(found: Sequence[Compared]) -> list[Row]:
    """Every figure, then the medians beside their bars."""
    rows = []
    for one in found:
        rows.append(_row(f"{one.name}: steps/s", one.predicted.steps_per_s, "steps/s", "real", one.real.steps_per_s))
    for one in found:
        if one.lag_error is not None:
            rows.append(_row(f"{one.name}: mean lag", one.predicted.lag_mean, "versions", "real", one.real.lag_mean))
    speeds = [one.throughput_error for one in found]
    lags = [one.lag_error for one in found if one.lag_error is not None]
    for name, errors, bar in (("throughput", speeds, THROUGHPUT_BAR), ("mean lag", lags, LAG_BAR)):
        what = f"median error of {name}, {len(errors)} configurations"
        rows.append(_row(what, statistics.median(errors), "relative", f"bar: at most {bar:.0%}", bar))
        rows.append(_row(f"largest error of {name}", max(errors), "relative", f"bar of the median: {bar:.0%}", bar))
    return rows


def _row(name: str, value: float, unit: str, reference: str, reference_value: float) -> Row:
    return Row("simulate", name, value, unit, reference, reference_value, 1)
