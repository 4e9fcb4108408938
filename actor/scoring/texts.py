"""A rollout as text, for whoever reads it: the task's question, and what came of it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from actor.rollout import Ids, Turn
from actor.tasks.base import AskingTask, PromptItem, Task
from actor.tasks.mixed import MixedTask
from actor.tasks.reasoning import BEGINS, Decoder, is_opened, without_reasoning
from actor.tasks.tokenizer import load_tokenizer

TAIL = 32  # tokens of a prompt's end that say whether it has opened reasoning


class Texts:
    """Of one actor's task. Raises TaskError if ``model_dir`` has no tokenizer."""

    def __init__(self, task: Task, model_dir: str) -> None:
        self._task, self._decoder = task, Decoder(load_tokenizer(model_dir))

    def question(self, item: PromptItem, given: Ids) -> str:
        """As the task words it, or ``given[P]``, the prompt that the policy read, decoded."""
        part = part_of(self._task, item)
        return part.question_text(item) if isinstance(part, AskingTask) else self._decode(given)

    def answer(self, turns: Sequence[Turn]) -> str:
        """What the policy wrote, its reasoning left out, and what it was told between two turns."""
        parts = []
        for number, turn in enumerate(turns):
            if number and not turn.fresh:
                parts.append(self._decode(turn.given).removesuffix(BEGINS).strip())
            opened = is_opened(self._decode(turn.given[-TAIL:]))
            parts.append(without_reasoning(self._decode(turn.completion.token_ids), opened).strip())
        return "\n".join(parts) if len(parts) > 1 else parts[0]

    def _decode(self, ids: np.ndarray[Any, Any]) -> str:
        return self._decoder(ids).strip()


def part_of(task: Task, item: PromptItem) -> Task:
    """Whose question ``item`` is."""
    return task.parts[item.task] if isinstance(task, MixedTask) else task
