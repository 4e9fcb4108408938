"""Conversations as messages, text and ids: what is kept exactly, what begins a segment, what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actor.engine.base import Completion
from actor.gateway.chat import Call, Limits, Refusal, read_request
from actor.gateway.conversation import Conversations, Placed
from actor.gateway.template import ChatTemplate, split_calls
from actor.tasks.sort6 import write_tokenizer
from common.errors import TaskError
from tests.chatml import TEMPLATE, make_tokenizer

LIMITS = Limits(temperatures=(1.0,), max_tokens=8, max_turns=4, max_length=400, top_logprobs=2)
END, START, TEXT_END = 2, 1, 0
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def template(directory: Path) -> ChatTemplate:
    return ChatTemplate(str(directory))


def body(messages: Any, **more: Any) -> bytes:
    return json.dumps({"model": "m", "messages": messages, **more}).encode()


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def completion(ids: Any, reason: Any = "stop") -> Completion:
    ids = np.array(ids, np.int32)
    n = len(ids)
    return Completion(
        request_id=0, sibling=0, token_ids=ids, logprobs=-np.arange(n, dtype=np.float32), finish_reason=reason,
        versions=np.full(n, 3, np.int32), topk_ids=np.tile(ids[:, None], (1, 2)),
        topk_logprobs=np.full((n, 2), -0.5, np.float32), experts=np.zeros((0, 0), np.uint16),
    )  # fmt: skip


def say(talk: Conversations, messages: Any, sampled: Completion, **more: Any) -> tuple[Placed, dict[str, Any]]:
    """One turn; returns where it was placed and the message that the agent got."""
    placed = talk.read(body(messages, **more))
    reply = talk.answer(placed, sampled, "0-0", "m")
    talk.take(placed, reply)
    return placed, json.loads(reply.body)["choices"][0]["message"]


def test_ids_are_kept_and_the_end_token_is_neither_doubled_nor_lost(template: ChatTemplate) -> None:
    talk = Conversations(template, LIMITS)
    letters = [template.encode(c)[0] for c in "hello"]  # not how the tokenizer spells it
    assert len(template.encode("hello")) < 5
    first, answer = say(talk, [user("hello")], completion([*letters, END]))
    assert answer == {"role": "assistant", "content": "hello"}
    messages = [user("hello"), answer, user("how are you")]
    second, answer = say(talk, messages, completion(letters, "length"))
    new = template.encode("\n<|im_start|>user\nhow are you<|im_end|>\n<|im_start|>assistant\n")
    assert second.given.tolist() == new.tolist()
    assert second.prompt_ids.tolist() == [*first.prompt_ids, *letters, END, *new]
    third, _ = say(talk, [*messages, answer, user("sunny")], completion([END]))  # the second was cut: given the end
    assert third.given[0] == END
    assert third.prompt_ids.tolist() == [*second.prompt_ids, *letters, *third.given]
    whole = template.render([*messages, {**answer, "content": "hello"}, user("sunny")], [])
    assert template.decode(third.prompt_ids, special=True) == whole
    assert [turn.fresh for turn in talk.turns] == [False] * 3


@settings(max_examples=25)
@given(
    turns=st.lists(
        st.tuples(st.text(max_size=6), st.lists(st.integers(0, 319), min_size=1, max_size=8), st.booleans()),
        min_size=1, max_size=4,
    )
)  # fmt: skip
def test_faithful_agents_stay_in_one_segment_whatever_was_sampled(
    template: ChatTemplate, turns: list[tuple[str, list[int], bool]]
) -> None:
    talk = Conversations(template, LIMITS)
    messages: list[dict[str, Any]] = []
    exact: list[int] = []
    for said, ids, ends in turns:
        sampled = completion([*ids[:7], END], "stop") if ends else completion(ids, "length")
        messages.append(user(said))
        placed, answer = say(talk, messages, sampled)
        assert placed.prompt_ids[: len(exact)].tolist() == exact
        messages.append(answer)
        exact = [*placed.prompt_ids.tolist(), *sampled.token_ids.tolist()]
    assert not any(turn.fresh for turn in talk.turns)


@pytest.mark.parametrize("change", ["edited", "dropped", "tools", "reasoning", "other end"])
def test_what_does_not_go_on_begins_a_segment_with_everything_rendered(template: ChatTemplate, change: str) -> None:
    talk = Conversations(template, LIMITS)
    text = "a</think>b" if change == "reasoning" else "sunny"
    end = TEXT_END if change == "other end" else END
    _, answer = say(talk, [user("hello"), user("you")], completion([*template.encode(text), end]))
    messages: list[dict[str, Any]] = [user("hello"), user("you"), answer, user("more")]
    if change == "edited":
        messages[2] = {"role": "assistant", "content": "rainy"}
    elif change == "dropped":
        del messages[0]
    placed, _ = say(talk, messages, completion([END]), **({"tools": TOOLS} if change == "tools" else {}))
    assert placed.why and len(placed.conversation.turns) == 1
    rendered = template.render(messages, TOOLS if change == "tools" else [])
    assert template.decode(placed.prompt_ids, special=True) == rendered
    assert placed.prompt_ids.tolist() == placed.given.tolist() == template.encode(rendered).tolist()
    assert [turn.fresh for turn in talk.turns] == [False, True]
    assert {"edited": "messages[2]", "dropped": "messages[0]"}.get(change, "template") in placed.why


def test_conversations_of_one_rollout_may_interleave(template: ChatTemplate) -> None:
    talk = Conversations(template, LIMITS)
    a, answer_a = say(talk, [user("a")], completion([40, END]))
    b, answer_b = say(talk, [user("b")], completion([41, END]))
    more_a, _ = say(talk, [user("a"), answer_a, user("c")], completion([42, END]))
    more_b, _ = say(talk, [user("b"), answer_b, user("c")], completion([43, END]))
    assert more_a.prompt_ids[: len(a.prompt_ids) + 2].tolist() == [*a.prompt_ids, 40, END]
    assert more_b.prompt_ids[: len(b.prompt_ids) + 2].tolist() == [*b.prompt_ids, 41, END]
    assert [turn.completion.token_ids[0] for turn in talk.turns] == [40, 42, 41, 43]
    assert [turn.fresh for turn in talk.turns] == [False, False, True, False]
    assert more_b.first_token == 6  # the noise goes on behind everything sampled


def test_the_longest_conversation_that_fits_goes_on(template: ChatTemplate) -> None:
    talk = Conversations(template, LIMITS)
    _, answer = say(talk, [user("a")], completion([40, END]))
    longer, again = say(talk, [user("a"), answer, user("b")], completion([40, END]))
    say(talk, [user("a")], completion([40, END]))  # the same answer a second time
    placed, _ = say(talk, [user("a"), answer, user("b"), again, user("c")], completion([END]))
    assert placed.conversation is longer.conversation


def test_tool_calls_come_back_structured_and_go_on_exactly(template: ChatTemplate) -> None:
    talk = Conversations(template, LIMITS)
    raw = 'see <tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    first, answer = say(talk, [user("hello")], completion([*template.encode(raw), END]), tools=TOOLS)
    call = answer["tool_calls"][0]
    assert answer["content"] == "see"
    assert call["function"] == {"name": "weather", "arguments": '{"city":"Paris"}'}
    echoed = {**answer, "content": "see", "refusal": None}
    echoed["tool_calls"][0]["function"]["arguments"] = '{"city": "Paris"}'  # another spelling of the same
    result = {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}
    second, _ = say(talk, [user("hello"), echoed, result], completion([END]), tools=TOOLS)
    assert second.prompt_ids[: len(first.prompt_ids)].tolist() == first.prompt_ids.tolist()
    assert "<tool_response>sunny" in template.decode(second.given, special=True)
    assert not second.why


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("plain", "plain", ()),
        ('<tool_call>{"name":"f","arguments":{}}</tool_call>', "", (Call("f", {}),)),
        ('a<tool_call>{"name":"f"}</tool_call> b', "a b", (Call("f", {}),)),
        ("<tool_call>{nonsense}</tool_call>", "<tool_call>{nonsense}</tool_call>", ()),
        ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", ()),
        ('<tool_call>{"name":"f","arguments":3}</tool_call>', '<tool_call>{"name":"f","arguments":3}</tool_call>', ()),
        ('<tool_call>{"name":"f"}', '<tool_call>{"name":"f"}', ()),
    ],
)
def test_what_is_no_call_stays_text(text: str, content: str, calls: tuple[Call, ...]) -> None:
    assert split_calls(text) == (content, calls)


def nested(depth: int) -> str:
    return '<tool_call>{"name":"f","arguments":' + '{"a":' * depth + "1" + "}" * depth + "}</tool_call>"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_nested_too_deep_to_be_told_stays_text(template: ChatTemplate, stream: bool) -> None:
    tokens = completion([*template.encode(nested(300)), END])
    talk = Conversations(template, LIMITS)
    placed = talk.read(body([user("x")], tools=TOOLS, stream=stream))
    reply = talk.answer(placed, tokens, "1", "m")
    assert (reply.message.content, reply.message.calls) == (nested(300), ())
    assert len(split_calls(nested(100))[1]) == 1


def test_calls_stay_text_where_no_tools_were_offered(template: ChatTemplate) -> None:
    raw = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    _, answer = say(Conversations(template, LIMITS), [user("x")], completion([*template.encode(raw), END]))
    assert answer == {"role": "assistant", "content": raw}


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"temperature": 0.5}, "temperature"), ({"top_p": 0.9}, "top_p"), ({"n": 2}, "n"), ({"stop": ["x"]}, "stop"),
        ({"presence_penalty": 0.1}, "presence_penalty"), ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"logit_bias": {"3": 1}}, "logit_bias"), ({"seed": 0}, "seed"), ({"top_k": 5}, "top_k"),
        ({"response_format": {"type": "json_object"}}, "response_format"), ({"tool_choice": "required"}, "tool_choice"),
        ({"max_tokens": 9}, "max_tokens"), ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"temperature": True}, "temperature"), ({"n": True}, "n"), ({"presence_penalty": False}, "presence_penalty"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"), ({"max_tokens": True}, "max_tokens"),
        ({"stream": "yes"}, "stream"), ({"tools": [{}]}, "tools"),
        ({"top_logprobs": 3, "logprobs": True}, "top_logprobs"), ({"top_logprobs": 1}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(more: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as caught:
        read_request(body([user("x")], **more), LIMITS)
    error = json.loads(caught.value.body)["error"]
    assert caught.value.status == 400
    assert error["param"] == param and param in error["message"]


def test_parameters_that_ask_for_nothing_are_taken() -> None:
    neutral = {
        "n": 1, "top_p": 1.0, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "stop": None,
        "seed": None, "temperature": 1, "user": "me", "response_format": {"type": "text"}, "tool_choice": "auto",
        "max_tokens": 8, "max_completion_tokens": 3,
    }  # fmt: skip
    request = read_request(body([user("x")], **neutral), LIMITS)
    assert request.max_tokens == 3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (b"{", "not JSON"), (b"[]", "JSON object"), (body([]), "messages"), (body([{"role": "bot"}]), r"messages\[0\]"),
        (body([{"role": ["user"]}]), r"messages\[0\]: must be an object with a role"), (body(["hi"]), r"messages\[0\]"),
        (body([{"role": "user", "content": [{"type": "image_url"}]}]), "parts of type text"),
        (body([{"role": "user", "content": 3}]), "parts of type text"),
        (body([{"role": "assistant", "tool_calls": [{"id": "x"}]}]), r"tool_calls\[0\]"),
        (body([{"role": "assistant", "reasoning": "hm"}]), r"messages\[0\].reasoning"),
    ],
)  # fmt: skip
def test_messages_that_cannot_be_read_are_refused(given: bytes, words: str) -> None:
    with pytest.raises(Refusal, match=words):
        read_request(given, LIMITS)


def test_parts_of_text_are_joined_and_developers_are_the_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = read_request(body([{"role": "developer", "content": parts}]), LIMITS)
    assert request.messages[0].for_template() == {"role": "system", "content": "ab"}


def test_turns_and_room_end(template: ChatTemplate) -> None:
    talk = Conversations(template, LIMITS)
    for _ in range(4):
        say(talk, [user("a")], completion([40, END]))
    with pytest.raises(Refusal, match=r"rollout\.max_turns"):
        talk.read(body([user("a")]))
    short = Conversations(template, Limits((1.0,), 8, 4, 20, 0))
    placed, _ = say(short, [user("a")], completion([40, END]))
    assert placed.max_tokens == 20 - len(placed.given) < 8 or len(placed.given) <= 12
    with pytest.raises(Refusal, match=r"rollout\.max_prompt_tokens"):
        short.read(body([user("a b c d e f")]))


def test_a_template_that_refuses_is_the_agents_fault(directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "strict.jinja"
    file.write_text("{{ raise_exception('users speak first') }}")
    talk = Conversations(ChatTemplate(str(directory), str(file)), LIMITS)
    with pytest.raises(Refusal, match="users speak first"):
        talk.read(body([user("a")]))


def test_a_tokenizer_without_a_template_needs_one(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    with pytest.raises(TaskError, match=r"task\.params\.chat_template"):
        ChatTemplate(str(tmp_path))
    with pytest.raises(TaskError, match="No such file"):
        ChatTemplate(str(tmp_path), str(tmp_path / "none.jinja"))
    assert "im_start" in TEMPLATE


def test_log_probabilities_are_told_of_what_the_agent_sees(template: ChatTemplate) -> None:
    talk = Conversations(template, LIMITS)
    placed = talk.read(body([user("a")], logprobs=True, top_logprobs=1))
    reply = talk.answer(placed, completion([*template.encode("hi"), END]), "0-0", "m")
    told = json.loads(reply.body)["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in told) == "hi"
    assert [entry["logprob"] for entry in told] == [-float(i) for i in range(len(told))]
    assert all(len(entry["top_logprobs"]) == 1 for entry in told)
    assert told[0]["bytes"] == list(told[0]["token"].encode())
