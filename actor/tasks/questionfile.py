"""Questions with their answers from JSONL files, split into those to train on and those held out.

::

    {"question": ..., "answer": "... #### 42"}     GSM8K
    {"problem": ..., "solution": "... \\boxed{42}"}  MATH; its "answer" goes first where there is one
    {"question": ..., "answer": "Paris"}           or a list of answers, each of which is right
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from actor.tasks.answers import last_boxed
from actor.tasks.rows import read_lines, read_row
from common.errors import TaskError

QUESTION_KEYS = ("question", "problem", "prompt")  # tried in this order
ANSWER_KEYS = ("answer", "answers", "solution")
SHOWN = 120  # characters of a line's keys in an error

log = logging.getLogger("actor.questions")


@dataclass(frozen=True)
class Line:
    """A question."""

    question: str
    answers: tuple[str, ...]  # final answers, any of which is right
    where: str  # file:line


def read_split(params: dict[str, Any], names: Sequence[str]) -> tuple[list[Line], list[Line]]:
    """(to train on, held out): of the files that one of ``task.params.<names>`` names, and of ``heldout``.

    ``heldout`` counts the last questions, or names files too. A question of both is held out. Raises
    TaskError for files, lines and parameters that cannot be used, by name and line.
    """
    given = [name for name in names if name in params]
    if len(given) != 1:
        raise TaskError(f"task.params.{' or .'.join(names)} must name a JSONL file of questions, or a list of them")
    lines = _read_all(given[0], params[given[0]], params)
    asked = params.get("heldout", 0)
    if isinstance(asked, int) and not isinstance(asked, bool):
        if not 0 <= asked < len(lines):
            raise TaskError(f"task.params.heldout={asked} of {len(lines)} questions leaves none to train on")
        train, heldout = lines[: len(lines) - asked], lines[len(lines) - asked :]
    else:
        train, heldout = lines, _read_all("heldout", asked, params)
    known = {line.question for line in heldout}
    kept = [line for line in train if line.question not in known]
    if not kept:
        raise TaskError("task.params.heldout: every training question is also held out; name other files")
    if len(kept) < len(train):
        log.warning("%d training questions are also held out and are left out", len(train) - len(kept))
    return kept, heldout


def _read_all(name: str, paths: Any, params: dict[str, Any]) -> list[Line]:
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
        raise TaskError(f"task.params.{name}={paths!r}: must name a JSONL file, or a list of them")
    lines = [line for path in paths for line in _read(path, params)]
    if not lines:
        raise TaskError(f"task.params.{name}={paths}: holds no questions")
    return lines


def _read(path: str, params: dict[str, Any]) -> Iterator[Line]:
    for number, text in enumerate(read_lines(path, path), 1):
        if not text.strip():
            continue
        where = f"{path}:{number}"
        row = read_row(text, where)
        _, (question, *_) = _field(row, "question", params, QUESTION_KEYS, where)
        key, answers = _field(row, "answer", params, ANSWER_KEYS, where)
        plain = key != "solution" or "answer" in params
        yield Line(question, tuple(_final(answer, plain, where) for answer in answers), where)


def _field(
    row: dict[str, Any], name: str, params: dict[str, Any], known: tuple[str, ...], where: str
) -> tuple[str, list[str]]:
    """The key that ``params`` names, or else the first of ``known`` that holds something, and its texts."""
    keys = (read_text(params, name, ""),) if name in params else known
    for key in keys:
        value = row.get(key)
        values = value if isinstance(value, list) else [value]
        texts = [_as_text(one) for one in values if _holds_something(one)]
        if texts and len(texts) == len(values):
            return key, texts
    raise TaskError(
        f"{where}: no {name} under {' or '.join(map(repr, keys))}, it has {', '.join(map(repr, row))[:SHOWN]}; name "
        f"the key in task.params.{name}"
    )


def _holds_something(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _as_text(value: Any) -> str:
    return format(Decimal(repr(value)), "f") if isinstance(value, float) else str(value)


def _final(text: str, plain: bool, where: str) -> str:
    """Behind GSM8K's last ``####``, in the last box, or the text itself if it is ``plain``: no solution."""
    before, hashes, behind = text.rpartition("####")
    if hashes and before.strip():
        text = behind
    elif (boxed := last_boxed(text)) is not None:
        text = boxed
    elif not plain:
        raise TaskError(
            f"{where}: its 'solution' holds neither \\boxed{{...}} nor a line '#### ...'; name the key of the final "
            "answer in task.params.answer"
        )
    if not text.strip():
        raise TaskError(f"{where}: its answer is empty")
    return text.strip()


def read_text(params: dict[str, Any], name: str, default: str) -> str:
    """``task.params.<name>``. Raises TaskError for anything but text."""
    value = params.get(name, default)
    if not isinstance(value, str):
        raise TaskError(f"task.params.{name}={value!r}: must be text")
    return value
