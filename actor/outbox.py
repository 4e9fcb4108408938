"""Trajectories on their way to the broker, kept until they are acknowledged. Pure."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from actor.rollout import Turn
from actor.tasks.base import Block
from common.config.units import bytes_per_token
from common.wire import EXPERT, FINISH_REASONS, MAX_MEMBERS, STARTS, Ack, GroupFailed, Trajectories

FAILURES_KEPT = 1000
BYTES_PER_MEMBER, BYTES_PER_BLOCK, BYTES_PER_CHANNEL = 24, 24, 4  # of a message, beside the tokens


@dataclass(frozen=True)
class Finished:
    """A scored rollout."""

    group: int
    sibling: int
    turns: Sequence[Turn]
    channels: dict[str, float]
    reward: float
    blocks: Sequence[Block] = ()  # of its turns' completions


def by_channels(finished: Sequence[Finished]) -> dict[tuple[str, ...], list[Finished]]:
    """``finished`` by the names of their reward channels: mixed tasks have different ones, and a message one set."""
    found: dict[tuple[str, ...], list[Finished]] = {}
    for one in finished:
        found.setdefault(tuple(one.channels), []).append(one)
    return found


def in_messages(finished: Sequence[Finished], most_bytes: int) -> Iterator[list[Finished]]:
    """``finished`` as one message after another can carry it: one rollout at least, else ``most_bytes`` at most."""
    part, room = list[Finished](), most_bytes
    for one in finished:
        size = _size(one)
        if part and (len(part) == MAX_MEMBERS or size > room):
            yield part
            part, room = [], most_bytes
        part.append(one)
        room -= size
    if part:
        yield part


def _size(one: Finished) -> int:
    """Bytes of a message."""
    first = one.turns[0].completion
    per_token = bytes_per_token(first.topk_ids.shape[1], first.experts.shape[1])
    tokens = sum(len(turn.given) + len(turn.completion.token_ids) for turn in one.turns)
    beside = BYTES_PER_MEMBER + BYTES_PER_CHANNEL * len(one.channels) + BYTES_PER_BLOCK * len(one.blocks)
    size: int = tokens * per_token + beside
    return size


def pack(run_id: str, channel_names: Sequence[str], finished: Sequence[Finished]) -> Trajectories:
    """One message of all ``finished`` rollouts: what was given is not trainable, what was sampled is."""
    turns = [turn for f in finished for turn in f.turns]
    lengths = [sum(len(turn.given) + len(turn.completion.token_ids) for turn in f.turns) for f in finished]

    def interleave(fill: float, dtype: type[np.generic], values: list[np.ndarray]) -> np.ndarray:
        parts = []
        for turn, value in zip(turns, values, strict=True):
            parts += [np.full((len(turn.given), *value.shape[1:]), fill, dtype), value.astype(dtype, copy=False)]
        return np.concatenate(parts)

    return Trajectories(
        run_id=run_id,
        channel_names=list(channel_names),
        groups=np.array([f.group for f in finished], np.int64),
        siblings=np.array([f.sibling for f in finished], np.int32),
        rewards=np.array([f.reward for f in finished], np.float32),
        channels=np.array([[f.channels[n] for n in channel_names] for f in finished], np.float32).reshape(
            len(finished), len(channel_names)
        ),
        finish=np.array([FINISH_REASONS.index(f.turns[-1].completion.finish_reason) for f in finished], np.uint8),
        cu_seqlens=np.concatenate(([0], np.cumsum(lengths))).astype(np.int32),
        token_ids=np.concatenate([part for turn in turns for part in (turn.given, turn.completion.token_ids)]),
        trainable=_roles(turns),
        log_q=interleave(0, np.float32, [turn.completion.logprobs for turn in turns]),
        versions=interleave(-1, np.int32, [turn.completion.versions for turn in turns]),
        topk_ids=interleave(0, np.int32, [turn.completion.topk_ids for turn in turns]),
        topk_log_q=interleave(0, np.float32, [turn.completion.topk_logprobs for turn in turns]),
        experts=np.concatenate([_experts(f.turns) for f in finished]),
        blocks=_block_table(finished),
        block_rewards=np.array([block.reward for f in finished for block in f.blocks], np.float32),
    )


def _block_table(finished: Sequence[Finished]) -> np.ndarray:
    """``[K, 5]``: trajectory, which block, outcome before it, first token and end within the trajectory."""
    rows = []
    for index, one in enumerate(finished):
        starts, position = [], 0
        for turn in one.turns:
            starts.append(position + len(turn.given))
            position = starts[-1] + len(turn.completion.token_ids)
        for block in one.blocks:
            at = starts[block.turn]
            rows.append((index, block.number, block.outcome, at + block.first, at + block.end))
    return np.array(rows, np.int32).reshape(-1, 5)


def _roles(turns: Sequence[Turn]) -> np.ndarray:
    """``[N]``: 1 where sampled, EXPERT in an exemplar's answer, STARTS where a fresh turn begins, else 0."""
    parts = []
    for turn in turns:
        given = np.zeros(len(turn.given), np.uint8)
        given[:1] = STARTS * turn.fresh
        parts += [given, np.full(len(turn.completion.token_ids), EXPERT if turn.exemplar else 1, np.uint8)]
    return np.concatenate(parts)


def _experts(turns: Sequence[Turn]) -> np.ndarray:
    """``[N, R]``: of each token the experts of the pass that read it first."""
    parts: list[np.ndarray] = []
    before = 0  # rows that earlier turns of the segment have recorded
    for turn in turns:
        if turn.fresh:
            before = 0
        if before:
            parts[-1] = parts[-1][:-1]  # the last token was not read in its own turn, but in this one
            before -= 1
        parts.append(turn.completion.experts[before:])
        before += len(parts[-1])
    return np.concatenate(parts)


class Outbox:
    """Sent messages with the identities that the broker has not acknowledged yet."""

    def __init__(self) -> None:
        self._failures: deque[GroupFailed] = deque(maxlen=FAILURES_KEPT)
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

    def failed(self, message: GroupFailed) -> None:
        """Keep ``message`` too: nobody acknowledges it, and the broker ignores one that it knows."""
        self._failures.append(message)

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

    def unacknowledged(self) -> list[Trajectories | GroupFailed]:
        """What must be sent again on a new connection, or to a broker that came back."""
        return [*(message for message, _, _ in self._messages.values()), *self._failures]

    def groups(self) -> set[int]:
        """Groups of which something is not acknowledged."""
        return {group for group, _ in self._owner}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(size for _, _, size in self._messages.values())

    def __len__(self) -> int:
        return len(self._owner)
