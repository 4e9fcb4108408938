"""Between messages and token ids: the model's chat template, its tokenizer, and tool calls in text."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from jinja2.exceptions import TemplateError
from numpy.typing import NDArray

from actor.gateway.chat import BAD_REQUEST, Call, Refusal
from actor.tasks.tokenizer import load_tokenizer
from common.errors import TaskError

Ids = NDArray[np.int32]
TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


class ChatTemplate:
    """The template of the tokenizer in ``model_dir``, or the Jinja file ``file``. Raises TaskError if there is none."""

    def __init__(self, model_dir: str, file: str = "") -> None:
        self._tokenizer = load_tokenizer(model_dir)
        if file:
            try:
                self._tokenizer.chat_template = Path(file).read_text().rstrip("\n")
            except OSError as error:
                raise TaskError(f"task.params.chat_template={file}: {error}") from error
        elif not self._tokenizer.chat_template:
            raise TaskError(
                f"model.path={model_dir}: its tokenizer has no chat template; name a Jinja file in "
                "task.params.chat_template"
            )

    def render(self, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
        """The conversation as text, up to where the policy goes on. Raises Refusal if the template does."""
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tools=tools or None, add_generation_prompt=True, tokenize=False
            )
        except (TemplateError, TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
            reason = f"messages: the chat template cannot render them: {type(error).__name__}: {error}"
            raise Refusal(BAD_REQUEST, reason, "messages") from error
        return str(text)

    def encode(self, text: str) -> Ids:
        """Ids ``[n]`` of a piece of rendered text; nothing is added."""
        return np.array(self._tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

    def decode(self, ids: Ids, special: bool) -> str:
        """Text of ``ids[n]``; ``special`` tokens as text, or left out."""
        return str(
            self._tokenizer.decode(ids.tolist(), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        )

    def tokens(self, ids: Ids) -> list[str]:
        """Text of each of ``ids[n]`` alone."""
        return list(self._tokenizer.batch_decode(ids[:, None].tolist(), clean_up_tokenization_spaces=False))


def split_calls(text: str) -> tuple[str, tuple[Call, ...]]:
    """Content and tool calls of what a policy wrote; a block that is no call stays content."""
    calls: list[Call] = []

    def take(block: re.Match[str]) -> str:
        call = _read_call(block[1])
        if call is None:
            return block[0]
        calls.append(call)
        return ""

    content = TOOL_CALL.sub(take, text)
    return (content.strip(), tuple(calls)) if calls else (text, ())


def _read_call(text: str) -> Call | None:
    try:
        given = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        return None
    arguments = given.get("arguments", {})
    if not isinstance(arguments, dict):
        return None
    try:
        orjson.dumps(arguments)
    except orjson.JSONEncodeError:  # nested deeper than can be told again
        return None
    return Call(given["name"], arguments)
