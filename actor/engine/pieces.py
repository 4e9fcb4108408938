"""What a rollout asks an SGLang server for, and what the pieces of its answers make. Pure.

A rollout that an update of the weights aborts is answered in several pieces, each sampled from the prompt and the
pieces before it.
"""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actor.engine.base import Completion
from actor.engine.probe import sampling
from actor.engine.reply import FLAT_FIELDS, Piece
from actor.engine.targets import Sample, Target
from common.errors import DataError
from common.wire import UNROUTED

MOST_DIGITS = 9  # of a version's number


def fields_of(sample: Sample, target: Target, rid: str, stop_ids: list[int], routed: bool) -> dict[str, Any]:
    """The body of ``/generate`` for what is left of ``sample``; ``routed``: with the experts of each token."""
    request = sample.request
    prompt = request.prompt_ids
    if sample.pieces:
        prompt = np.concatenate([prompt, *(piece.token_ids for piece in sample.pieces)])
    fields: dict[str, Any] = {
        "input_ids": np.ascontiguousarray(prompt, np.int32),
        "sampling_params": sampling(request.temperature, sample.left, stop_ids, request.ignore_eos),
        "return_logprob": True,
        "logprob_start_len": -1,
        "top_logprobs_num": request.top_logprobs,
        "rid": rid,
    }
    identity = target.server.identity
    if request.top_logprobs and identity is not None and identity.flat_top:
        fields |= FLAT_FIELDS
    if routed:
        fields["return_routed_experts"] = True
    if target.rank is not None:
        fields["data_parallel_rank"] = target.rank  # routed_dp_rank since 0.5.23, which knows both
    return fields


def versions_of(piece: Piece, tag_prefix: str) -> NDArray[np.int32]:
    """``[T]`` numbers of the versions that sampled each token. Raises DataError where one is another run's."""
    versions = np.empty(len(piece.token_ids), np.int32)
    for tag, start, end in piece.spans:
        number = tag.removeprefix(tag_prefix)
        if number == tag or not number.isdecimal() or len(number) > MOST_DIGITS:
            raise DataError(f"weight version {tag!r} is not of this run ({tag_prefix}N)")
        versions[start:end] = int(number)
    return versions


def until_end(piece: Piece, stop_ids: Collection[int]) -> Piece:
    """A piece of an aborted request up to the first token that ends a rollout, where it has one: nothing is left then.

    A server that is told to abort a request samples once more, and does not look whether that was the end.
    """
    if piece.finish != "abort":
        return piece
    ends = np.flatnonzero(np.isin(piece.token_ids, list(stop_ids)))
    if not len(ends):
        return piece
    tokens, given = int(ends[0]) + 1, len(piece.experts) - len(piece.token_ids)
    experts = piece.experts[: given + tokens].copy()
    experts[-1] = UNROUTED  # never read
    return Piece(
        token_ids=piece.token_ids[:tokens],
        logprobs=piece.logprobs[:tokens],
        spans=tuple((tag, start, min(end, tokens)) for tag, start, end in piece.spans if start < tokens),
        topk_ids=piece.topk_ids[:tokens],
        topk_logprobs=piece.topk_logprobs[:tokens],
        experts=experts,
        finish="stop",
        cached_tokens=piece.cached_tokens,
    )


def completion_of(sample: Sample, stop_ids: Collection[int], tag_prefix: str) -> Completion:
    """The whole rollout of a sample that has ended."""
    request, pieces = sample.request, sample.pieces
    token_ids = np.concatenate([piece.token_ids for piece in pieces])
    # Older servers look at the length first: an end token that comes last of max_tokens is "length" to them.
    stopped = pieces[-1].finish == "stop" or (not request.ignore_eos and int(token_ids[-1]) in stop_ids)
    return Completion(
        request_id=request.request_id,
        sibling=sample.sibling,
        token_ids=token_ids,
        logprobs=np.concatenate([piece.logprobs for piece in pieces]),
        versions=np.concatenate([versions_of(piece, tag_prefix) for piece in pieces]),
        topk_ids=np.concatenate([piece.topk_ids for piece in pieces]),
        topk_logprobs=np.concatenate([piece.topk_logprobs for piece in pieces]),
        experts=join_experts(pieces),
        finish_reason="stop" if stopped else "length",
        cached_tokens=pieces[0].cached_tokens,
    )


def join_experts(pieces: Sequence[Piece]) -> NDArray[np.uint16]:
    """A token's experts are those of the piece that read it first, which is what sampled its successor."""
    whole = pieces[-1].experts.copy()
    for piece in reversed(pieces[:-1]):
        read = max(0, len(piece.experts) - 1)
        whole[:read] = piece.experts[:read]
    return whole
