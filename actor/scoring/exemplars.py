"""Answers written by people: shown to judges as the manner that is wanted, and put into groups as members.

A JSONL file, a line an answer::

    {"question": "What is ...?", "answer": "..."}      of this question, by its text
    {"question": 17, "answer": "...", "task": "chat"}  of question 17 of a task (of any, without "task")
    {"answer": "..."}                                  of none: a style for all

Token ids are made once and are never decoded; an answer ends as the chat template ends it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actor.tasks.rows import read_row
from actor.tasks.tokenizer import load_tokenizer
from common.errors import ConfigError, TaskError

FIELDS = {"question", "answer", "task"}
MARK = "\x02answer\x02"  # a place in a rendered template

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class _Line:
    question: str | int | None
    answer: str
    task: str | None


class Exemplars:
    """Of the JSONL file ``path`` for the model in ``model_dir``.

    Raises ConfigError for a file that cannot be used, or a task in it that is not among ``labels``;
    TaskError without a tokenizer.
    """

    def __init__(self, path: str, model_dir: str, labels: Sequence[str]) -> None:
        self._by_question: dict[str | int, list[_Line]] = {}
        self._style: list[_Line] = []
        for number, line in _read(path):
            one = _parse(line, f"reward.exemplars={path}: line {number}")
            if one.task is not None and one.task not in labels:
                raise ConfigError(f"reward.exemplars={path}: line {number}: no task {one.task!r}; {', '.join(labels)}")
            if one.question is None:
                self._style.append(one)
            else:
                self._by_question.setdefault(one.question, []).append(one)
        if not self._by_question and not self._style:
            raise ConfigError(f"reward.exemplars={path}: holds no line; write answers into it or leave it out")
        self._tokenizer = load_tokenizer(model_dir)
        self._end = end_ids(self._tokenizer)
        self._ids: dict[str, Ids] = {}

    @property
    def has_questions(self) -> bool:
        """Whether any answer is of a question, so that it can be a group's member."""
        return bool(self._by_question)

    def of(self, label: str, index: int, text: str) -> list[str]:
        """Answers to question ``index`` of the task ``label``, whose text is ``text``, in the file's order."""
        own = [*self._by_question.get(text.strip(), ()), *self._by_question.get(index, ())]
        return [line.answer for line in own if line.task in (None, label)]

    def references(self, label: str, index: int, text: str) -> tuple[str, ...]:
        """What a judge is shown: answers to the question first, then those that are a style for all."""
        return (*self.of(label, index, text), *(line.answer for line in self._style if line.task in (None, label)))

    def ids(self, answer: str) -> Ids:
        """Token ids ``[T]`` of an answer, its end included; the same array every time."""
        if answer not in self._ids:
            text = self._tokenizer(answer, add_special_tokens=False)["input_ids"]
            self._ids[answer] = np.array([*text, *self._end], np.int32)
            self._ids[answer].flags.writeable = False
        return self._ids[answer]


def end_ids(tokenizer: Any) -> list[int]:
    """What an assistant's words end with: the first special token behind them in the chat template.

    Without a template, or with one that has none there, the tokenizer's end token.
    """
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        behind = tokenizer(text.rpartition(MARK)[2], add_special_tokens=False)["input_ids"] if MARK in text else []
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        for count, token in enumerate(behind, 1):
            if token in special:
                return list(behind[:count])
    if tokenizer.eos_token_id is None:
        raise ConfigError("reward.exemplars: neither chat template nor tokenizer of model.path says how an answer ends")
    return [int(tokenizer.eos_token_id)]


def _read(path: str) -> list[tuple[int, str]]:
    """Lines that are not empty, numbered from 1."""
    try:
        return [(n, line) for n, line in enumerate(Path(path).read_text().split("\n"), 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"reward.exemplars={path}: {error}; correct the path") from error


def _parse(line: str, where: str) -> _Line:
    try:
        found = read_row(line, where)
    except TaskError as error:
        raise ConfigError(str(error)) from error
    if not set(found) <= FIELDS:
        raise ConfigError(f"{where}: must be an object of {', '.join(sorted(FIELDS))}")
    question, answer, task = found.get("question"), found.get("answer"), found.get("task")
    if not isinstance(answer, str) or not answer.strip():
        raise ConfigError(f"{where}: needs an answer, a text")
    if isinstance(question, bool) or not isinstance(question, str | int | None):
        raise ConfigError(f"{where}: question must be its text or its number")
    if not isinstance(task, str | None):
        raise ConfigError(f"{where}: task must be a label")
    return _Line(question.strip() if isinstance(question, str) else question, answer, task)
