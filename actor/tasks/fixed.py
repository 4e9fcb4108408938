"""Random prompts of one length, for throughput: the reward is a coin that the completion itself tosses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actor.tasks.base import PromptItem, Split, refuse_params
from common.errors import TaskError
from common.philox import STREAM_PROMPTS, philox4x32

DEFAULT_PROMPT_TOKENS = 32


class FixedLength:
    """``params.prompt_tokens`` uniform ids a prompt; channel ``correct`` is the parity of the completion's sum."""

    channels = ("correct",)

    def __init__(self, model_dir: str, seed: int, params: dict[str, Any]) -> None:
        refuse_params("fixed", params, ("prompt_tokens",))
        self._seed = seed
        self._tokens = int(params.get("prompt_tokens", DEFAULT_PROMPT_TOKENS))
        try:
            self._vocab_size = int(json.loads((Path(model_dir) / "config.json").read_text())["vocab_size"])
        except (OSError, ValueError, KeyError) as error:
            raise TaskError(f"task fixed needs the vocabulary size of model.path={model_dir}: {error}") from error

    def prompt(self, index: int, split: Split) -> PromptItem:
        """Prompt ``index``."""
        positions = np.arange(self._tokens)
        words = philox4x32((self._seed, STREAM_PROMPTS), positions, index & 0xFFFFFFFF, index >> 32, split == "heldout")
        return PromptItem((words[0] % np.uint64(self._vocab_size)).astype(np.int32), None)

    def reward(self, item: PromptItem, completion_ids: NDArray[np.int32]) -> dict[str, float]:
        """1 where the ids add up to an odd number."""
        return {"correct": float(completion_ids.sum() % 2)}
