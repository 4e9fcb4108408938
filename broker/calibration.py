"""How far a stated confidence can be believed: Brier score, expected calibration error, AUROC. Pure.

Arrays are ``[n]`` completions: a confidence, and whether the completion was right.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 11  # [0, .1), [.1, .2), ... [1.0, 1.1): fixed (algorithms.md 2.1)
EDGES = np.arange(1, BINS) / 10  # what is written .3 begins the bin of .3: nobody multiplies by 10
DECIMALS = 6  # of a confidence: float32, in which it travels, knows no more, and .7 in it lies below .7

Wide = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Calibration:
    """Of ``count`` completions with a confidence."""

    count: int
    clipped: int  # stated outside [0, 1] and taken for the nearest
    brier: float  # mean of (confidence - right)^2
    ece: float  # sum over bins of their share times |accuracy - mean confidence|
    auroc: float | None  # chance that a right one is more confident than a wrong one; None without both
    bins: list[list[float]]  # [BINS] of [count, mean confidence, accuracy], 0 where empty

    def figures(self) -> dict[str, Any]:
        """For metrics.jsonl."""
        return dict(vars(self))


def calibrate(confidence: Wide, right: Flags) -> Calibration | None:
    """Of those completions whose confidence is known (not NaN); None if none is."""
    known = ~np.isnan(confidence)
    if not known.any():
        return None
    stated, hit = confidence[known], right[known]
    inside: Wide = np.round(np.clip(stated, 0.0, 1.0), DECIMALS).astype(np.float64)
    bins = reliability(inside, hit)
    count = len(inside)
    return Calibration(
        count=count,
        clipped=int(((stated < 0) | (stated > 1)).sum()),
        brier=float(np.square(inside - hit).mean()),
        ece=float((bins[:, 0] * np.abs(bins[:, 2] - bins[:, 1])).sum() / count),
        auroc=auroc(inside, hit),
        bins=bins.tolist(),
    )


def reliability(confidence: Wide, right: Flags) -> Wide:
    """``[BINS, 3]``: count, mean confidence and accuracy of each bin, 0 where it is empty."""
    bin_of = np.searchsorted(EDGES, confidence, side="right")
    counts = np.bincount(bin_of, minlength=BINS).astype(np.float64)
    sums = [np.bincount(bin_of, values, BINS) for values in (confidence, right.astype(np.float64))]
    return np.stack([counts, *(total / np.maximum(1, counts) for total in sums)], axis=1)


def auroc(confidence: Wide, right: Flags) -> float | None:
    """Area under the ROC curve by midranks: a tie counts one half. None unless there are right and wrong ones."""
    positives = int(right.sum())
    negatives = len(right) - positives
    if not positives or not negatives:
        return None
    _, place, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    midranks = np.cumsum(counts) - (counts - 1) / 2
    return float((midranks[place][right].sum() - positives * (positives + 1) / 2) / (positives * negatives))
