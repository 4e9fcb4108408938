"""Answers written by people as members of a group, over the real pipeline: who sees them and who must not."""

import numpy as np
import pytest

from broker.audit import strata
from broker.honesty import Honesty
from broker.journal import Journal
from broker.pipeline import Pipeline
from broker.recorder import Recorder, decision_digests
from broker.recovery import recover
from broker.steps import scores_of
from common import wire
from common.codec import decode, encode
from common.config import (
    AdvantageSection,
    ObrsSection,
    RolloutSection,
    RunConfig,
    RunSection,
    StalenessSection,
)
from common.rewards import RewardSection

G, B, VOCAB, PROMPT, ANSWER = 4, 2, 16, 2, 5
REWARDS = [1.0, 0.0, 0.0, 1.0]


def config(exemplars: int = 1, **sections) -> RunConfig:
    base = {
        "rollout": RolloutSection(
            groups_per_step=B, group_size=G, max_prompt_tokens=PROMPT, max_tokens=ANSWER, exemplars=exemplars
        ),
        "reward": RewardSection(exemplars="answers.jsonl"),
        "staleness": StalenessSection(1),
        "run": RunSection(steps=4, seed=3),
    }
    return RunConfig(**{**base, **sections})


def message(group: int, experts: tuple[int, ...] = (G - 1,), version: int = 0, siblings=range(G)) -> wire.Trajectories:
    """A group whose siblings ``experts`` are exemplars; the others' tokens do not depend on which."""
    siblings = list(siblings)
    n, length = len(siblings), PROMPT + ANSWER
    rng = np.random.default_rng(group)
    ids = rng.integers(0, VOCAB, (G, length)).astype(np.int32)[siblings]
    log_q = np.log(rng.uniform(0.2, 1, (G, length)))[siblings]
    role = np.zeros((n, length), np.uint8)
    role[:, PROMPT:] = 1
    for row, sibling in enumerate(siblings):
        if sibling in experts:
            role[row, PROMPT:] = wire.EXPERT
    sent = wire.Trajectories(
        "r", ["correct"], np.full(n, group, np.int64), np.array(siblings, np.int32),
        np.array(REWARDS, np.float32)[siblings], np.array(REWARDS, np.float32)[siblings][:, None],
        np.zeros(n, np.uint8), np.arange(0, n * length + 1, length, dtype=np.int32), ids.ravel(), role.ravel(),
        np.where(role == 1, log_q, 0).astype(np.float32).ravel(),
        np.where(role == 1, version, -1).astype(np.int32).ravel(),
        np.zeros((n * length, 0), np.int32), np.zeros((n * length, 0), np.float32),
    )  # fmt: skip
    arrived = decode([bytes(frame) for frame in encode(sent)], wire.TO_BROKER)
    assert isinstance(arrived, wire.Trajectories)
    for name in ("finish", "versions", "log_q"):
        setattr(arrived, name, getattr(arrived, name).copy())  # tests write into these
    return arrived


def answer(request: wire.ScoreRequest) -> wire.ScoreResult:
    """Each token's score is a function of the token alone."""
    log_p = np.where(request.wanted == 1, -0.1 - 0.1 * request.token_ids, 0).astype(np.float32)
    return wire.ScoreResult(request.request, 0, 0.0, log_p, np.zeros((len(log_p), 0), np.float32))


def step(settings: RunConfig, experts: tuple[int, ...] = (G - 1,), target=None) -> Pipeline:
    pipeline = target or Pipeline(settings, VOCAB)
    pipeline.grant("a", B, 0)
    for group in range(B):
        assert set(pipeline.admit(message(group, experts), "a", 0).reasons) == {""}
    request = pipeline.assemble(0)
    if request is not None:
        pipeline.scored(answer(request))
    return pipeline


def test_nobody_tosses_a_coin_for_an_exemplar_and_the_others_keep_theirs() -> None:
    """In the place of a sampled sibling of the same reward, an exemplar changes nothing for the others.

    Another reward would move the group's baseline, which it belongs to by design.
    """
    with_one, without = step(config()), step(config(), experts=())
    mine, theirs = with_one.shard(0, 0, 1), without.shard(0, 0, 1)
    assert mine is not None and theirs is not None
    mine.check()
    expert = mine.trainable == wire.EXPERT
    assert int(expert.sum()) == B * ANSWER and ((mine.accept == wire.EXPERT) == expert).all()
    assert (mine.log_q[expert] == 0).all() and (mine.log_m[expert] == 0).all() and (mine.log_p[expert] == 0).all()
    for name in ("accept", "log_m", "log_p", "log_q"):
        np.testing.assert_array_equal(getattr(mine, name)[~expert], getattr(theirs, name)[~expert])
    np.testing.assert_array_equal(mine.advantages, theirs.advantages)
    np.testing.assert_array_equal(mine.token_ids, theirs.token_ids)
    assert 0 < (mine.accept == 1).sum() < (mine.trainable == 1).sum()  # the coins took some


def test_an_exemplar_belongs_to_its_groups_baseline() -> None:
    pipeline = step(config(advantage=AdvantageSection(kind="dr_grpo")))
    shard = pipeline.shard(0, 0, 1)
    assert shard is not None
    assert shard.advantages[:G].tolist() == pytest.approx([0.5, -0.5, -0.5, 0.5])


def test_lags_divergences_and_lengths_never_see_one() -> None:
    pipeline = step(config(obrs=ObrsSection()))
    decided = pipeline.step(0)
    assert decided is not None
    receipt, batch = decided.receipt, decided.batch
    sampled = B * (G - 1) * ANSWER
    assert receipt["exemplars"] == B and batch.sampled.tolist() == [True, True, True, False] * B
    assert receipt["lag_histogram"] == {"0": sampled} and receipt["tokens_proposed"] == sampled
    assert receipt["length_mean"] == ANSWER and receipt["length_max"] == ANSWER
    shard = pipeline.shard(0, 0, 1)
    assert shard is not None
    on = shard.trainable == 1
    ratio = np.exp(-0.1 - 0.1 * shard.token_ids[on].astype(np.float64) - shard.log_q[on])
    assert receipt["acceptance_expected"] == pytest.approx(float(np.minimum(1, ratio).mean()), rel=1e-5)
    assert sum(sum(n for n, *_ in values.values()) for values in receipt["audit"]["strata"].values()) == 3 * sampled
    assert set(strata(batch)["length"][batch.sampled].tolist()) == {0}
    honesty = Honesty(1.0, 0)
    request = answer(wire.ScoreRequest(0, 0, 1.0, batch.segments.astype(np.int32), batch.token_ids,
                                       (batch.trainable == 1).astype(np.uint8), batch.topk_ids))  # fmt: skip
    honesty.check(batch, scores_of(request))
    assert honesty.accounts["a"].tokens == sampled
    assert pipeline.commit(0) is not None
    assert pipeline.fates.counts["length"]["trained"] == {8: B * (G - 1)}
    assert pipeline.counts["tokens_generated"] == sampled
    assert pipeline.counts["trajectories_trained"] == B * G and pipeline.queued == pipeline.held() == 0


@pytest.mark.parametrize("kind", ["keep", "mask"])
def test_masking_never_leaves_exemplars_alone(kind: str) -> None:
    """Every sampled answer truncated and filtered: then nothing is, and the receipt has tokens to speak of."""
    settings = config(advantage=AdvantageSection(overlong_filter=True, zero_signal=kind))
    pipeline = Pipeline(settings, VOCAB)
    pipeline.grant("a", B, 0)
    for group in range(B):
        sent = message(group)
        sent.finish[: G - 1] = 1
        pipeline.admit(sent, "a", 0)
    request = pipeline.assemble(0)
    assert request is not None and int(request.wanted.sum()) == B * (G - 1) * ANSWER
    pipeline.scored(answer(request))
    shard = pipeline.shard(0, 0, 1)
    assert shard is not None and int((shard.trainable == wire.EXPERT).sum()) == B * ANSWER


def test_a_group_of_exemplars_alone_is_given_up() -> None:
    settings = config(exemplars=3)
    pipeline = Pipeline(settings, VOCAB)
    pipeline.grant("a", B, 0)
    sent = message(0, experts=(1, 2, 3), siblings=(1, 2, 3))
    assert set(pipeline.admit(sent, "a", 0).reasons) == {""}
    pipeline.failed(0, 0, "environment")
    assert pipeline.dropped == {"environment": 3} and pipeline.fates.counts["length"]["dropped"] == {}
    assert pipeline.ledger.promised == 1 and pipeline.queued == pipeline.held() == 0


def test_a_padded_group_with_an_exemplar_is_trained() -> None:
    pipeline = Pipeline(config(), VOCAB)
    pipeline.grant("a", B, 0)
    pipeline.admit(message(0, siblings=(0, 1, 3)), "a", 0)
    pipeline.failed(0, 2, "environment")
    pipeline.admit(message(1), "a", 0)
    request = pipeline.assemble(0)
    assert request is not None
    pipeline.scored(answer(request))
    decided = pipeline.step(0)
    assert decided is not None and decided.receipt["groups_padded"] == 1 and decided.receipt["exemplars"] == 2


def test_exemplars_that_nobody_asked_for_are_refused() -> None:
    pipeline = Pipeline(config(exemplars=0), VOCAB)
    pipeline.grant("a", B, 0)
    reasons = pipeline.admit(message(0), "a", 0).reasons
    assert reasons[-1] == "holds an exemplar's tokens, rollout.exemplars=0" and 0 not in pipeline.book


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [("versions", 0, "has a version or a log_q"), ("log_q", -0.5, "has a version or a log_q")],
)
def test_an_exemplars_token_was_sampled_by_nobody(field: str, value: float, words: str) -> None:
    sent = message(0)
    assert sent.faults(VOCAB, 5) == {}
    getattr(sent, field)[np.flatnonzero(sent.trainable == wire.EXPERT)[0]] = value
    faults = sent.faults(VOCAB, 5)
    assert list(faults) == [G - 1] and words in faults[G - 1]
    oldest, sampled = message(0).summary
    assert oldest == [0, 0, 0, wire.NEVER] and sampled == [ANSWER] * 3 + [0]


def test_recovery_and_replay_know_exemplars(tmp_path) -> None:
    journal = Journal(tmp_path, "run", 64.0)
    recorder = Recorder(Pipeline(config(), VOCAB), journal, dict)
    recorder.begin(0)
    step(config(), target=recorder)
    recorder.shard(0, 0, 2)
    recorder.snapshot()
    journal.flush()
    while journal.durable < journal.last:
        journal.check()
    again = Pipeline(config(), VOCAB)
    assert recover(again, journal).differences == []
    assert decision_digests(again, 0) == decision_digests(recorder.pipeline, 0)
    journal.close()
