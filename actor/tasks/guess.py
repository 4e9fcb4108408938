"""A game of several turns in the quick start's alphabet: find a number in [0, 1000).

::

    c>  500$  a>  750$  b>  625$      a: it is higher, b: it is lower, c: that was no number

The conversation ends with the right guess or after ``rollout.max_turns``; a reply is REPLY_TOKENS long.
One number in eight is held out.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actor.tasks.base import PromptItem, Split, refuse_params
from actor.tasks.sort6 import ALPHABET, EOS, SPLITS, decode, encode, is_held_out
from common.errors import TaskError
from common.philox import STREAM_PROMPTS, philox4x32

NUMBERS = 1000
ASK, HIGHER, LOWER = encode("c>"), encode("a>"), encode("b>")
REPLY_TOKENS = 2


class Guess:
    """See the module. ``correct``: the last answer was right; ``closeness``: 1 - its share of the range away."""

    channels = ("correct", "closeness")

    def __init__(self, seed: int, params: dict[str, Any]) -> None:
        refuse_params("guess", params, ())
        self._seed = seed

    def prompt(self, index: int, split: Split) -> PromptItem:
        """Question ``index``: the number is uniform over its split and only the task knows it."""
        for attempt in range(10_000):
            counter = (index & 0xFFFFFFFF, index >> 32, attempt, SPLITS.index(split))
            number = int(philox4x32((self._seed, STREAM_PROMPTS), *counter)[0]) % NUMBERS
            if is_held_out(number) == (split == "heldout"):
                return PromptItem(ASK, number)
        raise AssertionError("ten thousand draws missed a split of one in eight")

    def reply(self, item: PromptItem, completions: Sequence[NDArray[np.int32]]) -> NDArray[np.int32] | None:
        """Which way the number lies from the last answer; None once it is found."""
        guess = read_guess(completions[-1])
        if guess is None:
            return ASK
        if guess == item.reference:
            return None
        return HIGHER if item.reference > guess else LOWER

    def reward_turns(self, item: PromptItem, completions: Sequence[NDArray[np.int32]]) -> dict[str, float]:
        """Of the last answer; one that is no number earns nothing."""
        guess = read_guess(completions[-1])
        if guess is None:
            return {"correct": 0.0, "closeness": 0.0}
        return {"correct": float(guess == item.reference), "closeness": 1 - abs(guess - item.reference) / NUMBERS}

    def reward(self, item: PromptItem, completion_ids: NDArray[np.int32]) -> dict[str, float]:
        """That of a conversation of one turn."""
        return self.reward_turns(item, [completion_ids])

    def answer(self, item: PromptItem, completion_ids: NDArray[np.int32]) -> str | None:
        """The number guessed last, however many zeros lead it."""
        guess = read_guess(completion_ids)
        return None if guess is None else str(guess)


def read_guess(answer: NDArray[np.int32]) -> int | None:
    """The number before the end token ``$``; None if ``answer[T]`` holds something else or 1,000 and more.

    Raises TaskError for ids outside the alphabet, which another model samples.
    """
    if len(answer) and int(answer.max()) >= len(ALPHABET):
        raise TaskError(f"token id {int(answer.max())} is no character of guess: it needs the quick start's model")
    ends = np.flatnonzero(answer == EOS)
    text = decode(answer[: ends[0]] if len(ends) else answer)
    return int(text) if text.isdigit() and int(text) < NUMBERS else None
