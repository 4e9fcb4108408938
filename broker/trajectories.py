"""Trajectories as the broker holds them: places in the messages that brought them. Nothing is copied until a batch is.

::

    message (frames, arrays)  <-  Trajectory: a place in it, and what is asked of it most often
    members of a batch        ->  pieces: runs of neighbours in one message, copied in one go
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import sub
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.config.units import bytes_per_token
from common.wire import Trajectories

Piece = tuple[Trajectories, int, int]  # a message, and tokens of it from one to another


@dataclass(slots=True, eq=False)  # not frozen: making it would take three times as long
class Trajectory:
    """One sibling; its tokens stay in the frames that they arrived in until :func:`gather` copies them together."""

    message: Trajectories
    index: int  # its place there
    length: int  # tokens, prompt included
    group: int
    sibling: int
    reward: float
    channels: dict[str, float]  # the reward's parts by name
    truncated: bool
    oldest_version: int  # of its oldest sampled token
    sampled_tokens: int
    nbytes: int  # held in the queue
    prompt: int  # that its group was granted for: which task's and which question, says task.mix
    actor: str
    event: int  # the journal's that brought it; -1 without a journal
    plain: bool  # one version, no log_q where nothing was sampled, no role but 0 and 1; False: perhaps

    @property
    def source(self) -> tuple[int, int]:
        """The journal's event that brought it, and its place in that message."""
        return self.event, self.index

    @property
    def place(self) -> list[int]:
        """Where it is found again, for a :data:`LoadTrajectory`."""
        return [self.event, self.index, self.prompt]

    @property
    def blocks(self) -> NDArray[np.int32]:
        """``[k, 4]``: which block, the outcome before it, its first token and its end."""
        first, end = self.message.block_cuts[self.index : self.index + 2]
        return np.asarray(self.message.blocks[first:end, 1:], np.int32)

    @property
    def block_rewards(self) -> NDArray[np.float32]:
        """``[k]``."""
        first, end = self.message.block_cuts[self.index : self.index + 2]
        return np.asarray(self.message.block_rewards[first:end], np.float32)


LoadTrajectory = Callable[[int, int, int], Trajectory]  # by its source in the journal, and its prompt


def unpack_all(
    message: Trajectories, actor: str = "", seq: int = -1, prompts: Sequence[int] | None = None
) -> list[Trajectory]:
    """The trajectories of a message, without a copy; ``prompts`` are those of their groups."""
    oldest, sampled = message.summary
    n, cuts, names = len(oldest), message.cuts, message.channel_names
    lengths = list(map(sub, cuts[1:], cuts))
    width = bytes_per_token(message.topk_ids.shape[1], message.experts.shape[1])
    is_plain = message.is_plain
    message.forget_checks()
    return list(
        map(
            Trajectory, repeat(message), range(n), lengths, message.groups.tolist(), message.siblings.tolist(),
            message.rewards.tolist(), [dict(zip(names, row, strict=True)) for row in message.channels.tolist()],
            [finish == 1 for finish in message.finish.tolist()], oldest, sampled, [n * width for n in lengths],
            repeat(0) if prompts is None else prompts, repeat(actor), repeat(seq), repeat(is_plain),
        )
    )  # fmt: skip


def pieces_of(members: Iterable[Trajectory]) -> list[Piece]:
    """Where the tokens of ``members`` lie, in their order; neighbours in a message are one piece."""
    found: list[Piece] = []
    message, after, first, end = None, -1, 0, 0
    for member in members:
        if member.message is message and member.index == after:
            end += member.length
        else:
            if message is not None:
                found.append((message, first, end))
            message = member.message
            first = message.cuts[member.index]
            end = first + member.length
        after = member.index + 1
    if message is not None:
        found.append((message, first, end))
    return found


def gather(pieces: Sequence[Piece], name: str) -> NDArray[Any]:
    """Array ``name`` of the messages' tokens end to end, of at least one piece: a copy, of one piece a view."""
    whole: NDArray[Any] = getattr(pieces[0][0], name)
    if whole.ndim == 2 and not whole.shape[1]:  # of a record that nobody keeps: as broad in every message
        return np.empty((sum(end - first for _, first, end in pieces), 0), whole.dtype)
    arrays = [getattr(message, name)[first:end] for message, first, end in pieces]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
