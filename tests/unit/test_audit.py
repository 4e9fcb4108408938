"""Receipts tell the truth: lying actors are flagged, honest ones never; a biased stratum stands out, noise does not."""

import numpy as np

from broker.audit import audit
from broker.batch import Batch, collate
from broker.decision import Rule, Scores, reject
from broker.honesty import FEWEST, Honesty
from broker.receipts import receipt
from common.config import RolloutSection, RunConfig
from tests.properties.made import sibling_of

VOCAB = 12


CONFIG = RunConfig(rollout=RolloutSection(group_size=4))


def policy(rng: np.random.Generator, shape: tuple[int, ...], spread: float = 1.0) -> np.ndarray:
    logits = spread * rng.standard_normal((*shape, VOCAB))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def batch_of(
    seed: int, lie: dict[str, float], drift: float = 0.3, trajectories: int = 64, length: int = 40
) -> tuple[Batch, Scores]:
    """Tokens really drawn from q; actors of ``lie`` report log q at another temperature."""
    rng = np.random.default_rng(seed)
    members, scores = [], []
    for index in range(trajectories):
        actor = f"a{index % 3}"
        log_q = policy(rng, (length,))
        log_p = log_q + drift * rng.standard_normal(log_q.shape)
        log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
        tokens = (np.exp(log_q).cumsum(-1) < rng.random((length, 1))).sum(-1).clip(max=VOCAB - 1)
        claimed = log_q * lie.get(actor, 1.0)
        claimed = claimed - np.log(np.exp(claimed).sum(-1, keepdims=True))
        rows = np.arange(length)
        members.append(
            sibling_of(
                index // 4, index % 4, float(rng.integers(0, 2)), tokens, np.ones(length), claimed[rows, tokens],
                np.zeros(length), actor=actor, event=index, channels={},
            )
        )  # fmt: skip
        scores.append(log_p[rows, tokens])
    log_p = np.concatenate(scores).astype(np.float32)
    return collate(seed, members, CONFIG), Scores(0, log_p, np.zeros((len(log_p), 0), np.float32))


def test_an_actor_that_reports_another_temperature_is_flagged_and_honest_ones_are_not():
    honesty = Honesty(0.5, 0)
    said = [sentence for step in range(12) for sentence in honesty.check(*batch_of(step, {"a1": 1.3}))]
    assert len(said) == 1
    assert said[0].startswith("a1 claims probabilities that cannot be")
    assert set(honesty.suspects) == {"a1"}
    honest = Honesty(1.0, 0)
    assert not [s for step in range(20) for s in honest.check(*batch_of(step, {}, drift=1.0))]


def test_an_actor_with_a_small_share_of_each_batch_is_judged_too():
    honesty, random = Honesty(1.0, 0), np.random.default_rng(0)
    said = []
    for step in range(60):
        said += [(step, sentence) for sentence in honesty._add("a0", random.exponential(0.6, 50))]
        assert not honesty._add("a1", random.exponential(1.0, 50))
    assert [step for step, _ in said] == [FEWEST // 50 - 1]


def test_a_turncoat_is_found_out_however_long_it_was_honest():
    honesty, random = Honesty(1.0, 0), np.random.default_rng(0)
    assert not [s for _ in range(2000) for s in honesty._add("a0", random.exponential(1.0, 200))]
    found = [step for step in range(100) if honesty._add("a0", random.exponential(0.6, 200))]
    assert found and found[0] < 30


def test_verification_can_be_switched_off():
    honesty = Honesty(0.0, 0)
    assert honesty.check(*batch_of(0, {"a1": 3.0})) == []
    assert honesty.accounts == {}


def test_a_stratum_that_loses_more_than_its_noise_is_named():
    batch, scored = batch_of(0, {})
    positive = np.repeat(batch.advantages > 0, np.diff(batch.cu_seqlens))
    biased = Scores(0, scored.log_p - np.where(positive, np.float32(0.4), np.float32(0)), scored.topk_log_p)
    found = audit(batch, reject(batch, biased, Rule(0, 0.0)))
    assert any(w.startswith("advantage 1: ") for w in found["warnings"])
    assert not any(w.startswith("lag") for w in found["warnings"])
    tokens = sum(count for count, _, _ in found["strata"]["advantage"].values())
    assert tokens == len(batch.token_ids)


def test_chance_alone_names_nobody():
    warned = 0
    for seed in range(30):
        batch, scored = batch_of(seed, {}, trajectories=32)
        warned += bool(audit(batch, reject(batch, scored, Rule(seed, 0.0)))["warnings"])
    assert warned <= 1


def test_a_receipt_holds_the_interval_of_the_divergence():
    truths = []
    for seed in range(40):
        batch, scored = batch_of(seed, {}, drift=0.5, trajectories=32)
        line = receipt(batch, reject(batch, scored, Rule(seed, 0.0)), 1.0)
        truths.append((line["kl_before"], line["kl_before_se"], line["kl_after"], line["kl_after_se"]))
    before, before_se, after, after_se = np.array(truths).T
    for value, error in ((before, before_se), (after, after_se)):
        assert 0.6 < value.std() / error.mean() < 1.6  # the error is that of the estimate
    assert (after < before).all()
