"""What a token's loss is multiplied by: the denominators of algorithms.md 0.3, over the whole batch.

They are counted before rejection, masks and clips, and over all ranks, because only the broker sees
the whole batch; so a learner's loss is a plain sum, however the batch is cut.
"""

import numpy as np
from numpy.typing import NDArray

from common.objective import Aggregate


def span_weights(
    aggregate: Aggregate,
    tokens: NDArray[np.int64],
    owner: NDArray[np.int64],
    groups: NDArray[np.int64],
    copies: NDArray[np.float64],
    longest: int,
) -> NDArray[np.float32]:
    """``[S]``: the weight of a token of each span.

    ``tokens[S]`` of each span count, ``owner[S]`` is its trajectory; ``groups[B]`` and ``copies[B]`` are
    the trajectories'. Where siblings are missing one counts ``copies`` times, above and below the
    line: that is what padding its group with copies would come to (algorithms.md 3.3).

    - ``token_mean``: ``1 / sum T`` (DAPO);
    - ``sequence_mean``: ``1 / (B T_i)``, the mean over trajectories of their means (GRPO);
    - ``constant``: ``1 / (B longest)`` (Dr.GRPO);
    - ``prompt_mean``: ``1 / (P sum of T in the prompt)`` (ScaleRL).

    Trajectories without a counted token count in no denominator but ``constant``'s.
    """
    per_trajectory = np.bincount(owner, tokens, len(groups))
    has = per_trajectory > 0
    if aggregate == "token_mean":
        weight = np.full(len(groups), 1 / max(1.0, round(float((per_trajectory * copies).sum()))))
    elif aggregate == "sequence_mean":
        weight = 1 / (max(1.0, float(copies[has].sum())) * np.maximum(1, per_trajectory))
    elif aggregate == "constant":
        weight = np.full(len(groups), 1 / (max(1.0, float(copies.sum())) * longest))
    else:
        prompts, of = np.unique(groups, return_inverse=True)
        held = np.bincount(of, per_trajectory * copies, len(prompts))
        weight = 1 / (max(1, int((held > 0).sum())) * np.maximum(1, held))[of]
    return (weight * copies)[owner].astype(np.float32)


def block_weights(
    tokens: NDArray[np.int64], owner: NDArray[np.int64], copies: NDArray[np.float64], scale: NDArray[np.float64]
) -> NDArray[np.float32]:
    """``[S]``: ``w_k / (B |T_k|)``, each block a mean over its own tokens (2602.10231; algorithms.md 2.1)."""
    has = np.bincount(owner, tokens, len(copies)) > 0
    batch = max(1.0, float(copies[has].sum()))
    return np.where(tokens > 0, scale * copies[owner] / (batch * np.maximum(1, tokens)), 0.0).astype(np.float32)
