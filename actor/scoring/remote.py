"""Reward models behind HTTP: judges of the OpenAI protocol, and classifiers of SGLang, vLLM or a plain form.

========  =======================================  ====================================================
protocol  posted                                   answered
========  =======================================  ====================================================
sglang    ``{"text": [t]}`` or ``{"input_ids":     ``[{"embedding": [logits]}]``: its ``/classify``
          [[ids]]}``
vllm      ``{"model": m, "input": t or ids}``      ``{"data": [{"probs": [p]}]}``: ``/classify``, or
                                                   ``{"data": [{"data": [r]}]}``: ``/pooling``
scores    ``{"question": q, "answer": a}``         ``{"scores": [r]}``
========  =======================================  ====================================================
"""

import asyncio
import math
from typing import Any, Protocol

from actor.scoring.endpoint import Endpoint, ModelDownError
from actor.scoring.rubric import Judged, last_message, messages, read_score, reminded
from actor.tasks.tokenizer import load_tokenizer
from common.errors import TaskError
from common.rewards import RewardModelEntry


class RewardModel(Protocol):
    """Something that scores a rollout's text."""

    unread: int  # words of a judge that could not be read

    async def score(self, judged: Judged) -> float:
        """Raises TaskError, saying why, if there is no score."""

    async def ready(self) -> None:
        """Wait until it is worth asking. Raises TaskError if it is not and nobody should wait."""


class Judge:
    """A generative reward model: a rubric, an answer, a score at the end of what it writes."""

    def __init__(self, name: str, entry: RewardModelEntry, endpoint: Endpoint, secret: bytes, within_s: float) -> None:
        """``within_s`` for all judgements of an answer. Raises ConfigError if the rubric cannot be read."""
        self._entry, self._endpoint, self._secret, self._within_s = entry, endpoint, secret, within_s
        self._rubric = entry.read_rubric(name)
        self.unread = 0

    async def ready(self) -> None:
        """See :class:`RewardModel`."""
        await self._endpoint.ready()

    async def score(self, judged: Judged) -> float:
        """The mean of ``samples`` judgements; of those that could be had in time, if some could not."""
        entry, scores, error = self._entry, list[float](), Exception()
        first = messages(judged, self._rubric, entry.scale, entry.references, self._secret)
        try:
            async with asyncio.timeout(self._within_s):
                for _ in range(entry.samples):
                    try:
                        scores.append(await self._judge(first))
                    except ModelDownError:
                        raise
                    except TaskError as failure:
                        error = failure
        except (TimeoutError, ModelDownError) as failure:
            error = failure
        if not scores:
            raise error
        return sum(scores) / len(scores)

    async def _judge(self, first: list[dict[str, str]]) -> float:
        """One judgement, asked for again with a reminder while it cannot be read."""
        entry, said = self._entry, first
        for attempt in range(entry.retries + 1):
            answer = await self._endpoint.ask({
                "model": entry.model, "messages": said, "temperature": entry.temperature,
                "max_tokens": entry.max_tokens,
            })  # fmt: skip
            text = ""
            try:
                text = last_message(answer)
                return read_score(text, entry.scale)
            except TaskError:
                self.unread += 1
                if attempt == entry.retries:
                    raise
            said = reminded(first, text, entry.scale)
        raise AssertionError("a loop with at least one turn")


class Classifier:
    """An outcome reward model behind HTTP."""

    def __init__(self, entry: RewardModelEntry, endpoint: Endpoint) -> None:
        """Raises TaskError for a tokenizer that cannot be loaded."""
        self._entry, self._endpoint = entry, endpoint
        self._tokenizer = (
            load_tokenizer(entry.tokenizer, f"reward.models.{endpoint.name}.tokenizer") if entry.tokenizer else None
        )
        self.unread = 0

    async def ready(self) -> None:
        """See :class:`RewardModel`."""
        await self._endpoint.ready()

    async def score(self, judged: Judged) -> float:
        """The output ``label`` of its answer."""
        answer = await self._endpoint.ask(self._body(judged))
        try:
            return squashed(pick(outputs_of(answer), self._entry.label), self._entry.squash)
        except TaskError as error:
            self.unread += 1
            raise TaskError(f"{self._endpoint.name}: {error}") from error

    def _body(self, judged: Judged) -> dict[str, Any]:
        entry = self._entry
        if entry.protocol == "scores":
            return {"question": judged.question, "answer": judged.answer} | (
                {"model": entry.model} if entry.model else {}
            )
        if self._tokenizer is None:
            content: Any = plain(judged)
            return {"text": [content]} if entry.protocol == "sglang" else {"model": entry.model, "input": content}
        ids = conversation_ids(self._tokenizer, judged)
        return {"input_ids": [ids]} if entry.protocol == "sglang" else {"model": entry.model, "input": ids}


def plain(judged: Judged) -> str:
    """A rollout for a model without a chat template."""
    return f"{judged.question}\n{judged.answer}"


def conversation_ids(tokenizer: Any, judged: Judged) -> list[int]:
    """A rollout as a conversation, by the model's own template; plain text if it has none."""
    if not tokenizer.chat_template:
        return list(tokenizer(plain(judged))["input_ids"])
    turns = [{"role": "user", "content": judged.question}, {"role": "assistant", "content": judged.answer}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def outputs_of(answer: Any) -> list[float]:
    """What a server says of one text, in any of the shapes above. Raises TaskError for another."""
    found = answer
    if isinstance(found, dict) and "data" in found:
        found = found["data"]
    if isinstance(found, dict) and "scores" in found:
        found = [{"scores": found["scores"]}]
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if isinstance(found, dict):
        found = next((found[key] for key in ("embedding", "probs", "data", "scores") if key in found), None)
    if isinstance(found, list) and found and isinstance(found[-1], list):
        found = found[-1]  # one row a token: the last one has read everything
    numbers = isinstance(found, list) and all(isinstance(x, int | float) and not isinstance(x, bool) for x in found)
    if not numbers or not found:
        raise TaskError(f"no scores of one text in its answer: {str(answer)[:120]}")
    return [float(x) for x in found]


def pick(outputs: list[float], label: int) -> float:
    """Output ``label``. Raises TaskError if there is none, or it is no number."""
    if label >= len(outputs):
        raise TaskError(f"{len(outputs)} outputs, label={label} asks for one more")
    if not math.isfinite(outputs[label]):
        raise TaskError(f"a score of {outputs[label]}")
    return outputs[label]


def squashed(value: float, how: str) -> float:
    """``value``, or its sigmoid."""
    if how == "none":
        return value
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
