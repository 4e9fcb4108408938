"""The quick start's task: six random digits, answer them sorted (``582013>`` -> ``012358$``).

A million questions, one in eight held out by a hash of its digits. Sixteen characters: the digits
are ids 0 to 9, ``>`` ends a question, ``$`` ends an answer, ``.`` pads, three are spare.
"""

import json
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actor.tasks.base import PromptItem, Split, refuse_params
from common.philox import STREAM_PROMPTS, philox4x32

ALPHABET = "0123456789>$.abc"
END_OF_QUESTION = ALPHABET.index(">")
EOS = ALPHABET.index("$")
PAD = ALPHABET.index(".")
DIGITS = 6
QUESTIONS = 10**DIGITS
HELD_OUT_ONE_IN = 8
_HASH = 0x9E3779B1  # Fibonacci hashing: spreads neighbouring questions over the splits
SPLITS: tuple[Split, ...] = ("train", "heldout")


def encode(text: str) -> NDArray[np.int32]:
    """Ids of the characters."""
    return np.array([ALPHABET.index(c) for c in text], np.int32)


def decode(ids: NDArray[np.int32]) -> str:
    """Characters of the ids."""
    return "".join(ALPHABET[i] for i in ids.tolist())


def is_held_out(question: int) -> bool:
    """One number in eight."""
    return ((question * _HASH) & 0xFFFFFFFF) >> 29 == 0  # the top three bits: one in eight


class Sort6:
    """See the module."""

    channels: tuple[str, ...] = ("correct", "prefix")
    eos_id = EOS

    def __init__(self, seed: int, params: dict[str, Any]) -> None:
        refuse_params("sort6", params, ())
        self._seed = seed

    def prompt(self, index: int, split: Split) -> PromptItem:
        """Question ``index``: uniform over its split, by rejection from uniform questions."""
        wanted = split == "heldout"
        for attempt in range(10_000):
            counter = (index & 0xFFFFFFFF, index >> 32, attempt, SPLITS.index(split))
            words = philox4x32((self._seed, STREAM_PROMPTS), *counter)
            question = int(words[0]) % QUESTIONS
            if is_held_out(question) == wanted:
                digits = f"{question:0{DIGITS}d}"
                return PromptItem(encode(digits + ">"), "".join(sorted(digits)) + "$")
        raise AssertionError("ten thousand draws missed a split of one in eight")

    def demonstration(self, item: PromptItem, draw: int) -> NDArray[np.int32]:
        """The right answer."""
        return encode(item.reference)

    def reward(self, item: PromptItem, completion_ids: NDArray[np.int32]) -> dict[str, float]:
        """``correct``: 1 for exactly the sorted digits and ``$``; ``prefix``: their share before the first error."""
        answer = decode(completion_ids)
        right = takewhile(bool, (given == wanted for given, wanted in zip(answer, item.reference, strict=False)))
        return {
            "correct": float(answer == item.reference),
            "prefix": sum(right) / len(item.reference),
        }

    def answer(self, item: PromptItem, completion_ids: NDArray[np.int32]) -> str | None:
        """What stands before the end token; None without one."""
        ends = np.flatnonzero(completion_ids == EOS)
        return decode(completion_ids[: ends[0]]) if len(ends) else None


def write_tokenizer(directory: str | Path) -> None:
    """The alphabet as a Hugging Face tokenizer; the same bytes every time."""
    directory = Path(directory)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = [{"id": i, "content": ALPHABET[i], **plain, "special": True} for i in (EOS, PAD)]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": {c: i for i, c in enumerate(ALPHABET)}, "unk_token": "."},
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1, ensure_ascii=False) + "\n")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "$",
        "pad_token": ".",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 64,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
