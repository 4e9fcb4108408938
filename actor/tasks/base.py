"""Tasks: prompts by index, rewards by channel.

``make_task`` knows ``sort6`` (the quick start), ``guess`` (several turns), ``agent`` (programs that
speak OpenAI's protocol), ``jsonl`` (data sets in files), ``search`` (look-ups in a corpus), ``terminal``
and ``repair`` (in a sandbox), ``fixed`` (throughput measurements) and ``gym:<name>`` for every
reasoning-gym data set. :mod:`actor.tasks.mixed` makes several of them one.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from common.config import RolloutSection
from common.errors import TaskError
from common.near import suggest

Split = Literal["train", "heldout"]
BUILT_IN: dict[str, tuple[str, bool]] = {  # name -> (module:class, whether it takes the model directory first)
    "sort6": ("actor.tasks.sort6:Sort6", False),
    "sort6_confidence": ("actor.tasks.sort6blocks:SortConfidence", False),
    "sort6_twice": ("actor.tasks.sort6blocks:SortTwice", False),
    "tagged": ("actor.tasks.tagged:TaggedTask", True),
    "guess": ("actor.tasks.guess:Guess", False),
    "agent": ("actor.tasks.agent:AgentTask", False),
    "jsonl": ("actor.tasks.jsonl:JsonlTask", True),
    "search": ("actor.tasks.search:SearchTask", True),
    "fixed": ("actor.tasks.fixed:FixedLength", True),
    "terminal": ("actor.tasks.terminal:Terminal", True),
    "repair": ("actor.tasks.repair:Repair", True),
}
SANDBOXED = ("terminal", "repair")  # run programs that the policy writes (actor.sandbox)
GYM_PREFIX = "gym:"


@dataclass(frozen=True)
class PromptItem:
    """One question."""

    prompt_ids: NDArray[np.int32]  # [P]
    reference: Any  # what the task's verifier needs
    task: int = 0  # whose question it is, where several are mixed


class Task(Protocol):
    """A source of questions with a verifier. The same seed and index give the same question.

    One with an attribute ``slow`` that is true has its replies and rewards made in threads, several at
    once, beside the sampling.
    """

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the reward channels."""

    def prompt(self, index: int, split: Split) -> PromptItem:
        """Question ``index`` of a split; the splits share no question."""

    def reward(self, item: PromptItem, completion_ids: NDArray[np.int32]) -> dict[str, float]:
        """Every channel's value for a completion ``[T]``."""


@runtime_checkable
class MultiTurnTask(Task, Protocol):
    """A task that answers the policy (``rollout.max_turns`` turns at most)."""

    def reply(self, item: PromptItem, completions: Sequence[NDArray[np.int32]]) -> NDArray[np.int32] | None:
        """The ids that follow the last of ``completions`` (one for each turn so far); None at the end."""

    def reward_turns(self, item: PromptItem, completions: Sequence[NDArray[np.int32]]) -> dict[str, float]:
        """Every channel's value for a whole conversation; stands for :meth:`reward`."""


@runtime_checkable
class FittedTask(Task, Protocol):
    """A task that keeps its replies within what the run has room for."""

    def fit(self, rollout: RolloutSection) -> None:
        """Told once, before the first prompt. Raises ConfigError for room that is too small."""


@runtime_checkable
class AnsweringTask(Task, Protocol):
    """A task whose completions to one question can be compared, so that an evaluation may count their votes."""

    def answer(self, item: PromptItem, completion_ids: NDArray[np.int32]) -> str | None:
        """The answer that the last completion ``[T]`` gives, equal for equal ones; None if none can be read."""


@runtime_checkable
class AskingTask(Task, Protocol):
    """A task that can word its question, for reward models and exemplars; that of others is the decoded prompt."""

    def question_text(self, item: PromptItem) -> str:
        """The question as a person would be asked it."""


@runtime_checkable
class FiniteTask(Task, Protocol):
    """A task with a last question: training goes through all of them again and again (common.questions)."""

    @property
    def questions(self) -> int:
        """How many there are to train on."""


@dataclass(frozen=True)
class Block:
    """A stretch of a turn's completion with a reward of its own (algorithms.md 2)."""

    number: int  # which block of its trajectory, from 0; blocks of one number are compared
    first: int  # token of the completion
    end: int
    reward: float
    outcome: int = -1  # what came of everything before it, a small number; -1 for a first block
    turn: int = 0


@runtime_checkable
class BlockTask(Task, Protocol):
    """A task whose completions have blocks; the spans are of the ids that were sampled, never of text."""

    def blocks(
        self, item: PromptItem, completions: Sequence[NDArray[np.int32]], channels: dict[str, float]
    ) -> list[Block]:
        """The blocks of a scored trajectory, in order and apart; one that is missing or garbled is left out."""


@runtime_checkable
class DemonstratedTask(Task, Protocol):
    """A task that knows right completions, from which ``tools.warmstart`` makes a starting model."""

    def demonstration(self, item: PromptItem, draw: int) -> NDArray[np.int32]:
        """One for ``item``; ``draw`` >= 0 chooses among several. All are equally long."""


@runtime_checkable
class HoldingTask(Task, Protocol):
    """A task with so many questions for evaluation alone, and no more."""

    @property
    def held_out(self) -> int:
        """How many."""


def count_questions(task: Task) -> int:
    """Training questions of ``task``; 0 where there is no end of them."""
    return task.questions if isinstance(task, FiniteTask) else 0


def check_name(name: str) -> None:
    """Raise :class:`TaskError` that suggests the near name unless there is a task called ``name``."""
    if not name.startswith(GYM_PREFIX) and name not in BUILT_IN:
        known = f"known: {', '.join(BUILT_IN)} and gym:<reasoning-gym data set>"
        raise TaskError(f"task.name={name!r}: no such task; {suggest(name, BUILT_IN, else_say=known)}")


def make_task(name: str, model_dir: str, seed: int, params: dict[str, Any]) -> Task:
    """The task called ``name``; raises :class:`TaskError` that suggests the near name."""
    check_name(name)
    if name.startswith(GYM_PREFIX):
        from actor.tasks.gym import GymTask

        return GymTask(name.removeprefix(GYM_PREFIX), model_dir, seed, params)
    where, with_model = BUILT_IN[name]
    module, _, cls = where.partition(":")
    make = getattr(importlib.import_module(module), cls)
    task: Task = make(model_dir, seed, params) if with_model else make(seed, params)
    return task


def refuse_params(task: str, params: dict[str, Any], known: tuple[str, ...]) -> None:
    """Raise :class:`TaskError` for a parameter that the task does not have."""
    for key in params:
        if key not in known:
            raise TaskError(f"task.params.{key}: {task} has no such parameter; {suggest(key, known)}")
