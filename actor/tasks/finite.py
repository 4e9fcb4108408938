"""A finite set of questions, some to train on and the others held out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from actor.tasks.base import Split
from common.errors import TaskError
from common.questions import question_of

T = TypeVar("T")


@dataclass(frozen=True)
class Questions(Generic[T]):
    """See the module."""

    seed: int
    train: Sequence[T]
    heldout: Sequence[T]

    def at(self, index: int, split: Split) -> T:
        """Question ``index``; training goes through its part again and again, in another order each time.

        Raises TaskError for a held-out question beyond those that there are.
        """
        if split == "train":
            return self.train[question_of(self.seed, index, len(self.train))]
        if index < len(self.heldout):
            return self.heldout[index]
        raise TaskError(f"held-out question {index}: task.params.heldout={len(self.heldout)} are held out")
