"""Any reasoning-gym data set by name, with its own generator and verifier.

The prompt is the data set's question through the model's chat template (plain text if it has
none); the answer is what stands in ``<answer>`` tags, or else the whole completion. Channel ``score``
is the verifier's value, ``correct`` is 1 where that is full marks. Verifiers run in processes of
their own (:mod:`actor.tasks.grading`): some evaluate what they are given, see :mod:`actor.tasks.gymrules`.
"""

import difflib
import json
import logging
import threading
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actor.tasks.answers import last_tagged
from actor.tasks.base import PromptItem, Split
from actor.tasks.chat import Chat
from actor.tasks.grading import Overdue, graders
from actor.tasks.gymrules import CORRECT_FROM, as_literal, make_dataset
from actor.tasks.params import read_number
from common.errors import TaskError

HELD_OUT = 512  # questions, unless params.heldout says otherwise
BLOCK = 512  # questions of one seed
REPLACEMENTS = 64  # tried for a training question that is held out
HELD_OUT_SEED = 0x5EED  # added to the run's seed
WORKERS, DEADLINE_S = 2, 10.0  # of verifiers; some take a second to load what they need
LONG_S = 5.0  # for held-out questions to be made

log = logging.getLogger("actor.gym")


class GymTask:
    """``gym:<name>``; ``params`` are the data set's own difficulty settings, and ``heldout``."""

    channels = ("correct", "score")
    slow = True  # verifiers are reached through a pipe

    def __init__(self, name: str, model_dir: str, seed: int, params: dict[str, Any]) -> None:
        from reasoning_gym.factory import DATASETS

        if name not in DATASETS:
            near = difflib.get_close_matches(name, list(DATASETS), n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "reasoning_gym.factory.DATASETS lists them"
            raise TaskError(f"task.name=gym:{name}: reasoning-gym has no such data set; {hint}")
        self._name, self._seed = name, seed
        self._params = {key: value for key, value in params.items() if key != "heldout"}
        self.held_out = int(read_number(params, "heldout", HELD_OUT, 0, 1_000_000))
        self._lock = threading.Lock()  # generators keep a state
        self._blocks: dict[tuple[Split, int], Any] = {}
        self._refuse_unverified(self._entry(0, "train"))
        self._chat = Chat(model_dir)
        self._graders = graders("gym", WORKERS, DEADLINE_S)
        self._held_out = self._make_held_out()

    def _refuse_unverified(self, entry: dict[str, Any]) -> None:
        from reasoning_gym.dataset import ProceduralDataset

        own = type(self._blocks["train", 0]).score_answer is not ProceduralDataset.score_answer
        if entry["answer"] is None and not own:
            raise TaskError(f"task.name=gym:{self._name}: its questions carry no answer, so nothing can be verified")

    def _make_held_out(self) -> set[str]:
        began = time.monotonic()
        found = {self._entry(i, "heldout")["question"] for i in range(self.held_out)}
        if (seconds := time.monotonic() - began) > LONG_S:
            log.warning(
                "gym:%s took %.0f s for %d held-out questions; task.params.heldout=N makes fewer, evaluation.prompts "
                "needs them", self._name, seconds, self.held_out,
            )  # fmt: skip
        return found

    def _entry(self, index: int, split: Split) -> dict[str, Any]:
        block, within = divmod(index, BLOCK)
        with self._lock:
            if (split, block) not in self._blocks:
                seed = (self._seed + (HELD_OUT_SEED if split == "heldout" else 0)) * 1_000_003 + block
                try:
                    dataset = make_dataset(self._name, self._params, BLOCK, seed % 2**31)
                except (TypeError, AssertionError, ValueError) as error:
                    raise TaskError(f"task.params for gym:{self._name}: {error}") from error
                self._blocks[split, block] = dataset
                while len(self._blocks) > 4:
                    del self._blocks[next(iter(self._blocks))]
            entry: dict[str, Any] = self._blocks[split, block][within]
        return entry

    def prompt(self, index: int, split: Split) -> PromptItem:
        """Question ``index``; a training question that is also held out is replaced by a later one."""
        if split == "heldout" and index >= self.held_out:
            raise TaskError(f"held-out question {index}: task.params.heldout={self.held_out} are held out")
        entry = self._entry(index, split)
        replacement = index
        while split == "train" and entry["question"] in self._held_out:
            replacement += BLOCK
            if replacement > index + REPLACEMENTS * BLOCK:
                raise TaskError(
                    f"task.name=gym:{self._name}: {REPLACEMENTS} training questions in a row are also held out; "
                    "make the data set larger with task.params, or hold out fewer (task.params.heldout)"
                )
            entry = self._entry(replacement, split)
        return PromptItem(self._chat.prompt(entry["question"]), entry)

    def question_text(self, item: PromptItem) -> str:
        """The data set's question."""
        return str(item.reference["question"])

    def answer(self, item: PromptItem, completion_ids: NDArray[np.int32]) -> str:
        """What the verifiers are given."""
        text = self._chat.text(completion_ids)
        tagged = last_tagged(text)
        return text.strip() if tagged is None else tagged

    def reward(self, item: PromptItem, completion_ids: NDArray[np.int32]) -> dict[str, float]:
        """The verifier's word on the answer; one that it cannot read, or hangs on, is worth nothing."""
        request = {
            "name": self._name, "params": json.dumps(self._params, sort_keys=True),
            "entry": as_literal(item.reference), "answer": self.answer(item, completion_ids),
        }  # fmt: skip
        try:
            score = float(self._graders.grade(request)["score"])
        except Overdue as error:
            log.warning("gym:%s: an answer %s and counts as wrong: %r", self._name, error, request["answer"][-120:])
            score = 0.0
        return {"correct": float(score >= CORRECT_FROM), "score": score}
