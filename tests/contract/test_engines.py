"""One contract, two engines: the embedded one and a real SGLang server."""

import numpy as np
import pytest
import torch

from actor.engine.base import Failure
from actor.engine.local import LocalEngine
from common.errors import EngineError
from tests.sglang import servers
from tests.sglang.conftest import models, server, sglang_python  # noqa: F401  # fixtures
from tests.sglang.servers import TOLERANCE, VOCAB, ask, at, drain, logprobs_of, prompt_of, reference, take_version


@pytest.fixture(params=["local", pytest.param("sglang", marks=pytest.mark.sglang)])
def engine(request, models, tmp_path):  # noqa: F811
    config = servers.run_config(models["first"], tmp_path)
    if request.param == "local":
        made = servers.local_engine(config)
    else:
        made = servers.sglang_engine(servers.attached(config, request.getfixturevalue("server")))
    yield made
    made.close()


@pytest.fixture
def prompts():
    return [prompt_of(length, seed) for seed, length in enumerate((3, 9, 1, 24))]


def test_greedy_completions_are_those_of_transformers(engine, models, prompts):  # noqa: F811
    model = reference(models["first"])
    for number, prompt in enumerate(prompts):
        engine.add(ask(number, prompt, temperature=0.0))
    assert engine.in_flight == 4 and engine.busy
    done = {c.request_id: c for c in drain(engine)}
    for number, prompt in enumerate(prompts):
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert done[number].token_ids.tolist() == wanted[0, len(prompt) :].tolist()
        expected = at(logprobs_of(model, prompt, done[number]), done[number].token_ids)
        np.testing.assert_allclose(done[number].logprobs, expected, atol=TOLERANCE)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logged_densities_and_alternatives_are_the_sampled_ones(engine, models, prompts, temperature):  # noqa: F811
    model = reference(models["first"])
    for number, prompt in enumerate(prompts):
        engine.add(ask(number, prompt, 3, 20, temperature, top_logprobs=5))
    done = drain(engine)
    assert len({(c.request_id, c.sibling) for c in done}) == len(done) == 12
    for c in done:
        rows = logprobs_of(model, prompts[c.request_id], c, temperature)
        np.testing.assert_allclose(c.logprobs, at(rows, c.token_ids), atol=TOLERANCE)
        np.testing.assert_allclose(c.topk_logprobs, rows.topk(5).values.numpy(), atol=TOLERANCE)
        named = rows.gather(1, torch.from_numpy(c.topk_ids.astype(np.int64)))  # near ties may change places
        np.testing.assert_allclose(c.topk_logprobs, named.numpy(), atol=TOLERANCE)
        assert all(len(set(ids)) == 5 for ids in c.topk_ids.tolist())
        assert c.finish_reason == ("stop" if c.token_ids[-1] == servers.EOS else "length")
        assert servers.EOS not in c.token_ids[:-1] and len(c.token_ids) <= 20
        assert (c.versions == 0).all() and c.versions.dtype == np.int32
    assert len({tuple(c.token_ids) for c in done}) > 8  # siblings differ


def test_the_end_token_can_be_ignored(engine):
    engine.add(ask(0, prompt_of(4), 4, 120, ignore_eos=True))
    done = drain(engine)
    assert [len(c.token_ids) for c in done] == [120] * 4 and {c.finish_reason for c in done} == {"length"}
    assert any(servers.EOS in c.token_ids for c in done)


def test_a_version_is_taken_in_flight_and_stamped_on_later_tokens(engine, models):  # noqa: F811
    engine.add(ask(0, prompt_of(5), 2, 250, ignore_eos=True))
    servers.wait_for(engine, _some_steps(engine))
    early = take_version(engine, 3, models["second"])
    assert engine.version == 3
    done = [*early, *drain(engine)]
    assert len(done) == 2
    for c in done:
        assert sorted(set(c.versions.tolist())) == [0, 3] and (np.diff(c.versions) >= 0).all()
        split = int((c.versions == 0).sum())
        old = at(logprobs_of(reference(models["first"]), prompt_of(5), c), c.token_ids)
        np.testing.assert_allclose(c.logprobs[:split], old[:split], atol=TOLERANCE)
        assert np.abs(c.logprobs[split + 1 :] - old[split + 1 :]).max() > 0.1
    engine.add(ask(1, prompt_of(7), 1, 10))
    (fresh,) = drain(engine)
    rows = logprobs_of(reference(models["second"]), prompt_of(7), fresh)
    np.testing.assert_allclose(fresh.logprobs, at(rows, fresh.token_ids), atol=TOLERANCE)
    assert (fresh.versions == 3).all()


def _some_steps(engine):
    """True once a few tokens of the 250 must have been sampled: steps of the embedded engine, what a server holds."""
    looks = iter(range(40))
    if isinstance(engine, LocalEngine):
        return lambda: next(looks, None) is None
    return lambda: servers.running_tokens(engine) > 20


def test_a_later_turn_goes_on_from_exact_ids(engine, models):  # noqa: F811
    model = reference(models["first"])
    engine.add(ask(0, prompt_of(6), 2, 10, ignore_eos=True))
    first = {c.sibling: c for c in drain(engine)}
    context = np.concatenate([prompt_of(6), first[1].token_ids, prompt_of(3, 9)])
    engine.add(ask(0, context, 1, 10, first_sibling=1, first_token=10, ignore_eos=True))
    (later,) = drain(engine)
    assert later.sibling == 1
    np.testing.assert_allclose(later.logprobs, at(logprobs_of(model, context, later), later.token_ids), atol=TOLERANCE)


def test_cancelled_siblings_do_not_come_back(engine):
    engine.add(ask(0, prompt_of(4), 4, 100, ignore_eos=True))
    engine.cancel(0, 1)
    engine.cancel(0, 3)
    engine.add(ask(1, prompt_of(4), 1, 100, first_sibling=2, ignore_eos=True))  # a later turn's
    engine.cancel(1, 0)  # not among those that are asked for
    engine.cancel(1, 2)
    engine.cancel(5, 0)  # unknown
    assert sorted(c.sibling for c in drain(engine)) == [0, 2]
    engine.add(ask(1, prompt_of(4), 2, 5))
    assert len(drain(engine)) == 2


def test_abort_forgets_everything_and_the_engine_goes_on(engine):
    engine.add(ask(0, prompt_of(4), 4, 100, ignore_eos=True))
    engine.step(0.05)
    engine.abort()
    assert engine.in_flight == 0
    engine.add(ask(0, prompt_of(4), 1, 5, ignore_eos=True))
    (only,) = drain(engine)
    assert not isinstance(only, Failure) and len(only.token_ids) == 5


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (ask(1, [VOCAB]), "outside"),
        (ask(1, [-1]), "outside"),
        (ask(1, []), "P >= 1"),
        (ask(1, [2] * 150, tokens=300), "max_length=400"),
        (ask(1, [2], samples=65), "max_sequences=64"),
        (ask(1, [2], temperature=-1.0), "temperature"),
        (ask(1, [2], top_logprobs=VOCAB + 1), "top_logprobs"),
    ],
)
def test_impossible_requests_are_refused_before_they_are_sent(engine, bad, message):
    with pytest.raises(EngineError, match=f"request 1: .*{message}"):
        engine.add(bad)
    assert engine.in_flight == 0
