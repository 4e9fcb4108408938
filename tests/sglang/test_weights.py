"""New weights in a live server: what requests in flight sample, and what a push that breaks leaves behind."""

import json
import os
import signal
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
import torch

from actor.engine import push
from actor.engine.client import ServerRefusedError
from actor.engine.server import State
from tests.sglang.servers import (
    EOS,
    TOLERANCE,
    ask,
    at,
    attached,
    drain,
    logprobs_of,
    prompt_of,
    reference,
    run_config,
    running_tokens,
    sglang_engine,
    take_version,
    wait_for,
    weights,
)

pytestmark = pytest.mark.sglang
TOKENS = 280


@pytest.fixture
def engine_of(models, server, tmp_path):
    made = []

    def make(**engine):
        made.append(sglang_engine(attached(run_config(models["first"], tmp_path, **engine), server)))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def run_across_an_update(engine, models, samples=3):
    """Completions that a version is taken under; oldest first. The bucket size makes several calls of it."""
    engine.add(ask(0, prompt_of(5), samples, TOKENS, ignore_eos=True, top_logprobs=4))
    wait_for(engine, lambda: running_tokens(engine) > 20)
    done = take_version(engine, 1, models["second"], 20_000)
    done += drain(engine)
    assert len(done) == samples
    for c in done:
        assert len(c.token_ids) == TOKENS
        assert sorted(set(c.versions.tolist())) == [0, 1] and (np.diff(c.versions) >= 0).all()
    return done


@pytest.mark.parametrize("mode", ["retract", "abort"])
def test_what_is_sampled_after_an_update_is_the_new_models_own(engine_of, models, mode):
    engine = engine_of(update=mode)
    old, new = reference(models["first"]), reference(models["second"])
    for c in run_across_an_update(engine, models):
        split = int((c.versions == 0).sum())
        before, after = logprobs_of(old, prompt_of(5), c), logprobs_of(new, prompt_of(5), c)
        np.testing.assert_allclose(c.logprobs[:split], at(before, c.token_ids)[:split], atol=TOLERANCE)
        np.testing.assert_allclose(c.logprobs[split:], at(after, c.token_ids)[split:], atol=TOLERANCE)
        np.testing.assert_allclose(c.topk_logprobs[split:], after.topk(4).values[split:].numpy(), atol=TOLERANCE)
    counters = engine.counters
    assert counters["resumed"] == (3 if mode == "abort" else 0) and counters["retries"] == 0
    assert counters["seconds_paused"] > 0


def test_a_rollout_ends_where_it_was_aborted_with_an_end_token(engine_of):
    """A server samples once more before it aborts, and says "abort" of an end token, too: behind it nothing is ours."""
    engine, ends, done = engine_of(update="abort"), [EOS, 3, 4, 5], []
    engine._stop_ids = ends
    everything = urllib.request.Request(
        f"{engine.servers[0].client.url}/abort_request",
        json.dumps({"rid": "", "abort_all": True}).encode(), {"Content-Type": "application/json"},
    )  # fmt: skip
    for number in range(40):
        engine.add(ask(number, prompt_of(5, number), 16, 60))
        done += wait_for(engine, lambda: running_tokens(engine) > 100 or not engine.in_flight)
        urllib.request.urlopen(everything, timeout=10).read()
        done += drain(engine)
        if engine.counters["resumed"] > 150:  # each 0.04 likely
            break
    assert engine.counters["resumed"] > 150 and len(done) == 16 * (number + 1)
    for c in done:
        assert not np.isin(c.token_ids[:-1], ends).any(), (c.token_ids, c.finish_reason)
        assert c.finish_reason == ("stop" if c.token_ids[-1] in ends else "length")


def test_in_place_keeps_the_old_keys_and_ships_what_was_sampled(engine_of, models):
    engine = engine_of(update="in_place")
    old, new = reference(models["first"]), reference(models["second"])
    for c in run_across_an_update(engine, models):
        split = int((c.versions == 0).sum())
        pure = at(logprobs_of(new, prompt_of(5), c), c.token_ids)
        assert np.abs(c.logprobs[split:] - pure[split:]).max() > 0.01  # of neither version
        # The oracle: the old model's keys and values, read on by the new one from the first token that it saw.
        errors = [np.abs(c.logprobs - mixed(old, new, c, split + shift)).max() for shift in (-1, 0, 1)]
        assert min(errors) < TOLERANCE


@torch.inference_mode()
def mixed(old, new, c, first):
    """log p of every token; the tokens from completion index ``first - 1`` on were read by ``new``."""
    ids = torch.from_numpy(np.concatenate([prompt_of(5), c.token_ids]).astype(np.int64))[None]
    cut = 5 + first - 1
    before = old(ids[:, :cut], use_cache=True)
    after = new(ids[:, cut:], past_key_values=before.past_key_values, use_cache=True)
    rows = torch.cat([before.logits[0], after.logits[0]]).log_softmax(-1)[4:-1]
    return at(rows, c.token_ids)


def test_many_versions_one_after_another_and_the_same_prompts_are_read_anew(engine_of, models):
    engine = engine_of()
    for version in range(1, 7):
        source = models["second" if version % 2 else "first"]
        take_version(engine, version, source)
        engine.add(ask(version, prompt_of(40), 2, 6))  # a prompt that the cache knows from every version before
        for c in drain(engine):
            rows = logprobs_of(reference(source), prompt_of(40), c)
            np.testing.assert_allclose(c.logprobs, at(rows, c.token_ids), atol=TOLERANCE)
            assert (c.versions == version).all()


def test_a_push_that_breaks_before_its_first_bucket_leaves_the_old_version_serving(engine_of, models, monkeypatch):
    engine = engine_of()
    broken = []

    async def refuse(client, *rest):
        if not broken:
            broken.append(True)
            raise broken_by_us(client)
        return await real(client, *rest)

    real = push.take_bucket
    monkeypatch.setattr(push, "take_bucket", refuse)
    engine.add(ask(0, prompt_of(5), 2, TOKENS, ignore_eos=True))
    take_version(engine, 1, models["second"], 20_000)  # the second attempt
    assert broken and engine.version == 1
    assert [len(c.token_ids) for c in drain(engine)] == [TOKENS] * 2


def test_a_push_that_breaks_half_way_samples_nothing_from_the_mixture(engine_of, models, monkeypatch):
    engine = engine_of()
    seen, states = [], []

    async def break_off(client, *rest):
        seen.append(True)
        if len(seen) == 3:
            raise broken_by_us(client)
        if len(seen) == 4:
            states.append(engine.servers[0].state)
        return await real(client, *rest)

    real = push.take_bucket
    monkeypatch.setattr(push, "take_bucket", break_off)
    engine.add(ask(0, prompt_of(5), 2, TOKENS, ignore_eos=True))
    wait_for(engine, lambda: running_tokens(engine) > 20)
    done = take_version(engine, 1, models["second"], 20_000) + drain(engine)
    assert states == [State.STALE]
    old, new = reference(models["first"]), reference(models["second"])
    for c in done:
        split = int((c.versions == 0).sum())
        expected = at(logprobs_of(old, prompt_of(5), c), c.token_ids)
        expected[split:] = at(logprobs_of(new, prompt_of(5), c), c.token_ids)[split:]
        np.testing.assert_allclose(c.logprobs, expected, atol=TOLERANCE)


def broken_by_us(client):
    return ServerRefusedError(f"{client.name}: broken by the test", 500)


def test_an_actor_killed_in_the_middle_of_a_push_leaves_a_server_that_the_next_one_can_use(server, models, tmp_path):
    """Its session stays open and the server paused, until somebody ends them."""
    code = """
import os, signal, sys
from actor.engine import push
from tests.sglang.servers import attached, run_config, sglang_engine, take_version
from pathlib import Path
real, seen = push.take_bucket, []
async def die(*rest):
    seen.append(1)
    if len(seen) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return await real(*rest)
push.take_bucket = die
engine = sglang_engine(attached(run_config(Path(sys.argv[1]), Path(sys.argv[2])), sys.argv[4]))
take_version(engine, 1, Path(sys.argv[3]), 20_000)
"""
    command = [sys.executable, "-c", code, str(models["first"]), str(tmp_path), str(models["second"]), server]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    engine = sglang_engine(attached(run_config(models["first"], tmp_path), server))
    try:
        take_version(engine, 5, models["second"])
        engine.add(ask(0, prompt_of(9), 2, 20))
        for c in drain(engine):
            rows = logprobs_of(reference(models["second"]), prompt_of(9), c)
            np.testing.assert_allclose(c.logprobs, at(rows, c.token_ids), atol=TOLERANCE)
            assert (c.versions == 5).all()
    finally:
        engine.close()


def test_weights_that_somebody_else_changed_are_noticed_and_sent_again(engine_of, models):
    engine = engine_of()
    take_version(engine, 2, models["second"])
    fields = json.dumps({"new_version": "strange", "abort_all_requests": False}).encode()
    url = engine.servers[0].client.url
    request = urllib.request.Request(f"{url}/update_weight_version", fields, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=10).read()
    engine.add(ask(0, prompt_of(5), 2, 8))
    (first, second) = drain(engine)
    assert (first.versions == 2).all() and (second.versions == 2).all()
    assert engine.counters["replies_refused"] >= 1


def test_a_version_of_another_model_is_refused_by_name(engine_of, models):
    """A server would pass over names that it does not know and say that all is well."""
    engine = engine_of()
    engine.load(1, weights(models["dense"]))
    error = engine.loaded().error
    assert "version 1: " in error and "missing (first: model.layers.0.mlp.experts.0.down_proj.weight)" in error
    assert engine.version == 0 and engine.loaded() is None
    engine.add(ask(0, prompt_of(5), 1, 5))
    assert (drain(engine)[0].versions == 0).all()
