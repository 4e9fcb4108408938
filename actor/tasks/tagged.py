"""Any text task in two blocks, marked by tags (2602.10231; algorithms.md 2).

::

    style confidence   reasoning <answer>42</answer> | analysis <confidence>0.8</confidence>
    style attempts     reasoning <answer>41</answer> | second thoughts <answer>42</answer>

The first block ends with the first ``</answer>``, at the token that completes it; the second is all
after it. ``params.inner`` names the task that is asked and that grades, from the ids of a block, what
stands in it; ``params.params`` are its own.
"""

import re
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actor.tasks.base import AskingTask, Block, PromptItem, Split, make_task, refuse_params
from actor.tasks.chat import Chat
from actor.tasks.sort6blocks import read_penalty, read_score, reward_second, score_confidence
from actor.tasks.tokenizer import load_tokenizer
from common.errors import TaskError

Ids = NDArray[np.int32]
PARAMS = ("inner", "params", "style", "score", "penalty", "suffix")
ENDS = "</answer>"
SUFFIXES = {
    "confidence": (
        "\n\nReason first, then write your final answer as <answer>...</answer>. After that, say what speaks for and "
        "against it, and write the probability that it is right as <confidence>p</confidence>, p from 0 to 1."
    ),
    "attempts": (
        "\n\nReason first, then write your answer as <answer>...</answer>. After that, look for a mistake in it, and "
        "write your final answer once more as <answer>...</answer>, changed or not."
    ),
}
CONFIDENCE = re.compile(r"<confidence>\s*([-+]?[0-9]*\.?[0-9]+)\s*(%?)\s*</confidence>")
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class TaggedTask:
    """Channels ``correct`` and ``valid``, and those of the style; see the module and :mod:`actor.tasks.sort6blocks`.

    A confidence outside [0, 1] is clipped and counted in ``clipped``.
    """

    def __init__(self, model_dir: str, seed: int, params: dict[str, Any]) -> None:
        refuse_params("tagged", params, PARAMS)
        self.style, self.score = str(params.get("style", "confidence")), read_score(params)
        if self.style not in SUFFIXES:
            raise TaskError(f"task.params.style={self.style!r}: must be one of {', '.join(SUFFIXES)}")
        if "inner" not in params:
            raise TaskError("task tagged needs task.params.inner, the name of the task that is asked")
        self.penalty = read_penalty("tagged", params)
        inner = make_task(str(params["inner"]), model_dir, seed, dict(params.get("params", {})))
        if not isinstance(inner, AskingTask):
            raise TaskError(f"task.params.inner={params['inner']}: has no question in words to put tags to")
        self._inner: AskingTask = inner
        self.slow = bool(getattr(inner, "slow", False))
        self._suffix = str(params.get("suffix", SUFFIXES[self.style]))
        self._chat = Chat(model_dir)
        self._tokenizer, self._lock = load_tokenizer(model_dir), threading.Lock()
        more = ("confidence", "brier", "bce", "rlcr", "clipped") if self.style == "confidence" else (
            "first", "second", "changed"
        )  # fmt: skip
        self.channels: tuple[str, ...] = ("correct", "valid", *more)

    @property
    def questions(self) -> int:
        """The inner task's."""
        return int(getattr(self._inner, "questions", 0))

    @property
    def held_out(self) -> int:
        """The inner task's; AttributeError, so that this is no HoldingTask, where that holds out any number."""
        return int(self._inner.held_out)  # type: ignore[attr-defined]

    def prompt(self, index: int, split: Split) -> PromptItem:
        """The inner task's question, with what is asked of the answer's form."""
        item = self._inner.prompt(index, split)
        return PromptItem(self._chat.prompt(self._inner.question_text(item) + self._suffix), item)

    def reward(self, item: PromptItem, completion_ids: Ids) -> dict[str, float]:
        """See the class."""
        text = self._text(completion_ids)
        cut = self._cut(completion_ids, text)
        if self.style == "confidence":
            return self._confidence(item, completion_ids, text, cut)
        return self._attempts(item, completion_ids, text, cut)

    def _confidence(self, item: PromptItem, ids: Ids, text: str, cut: int | None) -> dict[str, float]:
        correct = self._correct(item, ids if cut is None else ids[:cut])
        said = CONFIDENCE.search(text[text.find(ENDS) :]) if cut is not None else None
        value = None if said is None else float(said[1]) / (100.0 if said[2] else 1.0)
        sure = None if value is None else min(max(value, 0.0), 1.0)
        found = score_confidence(correct, sure) | {"clipped": float(sure != value)}
        return {name: found[name] for name in self.channels}

    def _attempts(self, item: PromptItem, ids: Ids, text: str, cut: int | None) -> dict[str, float]:
        answers = ANSWER.findall(text)
        if cut is None or len(answers) != 2:
            first = self._correct(item, ids if cut is None else ids[:cut])
            return {"correct": first, "valid": 0.0, "first": first, "second": 0.0, "changed": 0.0}
        first, second = self._correct(item, ids[:cut]), self._correct(item, self._chat.rest(ids, cut))
        changed = float(answers[0].strip() != answers[1].strip())
        return {"correct": second, "valid": 1.0, "first": first, "second": second, "changed": changed}

    def _correct(self, item: PromptItem, ids: Ids) -> float:
        return float(self._inner.reward(item.reference, ids)["correct"])

    def blocks(self, item: PromptItem, completions: Sequence[Ids], channels: dict[str, float]) -> list[Block]:
        """The answer, and what follows it given whether it was right."""
        ids = completions[0]
        first = channels["correct"] if self.style == "confidence" else channels["first"]
        cut = self._cut(ids, self._text(ids))
        if not channels["valid"] or cut is None or cut >= len(ids):
            return [Block(0, 0, len(ids), first - self.penalty)]
        second = channels[self.score] if self.style == "confidence" else reward_second(channels)
        return [Block(0, 0, cut, first), Block(1, cut, len(ids), second, int(first))]

    def answer(self, item: PromptItem, completion_ids: Ids) -> str | None:
        """What stands in the last answer tags."""
        answers = ANSWER.findall(self._text(completion_ids))
        return (" ".join(answers[-1].split()) or None) if answers else None

    def _text(self, ids: Ids) -> str:
        with self._lock:
            return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=False))

    def _cut(self, ids: Ids, text: str) -> int | None:
        """Tokens up to and with the one that completes the first ``</answer>``; None without one.

        Found by decoding prefixes of the ids, a dozen of them: the longest text that they give grows with them.
        """
        if ENDS not in text:
            return None
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if ENDS in self._text(ids[:middle]) else (middle + 1, high)
        return low
