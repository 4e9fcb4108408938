"""Agents that use the real openai client, against the embedded engine: what they cause is what is trained."""

import asyncio
import functools
import json
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import openai
import pytest

from actor.outbox import pack
from actor.tasks.agent import AgentSession, AgentTask, run_command
from common import wire
from common.errors import ConfigError, TaskError
from tests.chatml import make_chat_model
from tests.integration import agents
from tests.integration.fleet import Fleet
from tests.integration.table import Table

END = 2
HELLO = [{"role": "user", "content": "hello how are you"}]
CHANNELS = {"correct", "prefix"}
ROOM = 131_072 - len('CROUPIER_QUESTION={"text": ""}') - 1  # characters of a text that a command can be handed
FUNCTION = {"agent": "tests.integration.agents:seated"}
WEATHER = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return make_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(f'{{"text": "hello {n}", "n": {n}}}\n' for n in range(6)))
    return str(file)


@pytest.fixture
def table(chat_model, questions):
    with Table(chat_model, questions, FUNCTION) as table:
        yield table
    assert table.error is None


def client_of(session, kind=openai.OpenAI, **more):
    return kind(base_url=session.base_url, api_key=session.api_key, **{"max_retries": 0, **more})


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def end(table, verdict, count=1):
    verdict.put({"correct": 1.0})
    table.wait(lambda t: len(t.finished) == count)
    return table.finished[-1]


def test_a_conversation_is_recorded_as_it_was_sampled(table):
    session, verdict = table.sit()
    assert session.question["text"].startswith("hello") and session.split == "train"
    messages = list(HELLO)
    with client_of(session) as client:
        assert [model.id for model in client.models.list()] == [Path(table.config.model.path).name]
        for turn in range(4):
            answer = client.chat.completions.create(model="m", messages=messages, temperature=1.0, logprobs=True)
            completion = table.engine.sampled[turn]
            told = [token.logprob for token in answer.choices[0].logprobs.content]
            assert told == pytest.approx(completion.logprobs[: len(told)].tolist())
            assert answer.choices[0].finish_reason == completion.finish_reason
            assert answer.usage.completion_tokens == len(completion.token_ids)
            messages += [answer.choices[0].message, {"role": "user", "content": f"and {turn}"}]
        with pytest.raises(openai.BadRequestError, match=r"rollout\.max_turns"):
            client.chat.completions.create(model="m", messages=messages)
    done = end(table, verdict)
    sampled, asked = table.engine.sampled, table.engine.asked
    assert len(sampled) == len(done.turns) == 4
    assert {c.finish_reason for c in sampled} == {"stop", "length"}  # both ways of ending a turn
    exact = np.zeros(0, np.int32)
    for turn, completion, request in zip(done.turns, sampled, asked, strict=True):
        assert turn.completion is completion and not turn.fresh
        exact = np.concatenate([exact, turn.given])
        assert np.array_equal(request.prompt_ids, exact)
        exact = np.concatenate([exact, completion.token_ids])
    message = pack("r", ("correct",), [done])
    assert np.array_equal(message.token_ids, exact)
    assert np.array_equal(message.token_ids[message.trainable == 1], np.concatenate([c.token_ids for c in sampled]))
    assert message.faults(320, 0) == {}
    assert table.counters["segments"] == 0 and table.counters["tokens"] == len(
        message.token_ids[message.trainable == 1]
    )
    assert [request.first_token for request in asked] == np.cumsum(
        [0, *[len(c.token_ids) for c in sampled[:3]]]
    ).tolist()


def test_streams_say_the_same(table):
    session, verdict = table.sit()
    with client_of(session) as client:
        stream = client.chat.completions.create(
            model="m", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert chunks[-1].usage.completion_tokens == len(table.engine.sampled[0].token_ids)
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == table.engine.sampled[0].finish_reason
        messages = [*HELLO, {"role": "assistant", "content": text}, *HELLO]
        client.chat.completions.create(model="m", messages=messages)  # goes on where the stream ended
    done = end(table, verdict)
    assert [turn.fresh for turn in done.turns] == [False, False]


def test_async_agents_may_talk_at_once_and_edit_their_history(table):
    session, verdict = table.sit()

    async def talk():
        async with client_of(session, openai.AsyncOpenAI) as client:
            both = await asyncio.gather(
                *(client.chat.completions.create(model="m", messages=[*HELLO, *HELLO[:n]]) for n in range(2))
            )
            answer = both[0].choices[0].message.content
            changed = [*HELLO, {"role": "assistant", "content": f"{answer}!"}, *HELLO]
            await client.chat.completions.create(model="m", messages=changed)

    asyncio.run(talk())
    done = end(table, verdict)
    assert [turn.fresh for turn in done.turns] == [False, True, True]
    table.wait(lambda t: t.counters["segments"] == 2)
    message = pack("r", ("correct",), [done])
    assert (message.trainable == wire.STARTS).sum() == 2 and message.faults(320, 0) == {}


@pytest.mark.parametrize(
    "more", [{"temperature": 0.7}, {"top_p": 0.5}, {"n": 2}, {"stop": "x"}, {"seed": 1}, {"max_tokens": 13}]
)
def test_the_client_is_told_what_is_refused(table, more):
    session, verdict = table.sit()
    with client_of(session) as client, pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="m", messages=HELLO, **more)
    assert caught.value.param == next(iter(more))
    verdict.put({"correct": 1.0})
    table.wait(lambda t: t.messages)
    assert "made no request" in table.messages[0].reason


def test_what_no_client_library_sends_is_answered_in_openais_shape_too(table):
    session, verdict = table.sit()
    nested = functools.reduce(lambda inner, _: {"a": inner}, range(900), {})
    deep = {"messages": HELLO, "tools": [{**WEATHER[0], "function": {"name": "w", "parameters": nested}}]}
    odd = {"messages": [{**HELLO[0], "name": {"a": 1}}]}
    for status, words, body, headers in (
        (400, "cannot render|leave no room", json.dumps(deep).encode(), {}),  # Python 3.12 renders deeper
        (400, r"messages\[0\]\.name: .* must be a string", json.dumps(odd).encode(), {}),
        (400, "cannot be read|not JSON", b"no gzip at all", {"Content-Encoding": "gzip"}),
        (413, "more than 32 MB", b" " * (33 << 20), {}),
        (401, "belongs to no rollout", b"{}", {"Authorization": "Bearer croupier-0-\xe9"}),
    ):
        sent = {"Authorization": f"Bearer {session.api_key}", "Content-Type": "application/json", **headers}
        request = urllib.request.Request(f"{session.base_url}/chat/completions", body, sent)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=20)
        assert caught.value.code == status
        assert re.search(words, json.loads(caught.value.read())["error"]["message"])
    verdict.put({"correct": 1.0})


def test_what_an_agent_writes_into_its_question_nobody_else_reads(chat_model, questions):
    with Table(chat_model, questions, FUNCTION, group_size=2) as table:
        table.start()
        seats = [agents.SESSIONS.get(timeout=10) for _ in range(2)]
        seats[0][0].question["text"] = "mine"
        assert seats[1][0].question["text"].startswith("hello")
        for session, verdict in seats:
            with client_of(session) as client:
                client.chat.completions.create(model="m", messages=HELLO)
            verdict.put({"correct": 1.0})
        table.wait(lambda t: len(t.finished) == 2)


def test_keys_say_whose_request_it_is(table):
    session, verdict = table.sit()
    wrong = {"none": "x", "forged": session.api_key[:-1] + "!", "another": session.api_key.replace("-0-", "-1-")}
    for key in wrong.values():
        with client_of(session) as client, pytest.raises(openai.AuthenticationError):
            client.with_options(api_key=key).chat.completions.create(model="m", messages=HELLO)
    with client_of(session) as client:
        with pytest.raises(openai.NotFoundError, match="no such route"):
            client.embeddings.create(model="m", input="x")
        client.chat.completions.create(model="m", messages=HELLO)
        end(table, verdict)
        with pytest.raises(openai.APIStatusError, match="is over") as caught:
            client.chat.completions.create(model="m", messages=HELLO)
        assert caught.value.status_code == 410


def test_an_agent_that_goes_away_mid_request_loses_that_turn_only(table):
    session, verdict = table.sit()
    table.paused = True
    with client_of(session) as client:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.1).chat.completions.create(model="m", messages=HELLO)
        table.paused = False
        answer = client.chat.completions.create(model="m", messages=HELLO).choices[0].message
        client.chat.completions.create(model="m", messages=[*HELLO, answer, *HELLO])
    done = end(table, verdict)
    assert len(table.engine.sampled) == 3
    assert np.array_equal(table.engine.sampled[0].token_ids, table.engine.sampled[1].token_ids)  # the same noise
    assert [turn.completion for turn in done.turns] == table.engine.sampled[1:]
    assert not any(turn.fresh for turn in done.turns)


def test_an_agent_that_ends_mid_request_leaves_nothing_behind(table):
    session, verdict = table.sit()
    with client_of(session) as client:
        client.chat.completions.create(model="m", messages=HELLO)
        table.paused = True
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.05).chat.completions.create(model="m", messages=HELLO)
    done = end(table, verdict)
    assert len(done.turns) == 1
    table.paused = False
    table.wait(lambda t: t.engine.in_flight == 0)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (ValueError("oh no"), "ValueError: oh no (agents.py:"),
        (SystemExit(3), "SystemExit: 3"),
        ({"correct": float("nan")}, "not finite"),
        ({"correct": 1e39}, "not finite (float32)"),
        ({"correct": 10**400}, "not finite (float32)"),
        ({"correct": "good"}, "no number"),
        ({"corect": 1.0}, "wanted"),
        (None, "wanted"),
    ],
)
def test_what_an_agent_breaks_costs_its_sibling(chat_model, questions, result, words):
    with Table(chat_model, questions, FUNCTION, group_size=2) as table:
        table.start()
        seats = [agents.SESSIONS.get(timeout=10) for _ in range(2)]
        for session, _ in seats:
            with client_of(session) as client:
                client.chat.completions.create(model="m", messages=HELLO)
        seats[0][1].put(result)
        seats[1][1].put({"correct": 1.0})
        table.wait(lambda t: t.finished and t.messages)
    assert words in table.messages[0].reason
    assert table.counters["agent_failures"] == 1 and len(table.finished) == 1
    assert {table.messages[0].sibling, table.finished[0].sibling} == {0, 1}


def test_spare_siblings_are_told_that_it_is_over(chat_model, questions):
    with Table(chat_model, questions, {**FUNCTION, "workers": 2}, group_size=1, oversample=3.0) as table:
        table.start()
        (first, verdict), (second, other) = (agents.SESSIONS.get(timeout=10) for _ in range(2))
        with client_of(first) as client:
            client.chat.completions.create(model="m", messages=HELLO)
        end(table, verdict)
        with client_of(second) as client, pytest.raises(openai.APIStatusError, match="rollout is over"):
            client.chat.completions.create(model="m", messages=HELLO)
        other.put({"correct": 1.0})
        table.wait(lambda t: not t.play.waits_for_agents)
    assert len(table.finished) == 1 and not table.messages and table.counters["cancelled"] == 2
    assert agents.SESSIONS.empty()  # the third never began


def test_an_evaluation_is_played_the_same_way(chat_model, questions):
    with Table(chat_model, questions, FUNCTION, evaluation=2) as table:
        table.commands.put(lambda: table.play.start_evaluation(0, 2))
        for number in range(2):
            session, verdict = agents.SESSIONS.get(timeout=10)
            assert session.split == "heldout" and session.question["n"] == 4 + number
            with client_of(session) as client:
                for temperature in (1.0, 0.5):
                    client.chat.completions.create(model="m", messages=HELLO, temperature=temperature)
            verdict.put({"correct": float(number)})
        table.wait(lambda t: t.messages)
    result = table.messages[0]
    assert result.rewards.tolist() == [0.0, 1.0] and (result.lengths > 0).all() and not table.finished
    assert {request.temperature for request in table.engine.asked} == {0.5}


@pytest.mark.parametrize("way", ["async", "command", "function"])
def test_late_agents_fail_as_the_environments_fault(chat_model, questions, tmp_path, way):
    note = tmp_path / "pid"
    params = {
        "async": {"agent": "tests.integration.agents:sleeper"},
        "function": {"agent": "tests.integration.agents:stubborn", "workers": 1},
        "command": {"command": ["sh", "-c", f"sleep 60 & echo $! > {note}; wait"]},
    }[way]
    deadline_s = 2.0 if way == "command" else 0.3  # its note is to be there by then
    with Table(chat_model, questions, {**params, "deadline_s": deadline_s}) as table:
        table.start()
        table.wait(lambda t: t.messages)
        assert "deadline_s" in table.messages[0].reason and table.messages[0].sibling == 0
        if way == "function":
            table.wait(lambda t: t.error is not None)
            assert "task.params.command" in str(table.error)
        elif way == "command":
            left = int(note.read_text())
            table.wait(lambda t: not is_alive(left))
    assert table.counters["agent_failures"] == 1


def test_commands_are_run_with_the_session_in_their_environment(chat_model, questions):
    command = [sys.executable, "-m", "tests.integration.agents"]
    with Table(chat_model, questions, {"command": [*command, "play"]}) as table:
        table.start()
        table.wait(lambda t: t.finished)
        assert len(table.finished[0].turns) == 2
    for word, reason in (("fail", "exit code 1: the environment broke"), ("chatter", "no JSON on its last line")):
        with Table(chat_model, questions, {"command": [*command, word]}) as table:
            table.start()
            table.wait(lambda t: t.messages)
            assert reason in table.messages[0].reason


@pytest.mark.parametrize("leaves", ["sleep 60", "setsid sleep 3"])  # of its group, and of a group of its own
def test_a_command_has_ended_whatever_holds_its_pipe(leaves):
    async def play():
        command = ["bash", "-c", f"{leaves} & echo '{{\"correct\": 1}}'"]
        return await asyncio.wait_for(run_command(command, AgentSession("http://x", "k", {}, "train")), 2.5)

    assert asyncio.run(play()) == {"correct": 1}


def test_a_command_is_handed_the_longest_question_that_is_taken(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({"text": "x" * ROOM}) + "\n")
    command = [sys.executable, "-c", f"import os; print(len(os.environ['CROUPIER_QUESTION']) > {ROOM})"]
    task = AgentTask(0, {"command": command, "questions": str(file)})
    session = AgentSession("http://x", "k", task.prompt(0, "train").reference, "train")
    with pytest.raises(TaskError, match="printed no JSON on its last line: 'True'"):
        asyncio.run(run_command(command, session))


def test_questions_may_hold_what_unicode_calls_the_end_of_a_line(tmp_path):
    file, texts = tmp_path / "q.jsonl", ["plain", "two\u2028lines", "end\x85"]
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    task = AgentTask(0, {**FUNCTION, "questions": str(file)})
    assert sorted(task.prompt(i, "train").reference["text"] for i in range(3)) == sorted(texts)


def test_tools_are_offered_and_their_answers_go_on(table):
    session, verdict = table.sit()
    with client_of(session) as client:
        answer = client.chat.completions.create(model="m", messages=HELLO, tools=WEATHER).choices[0].message
        client.chat.completions.create(
            model="m", tools=WEATHER,
            messages=[*HELLO, answer.model_dump(), {"role": "tool", "tool_call_id": "x", "content": "sunny"}],
        )  # fmt: skip
    assert not any(turn.fresh for turn in end(table, verdict).turns)


def test_whatever_agents_do_each_place_is_filled_once_with_what_was_sampled(chat_model, questions):
    groups, wanted = range(30), 3
    params = {"agent": "tests.integration.agents:wild", "workers": 8, "deadline_s": 1.0}
    with Table(chat_model, questions, params, group_size=wanted, oversample=1.5) as table:
        for group in groups:
            table.start(group, group)
        table.wait(lambda t: t.play.rollouts.request_ids() == set() and len(t.messages + t.finished) >= 30, 30)
        table.wait(lambda t: not t.play.waits_for_agents and t.engine.in_flight == 0)
    places = [(one.group, one.sibling) for one in [*table.finished, *table.messages]]
    assert sorted(places) == [(group, sibling) for group in groups for sibling in range(wanted)]
    assert {True, False} == {turn.fresh for one in table.finished for turn in one.turns} and table.messages
    asked = {id(completion): request for request, completion in table.engine.pairs()}
    for one in table.finished:
        exact = np.zeros(0, np.int32)
        for turn in one.turns:
            exact = np.concatenate([exact[: 0 if turn.fresh else None], turn.given])
            assert np.array_equal(asked[id(turn.completion)].prompt_ids, exact)
            exact = np.concatenate([exact, turn.completion.token_ids])
    message = pack("r", ("correct",), table.finished)
    assert message.faults(320, 0) == {}
    assert np.diff(message.cu_seqlens).max() <= table.config.rollout.max_length


@pytest.mark.slow
def test_a_run_trains_on_what_agents_caused(chat_model, questions, tmp_path):
    overrides = [
        "run.steps=3", "task.name=agent", "task.params.agent=tests.integration.agents:openai_turns",
        f"task.params.questions={questions}", "task.params.heldout=2", "task.params.channels=[correct, prefix]",
        "task.params.workers=8", "rollout.groups_per_step=2", "rollout.max_turns=2", "rollout.max_prompt_tokens=60",
        "rollout.max_reply_tokens=60", "evaluation.prompts=2", "evaluation.every=3", "actor.count=1",
    ]  # fmt: skip
    parts = ("broker", "learner", "replica-0", "actor-0")
    with Fleet(tmp_path, chat_model, *overrides) as fleet:
        for part in parts:
            fleet.start(part)
        assert [fleet.wait(part) for part in parts] == [0] * 4, fleet.words()
        steps, status = fleet.steps(), fleet.status()
        log = fleet.log("actor-0").read_text()
        assert "begins a new segment: messages[1] is not what was recorded" in log and "segments" in log
    assert status["trajectories_trained"] == status["trajectories_acked"] == 3 * 8
    assert not status["trajectories_refused"] and not status["trajectories_dropped"]
    assert [e["version"] for e in status["evaluations"]] == [0, 3] and set(steps[0]["reward_channels"]) == CHANNELS
    # The replica, which reads each segment alone, finds the very probabilities that the actor sampled with.
    assert steps[0]["lag_max"] == 0 and abs(steps[0]["kl_before"]) < 1e-6 and steps[0]["ess"] > 1 - 1e-6


def test_settings_that_do_not_fit_are_refused_at_once(chat_model, questions, tmp_path, monkeypatch):
    def refused(words, params, error=TaskError, **more):
        with pytest.raises(error, match=words):
            Table(chat_model, params.pop("questions", questions), params, **more)

    refused("package.module:function", {})
    refused("package.module:function", {"agent": "tests.integration.agents:none"})
    refused("package.module:function", {"agent": "tests.integration.agents"})
    refused(r"No module named 'agnets'; put its directory on PYTHONPATH", {"agent": "agnets:play"})
    refused("package.module:function", {"agent": ".agents:play"})
    (tmp_path / "lacking_agent.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    refused(r"lacking_agent imports no_such_package, .* install it", {"agent": "lacking_agent:play"})
    refused(r"none\.jsonl: no such file in /.*started", {**FUNCTION, "questions": "none.jsonl"})
    refused("list of words", {"command": "ls"})
    refused("none to train on", {**FUNCTION, "heldout": 6})
    refused(r"evaluation\.prompts", dict(FUNCTION), ConfigError, evaluation=3)
    refused("no such parameter", {**FUNCTION, "deadline": 3})
    refused("at least", {**FUNCTION, "workers": 0})
    refused("from 0 to 65535", {**FUNCTION, "port": 65536})
    refused("list of names", {**FUNCTION, "channels": "correct"})
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"a": 1}\n[2]\n')
    refused(r"bad\.jsonl:2: must be", {**FUNCTION, "questions": str(bad)})
    refused(r"command=\['no_such_program'\]: no program 'no_such_program' to run", {"command": ["no_such_program"]})
    refused(r"no program '\./none\.sh' to run, seen from /", {"command": ["./none.sh"]})
    for row, words in (
        ('{"n": ' + "9" * 5000 + "}", "not JSON: .*4300"), ('{"text": "\\ud83d"}', "holds half a character"),
        (json.dumps({"text": "x" * (ROOM + 1)}), "takes 131073 bytes of .* where 131072 have room"),
    ):  # fmt: skip
        bad.write_text(f'{{"a": 1}}\n\n{row}\n')
        refused(rf"bad\.jsonl:3: {words}", {"command": ["true"], "questions": str(bad)})
    assert AgentTask(0, {**FUNCTION, "questions": str(bad)}).questions == 2  # a function is handed any length
    with Table(chat_model, questions, FUNCTION) as table:
        port = int(table.play._driver._gateway.url.rpartition(":")[2].partition("/")[0])
        refused(r"task\.params\.port", {**FUNCTION, "port": port}, ConfigError)
