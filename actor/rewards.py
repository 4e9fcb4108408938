"""Named reward channels into one number."""

import math
from collections.abc import Collection, Mapping

import numpy as np

from common.errors import TaskError
from common.near import suggest
from common.rewards import RewardSection

NOTHING = RewardSection()
LARGEST = float(np.finfo(np.float32).max)  # rewards and channels travel as float32


def is_told(value: float) -> bool:
    """Whether ``value`` is finite, also as float32: nobody else's group is refused for it."""
    return abs(value) <= LARGEST


def combine(
    channels: Mapping[str, float],
    weights: Mapping[str, float],
    section: RewardSection = NOTHING,
    lacking: Collection[str] = (),
) -> float:
    """``sum_c weights[c] * channels[c]`` over the channels whose gate is open (``reward.gate``).

    Channels without a weight are recorded and count nothing; those ``lacking`` have no value this time.
    Raises :class:`TaskError` for a weight of no channel (suggesting the near one), for no weight
    at all, and for values that are not finite, their sum included.
    """
    if not weights:
        raise TaskError("task.reward_weights is empty: nothing would be rewarded")
    for name, value in channels.items():
        if not is_told(value):
            raise TaskError(f"reward channel {name} returned {value}: a task must return finite rewards (float32)")
    total = 0.0
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise TaskError(f"task.reward_weights.{name}={weight}: must be finite")
        if name in lacking:
            continue
        if name not in channels:
            hint = suggest(name, sorted(channels), "channels")
            raise TaskError(f"task.reward_weights.{name}: the task has no such channel; {hint}")
        if section.opens(name, channels):
            total += weight * channels[name]
    if not is_told(total):
        raise TaskError(f"the weighted sum of {dict(channels)} is {total:g}: rewards must be finite (float32)")
    return total
