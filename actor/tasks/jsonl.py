"""Data sets in JSONL files, one question with its answer a line, graded by comparing final answers.

::

    line -> question, reference answer (GSM8K's ``#### 42``, MATH's ``\\boxed{...}``, or a plain one)
    completion -> text -> its final answer -> grader -> correct, format (an answer could be read)

``params.file`` or ``files`` holds the questions, of which the last ``heldout`` are for evaluation alone;
``heldout`` may name files of its own instead. Graders: ``math`` (math-verify, in processes that are
killed when they hang), ``number`` (the last number), ``exact`` (normalised text).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actor.tasks.answers import last_boxed, marked, normalised, read_number
from actor.tasks.base import PromptItem, Split, refuse_params
from actor.tasks.chat import Chat
from actor.tasks.finite import Questions
from actor.tasks.grading import Overdue, graders
from actor.tasks.params import read_number as read_limit
from actor.tasks.questionfile import Line, read_split, read_text
from common.errors import TaskError

PARAMS = (
    "file", "files", "heldout", "question", "answer", "system", "suffix", "grader", "deadline_s", "workers"
)  # fmt: skip
BOXED = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
SUFFIXES = {"math": BOXED, "number": BOXED, "exact": "\n\nGive your final answer within <answer> and </answer>."}
DEFAULT_DEADLINE_S = 5.0  # for math-verify on one answer, which takes milliseconds
DEFAULT_WORKERS = 2  # processes that grade
GRADED = 20_000  # characters of a completion's end that are looked at
SHOWN = 120  # characters of an answer in the log

log = logging.getLogger("actor.jsonl")
Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Verdict:
    """On one completion."""

    correct: bool = False
    read: bool = False  # whether there was an answer
    overdue: bool = False  # whether grading it had to be broken off


class JsonlTask:
    """See the module. Raises TaskError for files, lines and parameters that cannot be used, by name and line."""

    slow = True  # grader math takes milliseconds, seconds at worst

    def __init__(self, model_dir: str, seed: int, params: dict[str, Any]) -> None:
        refuse_params("jsonl", params, PARAMS)
        grader = _choice(params, "grader", tuple(SUFFIXES), "math")
        self.slow = grader == "math"
        self.channels: tuple[str, ...] = ("correct", "format", *(["overdue"] if grader == "math" else []))
        self._grade: Callable[[str, Line], Verdict] = {
            "math": self._by_math, "number": _by_number, "exact": _by_text
        }[grader]  # fmt: skip
        self._suffix = read_text(params, "suffix", SUFFIXES[grader])
        self._system = read_text(params, "system", "")
        self._questions = Questions(seed, *read_split(params, ("file", "files")))
        self._chat = Chat(model_dir)
        if grader == "math":
            deadline_s = read_limit(params, "deadline_s", DEFAULT_DEADLINE_S, 0.1, 600)
            self._graders = graders("math", int(read_limit(params, "workers", DEFAULT_WORKERS, 1, 256)), deadline_s)

    @property
    def questions(self) -> int:
        """Those to train on."""
        return len(self._questions.train)

    @property
    def held_out(self) -> int:
        """Those for evaluation alone."""
        return len(self._questions.heldout)

    def prompt(self, index: int, split: Split) -> PromptItem:
        """Question ``index``; training goes through the files in another order each time."""
        line = self._questions.at(index, split)
        return PromptItem(self._chat.prompt(line.question + self._suffix, self._system), line)

    def question_text(self, item: PromptItem) -> str:
        """The question, without ``params.suffix``."""
        line: Line = item.reference
        return line.question

    def reward(self, item: PromptItem, completion_ids: Ids) -> dict[str, float]:
        """``correct``, ``format``, and with grader math ``overdue``: it had to be broken off, which is a failure.

        Raises TaskError if the reference answer cannot be read.
        """
        verdict = self._grade(self._chat.text(completion_ids)[-GRADED:], item.reference)
        found = {"correct": verdict.correct, "format": verdict.read, "overdue": verdict.overdue}
        return {name: float(found[name]) for name in self.channels}

    def answer(self, item: PromptItem, completion_ids: Ids) -> str | None:
        """The answer as it is written, white space aside."""
        text = self._chat.text(completion_ids)[-GRADED:]
        if self._grade is _by_number:
            number = read_number(_final(text))
            return None if number is None else str(number)
        found = _final(text) if self._grade is _by_text else marked(text)
        return " ".join(found.split()) or None if found else None

    def _by_math(self, text: str, line: Line) -> Verdict:
        found, read = marked(text), False
        for answer in _readings(text):
            try:
                verdict = self._graders.grade({"references": line.answers, "answer": answer})
            except Overdue as error:
                log.warning("%s: an answer %s and counts as wrong: %r", line.where, error, (found or text)[-SHOWN:])
                return Verdict(overdue=True)
            read = read or bool(verdict["read"])
            if verdict["correct"]:
                return Verdict(True, True)
        return Verdict(False, read)


def _readings(text: str) -> list[str]:
    """What is graded: a box alone, or all there is; of other marks their words and their mathematics.

    math-verify reads ``x^2 + 1`` in a box alone, and ``72 apples`` in a sentence alone.
    """
    if (boxed := last_boxed(text)) is not None:
        return [f"\\boxed{{{boxed}}}"]
    if (found := marked(text)) is not None:
        return [f"\\boxed{{{found}}}", f"The answer is {found}"]
    return [text]


def _final(text: str) -> str:
    """The marked answer, or all there is."""
    found = marked(text)
    return text if found is None else found


def _by_number(text: str, line: Line) -> Verdict:
    wanted, given = [read_number(answer) for answer in line.answers], read_number(_final(text))
    if None in wanted:
        raise TaskError(f"{line.where}: no number in its answer {line.answers}; set task.params.grader=exact or math")
    return Verdict(given in wanted, given is not None)


def _by_text(text: str, line: Line) -> Verdict:
    given = normalised(_final(text))
    return Verdict(given in map(normalised, line.answers), bool(given))


def _choice(params: dict[str, Any], name: str, known: tuple[str, ...], default: str) -> str:
    value = params.get(name, default)
    if value not in known:
        raise TaskError(f"task.params.{name}={value!r}: must be one of {', '.join(known)}")
    return str(value)
