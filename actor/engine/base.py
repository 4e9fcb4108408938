"""What the rollout loop asks of an engine."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class SampleRequest:
    """Sample ``samples`` completions of one prompt."""

    request_id: int
    prompt_ids: NDArray[np.int32]  # [P]
    samples: int
    max_tokens: int
    temperature: float  # 0 is greedy: for evaluation, it has no density
    noise_key: tuple[int, int]  # (seed, stream) of the counter-based noise
    top_logprobs: int
    ignore_eos: bool = False


@dataclass(frozen=True)
class Completion:
    """One finished sibling. ``T`` counts sampled tokens, the end-of-sequence token included."""

    request_id: int
    sibling: int
    token_ids: NDArray[np.int32]  # [T]
    logprobs: NDArray[np.float32]  # [T] log q: log-softmax(logits / temperature) of what was really sampled
    versions: NDArray[np.int32]  # [T] weights that sampled each token
    topk_ids: NDArray[np.int32]  # [T, k]
    topk_logprobs: NDArray[np.float32]  # [T, k]
    finish_reason: str  # "stop" | "length"


class Engine(Protocol):
    """Continuous batching with weight swaps between tokens."""

    @property
    def version(self) -> int:
        """The weights in use."""

    @property
    def busy(self) -> bool:
        """Whether anything waits or is in flight."""

    @property
    def vocab_size(self) -> int:
        """Ids lie in ``[0, vocab_size)``."""

    def add(self, request: SampleRequest) -> None:
        """Queue a request; raises :class:`common.errors.EngineError` for one that can never run."""

    def step(self) -> list[Completion]:
        """Admit what fits, sample one token for everything in flight, return what finished."""

    def weight_targets(self) -> Mapping[str, torch.Tensor]:
        """Hugging Face name -> live tensor (views of the parameters)."""

    def swap(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Use new weights from the next token on; what is in flight keeps its KV cache."""
