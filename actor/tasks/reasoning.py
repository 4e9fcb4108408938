"""Where a policy's reasoning ends and its answer begins.

::

    <think> reasoning </think> answer       the first tag is sampled, or is the end of the prompt
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

BEGINS, ENDS = "<think>", "</think>"

Ids = NDArray[np.int32]


def is_opened(prompt: str) -> bool:
    """Whether what is sampled behind ``prompt`` begins as reasoning: the template has opened it."""
    return prompt.rstrip().endswith(BEGINS)


def without_reasoning(text: str, opened: bool = False) -> str:
    """What stands behind the last ``</think>``; nothing where reasoning began, or was ``opened``, and did not end."""
    _, ended, rest = text.rpartition(ENDS)
    return "" if not ended and (opened or BEGINS in text) else rest


class Decoder:
    """Text of ids without special tokens, save those that mark reasoning."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._tags = {i: text for i, text in special.items() if text in (BEGINS, ENDS)}

    def __call__(self, ids: Ids) -> str:
        """Of ``ids[n]``."""
        parts, begin = [], 0
        for at in np.flatnonzero(np.isin(ids, list(self._tags))).tolist() if self._tags else ():
            parts += [self._decode(ids[begin:at]), self._tags[int(ids[at])]]
            begin = at + 1
        return "".join([*parts, self._decode(ids[begin:])])

    def _decode(self, ids: Ids) -> str:
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))
