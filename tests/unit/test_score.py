"""The policy replica's scorer: what it says is the model's own log-probability, under the version it names."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from common import wire
from common.errors import DataError
from common.weights import StagedWeights, plan_buckets
from learner.feed import experts_tensor
from learner.followers import Followers
from learner.layout import BIAS, views
from learner.model.decoder import Decoder
from learner.score import PolicyScorer
from tests.unit.named import hf_tensors
from tests.unit.test_step import CONFIG, model_of

LENGTHS = (6, 1, 9)


def request(topk=0, temperature=0.8):
    rng = np.random.default_rng(0)
    n = sum(LENGTHS)
    offsets = np.concatenate(([0], np.cumsum(LENGTHS))).astype(np.int32)
    wanted = np.ones(n, np.uint8)
    wanted[offsets[:-1]] = 0
    wanted[2] = 0
    ids = rng.permuted(np.tile(np.arange(CONFIG.vocab_size), (n, 1)), axis=1)[:, :topk].astype(np.int32)
    return wire.ScoreRequest(1, 0, temperature, offsets, rng.integers(0, 19, n).astype(np.int32), wanted, ids)


@pytest.mark.parametrize("topk", [0, 3])
@pytest.mark.parametrize("chunk", [4, 512])
@pytest.mark.parametrize("limit", [1, 7, 100])
def test_scores_are_those_of_each_sequence_alone(topk, chunk, limit):
    model, asked = model_of(), request(topk)
    log_p, at = scorer_of(model, chunk, limit).score([asked])[0]
    for a, b in zip(asked.cu_seqlens, asked.cu_seqlens[1:], strict=False):
        with torch.no_grad():
            tokens = torch.from_numpy(asked.token_ids[a:b].astype(np.int64))
            logits = model.hidden(tokens, [0, b - a]) @ model.head.T
            whole = (logits / asked.temperature).log_softmax(1).numpy()
        for t in range(a, b):
            if not asked.wanted[t]:
                assert log_p[t] == 0
                assert not at[t].any()
            else:
                row = whole[t - a - 1]
                assert log_p[t] == pytest.approx(row[asked.token_ids[t]], abs=1e-5)
                assert at[t] == pytest.approx(row[asked.topk_ids[t]], abs=1e-5)


def scorer_of(model, chunk, limit=1 << 30):
    return PolicyScorer(model, chunk * CONFIG.vocab_size * 4 / 2**20, limit)


def test_requests_scored_together_are_those_scored_apart():
    scorer = scorer_of(model_of(), 4, 8)
    many = [request(2), request(2), request(2)]
    many[1].token_ids = (many[1].token_ids + 5) % CONFIG.vocab_size
    many[2].wanted = np.zeros_like(many[2].wanted)
    together = scorer.score(many)
    for asked, (log_p, at) in zip(many, together, strict=True):
        alone_log_p, alone_at = scorer.score([asked])[0]
        assert log_p == pytest.approx(alone_log_p, abs=1e-6)
        assert at == pytest.approx(alone_at, abs=1e-6)
    assert not np.allclose(together[0][0], together[1][0])
    assert not together[2][0].any()


def test_recorded_experts_are_replayed_in_scoring():
    """The replica's p must be the learner's: both follow the record (algorithms.md 9, rule 6)."""
    asked = request()
    model = model_of()
    own, _ = scorer_of(model, 64).score([asked])[0]
    asked.experts = np.tile(np.array([0, 1, 0, 1], np.uint16), (sum(LENGTHS), 1))
    replayed, _ = scorer_of(model, 64).score([asked])[0]
    tokens, experts = torch.from_numpy(asked.token_ids.astype(np.int64)), torch.tensor([[0, 1], [0, 1]])
    with torch.no_grad():
        hidden = model.hidden(tokens, asked.cu_seqlens, experts.expand(sum(LENGTHS), 2, 2))
        whole = (hidden @ model.head.T / asked.temperature).log_softmax(1)
    at = np.flatnonzero(asked.wanted)
    assert replayed[at] == pytest.approx(whole[at - 1, tokens[at]].numpy(), abs=1e-5)
    assert not np.allclose(own, replayed)
    for experts, words in (
        (asked.experts[:, :2], "width 2"), (asked.experts + np.uint16(9), "beyond 3"),
        (np.zeros_like(asked.experts), "same expert twice"), (half_known(asked.experts), "are torn"),
    ):  # fmt: skip
        asked.experts = experts
        with pytest.raises(DataError, match=words):
            scorer_of(model, 64).check(asked)


def test_a_rank_without_a_token_replays_its_empty_record():
    model = model_of()
    record = experts_tensor(np.zeros((0, 4), np.uint16), model.config, torch.device("cpu"))
    assert record.shape == (0, 2, 2)
    none = torch.zeros(0, dtype=torch.int64)
    assert model.hidden(none, np.zeros(1, np.int32), record.long()).shape == (0, model.config.hidden_size)


@pytest.mark.parametrize("routed", [True, False])
def test_followers_have_what_the_leader_has(monkeypatch, routed):
    asked = request()
    if routed:
        asked.experts = np.tile(np.array([0, 1, 2, 3], np.uint16), (sum(LENGTHS), 1))
        asked.experts[-1] = wire.UNROUTED
    packed, sent = scorer_of(model_of(), 64)._pack([asked]), []
    mesh = SimpleNamespace(world=2, device=torch.device("cpu"))
    monkeypatch.setattr(dist, "broadcast", lambda tensor, _: sent.append(tensor.clone()))
    Followers(mesh).share(packed)
    monkeypatch.setattr(dist, "broadcast", lambda tensor, _: tensor.copy_(sent.pop(0)))
    for name, found in vars(Followers(mesh).share(None)).items():
        mine = getattr(packed, name)
        same = found.dtype == mine.dtype and torch.equal(found, mine) if torch.is_tensor(mine) else found == mine
        assert same, name
    assert not sent and (packed.experts is not None) == routed
    assert not routed or (packed.experts[-1] == -1).all()


def half_known(experts):
    torn = experts.copy()
    torn[3, 2:] = wire.UNROUTED
    return torn


def test_frozen_tensors_need_not_come():
    scorer = PolicyScorer(model_of(0), 64.0, frozen=("model.embed_tokens.*",))
    tensors = list(hf_tensors(model_of(1)))
    assert tensors[0][0] == "model.embed_tokens.weight"
    scorer.swap(staged(tensors[1:], 5))
    assert scorer.version == 5
    assert torch.equal(scorer.model.embed, model_of(0).embed)


def test_an_id_outside_the_vocabulary_is_refused():
    asked = request()
    asked.token_ids[3] = 19
    with pytest.raises(DataError, match="outside the vocabulary of 19"):
        PolicyScorer(model_of(), 8.0).check(asked)


def test_a_swap_takes_every_tensor_or_none():
    scorer = PolicyScorer(model_of(0), 64.0)
    new = model_of(1)
    tensors = list(hf_tensors(new))
    scorer.swap(staged(tensors, 5))
    assert scorer.version == 5
    assert all(torch.equal(a, b) for a, b in zip(scorer.model.parameters(), new.parameters(), strict=True))
    with pytest.raises(DataError, match=r"lm_head\.weight.* missing or unknown"):
        scorer.swap(staged(tensors[:-1], 6))
    before = [p.clone() for p in scorer.model.parameters()]
    with pytest.raises(DataError, match=r"lm_head\.weight has shape \[1, 16\], the model has \[19, 16\]"):
        scorer.swap(staged([(n, t + 1) for n, t in tensors[:-1]] + [("lm_head.weight", torch.zeros(1, 16))], 6))
    assert all(torch.equal(a, b) for a, b in zip(scorer.model.parameters(), before, strict=True))
    assert scorer.version == 5


def test_a_version_that_arrived_in_the_models_own_order_is_adopted_and_left_again():
    """Swaps by pointer, then by copy, then by pointer; and nobody runs on memory that was given back."""

    def biased(seed):
        torch.manual_seed(seed)
        model = Decoder(dataclasses.replace(CONFIG, expert_bias=True))
        for tensor in views(model).values():
            torch.nn.init.normal_(tensor, std=0.2)
        return model

    scorer = PolicyScorer(biased(0), 64.0)

    def stacked(model):
        held = views(model)
        for parameter in model.parameters():
            inside = [n for n in held if held[n].untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()]
            yield from ((n, held[n]) for n in sorted(inside, key=lambda n: held[n].data_ptr()))
        yield from ((n, held[n]) for n in held if n.endswith(BIAS))

    first, second, third = (staged(list(stacked(biased(seed))), seed, 1 << 30) for seed in (1, 2, 3))
    apart = staged(list(hf_tensors(biased(4))), 4)
    previous = None
    for given, adopted in ((first, True), (second, True), (apart, False), (third, True)):
        assert scorer.swap(given) is adopted
        expected = biased(given.version)
        if previous is not None:
            previous.buckets[0][1].zero_()  # the receiver writes the next version there
        previous = given
        ours, theirs = views(scorer.model), views(expected)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert scorer.score([request()])[0][0] == pytest.approx(PolicyScorer(expected, 64.0).score([request()])[0][0])


def staged(tensors, version, bucket_bytes=2000):
    """As a receiver leaves them: flat buckets of bytes."""
    described = [(name, "float32", tuple(tensor.shape)) for name, tensor in tensors]
    values = dict(tensors)
    received = []
    for bucket in plan_buckets(described, bucket_bytes):
        flat = torch.zeros(bucket.nbytes, dtype=torch.uint8)
        for slot in bucket.slots:
            flat[slot.offset : slot.offset + slot.nbytes] = values[slot.name].reshape(-1).view(torch.uint8)
        received.append((bucket, flat))
    return StagedWeights(1, version, "", received)
