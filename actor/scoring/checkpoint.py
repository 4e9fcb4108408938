"""An outcome reward model that the actor runs itself: a sequence-classification checkpoint, in a thread.

::

    score -> waiting -> [up to reward.models.*.batch of them, padded] -> logits -> score

What waits is scored together; texts of one batch are padded at the end, behind what is read.
"""

import asyncio
import contextlib
import queue
import threading
from pathlib import Path
from typing import Any

import torch

from actor.scoring.remote import conversation_ids, pick, squashed
from actor.scoring.rubric import Judged
from actor.tasks.foreign import words_of_failure
from actor.tasks.tokenizer import load_tokenizer
from common.errors import ModelError, TaskError
from common.rewards import RewardModelEntry

END_S = 5.0  # for the batch under way to end when the actor does


class Checkpoint:
    """The classifier in ``entry.path``. Raises ModelError or TaskError if it cannot be used."""

    def __init__(self, name: str, entry: RewardModelEntry) -> None:
        self._name, self._entry = name, entry
        self.unread = 0
        self._model = _load(name, entry)
        self._tokenizer = load_tokenizer(entry.path, f"reward.models.{name}.path")
        config = self._model.config.get_text_config()
        self._outputs = int(self._model.config.num_labels)
        if entry.label >= self._outputs:
            raise ModelError(f"reward.models.{name}.label={entry.label}: {entry.path} has {self._outputs} outputs")
        self._vocabulary = int(config.vocab_size)
        self._longest = int(getattr(config, "max_position_embeddings", 0) or 1 << 30)
        self._waiting: queue.SimpleQueue[tuple[list[int], asyncio.Future[float]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=f"reward-{name}", daemon=True)
        self._thread.start()

    async def ready(self) -> None:
        """It is always up."""

    async def score(self, judged: Judged) -> float:
        """Its output ``label`` for the text. Raises TaskError for one that is too long for it."""
        ids = conversation_ids(self._tokenizer, judged)
        if not 0 < len(ids) <= self._longest:
            raise TaskError(f"{self._name}: a text of {len(ids)} tokens, it reads 1 to {self._longest}")
        future: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._waiting.put((ids, future))
        return await future

    def close(self) -> None:
        """End the thread."""
        self._waiting.put(None)
        self._thread.join(END_S)

    def _serve(self) -> None:
        torch.set_num_threads(self._entry.threads)  # of this thread alone
        while (first := self._waiting.get()) is not None:
            batch = [first]
            while len(batch) < self._entry.batch and not self._waiting.empty():
                one = self._waiting.get()
                if one is None:
                    return
                batch.append(one)
            batch = [one for one in batch if not one[1].cancelled()]
            try:
                scores: list[float | BaseException] = [*self._scores([ids for ids, _ in batch])] if batch else []
            except (Exception, SystemExit) as error:  # noqa: BLE001  # a model's code is foreign; its rollouts are told
                scores = [TaskError(f"{self._name}: {words_of_failure(error)}")] * len(batch)
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                for (_, future), score in zip(batch, scores, strict=True):
                    future.get_loop().call_soon_threadsafe(_settle, future, score)

    def _scores(self, texts: list[list[int]]) -> list[float | BaseException]:
        """Of each of ``texts``, token ids of different lengths."""
        pad = self._pad_for(texts)
        longest = max(map(len, texts))
        ids = torch.tensor([text + [pad] * (longest - len(text)) for text in texts])
        mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
        self._model.config.get_text_config().pad_token_id = pad
        with torch.inference_mode():
            logits = self._model(input_ids=ids, attention_mask=mask).logits.float()
        return [self._pick(row) for row in logits.tolist()]

    def _pick(self, row: list[float]) -> float | BaseException:
        try:
            return squashed(pick(row, self._entry.label), self._entry.squash)
        except TaskError as error:
            return TaskError(f"{self._name}: {error}")

    def _pad_for(self, texts: list[list[int]]) -> int:
        """What stands behind shorter texts. Decoders find a text's last token as the last one that is not this.

        So it must not be one that texts end with, as a checkpoint whose pad is its end token has it.
        """
        given = self._tokenizer.pad_token_id
        ends = {text[-1] for text in texts}
        if given is not None and given not in ends:
            return int(given)
        return next(token for token in range(self._vocabulary) if token not in ends)


def _settle(future: "asyncio.Future[float]", score: float | BaseException) -> None:
    if future.done():
        return
    if isinstance(score, BaseException):
        future.set_exception(score)
    else:
        future.set_result(score)


def _load(name: str, entry: RewardModelEntry) -> Any:
    from transformers import AutoModelForSequenceClassification

    key = f"reward.models.{name}.path={entry.path!r}"
    if not Path(entry.path).is_dir():
        raise ModelError(f"{key}: no such directory; download the model there or correct the path")
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            entry.path, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # transformers raises many unrelated types
        raise ModelError(f"{key}: no sequence-classification checkpoint in safetensors: {error}") from error
    if report["missing_keys"]:
        raise ModelError(
            f"{key}: has no {', '.join(sorted(report['missing_keys'])[:3])}, which would be random; name a reward "
            "model, not the language model that it was made from"
        )
    return model.eval()
