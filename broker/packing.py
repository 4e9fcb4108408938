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


def runs(members: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Ascending ``members`` as ranges of consecutive trajectories, so that they can be copied in one piece each."""
    if not len(members):
        return []
    cuts = np.flatnonzero(np.diff(members) != 1) + 1
    firsts, lasts = members[np.concatenate(([0], cuts))], members[np.concatenate((cuts - 1, [len(members) - 1]))]
    return list(zip(firsts.tolist(), (lasts + 1).tolist(), strict=True))
