"""Advantages from whole groups, before any rejection (algorithms.md 1.7, 3.3 and 4)."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["grpo", "dr_grpo", "rloo"]


def without_signal(rewards: NDArray[np.float32], sizes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """``[P]``: groups whose rewards are all equal, found by max == min and never by a small deviation."""
    first = np.cumsum(sizes) - sizes
    equal: NDArray[np.bool_] = np.maximum.reduceat(rewards, first) == np.minimum.reduceat(rewards, first)
    return equal


def group_advantages(
    rewards: NDArray[np.float32], sizes: NDArray[np.int64], group_size: int, kind: Kind, epsilon: float
) -> NDArray[np.float32]:
    """Advantages of ``P`` groups in order, ``rewards[B]`` with ``sizes[P]`` summing to ``B``: ``[B]``.

    ``grpo``: ``(R - mean) / (std + epsilon)`` with the population deviation; ``dr_grpo``:
    ``R - mean``; ``rloo``: ``n/(n-1) (R - mean)``. A group without signal gets exactly 0. A group
    of which only ``n`` of ``group_size`` are valid is taken over those and weighted by
    ``group_size / n``, which is what padding it with copies of them would come to.
    """
    wide, sizes = rewards.astype(np.float64), np.asarray(sizes, np.int64)
    first, owner = np.cumsum(sizes) - sizes, np.repeat(np.arange(len(sizes)), sizes)
    mean = np.add.reduceat(wide, first) / sizes
    centred = wide - mean[owner]
    scale = group_size / sizes
    if kind == "grpo":
        deviation = np.sqrt(np.add.reduceat(np.square(centred), first) / sizes)
        scale = scale / (deviation + epsilon)
    elif kind == "rloo":
        scale = scale * np.where(sizes > 1, sizes / np.maximum(1, sizes - 1), 1.0)
    silent = without_signal(rewards, sizes)
    return np.where(silent[owner], 0.0, centred * scale[owner]).astype(np.float32)
