"""Blockwise advantages: each block of a trajectory by its own reward and baseline (2602.10231; algorithms.md 2)."""

import numpy as np
from numpy.typing import NDArray

from common.objective import BlockBaseline

Longs = NDArray[np.int64]
Wide = NDArray[np.float64]
FIRST = -1  # outcome of a block that nothing comes before


def _means(values: Wide, stratum: Longs, leave_one_out: bool, copies: Wide | None = None) -> tuple[Wide, Wide]:
    """Mean of each value's stratum, without itself if so asked (NaN for one alone), and how many that is of.

    ``copies`` says how often each value counts.
    """
    weight = np.ones(len(values)) if copies is None else copies
    count = np.asarray(np.bincount(stratum, weight)[stratum], np.float64)
    total = np.bincount(stratum, values * weight)[stratum]
    if not leave_one_out:
        return total / count, count
    others: Wide = np.where(np.bincount(stratum)[stratum] > 1, count - weight, 0.0)
    means: Wide = np.where(others > 0, (total - values * weight) / np.maximum(1e-30, others), np.nan)
    return means, others


def block_advantages(
    rewards: Wide,
    groups: Longs,
    blocks: Longs,
    outcomes: Longs,
    baseline: BlockBaseline,
    leave_one_out: bool,
    shrinkage: float = 0.0,
    copies: Wide | None = None,
) -> NDArray[np.float32]:
    """Advantages of ``K`` blocks, all arrays ``[K]``: ``reward - b``, without a deviation.

    ``groups`` are the trajectories', ``blocks`` says which block of its trajectory each is, and
    ``outcomes`` what came of the prefix before it (FIRST for a trajectory's first block). Blocks
    that a trajectory lacks are not in the arrays and so in no stratum.

    - ``none``: ``b = 0``; ``batch``: the mean of that block over the batch, where those of a group that
      misses siblings count ``copies[K]`` times; ``group``: over its group;
    - ``ocb``: over those of its group whose prefix had the same outcome, moved towards the group's
      mean by ``shrinkage`` alpha: ``(n mean_o + alpha mean_G) / (n + alpha)``.

    With ``leave_one_out`` a baseline is over the others (unbiased for every stratum size); a stratum
    of one falls back to the rest of its group, a group of one to an advantage of 0.
    """
    if baseline == "none" or not len(rewards):
        return rewards.astype(np.float32)

    def stratum(*keys: Longs) -> Longs:
        packed = np.zeros(len(rewards), np.int64)
        for key in keys:
            small = np.unique(key, return_inverse=True)[1].reshape(-1)
            packed = packed * (int(small.max()) + 1) + small
        return np.unique(packed, return_inverse=True)[1].reshape(-1)

    if baseline == "batch":
        b, _ = _means(rewards, stratum(blocks), leave_one_out, copies)
    else:
        of_group, _ = _means(rewards, stratum(groups, blocks), leave_one_out)
        b = of_group
        if baseline == "ocb":
            of_outcome, n = _means(rewards, stratum(groups, blocks, outcomes), leave_one_out)
            known = np.where(np.isnan(of_outcome), 0.0, of_outcome)
            b = np.where(n > 0, (n * known + shrinkage * np.nan_to_num(of_group)) / np.maximum(1e-30, n + shrinkage), b)
    return np.where(np.isnan(b), 0.0, rewards - np.nan_to_num(b)).astype(np.float32)
