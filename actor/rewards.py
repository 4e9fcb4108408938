"""Named reward channels into one number."""

import math
from collections.abc import Collection, Mapping

from common.errors import TaskError
from common.near import suggest
from common.rewards import RewardSection

NOTHING = RewardSection()


def combine(
    channels: Mapping[str, float],
    weights: Mapping[str, float],
    section: RewardSection = NOTHING,
    lacking: Collection[str] = (),
) -> float:
    """``sum_c weights[c] * channels[c]`` over the channels whose gate is open (``reward.gate``).

    Channels without a weight are recorded and count nothing; those ``lacking`` have no value this time.
    Raises :class:`TaskError` for a weight of no channel (suggesting the near one), for no weight
    at all, and for values that are not finite.
    """
    if not weights:
        raise TaskError("task.reward_weights is empty: nothing would be rewarded")
    for name, value in channels.items():
        if not math.isfinite(value):
            raise TaskError(f"reward channel {name} returned {value}: a task must return finite rewards")
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
    return total
