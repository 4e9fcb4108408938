"""Several tasks as one: each prompt belongs to one of them, as ``task.mix`` says (common.mixture)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from actor.tasks.base import AnsweringTask, Block, BlockTask, FittedTask, MultiTurnTask, PromptItem, Split, Task
from common.config import RolloutSection
from common.errors import TaskError
from common.mixture import Mixture


class MixedTask:
    """A :class:`MultiTurnTask`; a part that never answers has one turn. A trajectory has its own part's channels."""

    def __init__(self, parts: Mapping[str, Task], schedule: Mixture) -> None:
        """``parts`` by label, in the order in which ``schedule`` numbers them."""
        self.labels, self.parts = tuple(parts), tuple(parts.values())
        self._schedule = schedule

    @property
    def channels(self) -> tuple[str, ...]:
        """Those of all parts, each once."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.channels))

    def prompt(self, index: int, split: Split) -> PromptItem:
        """The question of the task whose turn it is, held-out ones in the same order. Raises TaskError by label."""
        number, own = self._schedule.place(index)
        try:
            return replace(self.parts[number].prompt(own, split), task=number)
        except TaskError as error:
            raise TaskError(f"{self.labels[number]}: {error}") from error

    def fit(self, rollout: RolloutSection) -> None:
        """Tell the parts that want to know."""
        for part in self.parts:
            if isinstance(part, FittedTask):
                part.fit(rollout)

    def reply(self, item: PromptItem, completions: Sequence[NDArray[np.int32]]) -> NDArray[np.int32] | None:
        """What the item's own task says; one without an answer ends the conversation."""
        part = self.parts[item.task]
        return part.reply(item, completions) if isinstance(part, MultiTurnTask) else None

    def reward_turns(self, item: PromptItem, completions: Sequence[NDArray[np.int32]]) -> dict[str, float]:
        """The item's own task's channels."""
        part = self.parts[item.task]
        if isinstance(part, MultiTurnTask):
            return part.reward_turns(item, completions)
        return part.reward(item, completions[0])

    def answer(self, item: PromptItem, completion_ids: NDArray[np.int32]) -> str | None:
        """The item's own task's reading; None if it has none."""
        part = self.parts[item.task]
        return part.answer(item, completion_ids) if isinstance(part, AnsweringTask) else None

    def blocks(
        self, item: PromptItem, completions: Sequence[NDArray[np.int32]], channels: dict[str, float]
    ) -> list[Block]:
        """The item's own task's; none if it has none."""
        part = self.parts[item.task]
        return part.blocks(item, completions, channels) if isinstance(part, BlockTask) else []

    def reward(self, item: PromptItem, completion_ids: NDArray[np.int32]) -> dict[str, float]:
        """That of a conversation of one turn."""
        return self.reward_turns(item, [completion_ids])


def parts_of(task: Task) -> tuple[Task, ...]:
    """The tasks that are mixed, by number; ``task`` alone if it is no mixture."""
    return task.parts if isinstance(task, MixedTask) else (task,)
