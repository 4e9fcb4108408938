"""The SGLang engine against servers that lie, stall, vanish or are the wrong ones. No model, real HTTP."""

import asyncio
import json
import logging
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from aiohttp import web
from safetensors.numpy import save_file

from actor.engine.base import Failure, SampleRequest
from actor.engine.direct import DirectReceiver
from actor.engine.push import Version
from actor.engine.server import State
from actor.engine.sglang import MOST_EMPTY, SglangEngine
from actor.service import reporting
from common.config import (
    ActorSection,
    EngineSection,
    ModelSection,
    RolloutSection,
    RunConfig,
    RunSection,
    WeightsSection,
)
from common.errors import EngineError
from common.weights import plan_buckets
from common.wire import Applied, Go, Prepare, Publish, Ready, ReceiveFailed
from tests.integration.fake_sglang import CUT, VOCAB, FakeServer

FAST = {
    "device": "cpu",
    "heartbeat_s": 0.05,
    "server_timeout_s": 0.6,
    "start_timeout_s": 3.0,
    "backoff_s": 0.05,
    "restarts": 2,
}
TENSORS = [["w", "float32", [4]], ["v", "float32", [4]]]
BUCKET_BYTES = 16  # one tensor
EOS = 1


@pytest.fixture
def fakes():
    made = []

    def make(*args, **kwargs):
        made.append(FakeServer(*args, **kwargs))
        return made[-1]

    yield make
    for fake in made:
        fake.close()


@pytest.fixture
def engine_on(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    config = {"vocab_size": VOCAB, "max_position_embeddings": 512, "architectures": ["X"], "eos_token_id": EOS}
    (model / "config.json").write_text(json.dumps(config))
    save_file({name: np.zeros(shape, np.float32) for name, _, shape in TENSORS}, model / "model.safetensors")
    made = []

    def make(*servers, wait=True, rollout=None, weights=None, **engine):
        config = RunConfig(
            run=RunSection(name="r", dir=str(tmp_path)),
            model=ModelSection(path=str(model)),
            rollout=RolloutSection(max_prompt_tokens=64, max_tokens=64, **(rollout or {})),
            actor=ActorSection(count=1, engine="sglang", max_sequences=64),
            weights=weights or WeightsSection(),
            engine=EngineSection(launch=0, addresses=tuple(s.url for s in servers), **{**FAST, **engine}),
        )
        made.append(SglangEngine(config, "a"))
        if wait:
            run(made[-1], lambda: sum(s.state == State.SERVING for s in made[-1].servers) == len(servers))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def run(engine, until, seconds=30.0):
    ended, deadline = [], time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, [(s.name, s.state, s.why) for s in engine.servers]
        ended += engine.step(0.01)
    return ended


def ask(number, samples=2, tokens=6, **more):
    return SampleRequest(number, np.array([3, 4, 5], np.int32), samples, tokens, 1.0, (0, 0), **more)


def drain(engine):
    return run(engine, lambda: not engine.in_flight)


def once(change):
    """Spoil the first answer that is not the probe's."""
    done = []

    def spoil(fields, answer):
        if done or isinstance(answer, list):
            return answer
        done.append(True)
        return change(answer)

    return spoil


def always(change):
    return lambda fields, answer: answer if isinstance(answer, list) else change(answer)


def edited(**meta):
    return lambda answer: {**answer, "meta_info": {**answer["meta_info"], **meta}}


@pytest.mark.parametrize("version", ["0.5.19", "0.5.20", "0.5.23"])
@pytest.mark.parametrize("k", [0, 5])
def test_every_release_gives_the_same_arrays(fakes, engine_on, version, k):
    engine = engine_on(fakes(version=version), update="abort")
    engine.add(ask(1, top_logprobs=k))
    for c in drain(engine):
        assert len(c.token_ids) == 6 and c.topk_ids.shape == c.topk_logprobs.shape == (6, k)
        assert (c.topk_ids == np.arange(k)).all()
        np.testing.assert_allclose(c.logprobs, -np.log(VOCAB), rtol=1e-6)
        assert (c.versions == 0).all() and c.cached_tokens == 1


def ending(*tokens):
    """The answer's last tokens are these; what else it says stays."""

    def change(answer):
        ids, meta = [*answer["output_ids"][: -len(tokens)], *tokens], answer["meta_info"]
        sampled = [[value, token, None] for (value, *_), token in zip(meta["output_token_logprobs"], ids, strict=True)]
        return {**answer, "output_ids": ids, "meta_info": {**meta, "output_token_logprobs": sampled}}

    return change


@pytest.mark.parametrize(
    ("last", "ignore_eos", "finish"), [(EOS, False, "stop"), (EOS, True, "length"), (EOS + 1, False, "length")]
)
def test_an_end_token_that_is_the_last_allowed_ends_an_answer(fakes, engine_on, last, ignore_eos, finish):
    """Servers say "length" of all of these."""
    fake = fakes()
    engine = engine_on(fake)
    fake.spoil["/generate"] = always(ending(last))
    engine.add(ask(1, ignore_eos=ignore_eos))
    assert [(c.token_ids[-1], c.finish_reason) for c in drain(engine)] == [(last, finish)] * 2


@pytest.mark.parametrize(("ignore_eos", "lengths"), [(False, 4), (True, 6)])
def test_an_aborted_answer_that_had_come_to_its_end_is_whole(fakes, engine_on, ignore_eos, lengths):
    """A server samples once more before it aborts, and says "abort" of an end token, too."""
    fake = fakes()
    engine = engine_on(fake)
    aborted = set()

    def abort(fields, answer):
        if isinstance(answer, list) or len(fields["input_ids"]) > 3:
            return answer
        aborted.add(fields["rid"])
        meta, ids = answer["meta_info"], [2, 2, 2, EOS]
        return {
            "output_ids": ids,
            "meta_info": {
                **meta, "finish_reason": {"type": "abort"}, "completion_tokens": 4,
                "weight_versions": [{"version": meta["weight_version"], "start": 0, "end": 4}],
                "output_token_logprobs": [[-1.0, token, None] for token in ids],
            },
        }  # fmt: skip

    fake.spoil["/generate"] = abort
    engine.add(ask(1, ignore_eos=ignore_eos))
    ended = drain(engine)
    assert [len(c.token_ids) for c in ended] == [lengths] * 2 and len(aborted) == 2
    assert all(c.token_ids.tolist()[:4] == [2, 2, 2, EOS] for c in ended)
    assert ignore_eos or {c.finish_reason for c in ended} == {"stop"}
    assert engine.counters["resumed"] == (2 if ignore_eos else 0)


HALF_TRUE = {
    "fewer log-probabilities": (edited(output_token_logprobs=[[-1.0, 3, None]]), "6 tokens but 1 log-prob"),
    "NaN": (lambda a: {**a, "output_ids": [2] * 6, "meta_info": {**a["meta_info"], "output_token_logprobs":
            [[None, 2, None]] * 6}}, "NaN, infinite or positive"),
    "positive": (lambda a: {**a, "output_ids": [2] * 6, "meta_info": {**a["meta_info"], "output_token_logprobs":
            [[0.5, 2, None]] * 6}}, "NaN, infinite or positive"),
    "another vocabulary": (lambda a: {**a, "output_ids": [99] * 6, "meta_info": {**a["meta_info"],
            "output_token_logprobs": [[-0.5, 99, None]] * 6}}, "outside the vocabulary of 32"),
    "other ids": (lambda a: {**a, "output_ids": [31 - i for i in a["output_ids"]]}, "not the sampled ones"),
    "a hole in the versions": (edited(weight_versions=[{"version": "v", "start": 0, "end": 4}]), "do not cover"),
    "no versions": (edited(weight_versions=None), "weight_versions"),
    "a longer prompt": (edited(prompt_tokens=7), "read 7 prompt tokens of 3"),
    "an unknown end": (edited(finish_reason={"type": "tired"}), "'tired' is none of"),
    "nothing in meta": (lambda a: {"meta_info": None}, "AttributeError"),
    "an end that is no object": (edited(finish_reason="stop"), "AttributeError"),
    "output ids that are none": (lambda a: {**a, "output_ids": 5}, "TypeError"),
    "an id beyond every integer": (edited(output_token_logprobs=[[-1.0, 2**63, None]] * 6), "OverflowError"),
    "a version beyond every integer": (lambda a: edited(weight_versions=[{"start": 0, "end": 6, "version":
            a["meta_info"]["weight_version"] + "9" * 12}])(a), "is not of this run"),
    "a shorter answer than asked": (lambda a: {"output_ids": a["output_ids"][:4], "meta_info": {**a["meta_info"],
            "output_token_logprobs": a["meta_info"]["output_token_logprobs"][:4]}}, "cut after 4 of 6 tokens"),
    "no meta": (lambda a: {"output_ids": []}, "meta_info"),
    "not JSON": (lambda a: web.Response(text="<html>busy</html>"), "not one of SGLang's"),
    "HTTP 500": (lambda a: web.Response(status=500, text="out of memory"), "HTTP 500: out of memory"),
}  # fmt: skip


@pytest.mark.parametrize("fault", HALF_TRUE)
def test_a_half_true_answer_is_thrown_away_and_sampled_again(fakes, engine_on, caplog, fault):
    fake = fakes()
    engine = engine_on(fake)
    change, words = HALF_TRUE[fault]
    fake.spoil["/generate"] = once(change)
    with caplog.at_level(logging.WARNING):
        engine.add(ask(1))
        done = drain(engine)
    assert sorted(c.sibling for c in done) == [0, 1] and not any(isinstance(c, Failure) for c in done)
    assert engine.counters["retries"] == 1
    assert words in caplog.text


def test_a_server_that_keeps_lying_costs_its_rollouts_and_nothing_else(fakes, engine_on):
    honest, liar = fakes(), fakes()
    engine = engine_on(honest, liar, attempts=2)
    liar.spoil["/generate"] = always(edited(output_token_logprobs=[]))
    for number in range(12):
        engine.add(ask(number, samples=1))
    done = drain(engine)
    failed = [c for c in done if isinstance(c, Failure)]
    assert 0 < len(failed) < 12 and len(done) == 12
    assert all("2 attempts (engine.attempts), the last: a/server-1: 6 tokens but 0" in f.reason for f in failed)


def first(count, change):
    """Spoil so many answers that are not the probe's."""
    left = [count]

    def spoil(fields, answer):
        if isinstance(answer, list) or not left[0]:
            return answer
        left[0] -= 1
        return change(answer)

    return spoil


def refused(status):
    return lambda answer: web.Response(status=status, text="overloaded")


def aborted(answer):
    return edited(finish_reason={"type": "abort", "message": "x"}, output_token_logprobs=[], completion_tokens=0)(
        {**answer, "output_ids": []}
    )


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_refuses_is_asked_again_after_its_next_look(fakes, engine_on, status):
    fake = fakes()
    engine = engine_on(fake)
    server, refuse = engine.servers[0], always(refused(status))
    recovers = server.loads + 2
    fake.spoil["/generate"] = lambda fields, answer: answer if server.loads >= recovers else refuse(fields, answer)
    engine.add(ask(1, samples=4))
    done = drain(engine)
    assert len(done) == 4 and not any(isinstance(c, Failure) for c in done)
    assert engine.counters["requests"] <= 12 and server.restarts == 0


def test_a_server_that_does_nothing_but_refuse_has_failed(fakes, engine_on, caplog):
    fake = fakes()
    engine = engine_on(fake, restarts=20, backoff_s=0.5)
    fake.spoil["/generate"] = always(refused(500))
    for number in (1, 2):
        engine.add(ask(number, samples=2))
    ended = run(engine, lambda: engine.servers[0].restarts == 1)
    assert "lost a server: it does nothing but refuse: a/server-0 /generate: HTTP 500" in caplog.text
    del fake.spoil["/generate"]
    done = ended + drain(engine)
    assert len(done) == 4 and not any(isinstance(c, Failure) for c in done), "three of four attempts"


POISON = 7  # the first token of prompts that the server cannot take


def test_a_request_that_is_always_refused_costs_its_server_nothing(fakes, engine_on):
    fake = fakes()
    engine = engine_on(fake)
    refuse = always(refused(500))
    fake.spoil["/generate"] = lambda f, answer: refuse(f, answer) if f["input_ids"][0] == POISON else answer
    for number in range(3):
        engine.add(replace(ask(number, samples=1), prompt_ids=np.array([POISON, 2, 3], np.int32)))
        (ended,) = drain(engine)
        assert isinstance(ended, Failure) and "HTTP 500" in ended.reason
        engine.add(ask(10 + number, samples=1))
        (ended,) = drain(engine)
        assert not isinstance(ended, Failure)
    assert engine.servers[0].restarts == 0 and engine.servers[0].state == State.SERVING


def test_a_server_that_fails_at_once_takes_nothing_from_those_that_work(fakes, engine_on):
    works, fails = fakes(), fakes()
    engine = engine_on(works, fails, concurrency=8)
    works.seconds = 0.02
    fails.spoil["/generate"] = always(refused(500))
    for number in range(40):
        engine.add(ask(number, samples=4))
    done = drain(engine)
    assert len(done) == 160 and not any(isinstance(c, Failure) for c in done)
    assert engine.counters["requests_failed"] <= 160, "none is taken there twice"


def test_a_server_that_cannot_be_probed_is_tried_again(fakes, engine_on, caplog):
    fake = fakes()
    refusals = [1]
    fake.spoil["/generate"] = lambda fields, answer: refused(503)(answer) if refusals and refusals.pop() else answer
    assert engine_on(fake).servers[0].restarts == 1
    assert "lost a server: a/server-0 refused the probe" in caplog.text


def test_aborts_without_a_token_are_not_asked_again_at_once(fakes, engine_on):
    fake = fakes()
    engine = engine_on(fake)
    fake.spoil["/generate"] = always(aborted)
    engine.add(ask(1, samples=4))
    looks = engine.servers[0].loads
    run(engine, lambda: engine.counters["resumed"] >= 12)
    assert engine.counters["requests"] <= 4 * (engine.servers[0].loads - looks + 2)
    del fake.spoil["/generate"]
    assert not any(isinstance(c, Failure) for c in drain(engine))


def test_aborts_by_an_update_are_asked_again_at_once(fakes, engine_on):
    fake = fakes()
    engine = engine_on(fake, heartbeat_s=3.0, server_timeout_s=9.0)

    def update(answer):
        engine.servers[0].updates += 1
        return aborted(answer)

    fake.spoil["/generate"] = first(5, update)
    engine.add(ask(1, samples=1))
    assert len(run(engine, lambda: not engine.in_flight, 2.0)) == 1


def test_aborts_are_counted_anew_with_every_attempt(fakes, engine_on):
    fake = fakes()
    engine = engine_on(fake, heartbeat_s=0.001, attempts=2)
    fake.spoil["/generate"] = first(MOST_EMPTY + 5, aborted)
    engine.add(ask(1, samples=1))
    (done,) = drain(engine)
    assert not isinstance(done, Failure) and engine.counters["retries"] == 1


def test_rollouts_of_a_server_that_vanishes_are_sampled_elsewhere_from_their_prompts(fakes, engine_on):
    stays, goes = fakes(), fakes()
    engine = engine_on(stays, goes, start_timeout_s=1.0)
    goes.seconds = 60.0
    for number in range(16):
        engine.add(ask(number, samples=1))
    done = run(engine, lambda: engine.counters.get("requests", 0) >= 16)
    goes.stop()
    done += drain(engine)
    assert len(done) == 16 and not any(isinstance(c, Failure) for c in done)
    assert engine.counters["retries"] > 0 and engine.counters["servers_serving"] == 1
    sent = [fields for path, fields in stays.calls if path == "/generate" and isinstance(fields["input_ids"][0], int)]
    assert all(fields["input_ids"] == [3, 4, 5] and fields["sampling_params"]["max_new_tokens"] == 6 for fields in sent)
    run(engine, lambda: engine.servers[1].state == State.GONE)
    engine.step()  # one is enough: engine.least_servers=1


def test_a_server_that_comes_back_joins_again(fakes, engine_on):
    stays, goes = fakes(), fakes()
    engine = engine_on(stays, goes, restarts=20)
    goes.stop()
    run(engine, lambda: engine.servers[1].state == State.LOST)
    fakes(port=goes.port)
    run(engine, lambda: engine.servers[1].state == State.SERVING)
    assert engine.servers[1].version == 0


def test_the_broker_is_told_of_a_server_that_came_back_without_its_weights(fakes, engine_on):
    fake = fakes()
    engine = engine_on(fake, weights=WeightsSection(route="direct", backend="gloo"), restarts=20)
    (server,) = engine.servers
    version = Version(3, engine.tag(3), [(b, None) for b in plan_buckets([("w", "float32", (4,))], 1 << 20)])

    async def taken():
        fake.weight_version = version.tag
        return 0.0

    async def receive():
        assert await server.receive(version, taken) == ""
        engine.expect(version)

    assert engine.holds == 0
    engine.run(receive()).result(5)
    heard = SimpleNamespace(said=[], set_version=lambda version: heard.said.append(version))
    heard.send = heard.said.append
    reporting(heard, engine)("applied")
    assert heard.said == [3, "applied"]
    fake.stop()
    run(engine, lambda: server.state == State.LOST)
    assert engine.holds == 3 and not engine.lacking(3)  # nobody could be sent it
    fakes(port=fake.port)
    run(engine, lambda: server.state == State.STALE)
    assert engine.holds == 0 and engine.lacking(3) == [server]


def test_a_stuck_scheduler_is_found_although_the_server_accepts_connections(fakes, engine_on):
    stays, stuck = fakes(), fakes()
    engine = engine_on(stays, stuck)

    async def never(fields, answer):
        await asyncio.sleep(60)

    stuck.spoil |= dict.fromkeys(("/generate", "/server_info"), never)  # loads come from a snapshot
    began = time.monotonic()
    for number in range(12):
        engine.add(ask(number, samples=1))
    done = drain(engine)
    assert len(done) == 12 and not any(isinstance(c, Failure) for c in done)
    assert time.monotonic() - began < 20.0
    assert "no answer within 0.6 s" in engine.servers[1].why


def test_too_few_servers_end_the_actor_with_their_reasons(fakes, engine_on):
    first, second = fakes(), fakes()
    engine = engine_on(first, second, least_servers=2, restarts=1, start_timeout_s=1.0)
    second.stop()
    with pytest.raises(EngineError, match=r"1 of 2 servers are left, engine\.least_servers=2 are needed: .*a/server-1"):
        run(engine, lambda: False)


@pytest.mark.parametrize(
    ("spoil", "info", "words"),
    [
        ({}, {"version": "0.5.18"}, r"runs SGLang 0\.5\.18; 0\.5\.19 to 0\.5\.23 are supported"),
        ({}, {"version": "0.6.0"}, r"runs SGLang 0\.6\.0; 0\.5\.19 to"),
        ({}, {"version": "vLLM"}, "not an SGLang server"),
        ({}, {"version": "0.5.20"}, r"engine\.update=retract kills; set engine\.update=abort"),
        ({}, {"dp_size": 2}, r"dp_size=2 replicas, which SGLang cannot update .*engine\.launch"),
        ({}, {"preferred_sampling_params": '{"top_p": 0.9}'}, "--preferred-sampling-params"),
        ({"/model_info": lambda f, a: {**a, "architectures": ["Y"]}}, {}, r"serves Y, its actor has .*, which is X"),
        ({"/update_weights_from_disk": lambda f, a: web.Response(status=400, text="no")}, {}, "cannot load model"),
        ({"/generate": lambda f, a: [_skewed(r) for r in a]}, {}, r"does not sample from the log-probabilities"),
        ({"/generate": lambda f, a: [_certain(r) for r in a]}, {}, r"(no probability|does not sample)"),
    ],
)  # fmt: skip
def test_a_server_that_cannot_be_used_is_refused_with_the_remedy(fakes, engine_on, spoil, info, words):
    fake = fakes(**{"version": "0.5.23", **info})
    fake.spoil |= spoil
    engine = engine_on(fake, wait=False)
    with pytest.raises(EngineError, match=words):
        run(engine, lambda: False)


def _skewed(reply):
    """Truncated sampling: only the first eight ids ever come, at the probabilities of all."""
    ids = [token % 8 for token in reply["output_ids"]]
    value = reply["meta_info"]["output_token_logprobs"][0][0]
    reply["meta_info"]["output_token_logprobs"] = [[value, token, None] for token in ids]
    return {**reply, "output_ids": ids}


def _certain(reply):
    """Log-probabilities of a sharper distribution than the one that was sampled from."""
    meta = reply["meta_info"]
    meta["output_top_logprobs"] = [[[-0.1 - 3 * token, token, None] for token in range(len(row))]
                                   for row in meta["output_top_logprobs"]]  # fmt: skip
    return reply


def test_log_probabilities_without_the_temperature_are_noticed(fakes, engine_on):
    fake = fakes()

    def raw(fields, answer):
        for reply in answer:
            meta = reply["meta_info"]
            meta["output_top_logprobs"] = [
                [[-1.0 - token, token, None] for token in range(len(row))] for row in meta["output_top_logprobs"]
            ]
            ids = [int(np.random.default_rng(len(str(reply))).integers(0, 2))]
            meta["output_token_logprobs"] = [[-1.0, ids[0], None]]
            reply["output_ids"] = ids
        return answer

    from actor.engine import probe

    original = probe.check_frequencies
    probe.check_frequencies = lambda *a: None
    try:
        fake.spoil["/generate"] = raw
        engine = engine_on(fake, wait=False, rollout={"temperature": 0.5})
        with pytest.raises(EngineError, match="SGLANG_RETURN_ORIGINAL_LOGPROB"):
            run(engine, lambda: False)
    finally:
        probe.check_frequencies = original


def test_tokens_of_a_version_of_another_run_are_refused_and_the_server_is_not_trusted(fakes, engine_on):
    fake = fakes()
    engine = engine_on(fake, attempts=20)
    fake.weight_version = "croupier-other-0"
    engine.add(ask(1, samples=1))
    run(engine, lambda: engine.servers[0].restarts == 1)  # there is nothing to send it again: it starts anew
    (done,) = drain(engine)
    assert not isinstance(done, Failure) and (done.versions == 0).all()
    assert engine.counters["replies_refused"] >= 1  # it may be asked again before it is known to be another's


def test_what_a_stale_server_was_sampling_is_sampled_again_once_it_is_lost(fakes, engine_on):
    fake = fakes()
    engine = engine_on(fake, restarts=20)
    fake.seconds = 60.0
    engine.add(ask(1))
    run(engine, lambda: asked_of(fake) == 2)
    server = engine.servers[0]
    fake.seconds = 0.0
    engine._loop.call_soon_threadsafe(server.disown, "somebody else's")  # STALE first, then LOST
    done = drain(engine)
    assert sorted(c.sibling for c in done) == [0, 1] and engine.counters["retries"] == 2
    assert [target.under_way for target in engine._targets] == [0]
    assert server.restarts == 1 and server.failure is None


def test_ranks_of_data_parallel_attention_are_homes_of_their_own(fakes, engine_on):
    fake = fakes(tp_size=4, dp_size=4, attn_dp_size=4)
    engine = engine_on(fake)
    assert engine.servers[0].ranks == 4
    for _ in range(2):
        for number in range(12):
            engine.add(ask(number, samples=2))
        drain(engine)
    asked = [fields for path, fields in fake.calls if path == "/generate" and isinstance(fields["input_ids"][0], int)]
    homes = [fields["data_parallel_rank"] for fields in asked]
    assert len(homes) == 48 and set(homes) == {0, 1, 2, 3}
    assert sorted(homes[:24]) == sorted(homes[24:])  # every key came back to its rank


def asked_of(fake):
    """Requests but the probe's that have reached it."""
    return sum(path == "/generate" and isinstance(fields["input_ids"][0], int) for path, fields in fake.calls)


def test_answers_to_an_earlier_stay_are_not_counted_against_the_next(fakes, engine_on):
    fake = fakes()
    engine = engine_on(fake)
    fake.seconds = 0.3
    engine.add(ask(1, samples=8))
    run(engine, lambda: engine.counters["requests"] == 8)
    server = engine.servers[0]
    for state in (State.STALE, State.SERVING):
        engine._loop.call_soon_threadsafe(server._set, state)
        run(engine, lambda state=state: bool(len(engine._targets)) == (state == State.SERVING))
    assert len(drain(engine)) == 8
    assert [target.under_way for target in engine._targets] == [0]


def test_siblings_of_a_group_share_a_server_and_turns_come_back_to_it(fakes, engine_on):
    servers = [fakes() for _ in range(3)]
    engine = engine_on(*servers)
    for number in range(9):
        engine.add(ask(number, samples=4))
    drain(engine)
    for number in range(9):
        engine.add(replace(ask(number, samples=1), prompt_ids=np.array([3, 4, 5, number + 6], np.int32)))
    drain(engine)
    asked = [[f for p, f in s.calls if p == "/generate" and isinstance(f["input_ids"][0], int)] for s in servers]
    assert sum(map(len, asked)) == 45
    for own in asked:
        turns = sum(len(fields["input_ids"]) == 4 for fields in own)
        assert len(own) == turns * 5  # four siblings and one later turn of each group
    assert sum(len(own) > 0 for own in asked) >= 2


def test_the_fixed_concurrency_is_never_exceeded(fakes, engine_on):
    fake = fakes()
    engine = engine_on(fake, concurrency=3)
    fake.seconds = 0.05
    most = []
    engine.add(ask(1, samples=20))
    run(engine, lambda: most.append(sum(t.under_way for t in engine._targets)) or not engine.in_flight)
    assert max(most) == 3


# ---- new weights --------------------------------------------------------------------------------

UPDATE, BEGIN, RESUME = "/update_weights_from_distributed", "/begin_weight_update", "/continue_generation"
DIRECT = WeightsSection(route="direct", backend="gloo")


def nth(number, made):
    """Spoil one answer, the ``number``-th."""
    left = [number]

    def spoil(fields, answer):
        left[0] -= 1
        return answer if left[0] else made()

    return spoil


def steps_of(fake, start):
    """What it was told of its weights since call ``start``."""
    return [path for path, _ in fake.calls[start:] if path in (UPDATE, BEGIN, RESUME)]


def no():
    return web.Response(status=500, text="no")


class Learner:
    """What reaches an actor of a learner whose servers are in its group: Prepare and Go, and what comes back."""

    def __init__(self, engine):
        self.engine, self.sent = engine, []
        self.receiver = DirectReceiver(self.sent.append, engine, "retract")

    def publish(self, version, epoch):
        publish = Publish(version, "127.0.0.1", 1, "gloo", BUCKET_BYTES, TENSORS)
        self.receiver.on_prepare(Prepare(epoch, 1, 1, 2, asdict(publish)))
        run(self.engine, lambda: self.receiver.staged() or self.sent)  # what came before may be about to end
        assert self.sent.pop() == Ready(epoch, version, 1)
        self.receiver.on_go(Go(epoch, version, ["a"], 2))
        run(self.engine, lambda: self.sent)
        return self.sent.pop()


@pytest.mark.parametrize("broken", [no, lambda: CUT], ids=["refused", "cut"])
def test_a_torn_server_stays_paused_through_a_push_that_fails_before_its_first_bucket(fakes, engine_on, broken):
    fake = fakes()
    engine = engine_on(fake)
    fake.receives, start = True, len(fake.calls)
    fake.spoil |= {UPDATE: nth(2, broken), BEGIN: nth(2, no)}
    flat = torch.zeros(BUCKET_BYTES, dtype=torch.uint8)
    engine.load(1, [(bucket, flat) for bucket in plan_buckets(TENSORS, BUCKET_BYTES)])
    run(engine, lambda: engine.loaded() is not None)
    assert steps_of(fake, start) == [BEGIN, UPDATE, UPDATE, BEGIN, BEGIN, UPDATE, UPDATE, RESUME]
    (server,) = engine.servers
    assert (server.version, server.torn, server.restarts, server.state) == (1, False, 0, State.SERVING)


def test_a_push_that_fails_before_its_first_bucket_leaves_a_whole_server_sampling(fakes, engine_on):
    fake = fakes()
    engine = engine_on(fake, weights=DIRECT)
    learner, start = Learner(engine), len(fake.calls)
    fake.spoil[BEGIN] = nth(1, no)
    assert isinstance(learner.publish(1, 1), ReceiveFailed)
    assert steps_of(fake, start) == [BEGIN, RESUME]
    (server,) = engine.servers
    assert (server.version, server.torn, server.state) == (0, False, State.SERVING)


def test_a_torn_server_stays_paused_until_the_learner_has_sent_it_a_whole_version(fakes, engine_on):
    fake = fakes()
    engine = engine_on(fake, weights=DIRECT)
    learner, start = Learner(engine), len(fake.calls)
    (server,) = engine.servers
    fake.spoil |= {UPDATE: nth(2, no), BEGIN: nth(2, no)}
    for epoch in (1, 2):
        assert isinstance(learner.publish(1, epoch), ReceiveFailed)
        assert (server.version, server.torn, server.state) == (-1, True, State.STALE)
    assert learner.publish(1, 3) == Applied(3, 1, "")
    assert steps_of(fake, start) == [BEGIN, UPDATE, UPDATE, BEGIN, BEGIN, UPDATE, UPDATE, RESUME]
    run(engine, lambda: server.state == State.SERVING)
    assert (server.version, server.torn, server.restarts) == (1, False, 0)


def test_a_torn_server_that_takes_nothing_more_is_lost_and_starts_whole(fakes, engine_on):
    fake = fakes()
    engine = engine_on(fake, weights=DIRECT)
    learner = Learner(engine)
    (server,) = engine.servers
    fake.spoil |= {UPDATE: nth(2, no), BEGIN: lambda fields, answer: answer if not server.torn else no()}
    for epoch in (1, 2, 3):
        assert isinstance(learner.publish(1, epoch), ReceiveFailed)
    run(engine, lambda: server.restarts == 1 and server.state == State.SERVING)
    assert (server.version, server.torn) == (0, False)


def test_a_server_that_was_restarted_asks_for_a_group_that_has_not_met(fakes, engine_on):
    fake = fakes()
    engine = engine_on(fake, weights=DIRECT, restarts=20)
    learner = Learner(engine)
    (server,) = engine.servers
    assert learner.publish(1, 1) == Applied(1, 1, "")
    fake.stop()
    run(engine, lambda: server.state == State.LOST)
    again = fakes(port=fake.port)
    run(engine, lambda: server.state == State.STALE)
    publish = Publish(2, "127.0.0.1", 1, "gloo", BUCKET_BYTES, TENSORS)
    learner.receiver.on_prepare(Prepare(1, 1, 1, 2, asdict(publish)))
    assert learner.sent == [ReceiveFailed(1, 2, "a/server-0 would come to a group that has met"), Ready(1, 2, 1)]
    learner.sent.clear()
    assert learner.publish(2, 2) == Applied(2, 2, "")
    run(engine, lambda: server.state == State.SERVING)
    assert server.version == 2 and list(again.groups) == ["weights/1/2"]


def test_a_server_leaves_the_group_of_an_earlier_epoch(fakes, engine_on):
    fake = fakes()
    learner = Learner(engine_on(fake, weights=DIRECT))
    for version, epoch in ((1, 1), (2, 1), (3, 2)):
        assert learner.publish(version, epoch) == Applied(epoch, version, "")
    joined = [fields["group_name"] for path, fields in fake.calls if path == "/init_weights_update_group"]
    assert joined == ["weights/1/1", "weights/1/2"] and list(fake.groups) == joined[1:]
