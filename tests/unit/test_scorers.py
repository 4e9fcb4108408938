"""A batch is scored by several models at once: any order of their answers, and what becomes of the scores."""

import itertools

import numpy as np
import pytest

from broker.identities import Identities
from broker.journal import Journal
from broker.pipeline import Pipeline
from broker.recorder import Recorder
from broker.recovery import recover
from common import wire
from common.codec import encode
from common.config import ModelSection, ObrsSection, RolloutSection, RunConfig, TaskEntry, TaskSection, load
from common.errors import ConfigError, DataError, ModelError
from common.frozen import POLICY, REFERENCE, TeacherEntry
from common.identity import model_identity
from common.objective import AdvantageSection, LossSection
from learner.score import serving
from tests.unit.test_pipeline import G, config, trajectories
from tests.unit.test_recovery import settle
from tools.preflight import check_frozen
from tools.processes import processes_of
from tools.replay import Alternative

MIX = TaskSection(mix={"a": TaskEntry("sort6"), "b": TaskEntry("sort6")})
LOSS = LossSection(kl=0.1, distill=1.0, distill_clip=5.0)
BOTH = {"one": TeacherEntry("dir/one", ("a",)), "two": TeacherEntry("dir/two", ("b",))}
ALL = (POLICY, REFERENCE, "one", "two")


def taught(teachers=None, **sections):
    return config(**{"task": MIX, "loss": LOSS, "teachers": teachers or BOTH, **sections})


def ready(settings):
    """A pipeline whose first step was assembled: group 0 is of task a, group 1 of task b."""
    pipeline = Pipeline(settings, 16)
    pipeline.grant("a", 2, 0)
    for group in range(2):
        assert set(pipeline.admit(trajectories(group), "a", 0).reasons) == {""}
    pipeline.assemble(0)
    return pipeline


def says(scorer, request, change=lambda log_p: None):
    """What ``scorer`` always answers: a number that tells who, and which token it was."""
    seed = ALL.index(scorer) + 1
    log_p = (-((request.token_ids * 7 + seed * 3) % 11) / 5.0 - 0.01 * seed).astype(np.float32) * request.wanted
    change(log_p)
    return wire.ScoreResult(request.request, request.min_version, 0.1, log_p, np.zeros((len(log_p), 0), np.float32))


def answer(pipeline, *order, change=lambda log_p: None):
    for scorer in order:
        assert pipeline.scored(says(scorer, pipeline.requests[scorer], change)).scorer == scorer


def test_every_order_of_the_answers_comes_to_the_same_step():
    found = []
    for order in itertools.permutations(ALL):
        pipeline = ready(taught())
        assert set(pipeline.requests) == set(ALL)
        for number, scorer in enumerate(order):
            assert pipeline.shard(0, 0, 1) is None
            assert all(("teacher one" in pipeline.waiting_for()) == ("one" in order[number:]) for _ in order)
            answer(pipeline, scorer)
        assert not pipeline.requests
        found.append([bytes(f) for f in encode(pipeline.shard(0, 0, 1))] + [repr(pipeline.step(0).receipt)])
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_token_has_its_own_models_scores(world):
    pipeline = ready(taught())
    for name, group in (("one", 0), ("two", 1)):
        request = pipeline.requests[name]
        request.check()
        np.testing.assert_array_equal(request.token_ids, trajectories(group).token_ids)
        np.testing.assert_array_equal(request.wanted, trajectories(group).trainable)
        np.testing.assert_array_equal(request.cu_seqlens, trajectories(group).cu_seqlens)
    assert len(pipeline.requests[REFERENCE].token_ids) == sum(len(trajectories(g).token_ids) for g in range(2))
    assert {r.temperature for r in pipeline.requests.values()} == {1.0}
    answer(pipeline, *ALL)
    seen = 0
    for rank in range(world):
        shard = pipeline.shard(0, rank, world)
        shard.check()
        for index, group in enumerate(shard.groups.tolist()):
            part = slice(*shard.cu_seqlens[index : index + 2])
            ids, on = shard.token_ids[part], shard.trainable[part] == 1
            asked = wire.ScoreRequest(0, 0, 1.0, np.zeros(1, np.int32), ids, on.astype(np.uint8), np.zeros((0, 0)))
            np.testing.assert_array_equal(shard.log_reference[part], says(REFERENCE, asked).log_p)
            teacher = says(("one", "two")[group], asked).log_p
            np.testing.assert_array_equal(shard.log_teacher[part], np.where(on, teacher, np.nan).astype(np.float32))
            seen += 1
    assert seen == 2 * G


def test_a_task_without_a_teacher_has_no_teachers_scores_and_a_batch_without_its_task_asks_none():
    pipeline = ready(taught({"one": BOTH["one"]}))
    assert set(pipeline.requests) == {POLICY, REFERENCE, "one"}
    answer(pipeline, "one", POLICY, REFERENCE)
    shard = pipeline.shard(0, 0, 1)
    of_b = np.repeat(shard.groups == 1, np.diff(shard.cu_seqlens))
    assert np.isnan(shard.log_teacher[of_b]).all() and not np.isnan(shard.log_reference).any()
    assert pipeline.step(0).receipt["teachers"].keys() == {"one"}
    assert pipeline.step(0).receipt["teachers"]["one"]["tokens"] == trajectories(0).trainable.sum()
    rare = TaskSection(mix={"a": TaskEntry("sort6", ratio=9.0), "b": TaskEntry("sort6")})
    pipeline = ready(taught(task=rare))  # prompts 0 and 1 are both of task a
    assert set(pipeline.requests) == {POLICY, REFERENCE, "one"}


def test_one_teacher_of_every_task_and_rejection_off():
    settings = taught({"one": TeacherEntry("dir")}, obrs=ObrsSection(mode="off"), loss=LossSection(distill=1.0))
    pipeline = ready(settings)
    assert set(pipeline.requests) == {"one"}
    assert pipeline.shard(0, 0, 1) is None
    answer(pipeline, "one")
    shard = pipeline.shard(0, 0, 1)
    assert (np.isnan(shard.log_teacher) == (shard.trainable == 0)).all()
    assert not len(shard.log_reference)
    assert (shard.accept == shard.trainable).all()
    assert pipeline.step(0).receipt["scored_by_version"] is None


def test_impossible_tokens_are_kept_and_nan_is_counted_as_no_score():
    def spoil(log_p):
        at = np.flatnonzero(log_p)
        log_p[at[0]], log_p[at[1]], log_p[at[2]] = np.nan, -np.inf, 0.25

    pipeline = ready(taught())
    answer(pipeline, POLICY)
    answer(pipeline, REFERENCE, "one", change=spoil)
    answer(pipeline, "two")
    receipt, shard = pipeline.step(0).receipt, pipeline.shard(0, 0, 1)
    assert receipt["reference_unscorable"] == 1
    assert [receipt["teachers"][name]["unscorable"] for name in ("one", "two")] == [1, 0]
    assert receipt["teachers"]["one"]["clipped"] == 1
    sampled = np.flatnonzero(shard.trainable == 1)
    assert np.isnan(shard.log_reference[sampled]).sum() == 1
    assert np.isneginf(shard.log_reference).sum() == 1 and np.isneginf(shard.log_teacher).sum() == 1
    assert np.nanmax(shard.log_reference) <= 0 and np.nanmax(shard.log_teacher) <= 0
    assert np.isfinite(receipt["kl_reference"]) and np.isfinite(receipt["teachers"]["one"]["gap"])


def test_the_receipts_figures_are_plain_means():
    pipeline = ready(taught())
    answer(pipeline, *ALL)
    receipt, shard = pipeline.step(0).receipt, pipeline.shard(0, 0, 1)
    total, gaps = 0.0, {0: [], 1: []}
    owner = np.repeat(shard.groups, np.diff(shard.cu_seqlens))
    for t in np.flatnonzero(shard.trainable == 1):
        ratio = np.exp(float(shard.log_reference[t]) - float(shard.log_q[t]))
        total += ratio - 1 - np.log(ratio)
        gaps[int(owner[t])].append(np.clip(float(shard.log_teacher[t]) - float(shard.log_q[t]), -5, 5))
    assert receipt["kl_reference"] == pytest.approx(total / (shard.trainable == 1).sum())
    assert receipt["teachers"]["one"]["gap"] == pytest.approx(np.mean(gaps[0]))
    assert receipt["teachers"]["two"]["gap"] == pytest.approx(np.mean(gaps[1]))


def test_answers_that_are_late_twice_or_of_another_length_change_nothing():
    pipeline = ready(taught())
    one, policy = says("one", pipeline.requests["one"]), says(POLICY, pipeline.requests[POLICY])
    answer(pipeline, "one")
    assert pipeline.scored(one) is None
    assert pipeline.counts["late_scores"] == 1
    for wrong in (
        wire.ScoreResult(pipeline.requests["two"].request, 0, 0.1, one.log_p[:-1], one.topk_log_p[:-1]),
        wire.ScoreResult(pipeline.requests["two"].request, -1, 0.1, *(getattr(says("two", pipeline.requests["two"]), n)
                                                                      for n in ("log_p", "topk_log_p"))),
        wire.ScoreResult(policy.request, 0, 0.1, one.log_p, one.topk_log_p),  # a teacher's length for the policy
    ):  # fmt: skip
        with pytest.raises(DataError):
            pipeline.scored(wrong)
    assert set(pipeline.requests) == {POLICY, REFERENCE, "two"}
    answer(pipeline, "two", REFERENCE, POLICY)
    assert pipeline.scored(policy) is None
    assert pipeline.counts["late_scores"] == 2
    assert pipeline.shard(0, 0, 1) is not None


@pytest.mark.parametrize("answered", range(len(ALL) + 1))
def test_a_broker_killed_between_two_answers_awaits_only_the_others(tmp_path, answered):
    settings = taught()
    journal = Journal(tmp_path / "j", "r", 64)
    pipeline = Pipeline(settings, 16)
    recorder = Recorder(pipeline, journal, dict)
    recorder.begin(0)
    recorder.grant("a", 2, 0)
    for group in range(2):
        recorder.admit(trajectories(group), "a", 0)
    recorder.assemble(0)
    for number, scorer in enumerate(ALL[:answered]):
        recorder.scored(says(scorer, pipeline.requests[scorer]))
        if number == 1:
            recorder.snapshot()
    settle(journal)
    journal.close()
    journal = Journal(tmp_path / "j", "r", 64)
    again = Pipeline(settings, 16)
    assert recover(again, journal).differences == []
    assert again.requests.keys() == set(ALL[answered:])
    assert {n: r.request for n, r in again.requests.items()} == {n: r.request for n, r in pipeline.requests.items()}
    for one in (pipeline, again):
        answer(one, *ALL[answered:])
    shards = [[bytes(f) for f in encode(one.shard(0, 0, 1))] for one in (pipeline, again)]
    assert shards[0] == shards[1]
    assert again.step(0).receipt == pipeline.step(0).receipt
    journal.close()


def test_a_second_thinning_asks_the_policy_alone_and_keeps_the_frozen_scores():
    settings = taught(obrs=ObrsSection(rethin_below=1.0))
    pipeline = ready(settings)
    answer(pipeline, *ALL)
    first = pipeline.step(0).receipt
    frozen = pipeline.step(0).frozen
    assert pipeline.rethin(0, 1) is pipeline.requests[POLICY]
    assert set(pipeline.requests) == {POLICY}
    answer(pipeline, POLICY)
    entry = pipeline.step(0)
    assert entry.receipt["rethinned_by_version"] == 1
    assert entry.receipt["kl_reference"] == first["kl_reference"] and entry.frozen is frozen
    np.testing.assert_array_equal(pipeline.shard(0, 0, 1).log_reference, frozen.log_reference)


def test_replay_under_other_settings_takes_the_policys_scores_whoever_answered_last(tmp_path):
    settings = taught()
    for order in (ALL, ALL[::-1]):
        journal = Journal(tmp_path / order[0], "r", 64)
        pipeline = Pipeline(settings, 16)
        recorder = Recorder(pipeline, journal, dict)
        recorder.begin(0)
        recorder.grant("a", 2, 0)
        for group in range(2):
            recorder.admit(trajectories(group), "a", 0)
        recorder.assemble(0)
        for scorer in order:
            recorder.scored(says(scorer, pipeline.requests[scorer]))
        settle(journal)
        alternative = Alternative(settings)
        for event in journal.events():
            alternative(pipeline, event, None)
        journal.close()
        (row,) = alternative.rows
        assert row["acceptance"] == row["acceptance_then"] and row["kl"] == row["kl_then"]


# ---- configuration, processes, directories ------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"teachers": {"one": TeacherEntry("d", ("c",))}}, r"teachers\.one\.tasks=\['c'\]: .*no task 'c'; it has a, b"),
        ({"teachers": {"one": TeacherEntry("d"), "two": TeacherEntry("d", ("b",))}}, "'b' has a teacher already, one"),
        ({"teachers": {"one": TeacherEntry()}}, r"teachers\.one\.path=''"),
        ({"teachers": {"one": TeacherEntry("d", count=0)}}, r"teachers\.one\.count=0"),
        ({"teachers": {"reference": TeacherEntry("d")}}, r"teachers\.reference"),
        ({"teachers": {"a.b": TeacherEntry("d")}}, r"teachers\.a\.b"),
        ({"teachers": {}}, r"loss\.distill=1\.0: there is nobody to learn from"),
        ({"advantage": AdvantageSection(zero_signal="mask")}, r"advantage\.zero_signal='mask': .* set it to keep"),
    ],
)
def test_teachers_that_cannot_be_are_refused_by_name(sections, words):
    with pytest.raises(ConfigError, match=words):
        RunConfig(**{"task": MIX, "loss": LOSS, "teachers": BOTH, **sections})


def test_a_teachers_key_is_checked_and_its_scores_take_room(tmp_path):
    (tmp_path / "c.yaml").write_text("loss: {distill: 1.0}\nteachers: {one: {path: d, task: [a]}}\n")
    with pytest.raises(ConfigError, match=r"unknown key teachers\.one\.task; did you mean 'tasks'"):
        load(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("loss: {distill: 1.0}\nteachers: {one: d}\n")
    with pytest.raises(ConfigError, match=r"teachers\.one is a section"):
        load(tmp_path / "c.yaml")
    assert taught().bytes_journaled > config().bytes_journaled


def test_what_the_loss_does_not_need_is_not_started(tmp_path):
    def names(settings):
        return [process.name for process in processes_of(settings, tmp_path / "c.yaml")]

    assert names(taught(teachers=dict(BOTH, two=TeacherEntry("d", ("b",), 2)))) == [
        "broker", "learner", "replica-0", "reference-0", "teacher-one-0", "teacher-two-0", "teacher-two-1",
        "actor-0", "actor-1",
    ]  # fmt: skip
    assert names(taught(loss=LossSection())) == ["broker", "learner", "replica-0", "actor-0", "actor-1"]
    started = processes_of(taught(), tmp_path / "c.yaml")[4].command
    assert [*started][-4:] == ["--name", "teacher-one-0", "--serves", "one"]
    assert serving(taught(), "one").model.path == "dir/one"
    assert serving(taught(), REFERENCE).model.path == taught().model.path
    with pytest.raises(ConfigError, match=r"--serves three: .*it has reference, one, two"):
        serving(taught(), "three")


def directory(path, vocabulary, tokenizer, hidden=8):
    path.mkdir()
    (path / "config.json").write_text(f'{{"vocab_size": {vocabulary}, "model_type": "llama", "hidden_size": {hidden}}}')
    (path / "tokenizer.json").write_text(tokenizer)
    (path / "model.safetensors").write_bytes(b"")
    return str(path)


def test_a_teacher_of_other_tokens_is_refused_before_the_start_and_at_the_door(tmp_path):
    policy, larger = directory(tmp_path / "p", 16, "t"), directory(tmp_path / "l", 16, "t", hidden=64)
    wide, other = directory(tmp_path / "w", 17, "t"), directory(tmp_path / "o", 16, "u")

    def run(teacher):
        teachers = {"one": TeacherEntry(teacher)}
        return taught(teachers, loss=LossSection(distill=1.0), model=ModelSection(path=policy))

    def hello(settings, serves="one", role="replica"):
        facts = model_identity(settings.frozen["one"].path)
        return wire.Hello(role, "t", "", "s", 0, 1, 0, 0, "h", 1, facts, serves)

    check_frozen(run(larger).frozen["one"], policy)
    assert Identities(run(larger)).objection(hello(run(larger))) == ""
    for path, words in ((wide, "vocabulary 17 where this run has 16"), (other, "tokenizer")):
        with pytest.raises(ModelError, match=rf"teacher one at .* \(teachers\.one\.path\) has {words}.*model\.path's"):
            check_frozen(run(path).frozen["one"], policy)
        assert words in Identities(run(path)).objection(hello(run(path)))
    told = Identities(run(larger)).objection(hello(run(wide)))
    assert told.startswith("its teachers.one.path holds another model: ")
    for wrong in (hello(run(larger), "two"), hello(run(larger), role="actor")):
        assert "this run has one; start it as `python -m learner.score RUN.yaml" in Identities(run(larger)).objection(
            wrong
        )
    with pytest.raises(ModelError, match=r"teachers\.one\.path='.*/none': no such directory"):
        check_frozen(run(str(tmp_path / "none")).frozen["one"], None)


def test_segments_are_scored_apart_also_where_a_teacher_sees_a_part_of_the_batch():
    rollout = RolloutSection(groups_per_step=2, group_size=G, max_prompt_tokens=3, max_tokens=5)
    pipeline = Pipeline(taught(rollout=rollout), 16)
    pipeline.grant("a", 2, 0)
    cut = {}
    for group in range(2):
        message = trajectories(group)
        at = message.cu_seqlens[1:] - 1  # a further segment: a given token before the last
        message.trainable[at - 1], message.log_q[at - 1], message.versions[at - 1] = wire.STARTS, 0, -1
        cut[group] = np.sort(np.concatenate((message.cu_seqlens, at - 1)))
        assert set(pipeline.admit(message, "a", 0).reasons) == {""}
    pipeline.assemble(0)
    for name, group in (("one", 0), ("two", 1)):
        np.testing.assert_array_equal(pipeline.requests[name].cu_seqlens, cut[group])
        assert set(pipeline.requests[name].wanted.tolist()) == {0, 1}
