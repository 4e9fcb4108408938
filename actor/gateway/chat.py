"""OpenAI's chat completions: requests read and refused, answers written. Pure.

A parameter that would change the distribution sampled from is refused, because the logged
probabilities must be those of the sampler; so is one that nobody here would honour.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
BAD_REQUEST, UNAUTHORIZED, NOT_FOUND, GONE, TOO_LARGE = 400, 401, 404, 410, 413

# Values of parameters that ask for nothing, beside null. Others are refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "top_p": (1,), "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "stop": ([],),
    "response_format": ({"type": "text"},), "seed": (), "tool_choice": ("auto",), "parallel_tool_calls": (True,),
    "modalities": (["text"],),
}  # fmt: skip
READ = (
    "model", "messages", "tools", "temperature", "max_tokens", "max_completion_tokens", "stream", "stream_options",
    "logprobs", "top_logprobs",
)  # fmt: skip
WITHOUT_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
REMEDIES = {
    "n": "send one request for each completion",
    "seed": "run.seed, group and sibling decide the samples",
    "stop": "the model's own end token ends a turn",
    "tool_choice": "leave tools out to have none called",
}
REMEDY = "the logged probabilities must be those of rollout.temperature alone; leave it out"


class Refusal(Exception):
    """A request that is answered with ``status`` and OpenAI's error object."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = orjson.dumps(
            {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}
        )


@dataclass(frozen=True)
class Call:
    """A tool call."""

    name: str
    arguments: Any  # as JSON reads them; text that is no JSON stays text


@dataclass(frozen=True)
class Message:
    """One message, in the form in which two of them are compared."""

    role: str
    content: str = ""
    calls: tuple[Call, ...] = ()  # of an assistant
    name: str = ""
    call_id: str = ""  # which call a tool's message answers

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it."""
        out: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.calls:
            functions = [{"name": call.name, "arguments": call.arguments} for call in self.calls]
            out["tool_calls"] = [{"type": "function", "function": function} for function in functions]
        if self.name:
            out["name"] = self.name
        if self.call_id:
            out["tool_call_id"] = self.call_id
        return out


@dataclass(frozen=True)
class Limits:
    """What the run allows one rollout."""

    temperatures: tuple[float, ...]  # that a request may name; the split decides which is used
    max_tokens: int  # of a completion
    max_turns: int
    max_length: int  # tokens of all turns
    top_logprobs: int


@dataclass(frozen=True)
class ChatRequest:
    """A request that can be honoured."""

    messages: tuple[Message, ...]
    tools: list[dict[str, Any]] = field(default_factory=list)
    max_tokens: int = 1
    stream: bool = False
    include_usage: bool = False  # in a stream
    logprobs: bool = False
    top_logprobs: int = 0


@dataclass(frozen=True)
class TokenInfo:
    """A sampled token and its likeliest alternatives."""

    text: str
    logprob: float
    top: list[tuple[str, float]]


@dataclass(frozen=True)
class Answer:
    """A completion as the agent sees it."""

    id: str
    created: int  # seconds since 1970
    model: str
    version: int  # of the weights that sampled the last token
    message: Message
    finish: str  # "stop" | "length" | "tool_calls"
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    tokens: list[TokenInfo] | None  # None: not asked for


# ---- requests -----------------------------------------------------------------------------------


def read_request(body: bytes, limits: Limits) -> ChatRequest:
    """Raises Refusal, naming the parameter and the remedy, for what cannot be honoured."""
    given = _json(body)
    for name, value in given.items():
        if value is not None:
            _check_parameter(name, value)
    _check_temperature(given.get("temperature"), limits)
    stream = _flag(given, "stream")
    options = given.get("stream_options") or {}
    if not isinstance(options, dict) or (options and not stream):
        raise _bad("stream_options", "belongs to stream=true and must be an object")
    top = _whole(given, "top_logprobs", 0, 0, limits.top_logprobs, "rollout.top_logprobs")
    logprobs = _flag(given, "logprobs")
    if top and not logprobs:
        raise _bad("top_logprobs", "needs logprobs=true")
    counts = [
        _whole(given, name, limits.max_tokens, 1, limits.max_tokens, "rollout.max_tokens")
        for name in ("max_tokens", "max_completion_tokens")
    ]
    return ChatRequest(
        messages=_messages(given.get("messages")),
        tools=_tools(given.get("tools")),
        max_tokens=min(counts),
        stream=stream,
        include_usage=bool(options.get("include_usage")),
        logprobs=logprobs,
        top_logprobs=top,
    )


def _bad(param: str, message: str, code: str | None = None) -> Refusal:
    return Refusal(BAD_REQUEST, f"{param}: {message}", param, code)


def _json(body: bytes) -> dict[str, Any]:
    try:
        given = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refusal(BAD_REQUEST, f"the body is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise Refusal(BAD_REQUEST, "the body must be a JSON object")
    return given


def _check_parameter(name: str, value: Any) -> None:
    if name in READ or name in WITHOUT_EFFECT:
        return
    if name not in NEUTRAL:
        raise _bad(name, f"this gateway does not know it; {REMEDY}", "unsupported_parameter")
    if not any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in NEUTRAL[name]):
        raise _bad(name, f"{_brief(value)} cannot be honoured: {REMEDIES.get(name, REMEDY)}", "unsupported_value")


def _check_temperature(value: Any, limits: Limits) -> None:
    if value is not None and (isinstance(value, bool) or value not in limits.temperatures):
        used = limits.temperatures[0]
        text = f"{_brief(value)}, but rollout.temperature={used} samples; leave it out or change the run's setting"
        raise _bad("temperature", text, "unsupported_value")


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name) or False
    if not isinstance(value, bool):
        raise _bad(name, f"{_brief(value)} must be true or false")
    return value


def _whole(given: Mapping[str, Any], name: str, default: int, low: int, high: int, setting: str) -> int:
    value = given.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _bad(name, f"{_brief(value)} must be a whole number in [{low}, {setting}={high}]")
    return value


def _brief(value: Any) -> str:
    return repr(value)[:60]


def _messages(given: Any) -> tuple[Message, ...]:
    if not isinstance(given, list) or not given:
        raise _bad("messages", "must be a list of at least one message")
    return tuple(_message(f"messages[{i}]", message) for i, message in enumerate(given))


def _message(where: str, given: Any) -> Message:
    role = given.get("role") if isinstance(given, dict) else None
    if not isinstance(role, str) or role not in ROLES:
        raise _bad(where, f"must be an object with a role among {', '.join(ROLES)}")
    for key, value in given.items():
        if value and key not in ("role", "content", "tool_calls", "name", "tool_call_id"):
            raise _bad(f"{where}.{key}", "this gateway does not know it; leave it out")
    calls = given.get("tool_calls") or []
    if not isinstance(calls, list):
        raise _bad(f"{where}.tool_calls", "must be a list")
    return Message(
        role=ROLES[role],
        content=_content(f"{where}.content", given.get("content")),
        calls=tuple(_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls)),
        name=_text(where, given, "name"),
        call_id=_text(where, given, "tool_call_id"),
    )


def _text(where: str, given: Mapping[str, Any], key: str) -> str:
    value = given.get(key) or ""
    if not isinstance(value, str):
        raise _bad(f"{where}.{key}", f"{_brief(value)} must be a string")
    return value


def _content(where: str, given: Any) -> str:
    if given is None or isinstance(given, str):
        return given or ""
    parts: list[Any] = given if isinstance(given, list) else [None]
    if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
        raise _bad(where, "must be text, or a list of parts of type text")
    return "".join(part["text"] for part in parts)


def _call(where: str, given: Any) -> Call:
    function = given.get("function") if isinstance(given, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _bad(where, "must be of type function, with a name")
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments)
        except orjson.JSONDecodeError:
            return Call(function["name"], arguments)
    return Call(function["name"], arguments)


def _tools(given: Any) -> list[dict[str, Any]]:
    tools = given or []
    if not isinstance(tools, list) or not all(
        isinstance(tool, dict) and tool.get("type") == "function" and isinstance(tool.get("function"), dict)
        for tool in tools
    ):
        raise _bad("tools", "must be a list of objects of type function")
    return tools


# ---- answers ------------------------------------------------------------------------------------


def answer_body(answer: Answer) -> bytes:
    """A ``chat.completion`` object."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.message.content or None}
    if answer.message.calls:
        message["tool_calls"] = _calls(answer)
    choice = {"index": 0, "message": message, "logprobs": _logprobs(answer), "finish_reason": answer.finish}
    return orjson.dumps({**_head(answer, "chat.completion"), "choices": [choice], "usage": _usage(answer)})


def answer_events(answer: Answer, include_usage: bool) -> bytes:
    """The same as server-sent events; all content in one chunk, since a turn counts only when it is whole."""
    delta: dict[str, Any] = {"role": "assistant", "content": answer.message.content or None}
    if answer.message.calls:
        delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(_calls(answer))]
    choices: list[dict[str, Any]] = [
        {"index": 0, "delta": delta, "logprobs": _logprobs(answer), "finish_reason": None},
        {"index": 0, "delta": {}, "logprobs": None, "finish_reason": answer.finish},
    ]
    head = _head(answer, "chat.completion.chunk")
    chunks = [{**head, "choices": [choice]} for choice in choices]
    if include_usage:
        chunks = [{**chunk, "usage": None} for chunk in chunks]
        chunks.append({**head, "choices": [], "usage": _usage(answer)})
    return b"".join(b"data: " + orjson.dumps(chunk) + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"


def models_body(model: str) -> bytes:
    """The list of one model."""
    return orjson.dumps(
        {"object": "list", "data": [{"id": model, "object": "model", "created": 0, "owned_by": "croupier"}]}
    )


def _head(answer: Answer, kind: str) -> dict[str, Any]:
    return {
        "id": answer.id,
        "object": kind,
        "created": answer.created,
        "model": answer.model,
        "system_fingerprint": f"version-{answer.version}",
    }


def _calls(answer: Answer) -> list[dict[str, Any]]:
    calls = answer.message.calls
    functions = [{"name": call.name, "arguments": orjson.dumps(call.arguments).decode()} for call in calls]
    return [
        {"id": f"call-{answer.id}-{i}", "type": "function", "function": function}
        for i, function in enumerate(functions)
    ]


def _usage(answer: Answer) -> dict[str, Any]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
    }


def _logprobs(answer: Answer) -> dict[str, Any] | None:
    if answer.tokens is None:
        return None
    content = [{**_token(t.text, t.logprob), "top_logprobs": _tokens(t.top)} for t in answer.tokens]
    return {"content": content, "refusal": None}


def _tokens(pairs: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    return [_token(text, logprob) for text, logprob in pairs]


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
