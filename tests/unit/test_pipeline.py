"""The broker's decisions: admission, groups, advantages, rejection, shards, accounting."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.fates import length_bins
from broker.pipeline import Pipeline
from common import wire
from common.codec import encode
from common.config import (
    AdvantageSection,
    BrokerSection,
    ObrsSection,
    RolloutSection,
    RunConfig,
    RunSection,
    StalenessSection,
)
from common.errors import ConfigError, DataError, ProtocolError
from common.routing import Routing
from tests.routes import routes
from tools.launch import MAX_RESTARTS

G = 3
TOKEN_FIELDS = ("token_ids", "trainable", "log_q", "versions", "topk_ids", "topk_log_q")


def config(**sections):
    base = {
        "rollout": RolloutSection(groups_per_step=2, group_size=G, max_prompt_tokens=3, max_tokens=5),
        "staleness": StalenessSection(1),
        "run": RunSection(steps=5, seed=11),
    }
    return RunConfig(**{**base, **sections})


def trajectories(group, version=0, siblings=range(G), seed=None, rewards=None):
    siblings = list(siblings)
    rng = np.random.default_rng(group if seed is None else seed)
    lengths = rng.integers(4, 9, len(siblings))
    cu = np.concatenate(([0], np.cumsum(lengths)))
    n = int(cu[-1])
    within = np.arange(n) - np.repeat(cu[:-1], lengths)
    on = within >= 3
    return wire.Trajectories(
        run_id="r",
        channel_names=["correct"],
        groups=np.full(len(siblings), group, np.int64),
        siblings=np.array(siblings, np.int32),
        rewards=np.array(rewards if rewards is not None else rng.integers(0, 2, len(siblings)), np.float32),
        channels=np.zeros((len(siblings), 1), np.float32),
        finish=np.zeros(len(siblings), np.uint8),
        cu_seqlens=cu.astype(np.int32),
        token_ids=rng.integers(0, 16, n).astype(np.int32),
        trainable=on.astype(np.uint8),
        log_q=np.where(on, np.log(rng.uniform(0.05, 1, n)), 0).astype(np.float32),
        versions=np.where(on, version, -1).astype(np.int32),
        topk_ids=np.zeros((n, 0), np.int32),
        topk_log_q=np.zeros((n, 0), np.float32),
    )


def scores(request, log_q, version=0, shift=0.3):
    rng = np.random.default_rng(1)
    lp = np.minimum(0, log_q + rng.normal(0, shift, len(log_q))).astype(np.float32) * request.wanted
    return wire.ScoreResult(request.request, version, 0.0, lp, np.zeros((len(lp), 0), np.float32))


def run_step(pipeline, batches, version=0, actor="a"):
    for batch in batches:
        assert set(pipeline.admit(batch, actor, version).reasons) <= {""}
    request = pipeline.assemble(version)
    step = pipeline.ledger.next_step - 1
    log_q = np.zeros(len(request.token_ids), np.float32)
    log_q[request.wanted == 1] = -1.0
    pipeline.scored(scores(request, log_q, version))
    return step


def assert_books_balance(pipeline):
    assert pipeline.queued == pipeline.held()
    assert pipeline.queued >= 0


def test_arrival_order_changes_nothing():
    results = []
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        pipeline = Pipeline(config(), 16)
        assert pipeline.grant("a", 10, 0).groups.tolist() == [0, 1, 2, 3]
        for sibling in order:
            for group in (1, 0):
                whole = trajectories(group)
                a, b = whole.cu_seqlens[sibling], whole.cu_seqlens[sibling + 1]
                part = wire.Trajectories(
                    "r", ["correct"], whole.groups[:1], np.array([sibling], np.int32),
                    whole.rewards[sibling : sibling + 1],
                    whole.channels[:1], whole.finish[:1], np.array([0, b - a], np.int32),
                    *(getattr(whole, name)[a:b] for name in TOKEN_FIELDS),
                )  # fmt: skip
                part.check()
                assert pipeline.admit(part, "a", 0).reasons == [""]
        request = pipeline.assemble(0)
        log_q = np.where(request.wanted == 1, -1.0, 0.0)
        pipeline.scored(scores(request, log_q))
        results.append(pipeline.shard(0, 0, 1))
    for other in results[1:]:
        for name in ("groups", "siblings", "advantages", "token_ids", "accept", "log_m", "log_q", "log_p"):
            np.testing.assert_array_equal(getattr(results[0], name), getattr(other, name))


def test_shards_together_are_the_batch_and_are_served_byte_for_byte_again():
    pipeline = Pipeline(config(), 16)
    pipeline.grant("a", 10, 0)
    step = run_step(pipeline, [trajectories(0), trajectories(1)])
    one = pipeline.shard(step, 0, 1)
    two = [pipeline.shard(step, r, 2) for r in (0, 1)]
    keys = sorted((int(g), int(s)) for shard in two for g, s in zip(shard.groups, shard.siblings, strict=True))
    assert keys == sorted(zip(one.groups.tolist(), one.siblings.tolist(), strict=True))
    assert {w for s in (one, *two) for w in s.weights.tolist()} == {np.float32(1 / one.trainable.sum())}
    loads = [len(s.token_ids) for s in two]
    assert abs(loads[0] - loads[1]) <= 8
    assert bytes_of(pipeline.shard(step, 1, 2)) == bytes_of(pipeline.shard(step, 1, 2))
    shard = two[0]
    shard.check()
    assert (shard.log_m[shard.accept == 0] == 0).all()
    on = shard.accept == 1
    assert (shard.log_m[on] <= shard.log_q[on]).all()


def test_advantages_come_from_whole_groups_and_ignore_rejection():
    results = []
    for threshold in (0.5, 1.0, 3.0):
        pipeline = Pipeline(config(obrs=ObrsSection(threshold=threshold)), 16)
        pipeline.grant("a", 10, 0)
        step = run_step(pipeline, [trajectories(0, rewards=[1, 0, 0]), trajectories(1, rewards=[1, 1, 1])])
        results.append(pipeline.shard(step, 0, 1))
    a = results[0].advantages.reshape(2, G)
    np.testing.assert_allclose(a[0], [np.sqrt(2), -np.sqrt(0.5), -np.sqrt(0.5)], rtol=1e-5)
    assert (a[1] == 0).all()
    assert len({r.accept.sum() for r in results}) > 1
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].advantages, other.advantages)
        np.testing.assert_array_equal(results[0].weights, other.weights)


def test_rejection_off_ships_log_q_as_log_m_and_asks_nobody():
    pipeline = Pipeline(config(obrs=ObrsSection(mode="off")), 16)
    pipeline.grant("a", 10, 0)
    for g in (0, 1):
        pipeline.admit(trajectories(g), "a", 0)
    assert pipeline.assemble(0) is None
    shard = pipeline.shard(0, 0, 1)
    np.testing.assert_array_equal(shard.accept, shard.trainable)
    np.testing.assert_array_equal(shard.log_m, shard.log_q)
    assert pipeline.commit(0)["kl_before"] is None


def test_a_faulty_sibling_is_refused_its_group_given_up_and_its_prompt_granted_again():
    pipeline = Pipeline(config(), 16)
    pipeline.grant("a", 10, 0)
    bad = trajectories(0)
    bad.log_q[int(bad.cu_seqlens[1]) + 3] = np.nan
    reasons = pipeline.admit(bad, "a", 0).reasons
    assert reasons[0] == "" and "NaN" in reasons[1] and reasons[2] == "refused_sibling"
    assert pipeline.dropped == {"refused_sibling": 1}
    again = pipeline.grant("a", 10, 0)
    assert again.prompts.tolist() == [0] and again.groups.tolist() == [4]
    assert pipeline.admit(trajectories(1), "a", 0).reasons == [""] * G
    assert_books_balance(pipeline)


def test_a_prompt_that_always_fails_is_left_out_in_the_end():
    pipeline = Pipeline(config(), 16)
    pipeline.grant("a", 4, 0)
    group, prompts = 0, []
    for _ in range(4):
        pipeline.give_up(group, "actor_failed")
        grant = pipeline.grant("a", 1, 0)
        group = int(grant.groups[0])
        prompts.append(int(grant.prompts[0]))
    assert prompts == [0, 0, 4, 4]


def test_repeats_are_acknowledged_and_counted_once():
    pipeline = Pipeline(config(), 16)
    pipeline.grant("a", 10, 0)
    for _ in range(2):
        assert pipeline.admit(trajectories(0), "a", 0).reasons == [""] * G
    run_step(pipeline, [trajectories(1)])
    assert pipeline.admit(trajectories(0), "a", 0).reasons == [""] * G  # after it was assembled
    assert pipeline.counts["trajectories_acked"] == 2 * G
    assert pipeline.counts["repeats"] == 2 * G
    assert_books_balance(pipeline)


def test_strangers_and_impostors_are_refused():
    pipeline = Pipeline(config(), 16)
    pipeline.grant("a", 1, 0)
    assert set(pipeline.admit(trajectories(99), "a", 0).reasons) == {"unknown_group"}
    assert set(pipeline.admit(trajectories(0), "b", 0).reasons) == {"granted_to_another_actor"}
    assert set(pipeline.admit(trajectories(0, siblings=[7]), "a", 0).reasons) == {"sibling_out_of_range"}
    assert pipeline.queued == 0


def test_versions_from_the_future_and_older_than_the_grant_are_refused():
    pipeline = Pipeline(config(), 16)
    pipeline.grant("a", 4, 0)
    assert "future" in pipeline.admit(trajectories(0, version=3), "a", 0).reasons[0]
    pipeline = Pipeline(config(), 16)
    pipeline.ledger.next_step = 2
    pipeline.grant("a", 1, 2)
    assert "older than the grant" in pipeline.admit(trajectories(0, version=1), "a", 2).reasons[0]


def test_a_lost_actor_leaves_no_phantom_reservation():
    pipeline = Pipeline(config(), 16)
    pipeline.grant("a", 2, 0)
    pipeline.grant("b", 2, 0)
    pipeline.admit(trajectories(0, siblings=[2]), "a", 0)
    assert pipeline.grant("b", 10, 0) is None
    assert pipeline.actor_lost("a") == 2
    assert pipeline.dropped == {"actor_lost": 1}
    assert pipeline.grant("b", 10, 0).prompts.tolist() == [0, 1]
    assert set(pipeline.admit(trajectories(0), "a", 0).reasons) == {"actor_lost"}
    assert_books_balance(pipeline)


def test_accounting_over_a_whole_run():
    pipeline = Pipeline(config(), 16)
    for version in range(5):
        grant = pipeline.grant("a", 10, version)
        if grant is not None:
            for g in grant.groups.tolist():
                pipeline.admit(trajectories(int(g), version=version), "a", version)
                assert_books_balance(pipeline)
        request = pipeline.assemble(version)
        log_q = np.where(request.wanted == 1, -1.0, 0.0)
        pipeline.scored(scores(request, log_q, version))
        receipt = pipeline.commit(version)
        assert receipt["lag_max"] <= 1
        assert receipt["tokens_accepted"] <= receipt["tokens_proposed"]
        assert pipeline.commit(version) is None  # a repeated commit changes nothing
        assert_books_balance(pipeline)
    assert pipeline.counts["trajectories_trained"] == 5 * 2 * G


def test_a_full_queue_stops_the_grants():
    tiny = config(broker=BrokerSection(queue_mb=2 * G * 8 * 13 / (1 << 20)))
    pipeline = Pipeline(tiny, 16)
    assert len(pipeline.grant("a", 10, 0).groups) == 2
    assert pipeline.grant("a", 10, 0) is None


def test_scores_that_do_not_fit_are_refused_and_stale_ones_ignored():
    pipeline = Pipeline(config(), 16)
    pipeline.grant("a", 10, 0)
    for g in (0, 1):
        pipeline.admit(trajectories(g), "a", 0)
    request = pipeline.assemble(0)
    good = scores(request, np.where(request.wanted == 1, -1.0, 0.0))
    with pytest.raises(DataError, match="scores for"):
        pipeline.scored(wire.ScoreResult(request.request, 0, 0.0, good.log_p[:-1], good.topk_log_p[:-1]))
    pipeline.scored(wire.ScoreResult(request.request + 5, 0, 0.0, good.log_p, good.topk_log_p))
    assert pipeline.requests
    good.log_p[3] = np.nan
    pipeline.scored(good)
    receipt = pipeline.commit(0)
    assert receipt["unscorable"] == 1 and pipeline.counts["late_scores"] == 1


def test_steps_that_are_gone_are_named():
    pipeline = Pipeline(config(), 16)
    pipeline.grant("a", 10, 0)
    run_step(pipeline, [trajectories(0), trajectories(1)])
    pipeline.commit(0)
    assert pipeline.shard(0, 0, 1) is not None  # kept for a learner that resumes
    pipeline.checkpointed(0)
    with pytest.raises(ProtocolError, match="step 0 is no longer held"):
        pipeline.shard(0, 0, 1)
    assert pipeline.shard(1, 0, 1) is None


def test_what_becomes_of_trajectories_is_counted_by_length_reward_lag_and_task():
    pipeline = Pipeline(config(obrs=ObrsSection(mode="off")), 16)
    pipeline.grant("a", 4, 0)
    for group in range(3):
        pipeline.admit(trajectories(group, rewards=[-0.5, 0, 2]), "a", 0)
    pipeline.admit(trajectories(3, siblings=[1], rewards=[1]), "a", 0)
    assert pipeline.assemble(0) is None and pipeline.shard(0, 0, 1) is not None
    pipeline.commit(0)
    pipeline.actor_lost("a")
    found = pipeline.fates.status()
    assert found["trajectories_by_reward"] == {"trained": {"-1": 2, "0": 2, "1": 2}, "dropped": {"1": 1}}
    assert found["trajectories_by_lag"] == {"trained": {"0": 6}, "dropped": {"1": 1}}
    assert found["trajectories_by_task"] == {"trained": {"sort6": 6}, "dropped": {"sort6": 1}}
    lengths = found["trajectories_by_length"]
    assert sum(lengths["trained"].values()) == 6 and sum(lengths["dropped"].values()) == 1
    again = Pipeline(config(), 16)
    again.fates.restore(pipeline.fates.state())
    assert again.fates.status() == found


@pytest.mark.parametrize(("kind", "expected"), [("dr_grpo", [2 / 3, -1 / 3, -1 / 3]), ("rloo", [1, -0.5, -0.5])])
def test_other_advantages(kind, expected):
    pipeline = Pipeline(config(advantage=AdvantageSection(kind=kind)), 16)
    pipeline.grant("a", 10, 0)
    step = run_step(pipeline, [trajectories(0, rewards=[1, 0, 0]), trajectories(1)])
    np.testing.assert_allclose(pipeline.shard(step, 0, 1).advantages[:G], expected, rtol=1e-6)


def test_more_than_half_of_a_group_is_trained_with_the_weight_of_the_whole():
    pipeline = Pipeline(config(), 16)
    pipeline.grant("a", 4, 0)
    for group in (1, 2, 3):
        pipeline.admit(trajectories(group), "a", 0)
    rewards = [1.0, 0.0, 0.5]
    pipeline.admit(trajectories(0, siblings=[2, 0], rewards=[rewards[2], rewards[0]]), "a", 0)
    assert pipeline.ledger.queued == 3
    assert pipeline.actor_lost("a") == 0
    assert pipeline.ledger.queued == 4
    assert pipeline.admit(trajectories(0, siblings=[1]), "a", 0).reasons == [""]  # late: acknowledged, not trained
    request = pipeline.assemble(0)
    pipeline.scored(scores(request, np.where(request.wanted == 1, -1.0, 0.0)))
    batch = pipeline.step(0).batch
    mine = batch.advantages[batch.groups == 0]
    assert batch.siblings[batch.groups == 0].tolist() == [0, 2]
    assert mine.tolist() == pytest.approx([1, -1], rel=1e-4)  # (R - mean) / std over two
    shard = pipeline.shard(0, 0, 1)
    of_it, of_others = shard.weights[shard.groups == 0], shard.weights[shard.groups != 0]
    np.testing.assert_allclose(of_it, of_others[0] * G / 2, rtol=1e-6)
    assert pipeline.step(0).receipt["groups_padded"] == 1
    assert pipeline.commit(0)["trajectories"] == len(batch.groups)
    assert_books_balance(pipeline)


def test_a_failed_sibling_costs_itself_and_too_many_cost_the_group():
    pipeline = Pipeline(config(), 16)
    pipeline.grant("a", 2, 0)
    pipeline.failed(0, 1, "environment")
    pipeline.admit(trajectories(0, siblings=[0, 2]), "a", 0)
    assert pipeline.ledger.queued == 1
    pipeline.failed(1, 0, "environment")
    pipeline.failed(1, 0, "environment")
    pipeline.admit(trajectories(1, siblings=[1]), "a", 0)
    pipeline.failed(1, 2, "environment")
    assert pipeline.ledger.promised == 0
    assert pipeline.dropped == {"environment": 1}
    assert sum(pipeline.fates.counts["length"]["dropped"].values()) == 1
    assert pipeline.grant("b", 10, 0).prompts.tolist()[0] == 1  # asked again
    assert_books_balance(pipeline)


@pytest.mark.parametrize("kind", ["mask", "resample"])
def test_groups_without_signal_are_masked_or_replaced(kind):
    pipeline = Pipeline(config(advantage=AdvantageSection(zero_signal=kind)), 16)
    mixed = [1.0] + [0.0] * (G - 1)
    pipeline.grant("a", 4, 0)
    for group in range(4):
        pipeline.admit(trajectories(group, rewards=[1.0] * G if group == 1 else mixed), "a", 0)
    if kind == "resample":
        assert pipeline.dropped == {"no_signal": G}
        assert pipeline.ledger.queued == 3
        pipeline.admit(trajectories(int(pipeline.grant("a", 4, 0).groups[0]), rewards=mixed), "a", 0)
        assert pipeline.ledger.queued == 4
        return
    request = pipeline.assemble(0)
    silent = np.repeat(np.repeat([False, True], G), np.diff(request.cu_seqlens))
    assert not request.wanted[silent].any()
    assert request.wanted[~silent].any()


def test_resampling_ends_when_nothing_has_a_signal():
    pipeline = Pipeline(config(advantage=AdvantageSection(zero_signal="resample")), 16)
    for _ in range(200):
        grant = pipeline.grant("a", 4, 0)
        if grant is None:
            break
        for group in grant.groups.tolist():
            pipeline.admit(trajectories(int(group), rewards=[0.0] * G), "a", 0)
    assert grant is None
    assert pipeline.ledger.queued > 0


@pytest.mark.parametrize(("tokens", "longest"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (1024, 1024), (1025, 2048)])
def test_lengths_are_counted_by_powers_of_two(tokens, longest):
    assert length_bins(np.array([tokens])).tolist() == [longest]


def with_alternatives(message, k, fill):
    """``fill(ids, log_q)`` writes the alternatives of a message in place."""
    n = len(message.token_ids)
    message.topk_ids = np.tile(np.arange(k, dtype=np.int32), (n, 1))
    message.topk_log_q = np.full((n, k), np.log(0.5 / k), np.float32)
    fill(message.topk_ids, message.topk_log_q)
    return message


def test_an_alternative_above_0_is_refused_and_one_that_cannot_be_costs_no_step():
    rollout = RolloutSection(groups_per_step=2, group_size=G, max_prompt_tokens=3, max_tokens=5, top_logprobs=2)
    pipeline = Pipeline(config(rollout=rollout), 16)
    pipeline.grant("a", 4, 0)
    positive = with_alternatives(trajectories(0), 2, lambda ids, lq: lq.__setitem__((0, 0), 0.5))
    assert "topk_log_q is above 0" in pipeline.admit(positive, "a", 0).reasons
    heavy = [with_alternatives(trajectories(g), 2, lambda ids, lq: lq.fill(-0.1)) for g in (1, 2)]  # mass 1.8
    for message in heavy:
        assert set(pipeline.admit(message, "a", 0).reasons) == {""}
    request = pipeline.assemble(0)
    lp = np.where(request.wanted == 1, -1.0, 0.0).astype(np.float32)
    topk = np.full((len(lp), 2), np.nan, np.float32)
    with pytest.raises(DataError, match="alternatives"):
        pipeline.scored(wire.ScoreResult(request.request, 0, 0.0, lp, topk[:, :1]))
    assert pipeline.requests[""] is request  # nothing was lost by that
    pipeline.scored(wire.ScoreResult(request.request, 0, 0.0, lp, topk))
    assert pipeline.step(0).receipt["topk_missing_mass"] > 0
    assert pipeline.step(0).decision.z["topk_ignored"] > 0
    assert pipeline.shard(0, 0, 1) is not None
    assert_books_balance(pipeline)


def test_a_group_that_misses_siblings_counts_in_the_denominator_as_if_copies_made_up_for_them():
    pipeline = Pipeline(config(obrs=ObrsSection(mode="off")), 16)
    pipeline.grant("a", 2, 0)
    pipeline.admit(trajectories(0), "a", 0)
    pipeline.admit(trajectories(1, siblings=[0, 1]), "a", 0)
    pipeline.failed(1, 2, "environment")
    assert pipeline.assemble(0) is None
    batch = pipeline.step(0).batch
    tokens = batch.sampled_tokens
    assert pipeline.step(0).decision.denominator == round(tokens[:G].sum() + tokens[G:].sum() * G / 2)


def test_reward_channels_are_in_the_receipt():
    pipeline = Pipeline(config(), 16)
    pipeline.grant("a", 2, 0)
    messages = [trajectories(g) for g in range(2)]
    for value, message in enumerate(messages):
        message.channel_names, message.channels = ["correct", "style"], np.full((G, 2), value, np.float32)
    run_step(pipeline, messages)
    assert pipeline.step(0).receipt["reward_channels"] == {"correct": 0.5, "style": 0.5}


ROUTING = Routing((0, 1), experts=8, per_token=2)
ROUTED = RolloutSection(groups_per_step=2, group_size=G, max_prompt_tokens=3, max_tokens=5, routing_replay=True)


def routed(message, width=ROUTING.width):
    """With an expert record of random rows, the last of each trajectory UNROUTED."""
    rng, layers = np.random.default_rng(int(message.groups[0])), width // ROUTING.per_token
    message.experts = routes(rng, len(message.token_ids), layers, ROUTING.experts, ROUTING.per_token)
    message.experts[message.cu_seqlens[1:] - 1] = wire.UNROUTED
    return message


def test_a_record_that_cannot_be_this_models_is_refused_by_name():
    pipeline = Pipeline(config(rollout=ROUTED), 16, ROUTING)
    pipeline.grant("a", 4, 0)
    torn, foreign, narrow, none = (routed(trajectories(g)) for g in range(4))
    torn.experts[1, 2] = wire.UNROUTED
    foreign.experts[1, 2] = ROUTING.experts
    narrow.experts, none.experts = narrow.experts[:, 1:], none.experts[:, :0]
    told = "3 experts recorded of a token, this run's model has 4 (rollout.routing_replay=true)"
    for message, reason in (
        (torn, "expert record of a token is torn"),
        (foreign, "expert outside the 8 of a layer"),
        (narrow, told),
        (none, told.replace("3", "0", 1)),
    ):
        assert pipeline.admit(message, "a", 0).reasons[0] == reason
        assert pipeline.refused[reason] == 1
    twice = routed(trajectories(int(pipeline.grant("a", 1, 0).groups[0])))
    twice.experts[1, 3] = twice.experts[1, 2]
    assert pipeline.admit(twice, "a", 0).reasons[0] == "a layer's record names the same expert twice"
    assert pipeline.book.held == 0
    pipeline = Pipeline(config(), 16)
    pipeline.grant("a", 2, 0)
    reason = "4 experts recorded of a token, this run's model has 0 (rollout.routing_replay=false)"
    assert pipeline.admit(routed(trajectories(0)), "a", 0).reasons[0] == reason


@settings(max_examples=40)
@given(order=st.permutations(range(2 * G)), world=st.integers(1, 4), late=st.booleans())
def test_every_expert_row_stays_with_its_token(order, world, late):
    """Trajectories arrive one by one in any order; the oracle is a table of what was sent."""
    pipeline = Pipeline(config(rollout=ROUTED), 16, ROUTING)
    pipeline.grant("a", 2, 0)
    sent = {}
    for number in order:
        group, sibling = divmod(number, G)
        part = routed(trajectories(group, siblings=[sibling], seed=number))
        sent[group, sibling] = part
        if late and number == 2 * G - 1:
            pipeline.failed(group, sibling, "environment")  # the others make up for it
            del sent[group, sibling]
        else:
            assert pipeline.admit(part, "a", 0).reasons == [""]
    batch_rows = np.concatenate([sent[key].experts for key in sorted(sent)])
    request = pipeline.assemble(0)
    request.check()
    np.testing.assert_array_equal(request.experts, batch_rows)
    pipeline.scored(scores(request, np.where(request.wanted == 1, -1.0, 0.0)))
    seen = set()
    for rank in range(world):
        shard = pipeline.shard(0, rank, world)
        shard.check()
        assert shard.experts.shape == (len(shard.token_ids), ROUTING.width)
        for index, key in enumerate(zip(shard.groups.tolist(), shard.siblings.tolist(), strict=True)):
            tokens = slice(*shard.cu_seqlens[index : index + 2])
            np.testing.assert_array_equal(shard.experts[tokens], sent[key].experts)
            np.testing.assert_array_equal(shard.token_ids[tokens], sent[key].token_ids)
            seen.add(key)
    assert seen == sent.keys()
    assert_books_balance(pipeline)


def test_expert_records_count_in_every_bound():
    lean = Pipeline(config(), 16)
    tight = BrokerSection(queue_mb=2 * config().rollout.largest_group(4) / (1 << 20), journal_mb=0)
    full = Pipeline(config(rollout=ROUTED, broker=tight), 16, ROUTING)
    for pipeline in (lean, full):
        assert len(pipeline.grant("a", 4, 0).groups) == (4 if pipeline is lean else 2)
        pipeline.admit(routed(trajectories(0), pipeline.routed), "a", 0)
    tokens = len(trajectories(0).token_ids)
    assert full.queue_bytes == lean.queue_bytes + 2 * ROUTING.width * tokens
    for key, broker in (
        ("queue_mb", BrokerSection(queue_mb=1, journal_mb=0)),
        ("journal_mb", BrokerSection(queue_mb=64, journal_mb=1)),
        ("max_message_mb", BrokerSection(queue_mb=64, max_message_mb=1)),
    ):
        with pytest.raises(ConfigError, match=rf"broker\.{key}=1.* with the 16384 experts"):
            Pipeline(config(rollout=ROUTED, broker=broker), 16, Routing(tuple(range(2048)), 64, 8))


@pytest.mark.parametrize(
    "section", [AdvantageSection(), AdvantageSection(zero_signal="mask"), AdvantageSection(overlong_filter=True)]
)
def test_what_is_taken_out_of_the_loss_keeps_its_length_in_receipts_and_fates(section):
    pipeline = Pipeline(config(obrs=ObrsSection(mode="off"), advantage=section), 16)
    pipeline.grant("a", 4, 0)
    alike, cut = trajectories(0, rewards=[1, 1, 1]), trajectories(1, rewards=[1, 0, 0])
    if section.overlong_filter:
        cut.finish = np.array([0, 1, 1], np.uint8)
    for message in (alike, cut):
        pipeline.admit(message, "a", 0)
    pipeline.assemble(0)
    pipeline.shard(0, 0, 1)
    receipt = pipeline.commit(0)
    sampled = [t.sampled_tokens for t in pipeline.step(0).batch.members]
    assert receipt["length_mean"] == pytest.approx(np.mean(sampled)) and min(sampled) > 0
    trained = pipeline.fates.status()["trajectories_by_length"]["trained"]
    assert trained == {str(k): v for k, v in sorted(Counter(length_bins(np.array(sampled)).tolist()).items())}


@pytest.mark.parametrize("kind", ["mask", "resample"])
def test_rewards_that_are_equal_but_for_the_price_of_length_have_no_signal(kind):
    section = AdvantageSection(zero_signal=kind, overlong_buffer=4)
    pipeline = Pipeline(config(obrs=ObrsSection(mode="off"), advantage=section), 16)
    pipeline.grant("a", 4, 0)
    for group, rewards in enumerate(([1, 1, 1], [1, 0, 0], [0, 1, 0])):
        pipeline.admit(trajectories(group, rewards=rewards), "a", 0)
    pipeline.assemble(0)
    shard = pipeline.shard(0, 0, 1)
    ends = zip(shard.groups.tolist(), shard.cu_seqlens, shard.cu_seqlens[1:], strict=False)
    on = {group: bool(shard.trainable[first:end].any()) for group, first, end in ends}
    if kind == "mask":
        assert on == {0: False, 1: True} and pipeline.commit(0)["groups_without_signal"] == 1
    else:
        assert on == {1: True, 2: True} and pipeline.commit(0)["groups_without_signal"] == 0


def test_a_prompt_is_left_out_for_failures_in_a_row_before_its_actors_have_no_restart_left():
    def grants_until_left_out(fail):
        pipeline, granted = Pipeline(config(obrs=ObrsSection(mode="off")), 16), 0
        while True:
            (grant,) = pipeline.grant("a", 1, 0).groups.tolist()
            if pipeline.book.prompt(grant) != 0:
                assert dict(pipeline._failures) == {} and not pipeline.book.actors() - {"a"}
                return granted
            granted += 1
            fail(pipeline, grant)

    assert grants_until_left_out(lambda pipeline, group: pipeline.give_up(group, "environment")) == 3
    assert grants_until_left_out(lambda pipeline, group: pipeline.actor_lost("a")) == MAX_RESTARTS
    pipeline = Pipeline(config(obrs=ObrsSection(mode="off")), 16)
    pipeline.give_up(pipeline.grant("a", 1, 0).groups[0], "environment")
    pipeline.admit(trajectories(int(pipeline.grant("a", 1, 0).groups[0])), "a", 0)
    assert dict(pipeline._failures) == {} and pipeline.counts["groups_whole"] == 1


def test_what_is_held_of_trained_steps_is_counted_and_served_again_byte_for_byte():
    section = BrokerSection(retain_mb=0.12, journal_mb=0, assemble_ahead=8)
    pipeline, held = Pipeline(config(broker=section, run=RunSection(steps=8, seed=11)), 16), []
    for step in range(8):
        groups = pipeline.grant("a", 2, step).groups.tolist()
        run_step(pipeline, [trajectories(group, step) for group in groups], step)
        entries = pipeline.steps._steps.values()
        assert [batch.step for batch in pipeline.steps.waiting] == [step]
        served = [bytes_of(pipeline.shard(step, rank, 2)) for rank in range(2)]
        assert pipeline.commit(step) is not None and pipeline.commit(step) is None
        assert pipeline.steps.waiting == [] and all(entry.committed for entry in entries)
        assert sum(entry.nbytes for entry in entries) == pipeline.steps._held_bytes <= 0.12 * 2**20
        held.append(len(entries))
        assert [bytes_of(pipeline.shard(step, rank, 2)) for rank in range(2)] == served
        assert pipeline.commit(step) is None  # by the learner that came back
        assert not any(pipeline.steps.was_served(one) for one in range(step + 1))
    assert held[-1] == held[-2] < 8  # the oldest are forgotten
    pipeline.checkpointed(7)
    assert not pipeline.steps._steps and pipeline.steps._held_bytes == 0


def bytes_of(shard):
    return [bytes(frame) for frame in encode(shard)]
