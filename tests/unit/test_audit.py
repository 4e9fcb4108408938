"""Receipts tell the truth: lying actors are flagged, honest ones never; a biased stratum stands out, noise does not."""

from dataclasses import replace

import numpy as np
import pytest

from broker.audit import audit, compare_clusters
from broker.batch import Batch, collate
from broker.decision import Rule, Scores, reject
from broker.honesty import FEWEST, Honesty
from broker.receipts import receipt
from common.config import AdvantageSection, RolloutSection, RunConfig
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
        said += [(step, sentence) for sentence in honesty._add("a0", random.exponential(0.6, 50), 1)]
        assert not honesty._add("a1", random.exponential(1.0, 50), 1)
    assert [step for step, _ in said] == [FEWEST // 50 - 1]


def test_a_turncoat_is_found_out_however_long_it_was_honest():
    honesty, random = Honesty(1.0, 0), np.random.default_rng(0)
    assert not [s for _ in range(2000) for s in honesty._add("a0", random.exponential(1.0, 200), 4)]
    found = [step for step in range(100) if honesty._add("a0", random.exponential(0.6, 200), 4)]
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


def test_a_stratum_that_means_nothing_seldom_stands_out_though_trajectories_differ():
    random, found = np.random.default_rng(0), []
    for _ in range(400):
        of = random.integers(50, 400, 64)
        hits = random.binomial(of, np.clip(random.normal(0.9, 0.05, 64), 0, 1))
        found.append(compare_clusters(hits, of, random.random(64) < 0.5))
    assert np.std([one.z for one in found]) == pytest.approx(1.0, abs=0.15) and not any(one.stands_out for one in found)
    half = np.arange(64) < 32
    assert compare_clusters(np.where(half, 80, 95), np.full(64, 100), half).stands_out
    assert compare_clusters(np.array([80, 190]), np.array([100, 200]), np.array([True, False])).z > -2  # two draws


def test_lags_are_compared_by_trajectory_and_come_to_what_they_were():
    batch, scores = batch_of(3, {})
    decision = reject(batch, scores, Rule(0, 0.0))
    lags, tokens, taken = batch.by_lag(decision.accept == 1)
    assert len(lags) == len(batch.groups) and tokens.sum() == batch.lags.sum() and taken.sum() == decision.accepted
    assert np.bincount(lags, tokens).tolist() == batch.lags.tolist()


def test_an_actor_is_not_accused_of_what_the_selection_or_the_cut_did():
    random = np.random.default_rng(0)
    honesty = Honesty(1.0, 0)
    rare = random.random(200_000) < 0.001  # q = .001, p = .1: p/q is 100, and .9 / .999 of the others
    assert not honesty._add("a0", np.where(rare, 100.0, 0.9 / 0.999), 2000) and honesty.accounts["a0"].mean < 0.95
    assert honesty._add("a1", np.full(10_000, 0.9), 100)  # nothing was cut off that could make up for it


def test_where_outcomes_choose_what_is_trained_an_honest_actor_is_not_accused_and_a_gross_lie_still_is():
    """Rollouts stop with probability .1 a token under q and .05 under p; batches in which one ran on are not whole."""
    random, exact, wide = np.random.default_rng(0), Honesty(1.0, 0), Honesty(1.0, 0, chosen=True)
    stops = random.geometric(0.1, (20_000, 8))
    lengths = stops[(stops <= 10).all(axis=1)].reshape(-1)
    ratios = np.full(int(lengths.sum()), 0.95 / 0.9)
    ratios[np.cumsum(lengths) - 1] = 0.05 / 0.1
    assert exact._add("a0", ratios, len(lengths)) and not wide._add("a0", ratios, len(lengths))
    assert wide._add("a1", 0.6 * ratios, len(lengths))


def test_where_outcomes_choose_answers_of_one_token_may_move_much_and_longer_ones_share_in_it():
    """Answers are right with probability .1 under q and .3 under p; those of groups with both kinds are kept."""
    right = np.random.default_rng(0).random((10_000, 4)) < 0.1
    mixed = right[right.any(axis=1) & ~right.all(axis=1)].reshape(-1)
    first = np.where(mixed, 0.3 / 0.1, 0.7 / 0.9)
    assert 1.3 < first.mean() < 1.5

    def accused(tokens: int, lie: float) -> bool:
        ratios = np.concatenate([first, np.ones((tokens - 1) * len(first))])
        return bool(Honesty(1.0, 0, chosen=True)._add("a0", lie * ratios, len(first)))

    assert not accused(1, 1.0) and not accused(40, 1.0)
    assert accused(1, 1.6) and accused(40, 1.3) and accused(40, 0.7) and accused(1, 0.25)


def test_answers_of_which_nothing_is_trained_make_no_room_for_a_lie():
    config = RunConfig(rollout=RolloutSection(group_size=4), advantage=AdvantageSection(zero_signal="mask"))
    honesty, found = Honesty(1.0, 0, chosen=True), []
    for step in range(20):
        batch, scored = batch_of(step, {}, trajectories=800, length=6)
        members = [replace(m, reward=float(m.sibling % 2) if m.group % 10 == 0 else 1.0) for m in batch.members]
        batch = collate(step, members, config)
        lied = np.repeat([actor == "a1" for actor in batch.actors], np.diff(batch.cu_seqlens))
        found += honesty.check(batch, replace(scored, log_p=scored.log_p + np.float32(np.log(1.7)) * lied))
    assert len(found) == 1 and set(honesty.suspects) == {"a1"}


def test_accounts_survive_a_restart_and_names_that_come_and_go_do_not_add_up(monkeypatch):
    monkeypatch.setattr("broker.honesty.ACCOUNTS", 3)
    honesty = Honesty(1.0, 0)
    for name in ("a0", "a1", "a0", "a2", "a3"):
        honesty._add(name, np.full(3000, 0.5 if name == "a2" else 1.0), 30)
    assert list(honesty.accounts) == ["a0", "a2", "a3"]
    again = Honesty(1.0, 0)
    again.restore(honesty.state())
    assert again.accounts == honesty.accounts and again.suspects == {"a2": 0.5}
    assert again._add("a2", np.full(10, 0.5), 1) == []  # it was said
