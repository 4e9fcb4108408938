"""What an SGLang server answers to /generate -> arrays, and what is wrong with it if anything is. Pure.

Fields as in SGLang 0.5.19 to 0.5.23. Alternatives come as base64 of flat arrays where the server
knows ``return_flat_raw_output_top_logprobs`` (0.5.23): as JSON lists they cost a hundred times more
to read. Everything is checked here once, so that no half-true rollout gets any further.
"""

import base64
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray

from common.errors import DataError
from common.wire import LOG_Q_TOLERANCE, UNROUTED

FLAT_FIELDS = {"return_flat_raw_output_top_logprobs": True, "return_flat_raw_top_logprobs_b64": True}


@dataclass(frozen=True)
class Asked:
    """What a reply must agree with."""

    prompt_tokens: int
    max_tokens: int
    top_logprobs: int  # k
    vocab_size: int
    routed_layers: tuple[int, ...] = ()  # layers with experts, of those the server records; () records none
    experts_per_token: int = 0


@dataclass(frozen=True, eq=False)
class Piece:
    """Tokens sampled by one server in one request; T may be 0 if it was aborted."""

    token_ids: NDArray[np.int32]  # [T]
    logprobs: NDArray[np.float32]  # [T] log q
    spans: tuple[tuple[str, int, int], ...]  # (weight version as the server names it, first token, end)
    topk_ids: NDArray[np.int32]  # [T, k]
    topk_logprobs: NDArray[np.float32]  # [T, k]
    experts: NDArray[np.uint16]  # [P + T, R]; the last token was never read
    finish: Literal["stop", "length", "abort"]
    cached_tokens: int


def read_piece(body: bytes, asked: Asked) -> Piece:
    """The reply's arrays. Raises DataError that says what contradicts what."""
    try:
        reply = orjson.loads(body)
        meta = reply["meta_info"]
        sampled = meta.get("output_token_logprobs") or []
        values, numbers, *_ = zip(*sampled, strict=True) if sampled else ((), ())
        ids, logprobs = np.array(numbers, np.int64), np.array(values, np.float32)
        finish = (meta["finish_reason"] or {}).get("type", "")
        if finish == "abort" and not sampled:  # before it ran: there is little else in the answer
            return _nothing(asked)
        spans = _spans(meta)
        top_ids, top_logprobs = _top(meta, len(ids), asked.top_logprobs)
        experts = _experts(meta, asked, len(ids))
        cached = int(meta.get("cached_tokens") or 0)
        output = reply.get("output_ids")
        read, claimed = int(meta["prompt_tokens"]), int(meta["completion_tokens"])
        claimed = claimed if output is None else len(output)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise DataError(f"reply is not one of SGLang's /generate: {type(error).__name__}: {error}"[:300]) from error
    if claimed != len(ids):
        raise DataError(f"{claimed} tokens but {len(ids)} log-probabilities")
    if output is not None and output != list(numbers):
        raise DataError("the ids beside the log-probabilities are not the sampled ones")
    if read != asked.prompt_tokens:
        raise DataError(f"the server read {read} prompt tokens of {asked.prompt_tokens}")
    _check(ids, logprobs, spans, finish, asked)
    if top_ids.size and (not np.isfinite(top_logprobs).all() or top_ids.min() < 0 or top_ids.max() >= asked.vocab_size):
        raise DataError("alternatives are not finite log-probabilities of ids within the vocabulary")
    return Piece(ids.astype(np.int32), logprobs, spans, top_ids, top_logprobs, experts, finish, cached)


def _nothing(asked: Asked) -> Piece:
    """Of a request that was aborted before it ran."""
    width = len(asked.routed_layers) * asked.experts_per_token
    return Piece(
        token_ids=np.zeros(0, np.int32),
        logprobs=np.zeros(0, np.float32),
        spans=(),
        topk_ids=np.zeros((0, asked.top_logprobs), np.int32),
        topk_logprobs=np.zeros((0, asked.top_logprobs), np.float32),
        experts=np.full((asked.prompt_tokens, width), UNROUTED, np.uint16),
        finish="abort",
        cached_tokens=0,
    )


def _check(
    ids: NDArray[np.int64],
    logprobs: NDArray[np.float32],
    spans: tuple[tuple[str, int, int], ...],
    finish: str,
    asked: Asked,
) -> None:
    if finish not in ("stop", "length", "abort"):
        raise DataError(f"finish reason {finish!r} is none of stop, length, abort")
    if len(ids) > asked.max_tokens or (not len(ids) and finish != "abort"):
        raise DataError(f"{len(ids)} tokens where 1 to {asked.max_tokens} were asked for")
    if finish == "length" and len(ids) < asked.max_tokens:
        raise DataError(f"cut after {len(ids)} of {asked.max_tokens} tokens: its context or memory is too small")
    if not len(ids):
        return
    if ids.min() < 0 or ids.max() >= asked.vocab_size:
        raise DataError(f"sampled id {ids.max()} is outside the vocabulary of {asked.vocab_size}: another model")
    if not np.isfinite(logprobs).all() or logprobs.max() > LOG_Q_TOLERANCE:
        raise DataError("a log-probability is NaN, infinite or positive")
    ends = [0, *(end for _, _, end in spans)]
    if [start for _, start, _ in spans] != ends[:-1] or ends[-1] != len(ids):
        raise DataError(f"weight_versions {spans} do not cover the {len(ids)} tokens")


def _spans(meta: dict[str, Any]) -> tuple[tuple[str, int, int], ...]:
    spans = meta.get("weight_versions")
    if spans is None:
        raise ValueError("no weight_versions, which every release since 0.5.19 gives")
    return tuple((str(span["version"]), int(span["start"]), int(span["end"])) for span in spans)


def _top(meta: dict[str, Any], tokens: int, k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Ids and log q of the alternatives, ``[T, k]`` each."""
    if k == 0 or tokens == 0:
        return np.zeros((tokens, k), np.int32), np.zeros((tokens, k), np.float32)
    flat = meta.get("output_top_logprobs_val_flat_b64")
    if flat is not None:
        shape = tuple(meta["output_top_logprobs_shape"])
        values = np.frombuffer(base64.b64decode(flat), meta["output_top_logprobs_val_flat_b64_dtype"])
        ids = np.frombuffer(
            base64.b64decode(meta["output_top_logprobs_idx_flat_b64"]), meta["output_top_logprobs_idx_flat_b64_dtype"]
        )
        if shape != (tokens, k):
            raise ValueError(f"{shape} alternatives where ({tokens}, {k}) were asked for")
        return ids.reshape(shape).astype(np.int32), values.reshape(shape).astype(np.float32)
    rows = meta["output_top_logprobs"]
    if len(rows) != tokens or any(len(row) != k for row in rows):
        raise ValueError(f"alternatives of {len(rows)} tokens where {tokens} x {k} were asked for")
    values_, ids_, _ = zip(*chain.from_iterable(rows), strict=True)
    return np.array(ids_, np.int32).reshape(tokens, k), np.array(values_, np.float32).reshape(tokens, k)


def _experts(meta: dict[str, Any], asked: Asked, tokens: int) -> NDArray[np.uint16]:
    """``[P + T, R]``: of the layers with experts, in their order; the row of a token never read is UNROUTED."""
    length = asked.prompt_tokens + tokens
    width = len(asked.routed_layers) * asked.experts_per_token
    record = np.full((length, width), UNROUTED, np.uint16)
    if width:
        coded = meta.get("routed_experts")
        if coded is None:
            raise ValueError("no routed_experts; start the server with --enable-return-routed-experts")
        read = np.frombuffer(base64.b64decode(coded), np.int32)
        per_token = read.reshape(length - 1, -1, asked.experts_per_token)
        record[:-1] = per_token[:, list(asked.routed_layers)].reshape(length - 1, width)
    return record
