"""The learner's side of the feed: shards in, commits out; a shard as the batch that is trained on."""

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common import wire
from common.errors import DataError, DeadlineError
from common.link import BrokerLink
from learner.model.config import ModelConfig
from learner.step import StepBatch

POLL_S = 0.2
WORD_EVERY_S = 10.0
ASK_AGAIN_S = 3.0

log = logging.getLogger("learner.feed")


class Feed:
    """Fetches this rank's shards. Other messages (Resync, PublishDone) go to ``other``."""

    def __init__(
        self,
        link: BrokerLink,
        rank: int,
        world: int,
        wait_s: float,
        should_stop: Callable[[], bool],
        limit: str = "learner.wait_s",
    ) -> None:
        """``limit``: what ``wait_s`` is made of, for the error."""
        self.link = link
        self._rank, self._world = rank, world
        self._wait_s, self._limit = wait_s, limit
        self._should_stop = should_stop
        self.stopped = False  # the broker said Stop

    def fetch(self, step: int, other: Callable[[Any], None]) -> wire.Shard | None:
        """The shard of ``step``; None if told to stop. What ``other`` takes does not count as waiting.

        Raises :class:`DeadlineError` with what the broker last said it waits for.
        """
        request = wire.Fetch(step, self._rank, self._world)
        self.link.send(request)
        began = asked = time.monotonic()
        detail, next_word = "the broker has said nothing", began + WORD_EVERY_S
        while not self._should_stop() and not self.stopped:
            match message := self.link.receive(POLL_S):
                case wire.Shard() if message.step == step:
                    return message
                case wire.Waiting():
                    detail, asked = f"the broker waits for {message.detail}", time.monotonic()
                case wire.Welcome():  # a broker that came back knows of no fetch
                    self.link.send(request)
                    asked = time.monotonic()
                    other(message)
                case wire.Stop():
                    self.stopped = True
                case None:
                    pass
                case _:
                    before = time.monotonic()
                    other(message)
                    began += time.monotonic() - before
            now = time.monotonic()
            if now - asked > ASK_AGAIN_S:  # a broker that works says every second what it waits for
                self.link.send(request)
                asked = now
            if now > next_word:
                log.info("step %d: waiting since %.0f s; %s", step, now - began, detail)
                next_word = now + WORD_EVERY_S
            if now - began > self._wait_s:
                raise DeadlineError(f"no shard for step {step} within {self._wait_s:.0f} s ({self._limit}): {detail}")
        return None

    def commit(self, step: int, metrics: dict[str, float]) -> None:
        """The step is trained."""
        self.link.send(wire.Commit(step, step + 1, metrics))


def to_batch(shard: wire.Shard, device: torch.device, model: ModelConfig, temperature: float) -> StepBatch:
    """The shard's arrays as tensors; advantages and weights spread over each span's tokens.

    Raises :class:`DataError` for tokens that were sampled at another temperature, token ids outside the vocabulary
    and routing records that are not this model's.
    """
    tag = f"shard of step {shard.step}, rank {shard.rank}"
    if shard.temperature != temperature:
        raise DataError(
            f"{tag}: sampled at temperature {shard.temperature:g}, and rollout.temperature={temperature:g} here; "
            "start the learner with the broker's"
        )
    check_ids(tag, shard.token_ids, model.vocab_size)
    check_experts(shard.experts, model)
    spans = np.diff(shard.spans)

    def tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.array(array)).to(device=device, dtype=dtype)

    def optional(array: np.ndarray) -> torch.Tensor | None:
        return tensor(array, torch.float32) if len(array) else None

    return StepBatch(
        token_ids=tensor(shard.token_ids, torch.int64),
        cu_seqlens=shard.cu_seqlens,
        trainable=shard.trainable,
        accept=tensor(shard.accept, torch.uint8),
        advantages=tensor(np.repeat(shard.advantages, spans), torch.float32),
        weights=tensor(np.repeat(shard.weights, spans), torch.float32),
        log_q=tensor(shard.log_q, torch.float32),
        log_m=tensor(shard.log_m, torch.float32),
        log_p_v=tensor(shard.log_p, torch.float32),
        tokens_global=shard.tokens_global,
        experts=experts_tensor(shard.experts, model, device),
        trajectories=np.unique(np.stack((shard.groups, shard.siblings), axis=1), axis=0, return_inverse=True)[1],
        log_reference=optional(shard.log_reference),
        log_teacher=optional(shard.log_teacher),
    )


def check_ids(tag: str, token_ids: NDArray[np.int32], vocab_size: int) -> None:
    """Raises :class:`DataError` if an id is outside the vocabulary."""
    if len(token_ids) and not 0 <= token_ids.min() <= token_ids.max() < vocab_size:
        worst = token_ids[(token_ids < 0) | (token_ids >= vocab_size)][0]
        raise DataError(
            f"{tag}: token id {worst} lies outside the vocabulary of {vocab_size}; is model.path the actors'?"
        )


def check_experts(experts: NDArray[np.uint16], model: ModelConfig) -> None:
    """Raises :class:`DataError` if a record ``[N, R]`` is torn, of another width than this model's, or names an
    expert that does not exist or the same one twice; ``R`` = 0 is no record."""
    if experts.shape[1] == 0:
        return
    layers, chosen = len(model.sparse_layers), model.num_experts_per_tok
    if experts.shape[1] != layers * chosen:
        raise DataError(
            f"routing records of width {experts.shape[1]}; this model has {layers} sparse layers x {chosen} experts "
            "a token: is model.path the actors'?"
        )
    known = experts != wire.UNROUTED
    if (experts[known] >= model.num_experts).any():
        raise DataError(f"routing records name an expert beyond {model.num_experts - 1}")
    by_layer = np.sort(experts.reshape(-1, chosen), axis=1)
    if ((by_layer[:, 1:] == by_layer[:, :-1]) & (by_layer[:, 1:] != wire.UNROUTED)).any():
        raise DataError("routing records name the same expert twice for one token")
    if (known.any(axis=1) != known.all(axis=1)).any():
        raise DataError("routing records are torn: a token has some of its layers and not all")


def experts_tensor(experts: NDArray[np.uint16], model: ModelConfig, device: torch.device) -> Tensor | None:
    """A checked record ``[N, R]`` as i16 ``[N, L, k]``, -1 where nothing was recorded; None for ``R`` = 0.

    Two bytes each, as on the wire, for a whole step is a quarter of what it would be as indices.
    """
    if experts.shape[1] == 0:
        return None
    found = torch.from_numpy(np.array(experts).view(np.int16))  # UNROUTED, 65535, is -1
    chosen = model.num_experts_per_tok
    return found.to(device).view(len(experts), experts.shape[1] // chosen, chosen)  # a rank may have no token
