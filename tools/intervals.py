"""Student's t and what is made of it: means with 95 % intervals over seeds. Pure, numpy alone.

::

    values by group -> pooled()  -> one standard deviation for all groups and its degrees of freedom
    (group, block) -> value -> two_way() -> differences between groups, paired by block, gaps allowed
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # two-sided, 1 to 10 degrees of freedom
Z_95 = 1.959964  # two-sided, of the normal distribution
ROUNDING = 1e-8  # of a least-squares fit with entries of 0 and 1


def t_95(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t; infinite without degrees of freedom."""
    if freedom < 1:
        return math.inf
    if freedom <= len(T_95):
        return T_95[freedom - 1]
    z = Z_95  # two terms of Cornish and Fisher's expansion: within .003 from 11 on
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def pooled(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """One standard deviation within groups and its degrees of freedom; (nan, 0) if no group has two values."""
    freedom = sum(len(group) - 1 for group in groups if group)
    if freedom < 1:
        return math.nan, 0
    squares = sum(float(((np.asarray(group) - np.mean(group)) ** 2).sum()) for group in groups if group)
    return math.sqrt(squares / freedom), freedom


def half_width(deviation: float, freedom: int, count: int) -> float:
    """Half of the 95 % interval of a mean of ``count`` values; infinite where nothing is known of their spread."""
    return t_95(freedom) * deviation / math.sqrt(count) if freedom and count else math.inf


@dataclass(frozen=True)
class TwoWay:
    """``value = group + block + noise`` fitted by least squares; the noise is the same in all groups."""

    groups: tuple[str, ...]
    levels: Floats  # [G] of the groups, averaged over the blocks
    deviation: float  # of the noise; nan without degrees of freedom
    freedom: int
    _inverse: Floats  # [G + B - 1]^2
    _known: Floats  # [G + B - 1]^2 projects on what the data can tell

    def level(self, group: str) -> float:
        """The group's mean, as if every group had every block."""
        return float(self.levels[self.groups.index(group)])

    def difference(self, first: str, second: str) -> tuple[float, float]:
        """``first - second`` and half of its 95 % interval; infinite where no blocks connect the two."""
        contrast = np.zeros(len(self._inverse))
        contrast[self.groups.index(first)] += 1
        contrast[self.groups.index(second)] -= 1
        mean = self.level(first) - self.level(second)
        told = bool(np.abs(self._known @ contrast - contrast).max() < ROUNDING)
        if first == second:
            return 0.0, 0.0
        if not self.freedom or not told:
            return mean, math.inf
        return mean, t_95(self.freedom) * self.deviation * math.sqrt(float(contrast @ self._inverse @ contrast))


def two_way(values: Mapping[tuple[str, int], float]) -> TwoWay:
    """Fit ``(group, block) -> value``; with two groups its interval is the paired t-test's. At least one value."""
    if not values:
        raise ValueError("two_way: no values to compare")
    groups = tuple(dict.fromkeys(group for group, _ in values))
    blocks = tuple(dict.fromkeys(block for _, block in values))
    design = np.zeros((len(values), len(groups) + len(blocks) - 1))
    for row, (group, block) in enumerate(values):
        design[row, groups.index(group)] = 1
        if (column := blocks.index(block)) > 0:
            design[row, len(groups) + column - 1] = 1
    y = np.fromiter(values.values(), np.float64)
    inverse: Floats = np.asarray(np.linalg.pinv(design.T @ design), np.float64)
    found, rank = inverse @ design.T @ y, np.linalg.matrix_rank(design)
    freedom = len(values) - int(rank)
    left = float(((y - design @ found) ** 2).sum())
    levels: Floats = np.asarray(found[: len(groups)] + found[len(groups) :].sum() / len(blocks), np.float64)
    deviation = math.sqrt(left / freedom) if freedom else math.nan
    return TwoWay(groups, levels, deviation, freedom, inverse, inverse @ (design.T @ design))
