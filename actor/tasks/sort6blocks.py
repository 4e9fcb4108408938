"""The quick start's task in two blocks, for blockwise advantages (2602.10231; algorithms.md 2).

::

    sort6_confidence   582013> -> 012358 | a7$       sorted digits, then how sure: 7 of 9
    sort6_twice        582013> -> 012358 | b012358$  an attempt, then another

The first block is the answer and ends before its mark (``a`` or ``b``); the second is the mark and
all after it. A completion without a readable second block has one block alone, whose reward is less
by ``params.penalty``.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actor.tasks.base import Block, PromptItem, refuse_params
from actor.tasks.sort6 import ALPHABET, DIGITS, EOS, Sort6, decode, encode
from common.errors import TaskError

Ids = NDArray[np.int32]
SURE, AGAIN = ALPHABET.index("a"), ALPHABET.index("b")
SUREST = 9  # the digit that says 1.0
PENALTY = 0.5
LEAST = 0.01  # of a probability, where its logarithm is a reward
CHANGED = 0.1  # a second attempt that is another one and wrong


def read_penalty(task: str, params: dict[str, Any]) -> float:
    """``params.penalty`` of a completion without a second block. Raises TaskError outside [0, 1]."""
    value = params.get("penalty", PENALTY)
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise TaskError(f"task.params.penalty={value!r}: {task} takes a number from 0 to 1")
    return float(value)


def score_confidence(correct: float, sure: float | None) -> dict[str, float]:
    """The channels of an answer that is right or not and how sure of it one was, None where that is unreadable."""
    if sure is None:
        return {"correct": correct, "confidence": 0.0, "valid": 0.0, "brier": -1.0, "bce": float(np.log(LEAST)),
                "rlcr": correct - 1.0}  # fmt: skip
    brier = -((sure - correct) ** 2)
    likelihood = min(max(sure if correct else 1 - sure, LEAST), 1.0)
    return {"correct": correct, "confidence": sure, "valid": 1.0, "brier": brier, "bce": float(np.log(likelihood)),
            "rlcr": correct + brier}  # fmt: skip


def read_score(params: dict[str, Any]) -> str:
    """``params.score``: the channel that rewards a confidence. Raises TaskError for any other."""
    score = str(params.get("score", "brier"))
    if score not in ("brier", "bce"):
        raise TaskError(f"task.params.score={score!r}: must be brier or bce")
    return score


def reward_second(channels: dict[str, float]) -> float:
    """Of a second attempt: 1 if it is right, CHANGED if it is another wrong one, else 0 (algorithms.md 2.1)."""
    return channels["second"] or CHANGED * channels["changed"]


class SortConfidence(Sort6):
    """``correct``, ``confidence`` (0 where unreadable), ``valid``, ``brier``, ``bce`` and ``rlcr``.

    ``params.score`` is the second block's reward, ``brier``: ``-(confidence - correct)^2`` or ``bce``:
    the log-probability that the confidence gives the outcome. ``rlcr`` is one number for all tokens,
    ``correct - (confidence - correct)^2``, the method that blocks are compared with.
    """

    channels = ("correct", "confidence", "valid", "brier", "bce", "rlcr")

    def __init__(self, seed: int, params: dict[str, Any]) -> None:
        refuse_params("sort6_confidence", params, ("penalty", "score"))
        super().__init__(seed, {})
        self.penalty = read_penalty("sort6_confidence", params)
        self.score = read_score(params)

    def reward(self, item: PromptItem, completion_ids: Ids) -> dict[str, float]:
        """See the class."""
        mark = read_confidence(completion_ids)
        correct = float(decode(_answer(completion_ids, mark)) + "$" == item.reference)
        return score_confidence(correct, None if mark is None else float(completion_ids[mark + 1]) / SUREST)

    def blocks(self, item: PromptItem, completions: Sequence[Ids], channels: dict[str, float]) -> list[Block]:
        """The answer, and the confidence given whether it was right."""
        ids = completions[0]
        mark = read_confidence(ids)
        if mark is None:
            return [Block(0, 0, len(ids), channels["correct"] - self.penalty)]
        first = Block(0, 0, mark, channels["correct"]) if mark else None
        second = Block(1, mark, len(ids), channels[self.score], int(channels["correct"]))
        return [block for block in (first, second) if block is not None]

    def answer(self, item: PromptItem, completion_ids: Ids) -> str | None:
        """The digits."""
        return decode(_answer(completion_ids, read_confidence(completion_ids))) or None

    def demonstration(self, item: PromptItem, draw: int) -> Ids:
        """A right answer with a confidence that knows nothing."""
        return encode(f"{item.reference[:-1]}a{draw % (SUREST + 1)}$")


class SortTwice(Sort6):
    """``correct`` (the last attempt), ``first`` and ``second``, ``changed``, ``valid``.

    The first block's reward is its correctness, the second's :func:`reward_second`.
    """

    channels = ("correct", "first", "second", "changed", "valid")

    def __init__(self, seed: int, params: dict[str, Any]) -> None:
        refuse_params("sort6_twice", params, ("penalty",))
        super().__init__(seed, {})
        self.penalty = read_penalty("sort6_twice", params)

    def reward(self, item: PromptItem, completion_ids: Ids) -> dict[str, float]:
        """See the class."""
        attempts = read_attempts(completion_ids)
        right = [decode(attempt) + "$" == item.reference for attempt in attempts]
        if len(attempts) < 2:
            first = float(bool(right) and right[0])
            return {"correct": first, "first": first, "second": 0.0, "changed": 0.0, "valid": 0.0}
        changed = not np.array_equal(attempts[0], attempts[1])
        return {"correct": float(right[1]), "first": float(right[0]), "second": float(right[1]),
                "changed": float(changed), "valid": 1.0}  # fmt: skip

    def blocks(self, item: PromptItem, completions: Sequence[Ids], channels: dict[str, float]) -> list[Block]:
        """Both attempts, the second given whether the first was right."""
        ids = completions[0]
        if not channels["valid"]:
            return [Block(0, 0, len(ids), channels["first"] - self.penalty)]
        mark = int(np.flatnonzero(ids == AGAIN)[0])
        found = [Block(1, mark, len(ids), reward_second(channels), int(channels["first"]))]
        return [Block(0, 0, mark, channels["first"]), *found] if mark else found

    def answer(self, item: PromptItem, completion_ids: Ids) -> str | None:
        """The last attempt's digits."""
        attempts = read_attempts(completion_ids)
        return (decode(attempts[-1]) or None) if attempts else None

    def demonstration(self, item: PromptItem, draw: int) -> Ids:
        """The right answer twice."""
        digits = item.reference[:-1]
        return encode(f"{digits}b{digits}$")


def read_confidence(ids: Ids) -> int | None:
    """Where the mark of a confidence stands: mark, digit and end token are the last three; None for anything else."""
    mark = len(ids) - 3
    ok = mark >= 0 and ids[mark] == SURE and ids[mark + 1] <= SUREST and ids[mark + 2] == EOS
    return mark if ok and int((ids == SURE).sum()) == 1 else None


def read_attempts(ids: Ids) -> list[Ids]:
    """The attempts of a completion that has ended, two where one mark divides it; none if it has not ended."""
    if not len(ids) or ids[-1] != EOS:
        return []
    marks = np.flatnonzero(ids == AGAIN)
    return [ids[:-1]] if len(marks) != 1 else [ids[: marks[0]], ids[marks[0] + 1 : -1]]


def _answer(ids: Ids, mark: int | None) -> Ids:
    """What stands before the confidence; without one, what stands before the end token."""
    if mark is not None:
        return ids[:mark]
    return ids[:-1] if len(ids) and ids[-1] == EOS else ids[: DIGITS + 1]
