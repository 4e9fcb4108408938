"""Text to exact ids and back, for tasks that talk to a chat model over several turns.

::

    question -> prompt ids | sampled ids -> text | what the environment says -> ids that follow the sampled ones

Nothing sampled is encoded again: a reply is the piece of template between an assistant's words and
the next assistant's, with the environment as the user. A model without a chat template gets plain text.
"""

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actor.tasks.reasoning import ENDS, Decoder, is_opened, without_reasoning
from actor.tasks.tokenizer import load_tokenizer
from common.config import RolloutSection
from common.errors import ConfigError, TaskError

Ids = NDArray[np.int32]
ANSWERED, SAID = "\x02answered\x02", "\x02said\x02"  # places in a rendered template
CUT = "\n[... {} characters left out ...]\n"


class Chat:
    """Of the model in ``model_dir``. Thread-safe. Raises TaskError for a template that cannot go on."""

    def __init__(self, model_dir: str) -> None:
        self._tokenizer = load_tokenizer(model_dir)
        self._lock = threading.Lock()  # tokenizers refuse to be used by two threads at once: "Already borrowed"
        self._decode = Decoder(self._tokenizer)
        self._before, self._behind = self._turn_around(model_dir)
        self._opened = is_opened(self._behind)
        added = [str(t) for t in self._tokenizer.added_tokens_decoder.values() if t.special or not str(t).isspace()]
        self._reserved = sorted({*added, *map(str, self._tokenizer.all_special_tokens)}, key=len, reverse=True)

    def _turn_around(self, model_dir: str) -> tuple[str, str]:
        """(what stands between an answer and the user's next words, what stands behind those)."""
        if not self._tokenizer.chat_template:
            return "\n", "\n"
        roles = ("user", "assistant", "user")
        turns = [{"role": role, "content": text} for role, text in zip(roles, ("?", ANSWERED, SAID), strict=True)]
        text = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        _, answered, rest = text.partition(ANSWERED)
        before, said, behind = rest.partition(SAID)
        if not answered or not said:
            raise TaskError(f"model.path={model_dir}: its chat template does not show what user and assistant said")
        return before, behind

    def prompt(self, question: str, system: str = "") -> Ids:
        """Ids ``[P]`` of a conversation's beginning."""
        with self._lock:
            if not self._tokenizer.chat_template:
                whole = f"{system}\n\n{question}" if system else question
                return np.array(self._tokenizer(whole)["input_ids"], np.int32)
            turns = [{"role": "system", "content": system}] if system else []
            turns.append({"role": "user", "content": question})
            return self._encode(self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))

    def text(self, completion: Ids) -> str:
        """What the policy wrote in ``completion[T]``, its reasoning left out; "" if that has no end."""
        with self._lock:
            return without_reasoning(self._decode(completion), self._opened)

    def rest(self, completion: Ids, cut: int) -> Ids:
        """``completion[cut:]``, which :meth:`text` reads as an answer if reasoning has ended before it."""
        if not self._opened:
            return completion[cut:]
        with self._lock:
            ended = ENDS in self._decode(completion[:cut])
            return np.concatenate([self._encode(ENDS), completion[cut:]]) if ended else completion[cut:]

    def least_reply(self) -> int:
        """Tokens of a reply that says nothing."""
        return len(self._reply("", False))

    def room(self, rollout: RolloutSection, shortest: str, *, needs: str, times: int, remedy: str = "") -> int:
        """Tokens that a reply may have, ``rollout.max_reply_tokens``.

        ``needs`` and ``remedy`` are words of the ConfigError that is raised, ``times`` the advice, where that
        has no room for ``shortest``; "{}" in ``needs`` stands for the tokens that this takes.
        """
        least, given = self.least_reply() + len(self.prompt(shortest)), rollout.max_reply_tokens
        if rollout.max_turns > 1 and given < least:
            raise ConfigError(
                f"rollout.max_reply_tokens={given}: {needs.format(least)}; set it to {times * least}, say{remedy}"
            )
        return given

    def reply(self, said: str, completion: Ids, room: int) -> Ids:
        """Ids ``[n]``, n <= ``room``, that follow ``completion[T]``; too long a text is cut in the middle, with a mark.

        Text that would be read as the template's own tokens is broken up, and what UTF-8 cannot say is
        replaced. Raises TaskError if not even a mark has room.
        """
        said = said.encode(errors="replace").decode()
        for token in self._reserved:
            said = said.replace(token, f"{token[0]} {token[1:]}")
        ended = self._ended(completion)
        ids = self._reply(said, ended)
        fits, too_many = 0, len(said)  # characters kept
        while len(ids) > room and too_many - fits > 1:
            keep = (fits + too_many) // 2
            shorter = self._reply(_shortened(said, keep), ended)
            fits, too_many = (keep, too_many) if len(shorter) <= room else (fits, keep)
            if too_many - fits <= 1:
                ids = self._reply(_shortened(said, fits), ended)
        if len(ids) > room:
            raise TaskError(f"a reply of {len(ids)} tokens at least; raise rollout.max_reply_tokens={room}")
        return ids

    def _ended(self, completion: Ids) -> bool:
        """Whether the policy has written the token that ends its turn in the template."""
        if not len(completion):
            return False
        with self._lock:
            last = str(self._tokenizer.decode([int(completion[-1])], skip_special_tokens=False))
        return bool(last) and last in self._reserved and self._before.startswith(last)

    def _reply(self, said: str, ended: bool) -> Ids:
        before = self._before
        with self._lock:
            if ended:
                token = next(token for token in self._reserved if before.startswith(token))
                before = before.removeprefix(token)
            return self._encode(before + said + self._behind)

    def _encode(self, text: Any) -> Ids:
        return np.array(self._tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def _shortened(text: str, keep: int) -> str:
    """``keep`` characters of the two ends, and a mark between them."""
    return text[: keep - keep // 2] + CUT.format(len(text) - keep) + (text[-(keep // 2) :] if keep > 1 else "")
