"""What a timed run says, and what several of them say of two contestants. Pure.

::

    Timed (when each step ended) + rewards of saved versions  ->  curve  ->  seconds to a target
    the same figure of two contestants on the same seeds      ->  Ratio (with its spread over seeds)
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Curve = list[tuple[float, float]]  # (seconds, or steps; held-out reward), in order


@dataclass(frozen=True)
class Timed:
    """One finished run. The clock starts when the first step is done."""

    contestant: str
    seed: int
    recipe: dict[str, Any]  # all that decides the run: another one is run again
    startup_s: float  # from the command to the end of the first step
    at_s: list[float]  # end of step i + 1, of each step; at_s[0] is 0
    samples: list[int]  # completions trained, of each step
    tokens: list[int]  # completion tokens trained
    figures: dict[str, float] = field(default_factory=dict)  # means over steps: lag, acceptance, ...

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Timed":
        """The reverse; raises ValueError, KeyError or TypeError for what no run wrote."""
        return cls(**json.loads(text))

    @property
    def wall_s(self) -> float:
        """From the end of the first step to that of the last."""
        return self.at_s[-1]

    @property
    def samples_per_s(self) -> float:
        """Completions trained a second, from the second step on."""
        return sum(self.samples[1:]) / self.wall_s

    @property
    def tokens_per_s(self) -> float:
        """Completion tokens trained a second, from the second step on."""
        return sum(self.tokens[1:]) / self.wall_s

    def curve(self, rewards: Mapping[int, float]) -> Curve:
        """Held-out reward by seconds; ``rewards`` are of versions, and version v is there when step v is done."""
        return [(self.at_s[max(0, version - 1)], rewards[version]) for version in sorted(rewards)]


def reaches(curve: Curve, target: float) -> float | None:
    """Where the curve first reaches ``target``, by straight lines between its points; None if it never does."""
    if curve and curve[0][1] >= target:
        return curve[0][0]
    for (x0, y0), (x1, y1) in pairwise(curve):
        if y1 >= target:
            return x0 + (x1 - x0) * (target - y0) / (y1 - y0)
    return None


@dataclass(frozen=True)
class Ratio:
    """A figure and its reference, seed by seed."""

    pairs: list[tuple[float, float]]

    @property
    def value(self) -> float:
        """Mean of the figure."""
        return statistics.fmean(value for value, _ in self.pairs)

    @property
    def reference(self) -> float:
        """Mean of the reference, over the same seeds."""
        return statistics.fmean(reference for _, reference in self.pairs)

    @property
    def by_seed(self) -> list[float]:
        """The figure over its reference."""
        return [value / reference for value, reference in self.pairs]

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; 0 for one seed, which has none to show."""
        return statistics.stdev(self.by_seed) if len(self.pairs) > 1 else 0.0

    def __str__(self) -> str:
        mean = f"{self.value / self.reference:.2f}"
        return f"{mean} ± {self.spread:.2f}" if len(self.pairs) > 1 else mean


def paired(ours: Mapping[int, float | None], theirs: Mapping[int, float | None]) -> Ratio | None:
    """Of the seeds on which both have a figure that is not 0; None if there is no such seed."""
    pairs = [(a, b) for seed, a in ours.items() if a and (b := theirs.get(seed))]
    return Ratio(pairs) if pairs else None


def band(curves: Sequence[Curve], points: int = 200) -> tuple[Floats, Floats, Floats, Floats]:
    """``(x, mean, lowest, highest)`` over runs, up to where the shortest ends."""
    x = np.linspace(max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves), points)
    values = np.array([np.interp(x, [at for at, _ in curve], [reward for _, reward in curve]) for curve in curves])
    return x, values.mean(axis=0), values.min(axis=0), values.max(axis=0)
