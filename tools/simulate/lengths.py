"""How many tokens completions have, drawn in blocks."""

import numpy as np
from numpy.typing import NDArray

from tools.simulate.settings import LengthPart

BLOCK = 65_536  # lengths drawn at once


def draw(part: LengthPart, longest: int, count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """``count`` lengths in [1, longest]."""
    match part.kind:
        case "longest":
            found = np.full(count, longest, np.float64)
        case "lognormal":
            mu = np.log(part.mean) - part.sigma**2 / 2  # so that the mean is the mean
            found = np.round(random.lognormal(mu, part.sigma, count))
        case "uniform":
            found = random.integers(part.least, longest + 1, count).astype(np.float64)
        case "histogram":
            weights = np.array(part.weights or (1.0,) * len(part.values), np.float64)
            found = random.choice(np.array(part.values, np.float64), count, p=weights / weights.sum())
    return np.clip(found, 1, longest).astype(np.int64)


class Lengths:
    """An endless supply, the same for the same seed."""

    def __init__(self, part: LengthPart, longest: int, seed: int) -> None:
        self._part, self._longest = part, longest
        self._random = np.random.default_rng(seed)
        self._block: list[int] = []

    def take(self, count: int) -> list[int]:
        """``count`` lengths, shortest first."""
        if len(self._block) < count:
            self._block = draw(self._part, self._longest, max(BLOCK, count), self._random).tolist()
        taken = self._block[-count:]
        del self._block[-count:]
        taken.sort()
        return taken


class Spread:
    """Factors with mean 1: lognormal, ``spread`` their standard deviation."""

    def __init__(self, spread: float, seed: int) -> None:
        self._sigma = float(np.sqrt(np.log1p(spread**2)))
        self._random = np.random.default_rng(seed)

    def take(self) -> float:
        """One more."""
        return float(self._random.lognormal(-(self._sigma**2) / 2, self._sigma)) if self._sigma else 1.0
