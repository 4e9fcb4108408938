"""Any reasoning-gym data set by name, with its own generator and verifier.

The prompt is the data set's question through the model's chat template (plain text if it has
none). Channel ``score`` is the verifier's value, ``correct`` is 1 above CORRECT_FROM: some
verifiers give a wrong answer .01.
"""

import difflib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actor.tasks.base import PromptItem, Split
from actor.tasks.tokenizer import load_tokenizer
from common.errors import TaskError

CORRECT_FROM = 0.99
BLOCK = 512  # questions generated at once, and how many are held out
REPLACEMENTS = 64  # tried for a training question that is held out
HELD_OUT_SEED = 0x5EED  # added to the run's seed


class GymTask:
    """``gym:<name>``; ``params`` are the data set's own difficulty settings."""

    channels = ("correct", "score")

    def __init__(self, name: str, model_dir: str, seed: int, params: dict[str, Any]) -> None:
        from reasoning_gym.factory import DATASETS

        if name not in DATASETS:
            near = difflib.get_close_matches(name, list(DATASETS), n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "reasoning_gym.factory.DATASETS lists them"
            raise TaskError(f"task.name=gym:{name}: reasoning-gym has no such data set; {hint}")
        self._name, self._seed, self._params = name, seed, dict(params)
        self._blocks: dict[tuple[Split, int], Any] = {}
        self._tokenizer = load_tokenizer(model_dir)
        self._held_out = {self._entry(i, "heldout")["question"] for i in range(BLOCK)}
        if self._entry(0, "train")["answer"] is None:
            raise TaskError(f"task.name=gym:{name}: its questions carry no answer (None), so nothing can be verified")

    def _entry(self, index: int, split: Split) -> dict[str, Any]:
        import reasoning_gym

        block, within = divmod(index, BLOCK)
        if (split, block) not in self._blocks:
            seed = (self._seed + (HELD_OUT_SEED if split == "heldout" else 0)) * 1_000_003 + block
            try:
                dataset = reasoning_gym.create_dataset(self._name, size=BLOCK, seed=seed % 2**31, **self._params)
            except (TypeError, AssertionError, ValueError) as error:
                raise TaskError(f"task.params for gym:{self._name}: {error}") from error
            self._blocks[split, block] = dataset
            while len(self._blocks) > 4:
                del self._blocks[next(iter(self._blocks))]
        entry: dict[str, Any] = self._blocks[split, block][within]
        return entry

    def prompt(self, index: int, split: Split) -> PromptItem:
        """Question ``index``; a training question that is also held out is replaced by a later one."""
        entry = self._entry(index % BLOCK if split == "heldout" else index, split)
        replacement = index
        while split == "train" and entry["question"] in self._held_out:
            replacement += BLOCK
            if replacement > index + REPLACEMENTS * BLOCK:
                raise TaskError(
                    f"task.name=gym:{self._name}: {REPLACEMENTS} training questions in a row are also held out; "
                    "make the data set larger with task.params"
                )
            entry = self._entry(replacement, split)
        return PromptItem(self._encode(entry["question"]), (entry, self._name))

    def _encode(self, question: str) -> NDArray[np.int32]:
        if self._tokenizer.chat_template:
            turns = [{"role": "user", "content": question}]
            text = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = self._tokenizer(question)["input_ids"]
        return np.array(ids, np.int32)

    def question_text(self, item: PromptItem) -> str:
        """The data set's."""
        entry, _ = item.reference
        return str(entry["question"])

    def answer(self, item: PromptItem, completion_ids: NDArray[np.int32]) -> str:
        """The whole completion, as the verifiers read it."""
        return str(self._tokenizer.decode(completion_ids.tolist(), skip_special_tokens=True)).strip()

    def reward(self, item: PromptItem, completion_ids: NDArray[np.int32]) -> dict[str, float]:
        """The verifier's word on the decoded completion."""
        from reasoning_gym import get_score_answer_fn

        entry, name = item.reference
        answer = self.answer(item, completion_ids)
        score = float(get_score_answer_fn(name)(answer=answer, entry=entry))
        return {"correct": float(score >= CORRECT_FROM), "score": score}
