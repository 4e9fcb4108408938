"""Named reward channels into one number."""

import difflib
import math
from collections.abc import Mapping

from common.errors import TaskError


def combine(channels: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """``sum_c weights[c] * channels[c]``; channels without a weight are recorded and count nothing.

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
        if name not in channels:
            near = difflib.get_close_matches(name, list(channels), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"channels: {', '.join(sorted(channels))}"
            raise TaskError(f"task.reward_weights.{name}: the task has no such channel; {hint}")
        if not math.isfinite(weight):
            raise TaskError(f"task.reward_weights.{name}={weight}: must be finite")
        total += weight * channels[name]
    return total
