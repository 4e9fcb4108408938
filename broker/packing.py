"""Token-balanced shards of a decided batch: one per data-parallel rank."""

import heapq
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.aggregation import block_weights, span_weights
from broker.batch import Batch
from broker.decision import Decision
from broker.trajectories import gather
from common.config import RunConfig
from common.objective import Aggregate
from common.ragged import count
from common.wire import EXPERT, Shard


def balance(lengths: NDArray[np.int64], ranks: int) -> list[NDArray[np.int64]]:
    """Split trajectories of ``lengths[B]`` over ``ranks``; returns each rank's indices, ascending.

    Longest first onto the least loaded rank (Graham's LPT: at most 4/3 of the best possible
    maximum); ties go to the lower rank and the lower index, so the result is a function of the
    lengths alone. A rank may stay empty when there are fewer trajectories than ranks.
    """
    order, sizes = np.argsort(-lengths, kind="stable").tolist(), lengths.tolist()
    heap = [(0, rank) for rank in range(ranks)]
    assigned: list[list[int]] = [[] for _ in range(ranks)]
    for index in order:
        load, rank = heap[0]
        assigned[rank].append(index)
        heapq.heapreplace(heap, (load + sizes[index], rank))
    return [np.array(sorted(part), np.int64) for part in assigned]


def runs(members: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Ascending ``members`` as ranges of consecutive trajectories, so that they can be copied in one piece each."""
    found: list[tuple[int, int]] = []
    first, end = 0, -1
    for member in members.tolist():
        if member != end:
            if end >= 0:
                found.append((first, end))
            first = member
        end = member + 1
    return [*found, (first, end)] if end >= 0 else found


def weights_of(batch: Batch, decision: Decision, aggregate: Aggregate, longest: int) -> NDArray[np.float32]:
    """The weight of a token of each span ``[S]`` (:func:`broker.aggregation.span_weights`)."""
    if decision.accepted_only:
        tokens = count(decision.accept == 1, batch.spans)
    elif batch.spans is batch.cu_seqlens:
        tokens = batch.counted_tokens
    else:
        tokens = count(batch.trainable > 0, batch.spans)
    owner = batch.owners(batch.spans)
    if batch.span_scale is not None:
        weights = block_weights(tokens, owner, batch.copies, batch.span_scale)
    else:
        weights = span_weights(aggregate, tokens, owner, batch.groups, batch.copies, longest)
    return np.where(batch.muted[owner], np.float32(0), weights)


def make_shards(
    batch: Batch,
    decision: Decision,
    world: int,
    config: RunConfig,
    log_reference: NDArray[np.float32] | None = None,
    log_teacher: NDArray[np.float32] | None = None,
) -> list[Shard]:
    """One shard a rank, balanced by tokens. What the loss is divided by counts the whole batch (algorithms.md 1.8).

    A shard's rows are segments; those of one trajectory share its rank. ``log_reference[N]`` and
    ``log_teacher[N]`` travel along where there are any.
    """
    accept = decision.accept
    if batch.counted_tokens is not batch.sampled_tokens:
        accept = np.where(batch.trainable == EXPERT, np.uint8(EXPERT), accept)
    weights = weights_of(batch, decision, config.loss.aggregate, config.rollout.max_sampled)
    cuts = batch.cu_seqlens.tolist()
    shards = []
    for rank, members in enumerate(balance(np.diff(batch.cu_seqlens), world)):
        ranges, pieces = [(cuts[a], cuts[b]) for a, b in runs(members)], batch.pieces_of(members)

        made: dict[int, NDArray[Any]] = {}  # by identity: with rejection off three arrays are one

        def part(
            array: NDArray[Any], ranges: list[tuple[int, int]] = ranges, made: dict[int, NDArray[Any]] = made
        ) -> NDArray[Any]:
            if id(array) not in made:
                made[id(array)] = _pieces(array, ranges)
            return made[id(array)]

        segments, rows, _ = _cut(batch, batch.segments, members)
        spans, _, inside = _cut(batch, batch.spans, members)
        shards.append(
            Shard(
                step=batch.step,
                rank=rank,
                world=world,
                tokens_global=batch.tokens,
                temperature=config.rollout.temperature,
                groups=batch.groups[rows],
                siblings=batch.siblings[rows],
                cu_seqlens=segments,
                spans=spans,
                advantages=batch.span_advantages[inside],
                weights=weights[inside],
                token_ids=gather(pieces, "token_ids") if pieces else batch.token_ids[:0],
                trainable=part(batch.trainable),
                accept=part(accept),
                log_q=part(batch.own_log_q),
                log_m=part(decision.log_m),
                log_p=part(decision.log_p),
                experts=gather(pieces, "experts") if pieces else batch.experts[:0],
                log_reference=None if log_reference is None else part(log_reference),
                log_teacher=None if log_teacher is None else part(log_teacher),
            )
        )
    return shards


def _pieces(array: NDArray[Any], ranges: list[tuple[int, int]]) -> NDArray[Any]:
    """``array[a:b]`` of each range end to end; a view where there is one range."""
    if len(ranges) == 1:
        return array[ranges[0][0] : ranges[0][1]]
    return np.concatenate([array[a:b] for a, b in ranges]) if ranges else array[:0]


def _cut(
    batch: Batch, cuts: NDArray[np.int64], members: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """Pieces ``cuts`` (as fine as ``cu_seqlens`` or finer) of trajectories ``members``, end to end.

    Returns their offsets, the trajectory of each, and its own number.
    """
    if cuts is batch.cu_seqlens:
        owner, inner = members, members
    else:
        of = batch.owners(cuts)
        inner = np.flatnonzero(np.isin(of, members))
        owner = of[inner]
    offsets = np.zeros(len(inner) + 1, np.int32)
    np.cumsum(np.diff(cuts)[inner], out=offsets[1:])
    return offsets, owner, inner
