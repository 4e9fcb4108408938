"""Advantages, blocks and denominators against loops that follow algorithms.md 0.3, 2 and 4."""

import dataclasses
import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.advantages import group_advantages, overlong_penalty, without_signal
from broker.aggregation import block_weights, span_weights
from broker.batch import collate
from broker.blocks import FIRST, block_advantages
from broker.decision import accept_all
from broker.packing import make_shards, weights_of
from common.config import RolloutSection, RunConfig
from common.errors import ConfigError
from common.objective import GROUP_BASELINES, AdvantageSection, LossSection
from tests.properties.made import sibling_of

KINDS = ("grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "batch_mean", "scalerl", "none")
PAGE = [1.0, 0, 0, 1, 0, 0, 0, 0]  # O1


def naive(groups, size, section):
    """One sample after another; a group that misses siblings counts ``size / n`` times."""
    copies = [size / len(g) for g in groups]
    flat = [(r, g, c) for rewards, g, c in zip(groups, range(len(groups)), copies, strict=True) for r in rewards]
    total = sum(c for *_, c in flat)
    batch_mean = sum(r * c for r, _, c in flat) / total
    ddof = 1 if section.deviation == "sample" else 0

    def baseline(r, g):
        if section.kind in GROUP_BASELINES:
            return 0.0 if max(groups[g]) == min(groups[g]) else r - sum(groups[g]) / len(groups[g])
        return r if section.kind == "none" else r - batch_mean

    centred = [baseline(r, g) for r, g, _ in flat]
    used = [
        (a, c) for a, (_, g, c) in zip(centred, flat, strict=True)
        if section.kind != "scalerl" or max(groups[g]) > min(groups[g])
    ]  # fmt: skip
    weight = sum(c for _, c in used)
    mean = sum(a * c for a, c in used) / weight if used else 0.0
    spread = math.sqrt(sum(c * (a - mean) ** 2 for a, c in used) / (weight - ddof)) if weight > ddof else 0.0
    out = []
    for a, (_, g, _c) in zip(centred, flat, strict=True):
        n, scale = len(groups[g]), 1.0
        if section.kind == "grpo":
            mu = sum(groups[g]) / n
            std = math.sqrt(sum((x - mu) ** 2 for x in groups[g]) / max(1, n - ddof))
            scale = 1 / (std + section.epsilon)
        elif section.kind == "rloo" and n > 1:
            scale = n / (n - 1)
        elif section.kind in ("reinforce_pp", "reinforce_pp_baseline", "scalerl"):
            scale = 1 / (spread + section.epsilon)
        out.append(0.0 if a == 0 else a * scale)
    return out


@settings(max_examples=150)
@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.25, 1.0, -1.0]), min_size=1, max_size=4), min_size=1, max_size=6),
    st.sampled_from(KINDS), st.sampled_from(["population", "sample"]),
)  # fmt: skip
def test_advantages_are_those_of_a_loop(groups, kind, deviation):
    section = AdvantageSection(kind=kind, deviation=deviation, epsilon=1e-4)
    sizes = np.array([len(g) for g in groups])
    found = group_advantages(np.array([r for g in groups for r in g], np.float32), sizes, 4, section)
    np.testing.assert_allclose(found, naive(groups, 4, section), rtol=1e-4, atol=1e-4)
    if kind in GROUP_BASELINES:
        silent = np.repeat([max(g) == min(g) for g in groups], sizes)
        assert not found[silent].any()  # T16


def of_page(kind, **more):
    section = AdvantageSection(kind=kind, epsilon=0.0, **more)
    return group_advantages(np.array(PAGE, np.float32), np.array([8]), 8, section)


def test_the_numbers_of_the_page_and_where_verl_differs():
    np.testing.assert_allclose(of_page("grpo")[:2], [1.7320, -0.5773], atol=1e-4)
    np.testing.assert_allclose(of_page("grpo", deviation="sample")[:2], [1.6202, -0.5401], atol=1e-4)  # verl: ddof=1
    np.testing.assert_allclose(of_page("dr_grpo")[:2], [0.75, -0.25])
    np.testing.assert_allclose(of_page("rloo")[:2], [0.857, -0.286], atol=1e-3)
    ratio = of_page("grpo")[0] / of_page("grpo", deviation="sample")[0]
    assert ratio == pytest.approx(math.sqrt(8 / 7), rel=1e-6)


@settings(max_examples=50)
@given(
    st.lists(st.floats(-3, 3, width=16), min_size=2, max_size=9),
    st.floats(-2, 2, width=16),
    st.floats(0.5, 4, width=16),
)
def test_shifts_change_nothing_and_scales_only_what_is_not_divided(rewards, shift, scale):
    sizes = np.array([len(rewards)])
    r = np.array(rewards, np.float64)
    for kind in GROUP_BASELINES:
        section = AdvantageSection(kind=kind, epsilon=0.0)

        def take(values, section=section):
            return group_advantages(values.astype(np.float32), sizes, len(rewards), section)

        if max(r + shift) - min(r + shift) > 1e-2:
            np.testing.assert_allclose(take(r + shift), take(r), atol=1e-3)
        one = take(r)
        assert abs(one.sum()) < 1e-3
        factor = 1.0 if kind in ("grpo", "reinforce_pp_baseline", "scalerl") else scale
        if np.ptp(r) > 1e-2:
            np.testing.assert_allclose(take(r * scale), one * factor, rtol=1e-3, atol=1e-3)


def test_padding_a_group_with_copies_would_change_no_advantage():
    """T15: taken over the valid siblings alone, they are what their copies would get."""
    for kind in KINDS:
        section = AdvantageSection(kind=kind)
        whole = group_advantages(np.array([1, 0, 1, 0, 0, 1, 1, 1], np.float32), np.array([4, 4]), 4, section)
        half = group_advantages(np.array([1, 0, 0, 1, 1, 1], np.float32), np.array([2, 4]), 4, section)
        scale = 1.0 if kind != "rloo" else (2 / 1) / (4 / 3)  # a sample of two leaves out more
        np.testing.assert_allclose(half[:2], scale * whole[:2], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(half[2:], whole[4:], rtol=1e-5, atol=1e-6)


def test_silence_is_equality_and_never_a_small_deviation():
    assert without_signal(np.array([0.1] * 3 + [0.1, 0.1, 0.1 + 1e-6], np.float32), np.array([3, 3])).tolist() == [
        True,
        False,
    ]


def test_overlong_penalty_at_its_knots():
    lengths = np.array([16000, 16384, 18432, 20480, 20481])
    assert overlong_penalty(lengths, 20480, 4096).tolist() == [0, 0, -0.5, -1, -1]
    assert overlong_penalty(lengths, 20480, 0).tolist() == [0] * 5


# ---- blocks -------------------------------------------------------------------------------------

CORRECT = np.array([1, 1, 1, 1, 1, 0, 0, 0])
CONFIDENCE = np.array([0.9, 0.8, 0.95, 0.6, 0.7, 0.3, 0.8, 0.1])
BRIER = -((CONFIDENCE - CORRECT) ** 2)


def second_block(baseline, leave_one_out=False, shrinkage=0.0):
    zero, one = np.zeros(8, np.int64), np.ones(8, np.int64)
    return block_advantages(BRIER, zero, one, CORRECT.astype(np.int64), baseline, leave_one_out, shrinkage)


def test_blocks_of_the_page():
    near = {"atol": 6e-5, "rtol": 0}
    np.testing.assert_allclose(
        second_block("group"), [0.1203, 0.0903, 0.1278, -0.0297, 0.0403, 0.0403, -0.5097, 0.1203], **near
    )
    np.testing.assert_allclose(
        second_block("ocb"), [0.0505, 0.0205, 0.058, -0.0995, -0.0295, 0.1567, -0.3933, 0.2367], **near
    )
    np.testing.assert_allclose(
        second_block("ocb", True), [0.0631, 0.0256, 0.0725, -0.1244, -0.0369, 0.235, -0.59, 0.355], **near
    )
    np.testing.assert_allclose(
        second_block("ocb", False, 4.0), [0.0815, 0.0515, 0.0890, -0.0685, 0.0015, 0.0902, -0.4598, 0.1702], **near
    )
    np.testing.assert_allclose(second_block("none"), BRIER, atol=1e-7)


BLOCKS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2), st.floats(-2, 2)), min_size=1, max_size=25
)


@settings(max_examples=150)
@given(BLOCKS, st.sampled_from(["none", "batch", "group", "ocb"]), st.booleans(), st.sampled_from([0.0, 1.5]))
def test_block_advantages_are_those_of_a_loop(blocks, baseline, leave_one_out, shrinkage):
    if baseline != "ocb":
        shrinkage = 0.0
    g, k, o, r = (np.array(column) for column in zip(*blocks, strict=True))
    found = block_advantages(r.astype(float), g, k, o, baseline, leave_one_out, shrinkage)

    def mean(i, same):
        mates = [r[j] for j in range(len(r)) if same(i, j) and (j != i or not leave_one_out)]
        return (sum(mates) / len(mates), len(mates)) if mates else (None, 0)

    for i in range(len(r)):
        if baseline == "none":
            b = 0.0
        elif baseline == "batch":
            b = mean(i, lambda i, j: k[i] == k[j])[0]
        else:
            group = mean(i, lambda i, j: (g[i], k[i]) == (g[j], k[j]))[0]
            b = group
            if baseline == "ocb":
                own, n = mean(i, lambda i, j: (g[i], k[i], o[i]) == (g[j], k[j], o[j]))
                if n:
                    b = (n * own + shrinkage * group) / (n + shrinkage)
        assert found[i] == pytest.approx(0.0 if b is None else r[i] - b, abs=1e-5)


@settings(max_examples=60)
@given(BLOCKS, st.integers(0, 2**16))
def test_the_outcome_conditioned_baseline_keeps_its_invariants(blocks, seed):
    """T11."""
    g, k, o, r = (np.array(column) for column in zip(*blocks, strict=True))
    r = r.astype(float)

    def take(rewards, loo=False, order=slice(None)):
        return block_advantages(rewards[order], g[order], k[order], o[order], "ocb", loo).astype(float)

    plain = take(r)
    strata = defaultdict(list)
    for i in range(len(r)):
        strata[g[i], k[i], o[i]].append(i)
    constants = np.random.default_rng(seed).normal(size=len(r))
    moved = r.copy()
    for members in strata.values():
        assert abs(plain[members].sum()) < 1e-5
        moved[members] += constants[members[0]]
    np.testing.assert_allclose(take(moved), plain, atol=1e-5)
    order = np.random.default_rng(seed).permutation(len(r))
    np.testing.assert_allclose(take(r, order=order), plain[order], atol=1e-6)
    loo = take(r, True)
    for members in strata.values():
        n = len(members)
        if n > 1:
            np.testing.assert_allclose(loo[members], plain[members] * n / (n - 1), atol=1e-5)
    one = block_advantages(r, g, k, np.zeros_like(o), "ocb", False)
    np.testing.assert_allclose(one, block_advantages(r, g, k, o, "group", False), atol=1e-6)


# ---- denominators -------------------------------------------------------------------------------


@settings(max_examples=100)
@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), min_size=1, max_size=4),
    st.sampled_from(["token_mean", "sequence_mean", "constant", "prompt_mean"]),
)
def test_weights_are_those_of_a_loop(groups, aggregate):
    """T27 for prompt_mean; ``groups`` hold the counted tokens of each trajectory."""
    if not any(map(sum, groups)):
        return
    tokens = np.array([t for g in groups for t in g])
    of = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    copies = np.array([3 / len(g) for g in groups for _ in g])
    found = span_weights(aggregate, tokens, np.arange(len(tokens)), of, copies, 7)
    has = tokens > 0
    for i, t in enumerate(tokens):
        wanted = {
            "token_mean": lambda: 1 / round(float((tokens * copies).sum())),
            "sequence_mean": lambda t=t: 1 / (copies[has].sum() * max(1, t)),
            "constant": lambda: 1 / (copies.sum() * 7),
            "prompt_mean": lambda i=i: 1 / (
                sum(1 for g in groups if sum(g)) * max(1, (tokens * copies)[of == of[i]].sum())
            ),
        }[aggregate]()  # fmt: skip
        assert found[i] == pytest.approx(wanted * copies[i], rel=1e-5)


def test_the_length_bias_of_the_page():
    tokens, of, copies = np.array([10, 40]), np.zeros(2, np.int64), np.ones(2)
    advantages = np.array([1.0, -1.0])
    wanted = {"sequence_mean": 0.0, "token_mean": -0.6, "constant": -0.15}
    for aggregate, loss in wanted.items():
        weights = span_weights(aggregate, tokens, np.arange(2), of, copies, 100)
        assert float((weights * tokens * advantages).sum()) == pytest.approx(loss, abs=1e-6)
    lengths = np.array([4, 6, 20, 20])
    scale = span_weights("prompt_mean", lengths, np.arange(4), np.array([0, 0, 1, 1]), np.ones(4), 100)
    assert scale.tolist() == pytest.approx([0.05, 0.05, 0.0125, 0.0125])  # O4: .1 and .025, over two prompts


def test_duplicating_a_blocks_tokens_changes_no_blocks_share():
    once = block_weights(np.array([3, 2]), np.array([0, 0]), np.ones(1), np.ones(2)) * np.array([3, 2])
    twice = block_weights(np.array([6, 2]), np.array([0, 0]), np.ones(1), np.ones(2)) * np.array([6, 2])
    np.testing.assert_allclose(once, twice)


def member(group, sibling, reward, sampled, blocks=(), block_rewards=(), truncated=False):
    n = 2 + sampled
    on = (np.arange(n) >= 2).astype(np.uint8)
    return sibling_of(
        group, sibling, reward, np.arange(n), on, np.where(on, -1.0, 0.0), np.where(on, 0, -1), truncated=truncated,
        event=sibling, blocks=blocks, block_rewards=block_rewards,
    )  # fmt: skip


def test_blocks_become_spans_and_what_lies_between_them_counts_nothing():
    config = RunConfig(
        rollout=RolloutSection(group_size=2), advantage=AdvantageSection(blocks="ocb", leave_one_out=False)
    )
    members = [
        member(0, 0, 1.0, 6, [(0, FIRST, 2, 5), (1, 1, 6, 8)], [1.0, -0.1]),
        member(0, 1, 0.0, 4, [(0, FIRST, 2, 6)], [0.0]),  # garbled: no second block, in no stratum of it
    ]
    batch = collate(0, members, config)
    (shard,) = make_shards(batch, accept_all(batch), 1, config)
    shard.check()
    assert shard.spans.tolist() == [0, 2, 5, 6, 8, 10, 14]
    assert shard.advantages.tolist() == [0, 0.5, 0, 0, 0, -0.5]
    np.testing.assert_allclose(shard.weights, [0, 1 / 6, 0, 1 / 4, 0, 1 / 8])
    first, second = make_shards(batch, accept_all(batch), 2, config)
    assert sorted([first.spans.tolist(), second.spans.tolist()]) == [[0, 2, 5, 6, 8], [0, 2, 6]]


def test_the_reward_of_one_block_moves_no_advantage_of_another():
    config = RunConfig(rollout=RolloutSection(group_size=2), advantage=AdvantageSection(blocks="ocb"))
    found = []
    for value in (-0.1, -0.9):
        members = [
            member(0, s, 1.0, 6, [(0, FIRST, 2, 5), (1, 1, 5, 8)], [float(s), value * (s + 1)]) for s in range(2)
        ]
        found.append(collate(0, members, config).span_advantages)
    assert found[0][[1, 4]].tolist() == found[1][[1, 4]].tolist()
    assert found[0][2] != found[1][2]


def test_truncated_trajectories_leave_the_loss_and_keep_their_reward():
    config = RunConfig(
        rollout=RolloutSection(group_size=2),
        advantage=AdvantageSection(kind="dr_grpo", overlong_filter=True, overlong_buffer=4),
        loss=LossSection(aggregate="token_mean"),
    )
    batch = collate(0, [member(0, 0, 1.0, 4), member(0, 1, 0.0, 8, truncated=True)], config)
    assert batch.sampled_tokens.tolist() == [4, 0]
    assert batch.advantages.tolist() == [1.0, -1.0]  # of 1 and 0 - 1: eight of eight tokens are a whole penalty
    assert weights_of(batch, accept_all(batch), "token_mean", 8)[0] == np.float32(1 / 4)


def test_a_batch_of_truncated_trajectories_alone_has_no_loss():
    config = RunConfig(rollout=RolloutSection(group_size=2), advantage=AdvantageSection(overlong_filter=True))
    batch = collate(0, [member(0, s, float(s), 8, truncated=True) for s in range(2)], config)
    assert not weights_of(batch, accept_all(batch), "token_mean", 8).any()


def test_a_batch_of_equal_rewards_has_no_advantage_whatever_the_padding():
    for kind in KINDS[:-1]:
        rewards, sizes = np.full(21, 0.7, np.float32), np.array([8, 8, 5])
        assert not group_advantages(rewards, sizes, 8, AdvantageSection(kind=kind, epsilon=0.0)).any()


def test_blocks_of_a_short_group_count_for_its_missing_siblings_in_the_batch():
    rewards, groups = np.array([1.0, 0.0, 0.0]), np.array([0, 1, 1])
    zero, copies = np.zeros(3, np.int64), np.array([2.0, 1.0, 1.0])
    found = block_advantages(rewards, groups, zero, zero - 1, "batch", False, copies=copies)
    assert found.tolist() == [0.5, -0.5, -0.5]
    alone = block_advantages(rewards, groups, zero, zero - 1, "batch", True, copies=copies)
    assert alone.tolist() == [1.0, pytest.approx(-2 / 3), pytest.approx(-2 / 3)]


def test_a_silent_group_is_masked_only_where_another_speaks():
    config = RunConfig(rollout=RolloutSection(group_size=2), advantage=AdvantageSection(zero_signal="mask"))
    silent = [member(0, 0, 1.0, 3), member(0, 1, 1.0, 3)]
    speaks = [member(1, 0, 1.0, 3), member(1, 1, 0.0, 3)]
    assert collate(0, silent + speaks, config).sampled_tokens.tolist() == [0, 0, 3, 3]
    assert collate(0, silent, config).sampled_tokens.tolist() == [3, 3]


def test_every_way_to_cut_a_batch_adds_up_to_the_same_loss():
    """T9: the sum over shards of weight x advantage x token is the batch's, for every denominator."""
    rng = np.random.default_rng(0)
    members = [member(g, s, float(rng.random()), int(rng.integers(1, 9))) for g in range(4) for s in range(3)]
    for aggregate in ("token_mean", "sequence_mean", "constant", "prompt_mean"):
        config = RunConfig(rollout=RolloutSection(group_size=3), loss=LossSection(aggregate=aggregate))
        batch = collate(0, members, config)
        sums = []
        for world in (1, 2, 5, 16):
            total = 0.0
            for shard in make_shards(batch, accept_all(batch), world, config):
                shard.check()
                per_token = np.repeat(shard.advantages * shard.weights, np.diff(shard.spans)).astype(np.float64)
                total += float((per_token * shard.trainable * np.sin(shard.token_ids)).sum())
            sums.append(total)
        assert sums == pytest.approx([sums[0]] * 4, rel=1e-9)


def test_a_negative_weight_of_a_block_is_refused():
    with pytest.raises(ConfigError, match=r"advantage.block_weights"):
        AdvantageSection(blocks="ocb", block_weights=(1.0, -1.0))
    assert dataclasses.replace(AdvantageSection(blocks="ocb"), block_weights=(1.0, 0.5)).block_weights == (1.0, 0.5)
