"""What rejection does to an expectation: nothing. Exact sums over a vocabulary and both sides of every coin.

A token x of density q(x) is accepted with probability a(x), so ``q a`` and ``q (1 - a)`` are the weights
of an enumerated batch of 2 V tokens, whose loss is the expected loss of one sampled token.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.batch import collate
from broker.decision import Rule, Scores, reject
from common.config import RolloutSection, RunConfig
from common.objective import LossSection
from common.obrs import log_acceptance, log_inclusion
from learner.losses.policy import policy_loss
from learner.losses.tokens import Tokens
from tests.properties.made import trajectory

P = np.array([0.50, 0.25, 0.15, 0.08, 0.02])  # J1
Q = np.array([0.40, 0.10, 0.30, 0.15, 0.05])
F = np.array([1.0, -2.0, 0.5, 3.0, -1.0])
LATER = P * np.exp([0.4, -0.3, 0.1, -0.6, 0.8])  # J6: the policy that learns, while P scored
LATER /= LATER.sum()

LINEAR = {  # their loss is -E_pi[A] where nothing is clipped, by its value or by its slope
    "ppo": LossSection(clip_low=1.0, clip_high=1e9),
    "ppo_broker": LossSection(anchor="broker", clip_low=1.0, clip_high=1e9),
    "ppo_proximal": LossSection(anchor="proximal"),
    "reinforce": LossSection(kind="reinforce", anchor="none"),
    "cispo": LossSection(kind="cispo", clip_low=1.0, ratio_cap=1e9),
    "double_sided": LossSection(kind="double_sided", clip_low=1.0, clip_high=1e9),
    "m2po": LossSection(kind="m2po"),
}
BENT = {
    "clipped": LossSection(clip_low=0.1, clip_high=0.3),
    "clipped_broker": LossSection(anchor="broker", clip_low=0.1, clip_high=0.3),
    "cispo": LossSection(kind="cispo", clip_low=1.0, ratio_cap=1.5),
    "double_sided": LossSection(kind="double_sided", clip_low=0.3, clip_high=0.4),
    "dppo_tv": LossSection(kind="dppo_tv", tv_threshold=0.05, ratio_penalty=1e-2),
    "icepop": LossSection(anchor="proximal", correction="icepop", correction_low=0.6, correction_high=1.5),
    "kl": LossSection(kl=0.3, kl_estimator="k3"),
    "distill": LossSection(distill=0.7, anchor="proximal"),
    "entropy": LossSection(entropy=0.02),
}


def as_used(threshold):
    """Lambda as the functions have it, whose log is a float32."""
    return float(np.exp(np.float64(np.float32(np.log(threshold)))))


def softmax(logits):
    e = np.exp(logits - np.max(logits))
    return e / e.sum()


@st.composite
def laws(draw):
    """``(p, q, pi, A, lambda)`` over a vocabulary of at most 8."""
    size = draw(st.integers(2, 8))
    logits = st.lists(st.floats(-3, 3), min_size=size, max_size=size)
    p, q, pi = (softmax(np.array(draw(logits))) for _ in range(3))
    return p, q, pi, np.array(draw(logits)), draw(st.floats(0.05, 20))


def enumerated(p, q, pi, values, threshold, section, *, dtype=np.float64, log_z=0.0, mask=True, recompute=False):
    """``(expected loss, expected slope [V])``; p scored, pi learns.

    ``log_z`` is taken from log m, as the broker does for a Z weight. ``mask=False`` lets every token
    through with the same weights, ``recompute`` takes the density of the coins from pi: mistakes.
    """
    with np.errstate(divide="ignore"):
        lp, lq, lpi = (np.log(x).astype(dtype) for x in (p, q, pi))
    a = np.exp(log_acceptance(lp, lq, np.log(threshold))).astype(np.float64) if mask else np.ones(len(p))
    lm = log_inclusion(lpi if recompute else lp, lq, np.log(threshold)) - dtype(log_z)
    n = len(p)
    accept = np.concatenate((a > 0, np.zeros(n, bool)))

    def both(values, rejected=None):
        return torch.from_numpy(np.concatenate((values, values if rejected is None else rejected)).astype(dtype))

    tokens = Tokens(
        both(lq), both(lm, np.zeros(n)), both(lp, np.zeros(n)), both(values), both(q * a, q * (1 - a)),
        torch.from_numpy(accept.astype(np.uint8)), both(lq[::-1]), both(lpi[::-1]),
    )  # fmt: skip
    share, _ = policy_loss(both(lpi), both(values**2), tokens, section)
    return float(share.loss), share.slope.double().numpy().reshape(2, n).sum(0)


@pytest.mark.parametrize("name", LINEAR)
@settings(max_examples=8)
@given(law=laws())
def test_every_linear_loss_is_an_expectation_under_the_policy_that_learns(name, law):
    """T4: ``E[M pi / m A] = E_pi[A]`` for any pi and lambda, in float64 to rounding, in float32 to 1e-5."""
    p, q, pi, values, threshold = law
    _, slope = enumerated(p, q, pi, values, threshold, LINEAR[name])
    np.testing.assert_allclose(-slope, pi * values, rtol=1e-12, atol=1e-14)
    _, slope = enumerated(p, q, pi, values, threshold, LINEAR[name], dtype=np.float32)
    np.testing.assert_allclose(-slope, pi * values, rtol=3e-5, atol=1e-7)


@pytest.mark.parametrize("name", BENT)
@settings(max_examples=8)
@given(law=laws())
def test_rejection_moves_no_loss_and_no_slope(name, law):
    """T4, stacking rule 3: with coins or without, token by token the same expectation, clips and penalties included."""
    p, q, pi, values, threshold = law
    with_coins, slope = enumerated(p, q, pi, values, threshold, BENT[name])
    accept_all = np.minimum(threshold, (p / q).min()) * 0.5  # a threshold at which nothing is rejected
    without, plain = enumerated(p, q, pi, values, accept_all, BENT[name])
    assert with_coins == pytest.approx(without, rel=1e-10, abs=1e-12)
    np.testing.assert_allclose(slope, plain, rtol=1e-9, atol=1e-12)


def test_what_the_scoring_policy_cannot_say_is_lost_and_nothing_else():
    """T4 at the edge of its condition: tokens with p = 0 are never accepted, so their share of E_pi is missing."""
    p = np.array([0.6, 0.4, 0.0])
    q, pi, values = np.array([0.5, 0.3, 0.2]), np.array([0.3, 0.3, 0.4]), np.array([1.0, 2.0, 3.0])
    for threshold in (0.5, 1.0, 2.0):
        _, slope = enumerated(p, q, pi, values, threshold, LINEAR["reinforce"])
        np.testing.assert_allclose(-slope, [0.3, 0.6, 0.0], rtol=1e-12)


def test_the_readings_of_the_papers_objective():
    """J5: masked 0.295 = E_p f; with Z 0.22125 = Z E_p f; Algorithm 1 without its mask 0.4125, which is neither."""
    z = np.log(np.minimum(P, Q).sum())

    def reading(**how):
        return -enumerated(P, Q, P, F, 1.0, LINEAR["reinforce"], **how)[1].sum()

    assert reading() == pytest.approx(0.295, abs=1e-12)
    assert float(P @ F) == pytest.approx(0.295, abs=1e-12)
    assert reading(log_z=z) == pytest.approx(0.22125, abs=1e-12)
    assert reading(log_z=z, mask=False) == pytest.approx(0.4125, abs=1e-12)


def test_two_contexts_weighed_by_z_are_another_mixture_of_them():
    """J5: the uniform mixture is 0.338; eq. 5 over all tokens says 0.315, over accepted ones 0.523."""
    logits = np.array([2.0, 1, 0, -1])
    contexts = (
        (softmax(logits), softmax(logits + np.array([0.1, -0.1, 0.05, 0])), np.eye(4)[0]),
        (softmax(logits), softmax(logits[::-1]), np.eye(4)[3]),
    )
    plain, by_z, z = [], [], []
    for p, q, f in contexts:
        z.append(np.minimum(p, q).sum())
        plain.append(-enumerated(p, q, p, f, 1.0, LINEAR["reinforce"])[1].sum())
        by_z.append(-enumerated(p, q, p, f, 1.0, LINEAR["reinforce"], log_z=np.log(z[-1]))[1].sum())
    assert np.mean(plain) == pytest.approx(0.337986, abs=1e-6)
    assert np.mean(by_z) == pytest.approx(0.314769, abs=1e-6)
    assert np.sum(by_z) / np.sum(z) == pytest.approx(0.522781, abs=1e-6)


# ---- versions -----------------------------------------------------------------------------------


def test_coins_of_one_version_serve_a_later_one_and_recomputing_their_density_does_not():
    """T5, J6: truth 0.4603; with the shipped log m 0.4603, with max(lambda, p_v'/q) 0.6118."""

    def mean(pi, section=LINEAR["reinforce"], **how):
        return -enumerated(P, Q, pi, F, 1.0, section, **how)[1].sum()

    truth = float(LATER @ F)
    assert truth == pytest.approx(0.460298, abs=1e-6)
    assert mean(LATER) == pytest.approx(truth, abs=1e-12)
    assert mean(LATER, recompute=True) == pytest.approx(0.611798, abs=1e-6)
    assert mean(P) == pytest.approx(0.295, abs=1e-12)
    surrogate, _ = enumerated(P, Q, LATER, F, 1.0, LossSection(anchor="broker"))
    assert -surrogate == pytest.approx(0.343500, abs=1e-6)  # E_pv[min(rho A, clip A)]


@settings(max_examples=40)
@given(law=laws())
def test_what_a_recomputed_density_estimates(law):
    """T5: it weighs token x by ``a_v max(lambda, pi/q)``, which is pi/q only where neither had to decide."""
    p, q, pi, values, threshold = law
    _, slope = enumerated(p, q, pi, values, threshold, LINEAR["reinforce"], recompute=True)
    used = as_used(threshold)
    wrong = q * np.minimum(1, p / (used * q)) * np.maximum(used, pi / q)
    np.testing.assert_allclose(-slope, wrong * values, rtol=1e-9, atol=1e-12)
    right = (pi == p) | ((p >= used * q) & (pi >= used * q))
    assert (np.abs(wrong - pi) <= 1e-12)[right].all()


# ---- the structure of Jackpot's weight ----------------------------------------------------------


@settings(max_examples=40)
@given(law=laws(), cap=st.floats(1.0, 10.0))
def test_a_capped_masked_weight_is_truncated_importance_sampling_times_z(law, cap):
    """T7: ``E_coin[M min(Z max(lambda, r), c1)] = Z min(r, c1 / Z)``: lambda is left in Z and in the noise alone."""
    p, q, _, _, threshold = law
    z = np.minimum(q, p / as_used(threshold)).sum()
    section = LossSection(anchor="proximal", weight_cap=cap)
    _, slope = enumerated(p, q, p, np.ones(len(p)), threshold, section, log_z=np.log(z))
    np.testing.assert_allclose(-slope / q, z * np.minimum(p / q, cap / z), rtol=1e-9)


@settings(max_examples=40)
@given(law=laws(), first=st.floats(1.0, 6.0), second=st.floats(0.5, 3.0))
def test_the_papers_two_caps_come_to_one_coefficient(law, first, second):
    """1.3 (4): a generated token counts ``Z min(p_new/q, c1/Z) min(p_ref/p_new, c2)``, here with p_ref = q."""
    p, q, _, _, threshold = law
    z = np.minimum(q, p / as_used(threshold)).sum()
    section = LossSection(target="policy", weight_cap=first, anchor_cap=second, clip_low=1.0, clip_high=1e9)
    loss, _ = enumerated(p, q, p, np.ones(len(p)), threshold, section, log_z=np.log(z))
    wanted = q * z * np.minimum(p / q, first / z) * np.minimum(q / p, second) * (p / q)
    assert -loss == pytest.approx(wanted.sum(), rel=1e-9)


def test_the_brokers_z_weight_is_the_papers():
    """T7 through the broker: with every alternative known, pi / m is Z max(lambda, r), and capped as the page says."""
    rng = np.random.default_rng(0)
    group_size, copies = 5, 20
    config = RunConfig(rollout=RolloutSection(group_size=group_size, top_logprobs=5))
    everything = np.tile(np.arange(5), (2, 1)), np.tile(np.log(Q), (2, 1))
    members = [
        trajectory(g, x, 0.0, [0, 1], rng, ids=[0, x], log_q=[0, np.log(Q[x])], topk=everything)
        for g in range(copies) for x in range(group_size)
    ]  # fmt: skip
    batch = collate(0, members, config)
    log_p = np.where(batch.trainable == 1, np.log(P)[batch.token_ids], 0).astype(np.float32)
    scores = Scores(3, log_p, np.tile(np.log(P), (len(log_p), 1)).astype(np.float32))
    decision = reject(batch, scores, Rule(7, 0.0, "context"))
    weight = np.full(5, np.nan)
    on = decision.accept == 1
    weight[batch.token_ids[on]] = np.exp(log_p[on] - decision.log_m[on])
    np.testing.assert_allclose(weight, [0.9375, 1.875, 0.75, 0.75, 0.75], rtol=1e-5)
    a = np.array([1, 1, 0.5, 0.08 / 0.15, 0.4])
    np.testing.assert_allclose(a * np.minimum(weight, 1.2), 0.75 * np.minimum(P / Q, 1.2 / 0.75), rtol=1e-5)


def test_continuations_are_not_corrected_by_any_weight_of_a_token():
    """J11: the first token's estimate is E of a0 ~ p, a1 ~ q, 0.36; on policy it would be 0.88."""
    q0, p0 = np.array([0.7, 0.3]), np.array([0.4, 0.6])
    q1, p1 = np.array([[0.6, 0.4], [0.8, 0.2]]), np.array([[0.2, 0.8], [0.3, 0.7]])
    rewards = np.array([[0.5, 0.0], [0.0, 1.0]])
    score = np.array([1.0, 2.0])  # what the first token is asked about
    of_first = score * (q1 * rewards).sum(1)
    estimate = -enumerated(p0, q0, p0, of_first, 1.0, LINEAR["reinforce"])[1].sum()
    assert estimate == pytest.approx(0.36, abs=1e-12)
    assert (p0 * score * (p1 * rewards).sum(1)).sum() == pytest.approx(0.88, abs=1e-12)
