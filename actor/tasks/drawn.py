"""Questions made by number: the same for the same seed, and none in both splits. Pure."""

import hashlib
from collections.abc import Callable
from random import Random
from typing import TypeVar

from actor.tasks.base import Split
from common.philox import STREAM_PROMPTS, philox4x32

HELD_OUT_ONE_IN = 8
ATTEMPTS = 10_000  # to find a question of the split that is asked for
_SPLITS: tuple[Split, ...] = ("train", "heldout")

Sketch = TypeVar("Sketch")
Question = TypeVar("Question")


def draw(
    seed: int,
    index: int,
    split: Split,
    sketch: Callable[[Random], Sketch],
    say: Callable[[Sketch], str],
    finish: Callable[[Random, Sketch], Question | None],
) -> Question:
    """Question ``index``: one sketch in HELD_OUT_ONE_IN is held out, by a hash of all that it ``say``s.

    A sketch that cannot be finished (None) is drawn again. Raises ValueError if none comes to a
    question of this split: there are too few.
    """
    for attempt in range(ATTEMPTS):
        counter = (index & 0xFFFFFFFF, index >> 32, attempt, _SPLITS.index(split))
        words = philox4x32((seed, STREAM_PROMPTS), *counter)
        rng = Random(int(words[0]) << 32 | int(words[1]))
        drawn = sketch(rng)
        if is_held_out(say(drawn)) == (split == "heldout") and (question := finish(rng, drawn)) is not None:
            return question
    raise ValueError(f"{ATTEMPTS} questions, and none for the split {split}")


def is_held_out(text: str) -> bool:
    """One text in HELD_OUT_ONE_IN, whatever the seed."""
    return hashlib.blake2b(text.encode(), digest_size=1).digest()[0] % HELD_OUT_ONE_IN == 0
