"""Token-balanced shards: one per data-parallel rank."""

import heapq

import numpy as np
from numpy.typing import NDArray


def balance(lengths: NDArray[np.int64], ranks: int) -> list[NDArray[np.int64]]:
    """Split trajectories of ``lengths[B]`` over ``ranks``; returns each rank's indices, ascending.

    Longest first onto the least loaded rank (Graham's LPT: at most 4/3 of the best possible
    maximum); ties go to the lower rank and the lower index, so the result is a function of the
    lengths alone. A rank may stay empty when there are fewer trajectories than ranks.
    """
    order = np.argsort(-lengths, kind="stable")
    heap = [(0, rank) for rank in range(ranks)]
    assigned: list[list[int]] = [[] for _ in range(ranks)]
    for index in order.tolist():
        load, rank = heapq.heappop(heap)
        assigned[rank].append(index)
        heapq.heappush(heap, (load + int(lengths[index]), rank))
    return [np.array(sorted(part), np.int64) for part in assigned]


def token_index(
    cu_seqlens: NDArray[np.int64], members: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the tokens of ``members`` in the packed batch, and the members' own offsets."""
    lengths = np.diff(cu_seqlens)[members]
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    return np.repeat(cu_seqlens[:-1][members], lengths) + within, offsets
