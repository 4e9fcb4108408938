"""Trajectories of several segments from the actor's turns to the learner's rows, against a naive oracle."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actor.engine.base import Completion
from actor.outbox import Finished, pack
from actor.rollout import Turn
from broker.batch import collate
from broker.decision import Rule, Scores, accept_all, reject
from broker.packing import make_shards
from broker.pipeline import Pipeline
from broker.trajectories import unpack_all
from common import wire
from common.codec import decode, encode
from common.config import RolloutSection, RunConfig, RunSection, StalenessSection

G, VOCAB, ROUTED, K = 3, 50, 2, 2
CONFIG = RunConfig(rollout=RolloutSection(group_size=G))
SHAPES = st.lists(  # of each sibling its turns: tokens given, tokens sampled, whether a segment begins
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.booleans()), min_size=1, max_size=5),
    min_size=2 * G, max_size=2 * G,
)  # fmt: skip


def make_finished(shapes: Any, seed: int = 0) -> list[Finished]:
    """Two groups of random turns; a turn's experts reach from its context's start to its last token but one."""
    rng = np.random.default_rng(seed)
    out = []
    for number, turns in enumerate(shapes):
        made: list[Turn] = []
        context = 0
        for index, (given_tokens, tokens, fresh) in enumerate(turns):
            fresh = fresh and index > 0
            context = (0 if fresh else context) + given_tokens + tokens
            given_ids = rng.integers(0, VOCAB, given_tokens).astype(np.int32)
            experts = rng.integers(0, 8, (context, ROUTED)).astype(np.uint16)
            experts[-1] = wire.UNROUTED
            completion = Completion(
                0, 0, rng.integers(0, VOCAB, tokens).astype(np.int32), np.log(rng.uniform(0.1, 1, tokens)).astype("f4"),
                np.full(tokens, index, np.int32), rng.integers(0, VOCAB, (tokens, K)).astype(np.int32),
                np.log(rng.uniform(0.1, 0.5, (tokens, K))).astype("f4"), experts, "stop",
            )  # fmt: skip
            made.append(Turn(given_ids, completion, fresh))
        reward = float(rng.integers(0, 2)) + number / 100
        out.append(Finished(number // G, number % G, made, {"correct": reward}, reward))
    return out


def travelled(finished: list[Finished]) -> wire.Trajectories:
    """As the broker gets it."""
    message = decode([bytes(frame) for frame in encode(pack("r", ("correct",), finished))], wire.TO_BROKER)
    assert isinstance(message, wire.Trajectories)
    message.check()
    return message


def naive_rows(finished: list[Finished]) -> list[dict[str, Any]]:
    """One row a segment, token by token."""
    rows: list[dict[str, Any]] = []
    for one in finished:
        position = 0
        for turn in one.turns:
            if turn.fresh or turn is one.turns[0]:
                rows.append({"group": one.group, "sibling": one.sibling, "tokens": [], "at": position, "of": one})
            for token in turn.given:
                rows[-1]["tokens"].append((int(token), 0, 0.0))
            for token, log_q in zip(turn.completion.token_ids, turn.completion.logprobs, strict=True):
                rows[-1]["tokens"].append((int(token), 1, float(log_q)))
            position += len(turn.given) + len(turn.completion.token_ids)
    return rows


def rows_of(shards: list[wire.Shard]) -> list[dict[str, Any]]:
    out = []
    for shard in shards:
        shard.check()
        for row, (a, b) in enumerate(zip(shard.cu_seqlens[:-1], shard.cu_seqlens[1:], strict=True)):
            columns = (shard.token_ids, shard.trainable, shard.log_q)
            tokens = list(zip(*(column[a:b].tolist() for column in columns), strict=True))
            facts = {"group": int(shard.groups[row]), "sibling": int(shard.siblings[row]), "rank": shard.rank}
            span = np.searchsorted(shard.spans, a, side="right") - 1
            out.append({**facts, "tokens": tokens, "advantage": float(shard.advantages[span]), "range": (a, b)})
    return out


@settings(max_examples=40)
@given(shapes=SHAPES, world=st.integers(1, 3))
def test_segments_become_rows_that_share_what_their_trajectory_has(shapes: Any, world: int) -> None:
    finished = make_finished(shapes)
    message = travelled(finished)
    assert message.faults(VOCAB, 10, 8) == {}
    batch = collate(0, unpack_all(message), CONFIG)
    shards = make_shards(batch, accept_all(batch), world, CONFIG)
    found, wanted = rows_of(shards), naive_rows(finished)
    assert sorted((r["group"], r["sibling"], r["tokens"]) for r in found) == sorted(
        (r["group"], r["sibling"], r["tokens"]) for r in wanted
    )
    whole = sum(len(row["tokens"]) for row in wanted)
    sampled = sum(on for row in wanted for _, on, _ in row["tokens"])
    assert {shard.tokens_global for shard in shards} == {whole}
    assert {w for shard in shards for w in shard.weights.tolist()} == {np.float32(1 / sampled)}
    for one in finished:
        mates = [f.reward for f in finished if f.group == one.group]
        advantage = (one.reward - np.mean(mates)) / (np.std(mates) + 1e-6)
        mine = [r for r in found if (r["group"], r["sibling"]) == (one.group, one.sibling)]
        assert {row["rank"] for row in mine} == {mine[0]["rank"]}
        assert [row["advantage"] for row in mine] == pytest.approx([advantage] * len(mine), rel=1e-4, abs=1e-6)


@settings(max_examples=20)
@given(shapes=SHAPES)
def test_the_replica_is_asked_for_segments_and_coins_do_not_know_them(shapes: Any) -> None:
    finished = make_finished(shapes)
    whole = [
        dataclasses.replace(f, turns=[dataclasses.replace(turn, fresh=False) for turn in f.turns]) for f in finished
    ]
    batches = []
    for each in (finished, whole):  # experts of the whole one are not those of one context: not looked at here
        message = pack("r", ("correct",), each)
        message.experts = np.zeros((len(message.token_ids), 0), np.uint16)
        batches.append(collate(0, unpack_all(message), CONFIG))
    rng = np.random.default_rng(1)
    log_p = np.minimum(0, batches[0].log_q + rng.normal(0, 0.5, len(batches[0].log_q))).astype(np.float32)
    scores = Scores(4, log_p, np.full((len(log_p), K), -3.0, np.float32))
    decisions = [reject(batch, scores, Rule(7, 0.0)) for batch in batches]
    for field in ("accept", "log_m", "log_p"):
        np.testing.assert_array_equal(getattr(decisions[0], field), getattr(decisions[1], field))
    assert decisions[0].denominator == decisions[1].denominator
    assert np.diff(batches[0].segments).tolist() == [len(row["tokens"]) for row in naive_rows(finished)]
    assert batches[1].segments.tolist() == batches[1].cu_seqlens.tolist()


def test_the_pipeline_scores_and_serves_them() -> None:
    shapes = [
        [(3, 2, False), (2, 3, True)],
        [(3, 2, False), (1, 2, False)],
        [(2, 2, False), (2, 2, True), (1, 1, True)],
    ]
    config = RunConfig(
        rollout=RolloutSection(groups_per_step=1, group_size=G, max_prompt_tokens=8, max_tokens=8, top_logprobs=K),
        staleness=StalenessSection(1), run=RunSection(steps=2, seed=1),
    )  # fmt: skip
    pipeline = Pipeline(config, vocab_size=VOCAB)
    pipeline.grant("a", 1, 0)
    finished = make_finished(shapes)
    message = travelled(finished)
    message = dataclasses.replace(message, versions=np.minimum(message.versions, 0), experts=None)
    assert set(pipeline.admit(message, "a", 0).reasons) == {""}
    request = pipeline.assemble(0)
    assert request is not None
    request.check()
    rows = naive_rows(finished)
    assert np.diff(request.cu_seqlens).tolist() == [len(row["tokens"]) for row in rows]
    assert request.wanted.tolist() == [on for row in rows for _, on, _ in row["tokens"]]
    log_p = np.where(request.wanted, np.float32(-0.5), np.float32(0)).astype(np.float32)
    pipeline.scored(wire.ScoreResult(request.request, 0, 0.0, log_p, np.full((len(log_p), K), -3.0, np.float32)))
    shard = pipeline.shard(0, 0, 1)
    assert shard is not None
    assert shard.siblings.tolist() == [row["sibling"] for row in rows] == [0, 0, 1, 2, 2, 2]
    assert shard.spans.tolist() == [shard.cu_seqlens[i] for i in (0, 2, 3, 6)]
    sampled = sum(len(t.completion.token_ids) for f in finished for t in f.turns)
    assert set(shard.weights.tolist()) == {np.float32(1 / sampled)}


def test_experts_of_a_segment_are_those_of_its_own_contexts() -> None:
    finished = make_finished([[(3, 2, False), (2, 3, False), (2, 2, True), (1, 2, False)]] + [[(1, 1, False)]] * 5)
    message = pack("r", ("correct",), finished)
    first, second, third, fourth = (turn.completion.experts for turn in finished[0].turns)
    wanted = [first[:4], second[4:], third[:3], fourth[3:]]  # a turn's last token is read by the next turn
    np.testing.assert_array_equal(message.experts[: message.cu_seqlens[1]], np.concatenate(wanted))


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (3, 3, "an exemplar's token has a version"), (5, 255, "trainable must be 0, 1, 2"),
        (0, 2, "first token is sampled from nothing"), (0, 1, "first token is sampled from nothing"),
        (0, 3, "first token is sampled from nothing"), (3, 4, "trainable must be 0, 1, 2"),
    ],
)  # fmt: skip
def test_what_trainable_cannot_say_is_found(position: int, value: int, words: str) -> None:
    sound, message = (pack("r", ("correct",), make_finished([[(3, 2, False), (2, 3, True)]] * (2 * G))) for _ in "ab")
    assert sound.faults(VOCAB, 10) == {}
    at = int(message.cu_seqlens[1]) + position
    message.trainable[at] = value
    if value == 1:
        message.versions[at] = 0
    faults = message.faults(VOCAB, 10)
    assert list(faults) == [1] and words in faults[1]


def test_a_trajectory_of_openings_alone_has_nothing_to_train() -> None:
    message = pack("r", ("correct",), make_finished([[(3, 2, False), (2, 3, True)]] * (2 * G)))
    first = slice(0, int(message.cu_seqlens[1]))
    message.trainable[first] = np.where(message.trainable[first] == 1, 0, message.trainable[first])
    assert message.faults(VOCAB, 10) == {0: "no sampled token"}
