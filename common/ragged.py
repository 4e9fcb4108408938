"""Sums over the pieces of a packed array: ``offsets[B+1]`` cut ``values[N]`` into ``B`` pieces, some perhaps empty.

numpy's ``reduceat`` is written for pieces of a few elements; for long ones a call a piece is faster.
"""

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

LONG = 128  # mean elements of a piece from which a call for each is the faster way


def _are_long(values: NDArray[Any], offsets: NDArray[Any]) -> bool:
    return len(values) >= LONG * (len(offsets) - 1)


def count(flags: NDArray[np.bool_], offsets: NDArray[Any]) -> NDArray[np.int64]:
    """How many of ``flags[N]`` are true in each piece ``[B]``."""
    if _are_long(flags, offsets):
        at = offsets.tolist()
        return np.array([np.count_nonzero(flags[a:b]) for a, b in pairwise(at)], np.int64)
    running = np.zeros(len(flags) + 1, np.int64)
    np.cumsum(flags, out=running[1:])
    found: NDArray[np.int64] = np.diff(running[offsets])
    return found


def least(values: NDArray[np.int32], offsets: NDArray[Any], empty: int) -> NDArray[np.int32]:
    """The least of ``values[N]`` in each piece ``[B]``; ``empty`` for a piece without any."""
    if _are_long(values, offsets):
        at = offsets.tolist()
        return np.array([values[a:b].min(initial=empty) for a, b in pairwise(at)], np.int32)
    found = np.full(len(offsets) - 1, empty, np.int32)
    full = np.flatnonzero(np.diff(offsets))
    if len(full):
        found[full] = np.minimum.reduceat(values, offsets[:-1][full])
    return found
