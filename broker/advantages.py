"""Advantages of whole trajectories, before any rejection (algorithms.md 1.7, 3.3 and 4)."""

import numpy as np
from numpy.typing import NDArray

from common.objective import GROUP_BASELINES, AdvantageSection

Floats = NDArray[np.float32]


def without_signal(rewards: Floats, sizes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """``[P]``: groups whose rewards are all equal, found by max == min and never by a small deviation."""
    first = np.cumsum(sizes) - sizes
    equal: NDArray[np.bool_] = np.maximum.reduceat(rewards, first) == np.minimum.reduceat(rewards, first)
    return equal


def group_advantages(rewards: Floats, sizes: NDArray[np.int64], group_size: int, section: AdvantageSection) -> Floats:
    """Advantages of ``P`` groups in order, ``rewards[B]`` with ``sizes[P]`` summing to ``B``: ``[B]``.

    By ``section.kind`` (algorithms.md 4; ``mean`` and ``std`` of the group unless it says batch):

    - ``grpo``: ``(R - mean) / (std + epsilon)``; ``dr_grpo``: ``R - mean``; ``rloo``: ``n/(n-1) (R - mean)``;
    - ``reinforce_pp``: ``(R - batch mean) / (batch std + epsilon)`` (2501.03262); ``reinforce_pp_baseline``:
      ``R - mean``, then by the batch's deviation of that;
    - ``scalerl``: the same, the deviation over groups with signal alone (2510.13786);
    - ``batch_mean``: ``R - batch mean``; ``none``: ``R``.

    With a group's baseline a group without signal gets exactly 0. A group of which only ``n`` of
    ``group_size`` are valid is taken over those; in the batch's mean and deviation each of them counts
    ``group_size / n`` times, as it does in the loss (:mod:`broker.aggregation`).
    """
    wide, sizes = rewards.astype(np.float64), np.asarray(sizes, np.int64)
    first, owner = np.cumsum(sizes) - sizes, np.repeat(np.arange(len(sizes)), sizes)
    kind, padding = section.kind, (group_size / sizes)[owner]
    freedom = 1 if section.deviation == "sample" else 0
    silent = without_signal(rewards, sizes)[owner]
    if kind in GROUP_BASELINES:
        centred = wide - (np.add.reduceat(wide, first) / sizes)[owner]
        centred[silent] = 0.0
    else:
        centred = wide - (0.0 if kind == "none" else np.average(wide, weights=padding))
        if kind != "none" and wide.max(initial=-np.inf) == wide.min(initial=np.inf):
            centred[:] = 0.0
    scale = np.ones(len(wide))
    if kind == "grpo":
        squares = np.add.reduceat(np.square(centred), first)
        scale = 1 / (np.sqrt(squares / np.maximum(1, sizes - freedom)) + section.epsilon)[owner].clip(1e-30)
    elif kind == "rloo":
        scale = np.where(sizes > 1, sizes / np.maximum(1, sizes - 1), 1.0)[owner]
    elif kind in ("reinforce_pp", "reinforce_pp_baseline", "scalerl"):
        counted = ~silent if kind == "scalerl" else np.ones(len(wide), np.bool_)
        scale = np.full(len(wide), 1 / max(1e-30, _deviation(centred, padding * counted, freedom) + section.epsilon))
    return np.where(centred == 0, 0.0, centred * scale).astype(np.float32)


def _deviation(centred: NDArray[np.float64], weights: NDArray[np.float64], freedom: int) -> float:
    """Of values weighted by how often they count."""
    total = float(weights.sum())
    if total <= freedom:
        return 0.0
    mean = float((weights * centred).sum()) / total
    return float(np.sqrt((weights * np.square(centred - mean)).sum() / (total - freedom)))


def overlong_penalty(lengths: NDArray[np.int64], limit: int, buffer: int) -> Floats:
    """DAPO's soft punishment of ``lengths[B]`` (2503.14476, eq. 13): 0 to ``limit - buffer``, then down to -1.

    ``limit`` is the greatest possible length; the interval ``buffer`` before it is where the penalty falls.
    """
    if buffer <= 0:
        return np.zeros(len(lengths), np.float32)
    inside = ((limit - buffer) - lengths) / buffer
    return np.where(lengths > limit, -1.0, np.clip(inside, -1.0, 0.0)).astype(np.float32)
