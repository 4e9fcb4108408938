"""Columns over a run's steps that stay small however long it is: at most ``limit`` bins of 2^k steps.

::

    add(step, ...) -> the bin of step // width -> too many bins: every two neighbours become one, width doubles

A bin keeps how many values it saw, their sum and both extremes, so a spike of one step in a hundred thousand
is still drawn. Sums (tokens of a step) are added up, levels (tokens since the start) keep their last value.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

LIMIT = 512  # bins; about one pixel each on a wide chart
LAGS = 64  # lags from here on are counted together


@dataclass(slots=True)
class Mean:
    """Values of one column within a bin."""

    count: int
    total: float
    low: float
    high: float

    @property
    def mean(self) -> float:
        """Of what was added."""
        return self.total / self.count

    def merge(self, other: "Mean") -> None:
        """Add what the other holds."""
        self.count += other.count
        self.total += other.total
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)


@dataclass(slots=True)
class Bin:
    """``width`` steps beginning with ``index * width``."""

    index: int
    first: int  # step
    last: int  # step
    means: dict[str, Mean] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    levels: dict[str, float] = field(default_factory=dict)  # the last
    lags: Counter[int] = field(default_factory=Counter)  # lag, at most LAGS -> tokens

    def merge(self, later: "Bin") -> None:
        """Add a bin that comes after this one."""
        self.last = later.last
        for name, mean in later.means.items():
            if name in self.means:
                self.means[name].merge(mean)
            else:
                self.means[name] = mean
        for name, value in later.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.levels.update(later.levels)
        self.lags.update(later.lags)


class Bins:
    """The columns of a run, by step."""

    def __init__(self, limit: int = LIMIT) -> None:
        assert limit >= 2
        self.limit = limit
        self.width = 1  # steps a bin
        self.bins: list[Bin] = []
        self.rewound = 0  # times that steps were taken back

    def add(
        self,
        step: int,
        means: Mapping[str, float],
        sums: Mapping[str, float] | None = None,
        levels: Mapping[str, float] | None = None,
        lags: Mapping[int, int] | None = None,
    ) -> None:
        """One step. A step before the last one takes back what came since: the run was resumed there."""
        index = step // self.width
        if self.bins and step <= self.bins[-1].last:
            self._rewind(index, step)
        new = Bin(index, step, step, {name: Mean(1, value, value, value) for name, value in means.items()})
        new.sums.update(sums or {})
        new.levels.update(levels or {})
        for lag, tokens in (lags or {}).items():
            new.lags[min(lag, LAGS)] += tokens
        if self.bins and self.bins[-1].index == index:
            self.bins[-1].merge(new)
        else:
            self.bins.append(new)
            while len(self.bins) > self.limit:
                self._halve()

    def _rewind(self, index: int, step: int) -> None:
        self.rewound += 1
        while self.bins and self.bins[-1].index > index:
            self.bins.pop()
        if self.bins and self.bins[-1].index == index:
            if self.width == 1:
                self.bins.pop()
            else:
                self.bins[-1].last = min(self.bins[-1].last, step)

    def _halve(self) -> None:
        self.width *= 2
        halved: list[Bin] = []
        for one in self.bins:
            one.index //= 2
            if halved and halved[-1].index == one.index:
                halved[-1].merge(one)
            else:
                halved.append(one)
        self.bins = halved

    def since(self, step: int) -> list[Bin]:
        """The bins that hold ``step`` or later ones."""
        return [one for one in self.bins if one.last >= step]

    def mean(self, name: str) -> list[tuple[float, float]]:
        """(step in the middle of the bin, mean) of every bin that has the column."""
        return [((one.first + one.last) / 2, one.means[name].mean) for one in self.bins if name in one.means]
