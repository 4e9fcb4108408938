"""Where a peer's public formula and ours differ, in numbers (algorithms.md 0.3, 4, 5 and 6).

Each peer's formula is written here as its repository has it; ours is called. Two of them stand with the
losses: verl's k1 mode, which bounds 1 / rho (test_losses: test_bounds_are_of_the_ratio_and_not_of_its_inverse),
and CISPO's cap by its two names (test_cispo_by_its_cap_and_by_what_is_above_one_are_the_same_numbers).
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.advantages import group_advantages
from broker.aggregation import span_weights
from broker.batch import collate
from broker.decision import Rule, Scores, reject
from broker.packing import weights_of
from common.config import RolloutSection, RunConfig
from common.errors import ConfigError
from common.objective import AdvantageSection, LossSection
from learner.losses.corrections import m2po
from learner.losses.policy import policy_loss
from learner.losses.tokens import Tokens
from tests.properties.made import trajectory

P = np.array([0.50, 0.25, 0.15, 0.08, 0.02])  # J1
Q = np.array([0.40, 0.10, 0.30, 0.15, 0.05])
F = np.array([1.0, -2.0, 0.5, 3.0, -1.0])
PAGE = [1.0, 0, 0, 1, 0, 0, 0, 0]  # O1


def of_densities(own, behaviour, advantages):
    """Tokens that were sampled with ``behaviour`` and are all accepted, weights 1: ``(log p, entropy, tokens)``."""
    log_q, ones = torch.tensor(behaviour).log(), torch.ones(len(own))
    tokens = Tokens(log_q, log_q, log_q, torch.tensor(advantages), ones, ones.to(torch.uint8))
    return torch.tensor(own).log(), ones, tokens


def of_ratios(ratios, advantages):
    return of_densities([0.1 * r for r in ratios], [0.1] * len(ratios), advantages)


# ---- advantages ---------------------------------------------------------------------------------


def verl_grpo(rewards, epsilon=1e-6):
    """``compute_grpo_outcome_advantage`` of one group."""
    if len(rewards) == 1:
        return np.array(rewards) / (1 + epsilon)  # mean 0, deviation 1
    return (np.array(rewards) - np.mean(rewards)) / (np.std(rewards, ddof=1) + epsilon)


def grpo(rewards, **section):
    return group_advantages(
        np.array(rewards, np.float32), np.array([len(rewards)]), len(rewards), AdvantageSection(**section)
    )


@settings(max_examples=40)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=16).filter(lambda r: len(set(r)) > 1))
def test_verl_divides_by_the_deviation_of_a_sample(rewards):
    """verl's torch.std has ddof=1: smaller by sqrt((G - 1) / G), 1.620 for 1.732 at G = 8; deviation=sample is that."""
    size = len(rewards)
    ours, theirs = grpo(rewards), verl_grpo(rewards)
    np.testing.assert_allclose(theirs, ours * math.sqrt((size - 1) / size), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(grpo(rewards, deviation="sample"), theirs, rtol=2e-5, atol=1e-6)
    assert grpo(PAGE)[0] == pytest.approx(1.7320, abs=1e-4) and verl_grpo(PAGE)[0] == pytest.approx(1.6202, abs=1e-4)


def test_verl_takes_the_reward_itself_of_a_group_of_one():
    """verl: mean 0 and deviation 1, so the advantage is R, here .7; ours is 0, and a run that wants it is refused."""
    assert verl_grpo([0.7])[0] == pytest.approx(0.7, rel=1e-5)
    assert grpo([0.7]).tolist() == [0.0]
    with pytest.raises(ConfigError, match=r"rollout.group_size.*advantage of 0"):
        RunConfig(rollout=RolloutSection(group_size=1))


# ---- denominators -------------------------------------------------------------------------------


def thinned():
    """J1 with every token as often as q says, in trajectories of six, thinned at lambda = 1: ``(batch, decision)``."""
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(5), np.round(Q * 24_000).astype(int))
    members = [
        trajectory(g, 0, 0.0, [0] + [1] * 6, rng, ids=[0, *part], log_q=[0, *np.log(Q)[part]])
        for g, part in enumerate(rng.permutation(ids).reshape(-1, 6))
    ]
    config = RunConfig(rollout=RolloutSection(group_size=1), advantage=AdvantageSection(kind="none"))
    batch = collate(0, members, config)
    log_p = np.where(batch.trainable == 1, np.log(P)[batch.token_ids], 0).astype(np.float32)
    return batch, reject(batch, Scores(1, log_p, np.zeros((len(log_p), 0), np.float32)), Rule(2, 0.0))


def test_verl_divides_by_the_tokens_that_its_mask_left():
    """J12: over all tokens the masked weights estimate E_p f = 0.295, over the accepted ones 0.295 / Z = 0.393."""
    batch, decision = thinned()
    on = decision.accept == 1
    value = np.exp(decision.log_p[on] - decision.log_m[on]) @ F[batch.token_ids[on]]
    ours = value * weights_of(batch, decision, "token_mean", 6)[0]
    assert ours == pytest.approx(0.295, abs=0.015)
    assert value / on.sum() == pytest.approx(ours / 0.75, rel=0.01)
    assert value / on.sum() == pytest.approx(0.295 / 0.75, abs=0.02)


def test_a_mean_over_a_sequences_survivors_blows_them_up():
    """verl's seq-mean-token-mean over a rejected mask: .222 for a survivor on average, up to 1; ours is 1/6 for all."""
    batch, decision = thinned()
    accepted = np.add.reduceat(decision.accept.astype(np.int64), batch.cu_seqlens[:-1])
    theirs = np.repeat(1 / np.maximum(1, accepted), accepted)  # of each accepted token
    ours = weights_of(batch, decision, "sequence_mean", 6) * len(batch.groups)
    np.testing.assert_allclose(ours, 1 / 6, rtol=1e-6)
    assert theirs.mean() == pytest.approx(0.222, abs=0.006)  # 1 - (1 - Z)^6 over 6 Z
    assert theirs.max() == 1.0
    assert len(batch.groups) == 4000


LENGTHS, VALUES = np.array([10, 40]), np.array([1.0, -1.0])  # O1: +1 on ten tokens, -1 on forty


def ours(how, lengths=LENGTHS, values=VALUES, owner=(0, 1)):
    """The loss of one prompt's two trajectories, cut into spans of so many tokens."""
    weights = span_weights(how, lengths, np.array(owner), np.zeros(2, np.int64), np.ones(2), 100)
    return round(float((lengths * values * weights).sum()), 6)


def bnpo(micro_batches):
    """TRL's ``loss_type=bnpo``: a mean over the tokens at hand, then over gradient accumulation."""
    means = [(LENGTHS[part] @ VALUES[part]) / LENGTHS[part].sum() for part in micro_batches]
    return sum(means) / len(means)


def sum_of_sample_mean(lengths, values):
    """slime's, over the global batch size."""
    return sum((n * v) / n for n, v in zip(lengths, values, strict=True)) / len(lengths)


def test_a_mean_of_the_means_of_micro_batches_depends_on_the_cut():
    """TRL's bnpo: -0.6 if the trajectories share a micro-batch, 0 if each has its own; ours is -0.6 anyhow (T9)."""
    assert bnpo([[0, 1]]) == pytest.approx(-0.6)
    assert ours("token_mean") == -0.6
    assert bnpo([[0], [1]]) == 0.0


def test_slime_averages_samples_and_ours_tokens_unless_told():
    """slime: 0 where a mean over tokens is -0.6; a trajectory in two samples counts twice there, -1/3, not here."""
    assert sum_of_sample_mean(LENGTHS, VALUES) == ours("sequence_mean") == 0
    assert ours("token_mean") == -0.6
    pieces = np.array([10, 20, 20]), np.array([1.0, -1.0, -1.0])
    assert sum_of_sample_mean(*pieces) == pytest.approx(-1 / 3)
    assert ours("sequence_mean", *pieces, owner=(0, 1, 1)) == 0


def test_a_cookbooks_double_sided_loss_has_closed_bounds_and_divides_by_what_it_kept():
    """A GLM-5 style recipe keeps r = 0.8 itself, and divides by 4 kept of 5 tokens where ours divides by 5."""
    ratios, advantages = [1.2, 0.5, 0.8, 1.25, 1.0], [1.0, 1.0, -1.0, -1.0, 1.0]
    log_p, entropy, tokens = of_ratios(ratios, advantages)
    tokens.weights = tokens.weights / 5
    log_p[2] = tokens.log_q[2] + math.log(1 - 0.2)  # on the bound, exactly
    section = LossSection(kind="double_sided", clip_low=1 - float((log_p - tokens.log_q)[2].exp()), clip_high=0.28)
    share, _ = policy_loss(log_p, entropy, tokens, section)
    kept = [0.8 <= r <= 1.28 for r in ratios]
    theirs = -sum(r * a for r, a, k in zip(ratios, advantages, kept, strict=True) if k) / sum(kept)
    assert [bool(s) for s in share.slope] == [True, False, False, True, True]
    assert share.loss.item() == pytest.approx(-0.19, abs=1e-6)  # (1.2 - 1.25 + 1) / 5
    assert theirs == pytest.approx(-0.0375)  # (1.2 - .8 - 1.25 + 1) / 4


# ---- masks and clips ----------------------------------------------------------------------------


def test_a_cap_read_by_the_wrong_name_is_another_cap():
    """TRL's epsilon_high is the cap itself, verl's and slime's what is above 1: the 5 of one is the 6 of the other."""
    given_ = of_ratios((0.2, 1.0, 5.5, 9.0), (1.0,) * 4)
    trl, _ = policy_loss(*given_, LossSection(kind="cispo", clip_low=1.0, ratio_cap=5.0))
    verl, _ = policy_loss(*given_, LossSection(kind="cispo", clip_low=1.0, clip_high=5.0))
    assert (-trl.slope).tolist() == pytest.approx([0.2, 1.0, 5.0, 5.0])
    assert (-verl.slope).tolist() == pytest.approx([0.2, 1.0, 5.5, 6.0])


def test_prime_rl_masks_by_probability_and_ppo_by_ratio():
    """DPPO-TV at .2 keeps .01 -> .02 though its ratio is 2, not .7 -> .95; PPO clips both, and .3 -> .2 of A < 0."""
    behaviour, own = [0.01, 0.7, 0.3, 0.9, 0.5], [0.02, 0.95, 0.2, 0.6, 0.55]
    advantages = [1.0, 1.0, -1.0, -1.0, 1.0]
    given_ = of_densities(own, behaviour, advantages)
    tv, _ = policy_loss(*given_, LossSection(kind="dppo_tv", tv_threshold=0.2))
    ppo, _ = policy_loss(*given_, LossSection(clip_low=0.2, clip_high=0.2))
    assert [bool(s) for s in tv.slope] == [True, False, True, False, True]
    assert [bool(s) for s in ppo.slope] == [False, False, False, False, True]
    theirs = [  # prime-rl's default_loss_fn
        a * p / q * (not (p - q > 0.2 if a > 0 else p - q < -0.2))
        for p, q, a in zip(own, behaviour, advantages, strict=True)
    ]
    assert (-tv.slope).tolist() == pytest.approx(theirs, rel=1e-5)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.floats(1e-3, 0.999), st.floats(1e-3, 0.999), st.booleans()), min_size=1, max_size=20))
def test_what_ppo_keeps_prime_rl_keeps(tokens):
    """``|pi - q| = q |rho - 1| <= epsilon``: at equal bounds the mask on probabilities is the wider one."""
    own, behaviour, up = zip(*tokens, strict=True)
    given_ = of_densities(list(own), list(behaviour), [1.0 if u else -1.0 for u in up])
    tv, _ = policy_loss(*given_, LossSection(kind="dppo_tv", tv_threshold=0.2))
    ppo, _ = policy_loss(*given_, LossSection(clip_low=0.2, clip_high=0.2))
    assert (tv.slope[ppo.slope != 0] != 0).all()


def areal_m2po(log_ratios, threshold):
    """AReaL's ``get_m2po_loss_mask``: every token, mean strictly below, at least one kept."""
    squares = np.square(log_ratios)
    order = np.argsort(-squares)
    keep = np.ones(len(squares), bool)
    for at in order[:-1]:
        if squares[keep].mean() < threshold:
            break
        keep[at] = False
    return keep


def test_areal_masks_by_m2_what_does_no_harm_too():
    """Of ratios (3, .4) pulled back by their advantages ours masks none; AReaL, which asks no sign, masks both.

    They agree on the page's numbers. Where nothing is near enough ours masks all that harms, AReaL keeps one.
    """
    page = (1.02, 0.97, 1.9, 0.4, 1.1, 0.88, 3.0, 1.0)
    signs = (1.0, -1.0, 1.0, -1.0, -1.0, 1.0, 1.0, 1.0)
    cases = (
        (page, signs, [1, 1, 0, 0, 1, 1, 0, 1], [1, 1, 0, 0, 1, 1, 0, 1]),
        ((3.0, 0.4, 1.05, 0.98), (-1.0, 1.0, 1.0, -1.0), [1, 1, 1, 1], [0, 0, 1, 1]),
        ((2.0, 3.0), (1.0, 1.0), [0, 0], [1, 0]),
    )
    for ratios, advantages, ours, theirs in cases:
        log_p, _, tokens = of_ratios(ratios, advantages)
        assert m2po(log_p, tokens, 0.04, lambda sums: sums).factor.tolist() == ours
        assert areal_m2po(np.log(ratios), 0.04).astype(int).tolist() == theirs


def test_areal_drops_what_exceeds_its_cap_and_ours_truncates_it():
    """behav_imp_weight_cap = 2 takes a token of weight 3 out; weight_cap counts it as 2, icepop from 0 is AReaL's."""
    given_ = of_ratios((0.5, 1.9, 3.0), (1.0,) * 3)
    truncated, _ = policy_loss(*given_, LossSection(anchor="proximal", weight_cap=2.0))
    areal = LossSection(anchor="proximal", correction="icepop", correction_low=0.0, correction_high=2.0)
    dropped, _ = policy_loss(*given_, areal)
    assert (-truncated.slope).tolist() == pytest.approx([0.5, 1.9, 2.0], rel=1e-5)
    assert (-dropped.slope).tolist() == pytest.approx([0.5, 1.9, 0.0], rel=1e-5)


def test_a_decoupled_loss_and_a_bypassed_one_are_two_roads_to_one_gradient():
    """prox / behav times theta / prox is theta / behav, 1.3; verl's bypass with PPO takes no further weight."""
    behaviour, proximal, own = 0.20, 0.25, 0.26
    log = torch.tensor
    weights, accept = torch.ones(1), torch.ones(1, dtype=torch.uint8)
    q, anchor = log([behaviour]).log(), log([proximal]).log()
    tokens = Tokens(q, q, anchor, torch.ones(1), weights, accept)
    decoupled, _ = policy_loss(log([own]).log(), weights, tokens, LossSection(anchor="broker"))
    bypass, _ = policy_loss(log([own]).log(), weights, tokens, LossSection(clip_low=0.2, clip_high=1.0))
    assert [-decoupled.slope.item(), -bypass.slope.item()] == pytest.approx([1.3, 1.3], rel=1e-5)
    with pytest.raises(ConfigError, match="same gap twice"):
        LossSection(kind="double_sided", anchor="broker")
