"""Properties of algorithms.md 10 that need no model: rejection (T1, T6, T8, T10, T25, T28), masks, versions, sampling.

T4, T5 and T7 are in test_unbiased, T9, T15 and T16 in test_partitions; docs/algorithms.md has the whole table.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from actor.engine.probe import check_frequencies
from actor.engine.sampling import sample
from broker.batch import collate
from broker.decision import Rule, Scores, accept_all, reject
from broker.packing import make_shards
from broker.pipeline import Pipeline
from common import wire
from common.codec import decode, encode
from common.config import RolloutSection, RunConfig
from common.errors import EngineError
from common.objective import LossSection
from common.obrs import divergence, log_acceptance, log_inclusion, thin
from common.philox import uniforms
from common.zbounds import interpolate, kappa
from learner.losses.corrections import by_sequence
from learner.losses.policy import policy_loss
from learner.losses.tokens import Tokens
from tests.properties.made import delivered, tokens_of, trajectory
from tests.properties.test_obrs_properties import kl, masses, pairs
from tests.unit.test_pipeline import config as config_of_pipeline
from tests.unit.test_pipeline import trajectories

P = np.array([0.50, 0.25, 0.15, 0.08, 0.02])
Q = np.array([0.40, 0.10, 0.30, 0.15, 0.05])


# ---- rejection ----------------------------------------------------------------------------------


@settings(max_examples=40)
@given(pairs())
def test_the_rest_of_the_identities(pair):
    """T1: Z(1) = 1 - TV; weights of what is accepted have mean 1; chi-square falls; Z-weights never exceed lambda Z."""
    p, q, threshold = pair
    _, at_one = masses(p, q, 1.0)
    assert at_one.sum() == pytest.approx(1 - 0.5 * np.abs(p - q).sum(), abs=1e-5)
    a, m = masses(p, q, threshold)
    z, after = m.sum(), m / m.sum()
    assert (q * a).sum() == pytest.approx(z, rel=1e-4)
    np.testing.assert_allclose(p / after, z * np.maximum(threshold, p / q), rtol=1e-4)
    assert (after * (p / after)).sum() == pytest.approx(1)
    chi_before, chi_after = ((p - q) ** 2 / q).sum(), ((p - after) ** 2 / after).sum()
    assert chi_after <= chi_before * (1 + 1e-5) + 1e-6
    assert z * (p / a).sum() <= 1 + 1e-4  # the elementary proof of theorem 3.3
    second_moment = (p * np.maximum(threshold, p / q)).sum()
    assert second_moment >= (p * p / q).sum() * (1 - 1e-5)  # per generated token never better than plain weights
    assert z * second_moment <= (p * p / q).sum() * (1 + 1e-4)  # per trained token never worse


@settings(max_examples=40)
@given(pairs(), st.integers(0, 2**16))
def test_no_other_rule_of_the_same_budget_comes_closer(pair, seed):
    """T1, theorem 3.4: against random acceptance rules that are filled up to the same Z."""
    p, q, threshold = pair
    _, m = masses(p, q, threshold)
    z, rng = m.sum(), np.random.default_rng(seed)
    rule = rng.uniform(0, 1, len(p)) ** rng.uniform(0.2, 3)
    rule = np.minimum(1, rule * z / (q * rule).sum())
    for _ in range(50):
        free = rule < 1
        gap = z - (q * rule).sum()
        if gap < 1e-12 or not free.any():
            break
        rule[free] = np.minimum(1, rule[free] + gap / q[free].sum())
    assume(abs((q * rule).sum() - z) < 1e-7)
    assert kl(p, q * rule / z) >= kl(p, m / z) - 1e-5


@settings(max_examples=40)
@given(st.floats(0.2, 0.99), st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30))
def test_both_debiased_z_have_the_acceptance_as_their_mean(acceptance, parts):
    """T8: exactly; and the interpolated one never leaves its bounds, whatever the acceptance."""
    core = np.array([0.05 + 0.9 * c for c, _ in parts], np.float32)
    upper = np.array([c + (1 - c) * w for c, (_, w) in zip(core.tolist(), parts, strict=True)], np.float32)
    z, theta = interpolate(core, upper, acceptance)
    assert 0 <= theta <= 1
    assert (z >= core).all() and (z <= upper).all()
    if core.mean() <= acceptance <= upper.mean():
        assert z.mean() == pytest.approx(acceptance, abs=1e-5)
    paper, factor = kappa(core, acceptance)
    assert paper.mean() == pytest.approx(acceptance, abs=1e-5)
    np.testing.assert_allclose(paper, factor * core, rtol=1e-5)


GROUPS = st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=2), min_size=1, max_size=4)


def batch_of(groups, seed=0, **how):
    """Two siblings a group with so many sampled tokens, the third one's rewards drawn; ``(batch, config)``."""
    rng = np.random.default_rng(seed)
    config = RunConfig(rollout=RolloutSection(group_size=2), **how)
    members = [
        trajectory(10 + g, s, rng.integers(0, 2), [0, 0] + [1] * n, rng)
        for g, siblings in enumerate(groups) for s, n in enumerate(siblings)
    ]  # fmt: skip
    return members, config


def scores_of(batch, seed=1, spread=0.8):
    noise = np.random.default_rng(seed).normal(0, spread, len(batch.log_q))
    return Scores(4, np.minimum(0, batch.log_q + noise).astype(np.float32), np.zeros((len(noise), 0), np.float32))


def decided(shards):
    """``{(group, sibling): (accept, log m) bytes}`` of every row of shards."""
    out = {}
    for shard in shards:
        for row, key in enumerate(zip(shard.groups.tolist(), shard.siblings.tolist(), strict=True)):
            at = slice(*shard.cu_seqlens[row : row + 2])
            out[key] = shard.accept[at].tobytes(), shard.log_m[at].tobytes()
    return out


@settings(max_examples=25)
@given(groups=GROUPS, seed=st.integers(0, 99))
def test_coins_know_neither_the_batch_nor_the_shard_nor_the_order(groups, seed):
    """T6: the same tokens alone, among others, in another order, on one rank or four: the same bits."""
    members, config = batch_of(groups, seed)
    whole = collate(0, members, config)
    scores = scores_of(whole)
    decision = reject(whole, scores, Rule(3, 0.1))
    wanted = decided(make_shards(whole, decision, 1, config))
    for world in (2, 4):
        assert decided(make_shards(whole, decision, world, config)) == wanted
    backwards = collate(7, members[::-1], config)
    assert decided(make_shards(backwards, reject(backwards, scores, Rule(3, 0.1)), 1, config)) == wanted
    alone = collate(0, members[-2:], config)
    of_last = slice(-len(alone.log_q), None)
    part = Scores(4, scores.log_p[of_last], scores.topk_log_p[of_last])
    found = decided(make_shards(alone, reject(alone, part, Rule(3, 0.1)), 1, config))
    assert found == {key: wanted[key] for key in found}


@settings(max_examples=25)
@given(groups=GROUPS, seed=st.integers(0, 99), log_thresholds=st.lists(st.floats(-3, 3), min_size=2, max_size=2))
def test_advantages_and_denominators_are_those_of_before_any_coin(groups, seed, log_thresholds):
    """T10: byte for byte the same under every lambda, and with rejection off, whoever survives."""
    members, config = batch_of(groups, seed)
    batch = collate(0, members, config)
    decisions = [reject(batch, scores_of(batch), Rule(3, threshold)) for threshold in log_thresholds]
    off, *others = [make_shards(batch, one, 1, config)[0] for one in (accept_all(batch), *decisions)]
    for shard in others:
        assert shard.advantages.tobytes() == off.advantages.tobytes()
        assert shard.weights.tobytes() == off.weights.tobytes()
    easy, hard = (int(decisions[i].accepted) for i in np.argsort(log_thresholds))
    assert hard <= easy <= sum(map(sum, groups))


@settings(max_examples=25)
@given(groups=GROUPS, seed=st.integers(0, 99))
def test_equal_policies_reject_nothing_and_weigh_everything_one(groups, seed):
    """T25, bitwise from the broker through the wire to the loss: log m = log q, slopes are those without rejection."""
    members, config = batch_of(groups, seed)
    batch = collate(0, members, config)
    scores = Scores(4, batch.log_q, np.zeros((len(batch.log_q), 0), np.float32))
    decision = reject(batch, scores, Rule(5, 0.0))
    assert decision.accepted == decision.proposed == sum(map(sum, groups))
    assert decision.divergence is not None and decision.divergence.expected_acceptance == 1.0
    (sent,) = delivered(batch, decision, config)
    tokens = tokens_of(sent)
    assert tokens.accept.all()
    assert torch.equal(tokens.log_m, tokens.log_q) and torch.equal(tokens.log_p_v, tokens.log_q)
    for anchor in ("behaviour", "broker", "proximal"):
        section = LossSection(anchor=anchor)
        share, stats = policy_loss(tokens.log_q, torch.zeros_like(tokens.log_q), tokens, section)
        assert torch.equal(share.slope, -tokens.advantages * tokens.weights)
        assert stats.weight.item() == stats.weight_squared.item() == len(tokens.accept)


BITS = st.integers(0, 2**32 - 1)


@settings(max_examples=40)
@given(st.lists(st.tuples(BITS, BITS, BITS), min_size=1, max_size=20))
def test_log_m_travels_bit_for_bit(bits):
    """T28: any float32 at all, signed zeros, subnormals and NaNs with their payloads among them."""
    values = np.array(bits, np.uint32).T
    n = values.shape[1]
    log_q, log_m, log_p = (row.copy().view(np.float32) for row in values)
    shard = wire.Shard(
        step=0, rank=0, world=1, tokens_global=n + 1, temperature=1.0, groups=np.zeros(1, np.int64),
        siblings=np.zeros(1, np.int32), cu_seqlens=np.array([0, n], np.int32), spans=np.array([0, n], np.int32),
        advantages=np.ones(1, np.float32), weights=np.ones(1, np.float32), token_ids=np.zeros(n, np.int32),
        trainable=np.ones(n, np.uint8), accept=np.ones(n, np.uint8), log_q=log_q, log_m=log_m, log_p=log_p,
    )  # fmt: skip
    message = decode([bytes(frame) for frame in encode(shard)], wire.FROM_BROKER)
    for name, sent in (("log_q", values[0]), ("log_m", values[1]), ("log_p", values[2])):
        assert getattr(message, name).view(np.uint32).tolist() == sent.tolist()


@settings(max_examples=25)
@given(groups=GROUPS, seed=st.integers(0, 99))
def test_what_the_broker_decided_is_what_the_learner_weighs_with(groups, seed):
    """T28 from the coin to the tensor: the very bits of ``min(log q, log p - log lambda)``."""
    members, config = batch_of(groups, seed)
    batch = collate(0, members, config)
    scores = scores_of(batch)
    decision = reject(batch, scores, Rule(1, 0.3))
    (sent,) = delivered(batch, decision, config)
    on = decision.accept == 1
    wanted = log_inclusion(scores.log_p[on], batch.log_q[on], 0.3)
    assert sent.log_m.numpy()[on].tobytes() == wanted.tobytes()
    assert sent.log_q.numpy()[on].tobytes() == batch.log_q[on].tobytes()
    assert (sent.accept.numpy() == 1).tolist() == on.tolist()


def test_estimates_of_a_batch_are_the_exact_divergences_of_its_law():
    """1.2, 1.3: with every token as often as q says, KL falls from 0.168 to 0.053, Z = 0.75, ESS 0.889."""
    counts = np.round(Q * 2000).astype(int)
    lp, lq = (np.repeat(np.log(x), counts).astype(np.float32) for x in (P, Q))
    place = np.concatenate([(np.arange(n) + 0.5) / n for n in counts]).astype(np.float32)  # coins at their quantiles
    found = divergence(lp, lq, thin(lp, lq, place, 0.0))
    assert found.kl_before == pytest.approx(0.168058, abs=1e-5)
    assert found.kl_after == pytest.approx(0.052962, abs=1e-5)
    assert found.expected_acceptance == pytest.approx(0.75, abs=1e-6)
    assert found.ess == pytest.approx(8 / 9, abs=2e-3)


def test_gaussian_mismatch_has_the_acceptance_and_the_gain_of_the_page():
    """11.1: Z = 1 - sqrt(KL / pi) and a divergence 2.93 times smaller at lambda 1, 10 times at Z = 0.88; any V."""
    rng = np.random.default_rng(0)
    sd = 0.1356
    p = np.exp(rng.normal(0, 1, 200_000))
    p /= p.sum()
    q = p * np.exp(-rng.normal(0, sd, len(p)))
    q /= q.sum()
    lp, lq = np.log(p), np.log(q)
    before = float((p * (lp - lq)).sum())
    for c, reduction in ((0.0, 2.934), (0.8, 9.88)):
        m = np.exp(log_inclusion(lp, lq, c * sd))
        z = m.sum()
        cdf, density = 0.5 * (1 + math.erf(c / math.sqrt(2))), math.exp(-c * c / 2) / math.sqrt(2 * math.pi)
        assert z == pytest.approx(1 - sd * (c * cdf + density), abs=0.01)
        assert before / float((p * (lp - np.log(m / z))).sum()) == pytest.approx(reduction, rel=0.1)
        assert np.exp(log_acceptance(lp, lq, c * sd)).dot(q) == pytest.approx(z, rel=1e-9)
    assert np.minimum(p, q).sum() == pytest.approx(1 - math.sqrt(before / math.pi), abs=1e-3)


# ---- masks and versions -------------------------------------------------------------------------


SURROGATES = {  # losses whose value is what their slope differentiates
    "double_sided": LossSection(kind="double_sided", clip_low=0.3, clip_high=0.4),
    "ppo": LossSection(clip_low=0.1, clip_high=0.3),
    "dppo_tv": LossSection(kind="dppo_tv", tv_threshold=0.1, ratio_penalty=1e-2),
}


@pytest.mark.parametrize("name", SURROGATES)
@settings(max_examples=20)
@given(logits=st.lists(st.floats(-2, 2), min_size=3, max_size=6), seed=st.integers(0, 999))
def test_slopes_are_finite_differences_of_the_masked_surrogate(name, logits, seed):
    """T12, through the softmax of every logit: what stands under sg in the report is differentiated here."""
    section, rng, n = SURROGATES[name], np.random.default_rng(seed), len(logits)
    z = torch.tensor(logits, dtype=torch.float64)
    log_q = torch.from_numpy(np.log(rng.dirichlet(np.ones(n))))
    advantages, ones = torch.from_numpy(rng.normal(size=n)), torch.ones(n, dtype=torch.float64)
    tokens = Tokens(log_q, log_q, log_q, advantages, ones, torch.ones(n, dtype=torch.uint8))

    def value(z):
        return policy_loss(z.log_softmax(0), 0 * ones, tokens, section)[0]

    log_ratio, h = z.log_softmax(0) - log_q, 1e-6
    edges = [0.7, 1.4, 0.9, 1.3]
    assume(min(float((log_ratio - math.log(e)).abs().min()) for e in edges) > 1e-4)
    moved = (z.log_softmax(0).exp() - log_q.exp()).abs()
    assume(float((moved - 0.1).abs().min()) > 1e-4)
    slope = value(z).slope
    ours = slope - z.softmax(0) * slope.sum()  # d log pi(y) / dz = e_y - pi
    for i in range(n):
        step = torch.zeros(n, dtype=torch.float64)
        step[i] = h
        numeric = (value(z + step).loss - value(z - step).loss) / (2 * h)
        assert float(ours[i]) == pytest.approx(float(numeric), rel=1e-5, abs=1e-6)
    if name == "double_sided":
        ratio = log_ratio.exp()
        inside = (ratio > 0.7) & (ratio < 1.4)
        assert torch.equal(slope != 0, inside & (advantages != 0))


@settings(max_examples=25)
@given(
    versions=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=2, max_size=2),
    seed=st.integers(0, 99),
)
def test_each_token_of_several_versions_has_its_own_density(versions, seed):
    """T14: one trajectory is one sample; coin and log m follow each token's own log q, whichever version logged it."""
    config = RunConfig(rollout=RolloutSection(group_size=2))

    def members(of):
        rng = np.random.default_rng(seed)
        return [trajectory(0, s, s, [0] + [1] * len(v), rng, versions=[0, *v]) for s, v in enumerate(of)]

    batch = collate(0, members(versions), config)
    on = batch.trainable == 1
    assert batch.versions[on].tolist() == [v for of in versions for v in of]
    scores = scores_of(batch, seed)
    found = reject(batch, scores, Rule(2, 0.2))
    naive = [min(q, np.float32(p - np.float32(0.2))) for p, q in zip(scores.log_p, batch.log_q, strict=True)]
    assert found.log_m.tolist() == [float(m) if one else 0.0 for m, one in zip(naive, found.accept, strict=True)]
    of_one = collate(0, members([[4] * len(v) for v in versions]), config)
    again = reject(of_one, scores, Rule(2, 0.2))
    assert again.accept.tolist() == found.accept.tolist() and again.log_m.tobytes() == found.log_m.tobytes()


@settings(max_examples=25)
@given(st.lists(st.integers(1, 2), min_size=6, max_size=6))
def test_a_trajectory_is_as_old_as_its_oldest_token(versions):
    """T14: one token of a version older than the grant allows makes the whole of it too old."""
    pipeline = Pipeline(config_of_pipeline(), 16)
    pipeline.ledger.next_step = 2
    pipeline.grant("a", 1, 2)
    message = trajectories(0, version=2, siblings=[0])
    on = message.trainable == 1
    message.versions[on] = versions[: on.sum()]
    oldest = min(versions[: on.sum()])
    assert message.summary[0] == [oldest]
    (reason,) = pipeline.admit(message, "a", 2).reasons
    assert reason == "" if oldest == 2 else "older than the grant" in reason


@settings(max_examples=25)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), seed=st.integers(0, 9999), low=st.floats(0.01, 0.4))
def test_three_forms_of_gspo_are_one(lengths, seed, low):
    """T17: the sequence form by autograd, GSPO-token by autograd, and ours: value and gradient."""
    g, n, count = torch.Generator().manual_seed(seed), sum(lengths), len(lengths)
    log_q = -torch.rand(n, generator=g, dtype=torch.float64) * 3
    own = (log_q + 0.4 * torch.randn(n, generator=g, dtype=torch.float64)).requires_grad_()
    of = torch.arange(count).repeat_interleave(torch.tensor(lengths))
    advantages = torch.randn(count, generator=g, dtype=torch.float64)
    sizes = torch.tensor(lengths, dtype=torch.float64)

    def clipped(ratio, a):
        return torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + 2 * low) * a)

    mean = torch.zeros(count, dtype=torch.float64).index_add(0, of, own - log_q) / sizes
    by_row = -clipped(mean.exp(), advantages).mean()
    token_ratio = mean.exp().detach()[of] * (own - own.detach()).exp()
    per_token = clipped(token_ratio, advantages[of]) / sizes[of] / count
    section = LossSection(kind="gspo", clip_low=low, clip_high=2 * low, aggregate="sequence_mean")
    weights = 1 / (count * sizes[of])
    tokens = Tokens(log_q, log_q, log_q, advantages[of], weights, torch.ones(n, dtype=torch.uint8))
    now = own.detach()
    share, _ = policy_loss(now, 0 * now, by_sequence(now, tokens, torch.tensor(lengths), section), section)
    for loss in (by_row, -per_token.sum()):
        (slope,) = torch.autograd.grad(loss, own, retain_graph=True)
        assert share.loss.item() == pytest.approx(loss.item(), rel=1e-10, abs=1e-12)
        np.testing.assert_allclose(share.slope.numpy(), slope.numpy(), rtol=1e-9, atol=1e-12)


# ---- sampling -----------------------------------------------------------------------------------

LOGITS = np.array([3.0, 2.2, 1.5, 0.8, 0.2, -0.5, -1.0, -1.5])  # J10
DRAWS = 100_000


def drawn(temperature):
    """1e5 tokens of the fixed model through our engine's sampling; ``(ids, log q [8])``."""
    logits = torch.from_numpy(LOGITS).float().expand(DRAWS, -1)
    noise = torch.from_numpy(uniforms(11, 1, np.arange(DRAWS), 0, 0, 0))
    found = sample(logits, torch.full((DRAWS,), temperature), noise)
    assert torch.equal(found.logprobs, found.logprobs_nV.gather(1, found.ids[:, None])[:, 0])
    return found.ids.numpy(), found.logprobs_nV[0].numpy()


def log_softmax(z):
    return (z - z.max() - np.log(np.exp(z - z.max()).sum())).astype(np.float32)


def test_tokens_come_as_often_as_their_returned_density_says_and_every_unusable_one_is_found():
    """T24: chi-square of 1e5 tokens at T = .7 against exp(log q), and against what 0.2 calls unusable."""
    ids, log_q = drawn(0.7)
    np.testing.assert_allclose(log_q, log_softmax(LOGITS / 0.7), atol=1e-6)
    order = np.argsort(-log_q)[:7]
    check_frequencies("ours", ids, order, log_q[order])
    with pytest.raises(EngineError, match="does not sample from"):  # vLLM's raw_logprobs: before the temperature
        check_frequencies("raw", ids, order, log_softmax(LOGITS)[order])
    kept = np.cumsum(np.exp(log_q[order])) - np.exp(log_q[order]) < 0.9  # top_p = .9 behind the returned value
    inside = np.isin(ids, order[kept])
    assert 0.9 <= inside.mean() < 0.96
    with pytest.raises(EngineError, match="does not sample from"):
        check_frequencies("before truncation", ids[inside], order, log_q[order])
    true = log_q[order[kept]] - np.log(np.exp(log_q[order[kept]]).sum())
    check_frequencies("renormalised on its support", ids[inside], order[kept], true)
