"""Advantages from whole groups, before any rejection (algorithms.md 1.7 and 4)."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["grpo", "dr_grpo", "rloo"]


def group_advantages(rewards: NDArray[np.float32], kind: Kind, epsilon: float) -> NDArray[np.float32]:
    """Advantages of groups, ``rewards[P, G] -> [P, G]``.

    ``grpo``: ``(R - mean) / (std + epsilon)`` with the population deviation; ``dr_grpo``:
    ``R - mean``; ``rloo``: ``G/(G-1) (R - mean)``. A group whose rewards are all equal gets
    exactly 0, found by max == min and never by a small deviation.
    """
    wide = rewards.astype(np.float64)
    group_size = wide.shape[1]
    centred = wide - wide.mean(axis=1, keepdims=True)
    if kind == "grpo":
        centred = centred / (wide.std(axis=1, keepdims=True) + epsilon)
    elif kind == "rloo" and group_size > 1:
        centred = centred * (group_size / (group_size - 1))
    equal = wide.max(axis=1, keepdims=True) == wide.min(axis=1, keepdims=True)
    return np.where(equal, 0.0, centred).astype(np.float32)
