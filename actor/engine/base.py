"""What an engine is to the rest of the actor: requests in, completions out, weights taken in flight.

::

    add(request) -> step() -> step() -> ... -> [Completion | Failure, ...]
                        ^ load(version, buckets) ... loaded(): later tokens carry the new version

:class:`actor.engine.local.LocalEngine` decodes one token of everything at each step;
:class:`actor.engine.sglang.SglangEngine` drives servers, and a step only looks at what they answered.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import EngineError
from common.weights import Bucket

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, eq=False)
class SampleRequest:
    """One prompt and how to sample its siblings.

    The uniform behind a token depends on ``noise_key``, ``request_id``, the sibling and the
    token's index in the completion alone, so the same request samples the same tokens whatever
    else is in flight.
    """

    request_id: int  # in [0, 2**63), unique among the requests in flight
    prompt_ids: NDArray[np.int32]  # [P], P >= 1
    samples: int  # G siblings
    max_tokens: int  # per completion, the end token included
    temperature: float  # 0.0 is greedy, for evaluation only
    noise_key: tuple[int, int]  # (seed, stream)
    top_logprobs: int = 0  # k
    ignore_eos: bool = False  # sample max_tokens always
    first_sibling: int = 0  # the siblings are [first_sibling, first_sibling + samples): a later turn asks for one
    first_token: int = 0  # tokens that earlier turns sampled: the noise goes on behind theirs


@dataclass(frozen=True, eq=False)
class Completion:
    """One finished sibling; T tokens, the prompt excluded, the end token included."""

    request_id: int
    sibling: int  # of the request's
    token_ids: NDArray[np.int32]  # [T]
    logprobs: NDArray[np.float32]  # [T] log q as sampled: log_softmax(logits / temperature); greedy: temperature 1
    versions: NDArray[np.int32]  # [T] weights that sampled each token
    topk_ids: NDArray[np.int32]  # [T, k], likeliest first
    topk_logprobs: NDArray[np.float32]  # [T, k] log q
    experts: NDArray[np.uint16]  # [P + T, R] prompt included; see common.wire. R = 0: not recorded
    finish_reason: FinishReason
    cached_tokens: int = 0  # of the prompt, read from a cache


@dataclass(frozen=True)
class Failure:
    """A sibling that will never finish, through no fault of the policy."""

    request_id: int
    sibling: int
    reason: str


@dataclass(frozen=True)
class Loaded:
    """What became of the version last given to :meth:`Engine.load`."""

    version: int
    error: str = ""  # why it is not in use; "" if it is
    keeps: bool = False  # whether the engine goes on reading the buckets' memory until the next version


class Engine(Protocol):
    """Samples everything in flight together."""

    @property
    def version(self) -> int:
        """Of the weights that sample the next token; 0 is the starting model, -1 while nothing can sample."""

    @property
    def holds(self) -> int:
        """The newest version that everything here has, for the broker: who holds less is sent it again."""

    @property
    def busy(self) -> bool:
        """Whether :meth:`step` has anything to do."""

    @property
    def in_flight(self) -> int:
        """Sequences admitted or waiting that have not been returned."""

    @property
    def slots(self) -> int:
        """Sequences that it can decode at once."""

    @property
    def vocab_size(self) -> int:
        """Token ids lie in ``[0, vocab_size)``."""

    @property
    def eos_id(self) -> int:
        """The token that ends a completion; -1 if the model names none."""

    @property
    def device(self) -> torch.device:
        """Where versions are received."""

    @property
    def counters(self) -> dict[str, float]:
        """What happened so far, by name: for the heartbeat."""

    def add(self, request: SampleRequest) -> None:
        """Queue a request. Raises EngineError, naming it, if it can never be sampled."""

    def step(self, wait_s: float = 0.0) -> Sequence[Completion | Failure]:
        """Go on with everything in flight; return what ended. Waits at most ``wait_s`` for something to end.

        Raises EngineError if the engine cannot go on.
        """

    def cancel(self, request_id: int, sibling: int) -> None:
        """Forget one sibling; one that is not in flight is no error."""

    def abort(self) -> None:
        """Forget every request in flight."""

    def load(self, version: int, buckets: Sequence[tuple[Bucket, torch.Tensor]]) -> None:
        """Take a complete set of weights into use; requests in flight go on under it. See :meth:`loaded`."""

    def loaded(self) -> Loaded | None:
        """The outcome of the last :meth:`load`, once; None while it is under way."""

    def close(self) -> None:
        """Release everything; stops servers that the engine started."""


def check_request(request: SampleRequest, vocab_size: int, max_length: int, slots: int) -> None:
    """Raise EngineError, naming the request and what to change, if it can never be sampled.

    ``max_length`` of prompt and completion together; ``slots`` for siblings that are sampled together.
    """
    prompt, longest = request.prompt_ids, len(request.prompt_ids) + request.max_tokens
    problem = None
    if prompt.ndim != 1 or len(prompt) == 0:
        problem = f"prompt_ids of shape {prompt.shape} must be [P] with P >= 1"
    elif prompt.min() < 0 or prompt.max() >= vocab_size:
        bad = prompt[(prompt < 0) | (prompt >= vocab_size)][0]
        problem = f"prompt token id {bad} is outside [0, {vocab_size}); is it another model's tokenizer?"
    elif request.max_tokens < 1 or longest > max_length:
        problem = (
            f"prompt of {len(prompt)} tokens + max_tokens={request.max_tokens} must lie within "
            f"max_length={max_length}; shorten the prompt or raise max_length"
        )
    elif not 1 <= request.samples <= slots:
        problem = f"samples={request.samples} must lie in [1, max_sequences={slots}]"
    elif not 0.0 <= request.temperature < float("inf"):
        problem = f"temperature={request.temperature} must be finite and not negative"
    elif not 0 <= request.top_logprobs <= vocab_size:
        problem = f"top_logprobs={request.top_logprobs} must lie in [0, {vocab_size}]"
    if problem is not None:
        raise EngineError(f"request {request.request_id}: {problem}")
