"""What each live sequence has sampled so far: numpy columns over slots, no tensors. Pure.

Live rows are ``[0, live)``; a finished row's place is taken by the last live one.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from actor.engine.base import Completion, SampleRequest
from common.philox import uniforms
from common.wire import UNROUTED

WORD_BITS = 32
_STATE = np.dtype(
    [
        ("request_low", np.uint32),
        ("request_high", np.uint32),
        ("sibling", np.uint32),
        ("key", np.int32),  # index of the noise key
        ("temperature", np.float32),
        ("prompt", np.int32),  # tokens
        ("sampled", np.int32),  # tokens
        ("earlier", np.int32),  # tokens that earlier turns sampled
        ("max_tokens", np.int32),
        ("newest", np.int32),  # token id
        ("top_logprobs", np.int32),
        ("ignore_eos", np.bool_),
    ]
)


class Rows:
    """Bookkeeping of ``slots`` sequences of at most ``max_length`` tokens."""

    def __init__(self, slots: int, max_length: int, routed: int = 0) -> None:
        """``routed``: experts that are recorded of a token."""
        self.slots = slots
        self.live = 0
        self._state = np.zeros(slots, _STATE)
        self._tokens = np.zeros((slots, max_length), np.int32)
        self._logprobs = np.zeros((slots, max_length), np.float32)
        self._versions = np.zeros((slots, max_length), np.int32)
        self._top_ids = np.zeros((slots, max_length, 0), np.int32)
        self._top_logprobs = np.zeros((slots, max_length, 0), np.float32)
        self._experts = np.zeros((slots, max_length, routed), np.uint16)  # by position, prompt included
        self._requests: list[SampleRequest] = []  # of the live rows
        self._keys: list[tuple[int, int]] = []  # noise keys seen since the rows were last empty

    @property
    def free(self) -> int:
        """Slots without a sequence."""
        return self.slots - self.live

    @property
    def positions(self) -> NDArray[np.int32]:
        """``[n]`` where each row's newest token stands, from 0."""
        state = self._state[: self.live]
        positions: NDArray[np.int32] = state["prompt"] + state["sampled"] - 1
        return positions

    @property
    def newest(self) -> NDArray[np.int32]:
        """``[n]`` newest token ids."""
        return self._state["newest"][: self.live]

    @property
    def temperatures(self) -> NDArray[np.float32]:
        """``[n]``, 0 where greedy."""
        return self._state["temperature"][: self.live]

    def request(self, row: int) -> SampleRequest:
        """Whose sequence ``row`` is."""
        return self._requests[row]

    def find(self, request_id: int, sibling: int) -> int | None:
        """The row of one sibling, if it is live."""
        siblings = self._state["sibling"][: self.live]
        return next(
            (int(r) for r in np.flatnonzero(siblings == sibling) if self._requests[r].request_id == request_id), None
        )

    def first_row(self, request: SampleRequest) -> int:
        """The row of a newly appended request's sibling 0."""
        return next(row for row, owner in enumerate(self._requests) if owner is request)

    def append(self, request: SampleRequest) -> None:
        """Give the next rows to the siblings of ``request``."""
        if self.live == 0:
            self._keys.clear()
        if request.noise_key not in self._keys:
            self._keys.append(request.noise_key)
        rows = slice(self.live, self.live + request.samples)
        assert rows.stop <= self.slots
        state = self._state[rows]
        state["request_low"] = request.request_id & 0xFFFFFFFF
        state["request_high"] = request.request_id >> WORD_BITS
        state["sibling"] = request.first_sibling + np.arange(request.samples)
        state["earlier"] = request.first_token
        state["key"] = self._keys.index(request.noise_key)
        state["temperature"] = request.temperature
        state["prompt"] = len(request.prompt_ids)
        state["sampled"] = 0
        state["max_tokens"] = request.max_tokens
        state["newest"] = request.prompt_ids[-1]
        state["top_logprobs"] = request.top_logprobs
        state["ignore_eos"] = request.ignore_eos
        self._requests += [request] * request.samples
        self.live = rows.stop

    def uniforms(self) -> NDArray[np.float64]:
        """``[n]`` in (0, 1), from (seed, stream; token index, sibling, request) alone."""
        state = self._state[: self.live]
        counters = (state["earlier"] + state["sampled"], state["sibling"], state["request_low"], state["request_high"])
        if len(self._keys) == 1:
            return uniforms(*self._keys[0], *counters)
        out = np.empty(self.live, np.float64)
        for index, key in enumerate(self._keys):
            rows = state["key"] == index
            out[rows] = uniforms(*key, *(counter[rows] for counter in counters))
        return out

    def most_top_logprobs(self) -> int:
        """The largest k that a live row wants."""
        return int(self._state["top_logprobs"][: self.live].max(initial=0))

    def record(
        self,
        ids: NDArray[np.int64],
        logprobs: NDArray[np.float32],
        version: int,
        top: tuple[NDArray[np.float32], NDArray[np.int64]] | None,
    ) -> None:
        """One sampled token a row; ``top`` is (log q, ids), both ``[n, k]``."""
        state = self._state[: self.live]
        rows, columns = np.arange(self.live), state["sampled"]
        self._tokens[rows, columns] = ids
        self._logprobs[rows, columns] = logprobs
        self._versions[rows, columns] = version
        if top is not None:
            k = top[0].shape[1]
            if k > self._top_ids.shape[2]:
                self._grow_top(k)
            self._top_logprobs[rows, columns, :k], self._top_ids[rows, columns, :k] = top
        state["newest"] = ids
        state["sampled"] += 1

    def record_prompts(self, first: int, sources: NDArray[np.int64], experts: NDArray[np.uint16]) -> None:
        """Experts ``[U, P, R]`` of prompts just read; row ``first + i`` has prompt ``sources[i]``.

        What lies behind a shorter prompt is padding, written over as that row decodes.
        """
        self._experts[first : first + len(sources), : experts.shape[1]] = experts[sources]

    def record_experts(self, experts: NDArray[np.uint16]) -> None:
        """Experts ``[n, R]`` of each row's newest token, just read."""
        self._experts[np.arange(self.live), self.positions] = experts

    def _grow_top(self, k: int) -> None:
        more = ((0, 0), (0, 0), (0, k - self._top_ids.shape[2]))
        self._top_ids, self._top_logprobs = np.pad(self._top_ids, more), np.pad(self._top_logprobs, more)

    def done(self, stop_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows whose newest token is their last, ascending."""
        state = self._state[: self.live]
        stopped = np.isin(state["newest"], stop_ids) & ~state["ignore_eos"]
        return np.flatnonzero(stopped | (state["sampled"] >= state["max_tokens"]))

    def completion(self, row: int, stop_ids: NDArray[np.int64]) -> Completion:
        """Copies of what ``row`` sampled."""
        state: Any = self._state[row]
        tokens, k = slice(int(state["sampled"])), slice(int(state["top_logprobs"]))
        stopped = not state["ignore_eos"] and state["newest"] in stop_ids
        experts = self._experts[row, : int(state["prompt"] + state["sampled"])].copy()
        experts[-1] = UNROUTED  # the last token is never read
        return Completion(
            request_id=self._requests[row].request_id,
            sibling=int(state["sibling"]),
            token_ids=self._tokens[row, tokens].copy(),
            logprobs=self._logprobs[row, tokens].copy(),
            versions=self._versions[row, tokens].copy(),
            topk_ids=self._top_ids[row, tokens, k].copy(),
            topk_logprobs=self._top_logprobs[row, tokens, k].copy(),
            experts=experts,
            finish_reason="stop" if stopped else "length",
        )

    def remove(self, done: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Drop rows ``done`` and close the gaps; returns (sources, targets) of the rows that moved."""
        kept = self.live - len(done)
        targets = done[done < kept]
        sources = np.setdiff1d(np.arange(kept, self.live), done)
        for column in (
            self._state,
            self._tokens,
            self._logprobs,
            self._versions,
            self._top_ids,
            self._top_logprobs,
            self._experts,
        ):
            column[targets] = column[sources]
        for source, target in zip(sources, targets, strict=True):
            self._requests[target] = self._requests[source]
        del self._requests[kept:]
        self.live = kept
        return sources, targets

    def clear(self) -> None:
        """Drop every row."""
        self.live = 0
        self._requests.clear()
