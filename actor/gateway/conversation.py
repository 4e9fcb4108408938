"""What one agent and the policy said to each other, as messages, as text and as exact ids. Pure.

::

    request -> the conversation that its messages extend -> the text that is new -> ids behind the recorded ones
                  | none: a new one, whose prompt is everything rendered

Sampled ids are never encoded again. What is new is found in the text: the whole conversation is
rendered with each recorded answer as it was sampled, end token included, and must begin with the
text recorded so far. An agent that edits its history, and a template that renders it differently
later (reasoning left out, say), therefore begin a new conversation: a segment of the trajectory.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from actor.engine.base import Completion
from actor.gateway.chat import (
    BAD_REQUEST,
    Answer,
    ChatRequest,
    Limits,
    Message,
    Refusal,
    TokenInfo,
    answer_body,
    answer_events,
    read_request,
)
from actor.gateway.template import ChatTemplate, Ids, split_calls
from actor.rollout import Turn

SHOWN = 40  # bytes of a text in a log line


@dataclass(eq=False)
class Conversation:
    """One segment."""

    messages: tuple[Message, ...] = ()  # as the agent knows them, the policy's included
    rendered: list[dict[str, Any]] = field(default_factory=list)  # the same as the template gets them
    text: str = ""  # of everything given and sampled
    turns: list[Turn] = field(default_factory=list)

    @property
    def ids(self) -> Ids:
        """Exact ids ``[n]`` of everything given and sampled."""
        parts = [part for turn in self.turns for part in (turn.given, turn.completion.token_ids)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)


@dataclass(frozen=True, eq=False)
class Placed:
    """A request and where it belongs."""

    request: ChatRequest
    conversation: Conversation  # that goes on, or a new one
    rendered: list[dict[str, Any]]
    text: str  # of the whole prompt
    given: Ids  # [n] what is new of it
    prompt_ids: Ids  # [P]
    max_tokens: int
    first_token: int  # tokens that the rollout has sampled before
    why: str  # no earlier conversation goes on; "" if one does, or there is none


@dataclass(frozen=True, eq=False)
class Reply:
    """A completion, read: what the agent gets, and what is recorded if it does."""

    body: bytes
    content_type: str
    turn: Turn
    message: Message
    raw: str  # text as sampled, without the end token ...
    end: str  # ... and that token's


class Conversations:
    """Those of one rollout, in the order in which they began."""

    def __init__(self, template: ChatTemplate, limits: Limits) -> None:
        self._template, self._limits = template, limits
        self._begun: list[Conversation] = []

    @property
    def turns(self) -> list[Turn]:
        """Of all conversations, one behind the other."""
        return [turn for conversation in self._begun for turn in conversation.turns]

    def read(self, body: bytes) -> Placed:
        """Where a request belongs; changes nothing. Raises Refusal for what cannot be honoured."""
        limits, turns = self._limits, self.turns
        request = read_request(body, limits)
        if len(turns) >= limits.max_turns:
            text = f"the rollout has had its {len(turns)} turns; raise rollout.max_turns"
            raise Refusal(BAD_REQUEST, text, code="max_turns")
        conversation, rendered, text, why = self._find(request)
        given = self._template.encode(text[len(conversation.text) :])
        prompt_ids = np.concatenate([conversation.ids, given])
        length = sum(len(turn.given) + len(turn.completion.token_ids) for turn in turns)
        room = limits.max_length - length - len(given)
        if room < 1:
            raise Refusal(
                BAD_REQUEST,
                f"messages: {len(given)} new tokens behind the {length} of this rollout leave no room within the "
                f"longest trajectory, {limits.max_length}: raise rollout.max_prompt_tokens, .max_reply_tokens or "
                ".max_turns",
                "messages",
                "context_length_exceeded",
            )
        if not len(prompt_ids):
            raise Refusal(BAD_REQUEST, "messages: they render to no token", "messages")
        sampled = sum(len(turn.completion.token_ids) for turn in turns)
        return Placed(
            request, conversation, rendered, text, given, prompt_ids, min(request.max_tokens, room), sampled, why
        )

    def _find(self, request: ChatRequest) -> tuple[Conversation, list[dict[str, Any]], str, str]:
        """The longest conversation that ``request`` goes on with, or a new one: (it, rendered, text, why new)."""
        whys: list[str] = []
        for begun in sorted(self._begun, key=lambda c: len(c.messages), reverse=True):
            known = len(begun.messages)
            if request.messages[:known] != begun.messages:
                whys.append(_edited(begun, request))
                continue
            rendered = begun.rendered + [message.for_template() for message in request.messages[known:]]
            text = self._template.render(rendered, request.tools)
            if text.startswith(begun.text):
                return begun, rendered, text, ""
            whys.append(f"the chat template renders the history otherwise where it was {_parting(begun.text, text)!r}")
        rendered = [message.for_template() for message in request.messages]
        return Conversation(), rendered, self._template.render(rendered, request.tools), whys[0] if whys else ""

    def answer(self, placed: Placed, completion: Completion, number: str, model: str) -> Reply:
        """What the agent gets for ``completion``; changes nothing. ``number`` makes ids of it."""
        ids = completion.token_ids
        ended = completion.finish_reason == "stop"
        sampled, end = (ids[:-1], ids[-1:]) if ended else (ids, ids[:0])
        seen = self._template.decode(sampled, special=False)
        content, calls = split_calls(seen) if placed.request.tools else (seen, ())
        message = Message("assistant", content, calls)
        finish = "tool_calls" if calls else completion.finish_reason
        answer = Answer(
            id=f"chatcmpl-{number}",
            created=int(datetime.now(UTC).timestamp()),
            model=model,
            version=int(completion.versions[-1]),
            message=message,
            finish=finish,
            prompt_tokens=len(placed.prompt_ids),
            completion_tokens=len(ids),
            cached_tokens=completion.cached_tokens,
            tokens=self._tokens(completion, len(sampled), placed.request.top_logprobs)
            if placed.request.logprobs
            else None,
        )
        stream = placed.request.stream
        return Reply(
            body=answer_events(answer, placed.request.include_usage) if stream else answer_body(answer),
            content_type="text/event-stream" if stream else "application/json",
            turn=Turn(placed.given, completion, fresh=self._is_fresh(placed.conversation)),
            message=message,
            raw=self._template.decode(sampled, special=True),
            end=self._template.decode(end, special=True) if ended else "",
        )

    def _is_fresh(self, conversation: Conversation) -> bool:
        return not conversation.turns and bool(self._begun)

    def _tokens(self, completion: Completion, count: int, top: int) -> list[TokenInfo]:
        """The first ``count`` tokens with their ``top`` alternatives each."""
        texts = self._template.tokens(completion.token_ids[:count])
        others = self._template.tokens(completion.topk_ids[:count, :top].reshape(-1))
        top_logprobs = completion.topk_logprobs[:count, :top].tolist()
        return [
            TokenInfo(text, logprob, list(zip(others[i * top : (i + 1) * top], top_logprobs[i], strict=True)))
            for i, (text, logprob) in enumerate(zip(texts, completion.logprobs[:count].tolist(), strict=True))
        ]

    def take(self, placed: Placed, reply: Reply) -> None:
        """The agent has its answer: a turn."""
        conversation = placed.conversation
        if not conversation.turns:
            self._begun.append(conversation)
        conversation.messages = (*placed.request.messages, reply.message)
        conversation.rendered = [*placed.rendered, {"role": "assistant", "content": reply.raw}]
        conversation.text = placed.text + reply.raw + reply.end
        conversation.turns.append(reply.turn)


def _edited(begun: Conversation, request: ChatRequest) -> str:
    """Where ``request`` leaves what was recorded."""
    pairs = zip(begun.messages, request.messages, strict=False)
    index = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(request.messages))
    return f"messages[{index}] is not what was recorded" if index < len(request.messages) else "messages are missing"


def _parting(recorded: str, rendered: str) -> str:
    """What ``recorded`` says where ``rendered`` first differs."""
    a, b = np.frombuffer(recorded.encode(), np.uint8), np.frombuffer(rendered.encode(), np.uint8)
    shorter = min(len(a), len(b))
    differ = np.flatnonzero(a[:shorter] != b[:shorter])
    start = int(differ[0]) if len(differ) else shorter
    return a[start : start + SHOWN].tobytes().decode(errors="replace")
