"""What an engine is to the rest of the actor: requests in, completions out, one decode step at a time.

::

    add(request) -> step() -> step() -> ... -> [Completion, ...]
                        ^ swap(version, tensors) between two steps; the KV cache is kept
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

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


@dataclass(frozen=True, eq=False)
class Completion:
    """One finished sibling; T tokens, the prompt excluded, the end token included."""

    request_id: int
    sibling: int  # in [0, G)
    token_ids: NDArray[np.int32]  # [T]
    logprobs: NDArray[np.float32]  # [T] log q as sampled: log_softmax(logits / temperature); greedy: temperature 1
    versions: NDArray[np.int32]  # [T] weights that sampled each token
    topk_ids: NDArray[np.int32]  # [T, k], likeliest first
    topk_logprobs: NDArray[np.float32]  # [T, k] log q
    experts: NDArray[np.uint16]  # [P + T, R] prompt included; see common.wire. R = 0: not recorded
    finish_reason: FinishReason


class Engine(Protocol):
    """Samples everything in flight together."""

    @property
    def version(self) -> int:
        """Of the weights that sample the next token; 0 is the starting model."""

    @property
    def busy(self) -> bool:
        """Whether :meth:`step` has anything to do."""

    @property
    def in_flight(self) -> int:
        """Sequences admitted or waiting that have not been returned."""

    @property
    def vocab_size(self) -> int:
        """Token ids lie in ``[0, vocab_size)``."""

    @property
    def eos_id(self) -> int:
        """The token that ends a completion; -1 if the model names none."""

    def add(self, request: SampleRequest) -> None:
        """Queue a request. Raises EngineError, naming it, if it can never be sampled."""

    def step(self) -> list[Completion]:
        """Admit what fits, sample the next token of everything in flight, return what finished."""

    def abort(self) -> None:
        """Forget every request in flight."""

    def weight_targets(self) -> dict[str, Tensor]:
        """Checkpoint name -> view of the live parameter."""

    def swap(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Copy a complete set of weights in place, between two steps; later tokens carry ``version``.

        Raises EngineError, and changes nothing, if names or shapes differ from :meth:`weight_targets`.
        """
