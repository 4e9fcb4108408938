"""Trajectories on their way to the broker, kept until they are acknowledged. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actor.engine.base import Completion
from common.wire import FINISH_REASONS, Ack, Trajectories


@dataclass(frozen=True)
class Finished:
    """A scored rollout."""

    group: int
    prompt_ids: np.ndarray[tuple[int], np.dtype[np.int32]]  # [P]
    completion: Completion
    channels: dict[str, float]
    reward: float


def pack(run_id: str, channel_names: Sequence[str], finished: Sequence[Finished]) -> Trajectories:
    """One message of all ``finished`` rollouts: prompt then completion, the prompt not trainable."""
    prompts = [f.prompt_ids for f in finished]
    completions = [f.completion for f in finished]
    lengths = [len(p) + len(c.token_ids) for p, c in zip(prompts, completions, strict=True)]

    def interleave(fill: float, dtype: type[np.generic], values: list[np.ndarray]) -> np.ndarray:
        parts = []
        for prompt, value in zip(prompts, values, strict=True):
            parts += [np.full((len(prompt), *value.shape[1:]), fill, dtype), value.astype(dtype, copy=False)]
        return np.concatenate(parts)

    return Trajectories(
        run_id=run_id,
        channel_names=list(channel_names),
        groups=np.array([f.group for f in finished], np.int64),
        siblings=np.array([c.sibling for c in completions], np.int32),
        rewards=np.array([f.reward for f in finished], np.float32),
        channels=np.array([[f.channels[n] for n in channel_names] for f in finished], np.float32).reshape(
            len(finished), len(channel_names)
        ),
        finish=np.array([FINISH_REASONS.index(c.finish_reason) for c in completions], np.uint8),
        cu_seqlens=np.concatenate(([0], np.cumsum(lengths))).astype(np.int32),
        token_ids=np.concatenate([a for p, c in zip(prompts, completions, strict=True) for a in (p, c.token_ids)]),
        trainable=interleave(0, np.uint8, [np.ones(len(c.token_ids), np.uint8) for c in completions]),
        log_q=interleave(0, np.float32, [c.logprobs for c in completions]),
        versions=interleave(-1, np.int32, [c.versions for c in completions]),
        topk_ids=interleave(0, np.int32, [c.topk_ids for c in completions]),
        topk_log_q=interleave(0, np.float32, [c.topk_logprobs for c in completions]),
        experts=np.concatenate([c.experts for c in completions]),
    )


class Outbox:
    """Sent messages with the identities that the broker has not acknowledged yet."""

    def __init__(self) -> None:
        self._messages: dict[int, tuple[Trajectories, set[tuple[int, int]], int]] = {}
        self._owner: dict[tuple[int, int], int] = {}
        self._next = 0

    def add(self, message: Trajectories) -> None:
        """Keep ``message`` until every trajectory in it is acknowledged."""
        identities = set(zip(message.groups.tolist(), message.siblings.tolist(), strict=True))
        size = message.token_ids.nbytes * 4 + message.topk_ids.nbytes * 2 + message.experts.nbytes
        self._messages[self._next] = (message, identities, size)
        self._owner.update(dict.fromkeys(identities, self._next))
        self._next += 1

    def acknowledge(self, ack: Ack) -> list[tuple[int, int, str]]:
        """Forget what the broker took or refused for good; returns the refused with their reasons."""
        refused = []
        for group, sibling, reason in zip(ack.groups.tolist(), ack.siblings.tolist(), ack.reasons, strict=True):
            if reason:
                refused.append((group, sibling, reason))
            owner = self._owner.pop((group, sibling), None)
            if owner is None:
                continue
            _, waiting, _ = self._messages[owner]
            waiting.discard((group, sibling))
            if not waiting:
                del self._messages[owner]
        return refused

    def unacknowledged(self) -> list[Trajectories]:
        """What a broker that came back must be sent again, oldest first."""
        return [message for message, _, _ in self._messages.values()]

    def groups(self) -> set[int]:
        """Groups of which something is not acknowledged."""
        return {group for group, _ in self._owner}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(size for _, _, size in self._messages.values())

    def __len__(self) -> int:
        return len(self._owner)
