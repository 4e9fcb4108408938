"""Mixed tasks: shares of every window, indices without gaps, and what a batch and its receipt say of them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.batch import collate
from broker.decision import reject
from broker.pipeline import Pipeline
from broker.receipts import receipt
from broker.trajectories import unpack_all
from common import wire
from common.config import (
    ObrsSection,
    RolloutSection,
    RunConfig,
    RunSection,
    StalenessSection,
    TaskEntry,
    TaskSection,
    load,
)
from common.errors import ConfigError
from common.mixture import LONGEST_PERIOD, Mixture, turns_of
from tests.unit import test_audit
from tools.receipt import audit_table, receipt_table

MIX = TaskSection(mix={"easy: a": TaskEntry("sort6", 3.0), "b": TaskEntry("guess", 1.0)})
ratios = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@settings(max_examples=60)
@given(ratios, st.integers(0, 10**12), st.integers(1, 200))
def test_every_prefix_is_within_one_of_the_ratios_and_every_window_within_two(weights, first, length) -> None:
    schedule = Mixture(weights)
    share = np.array(weights) / sum(weights)
    tasks, _ = schedule.places(np.arange(3 * schedule.period))
    counts = (tasks[:, None] == np.arange(len(weights))).cumsum(axis=0)
    expected = np.arange(1, len(tasks) + 1)[:, None] * share
    assert np.abs(counts - expected).max() < 1
    window, _ = schedule.places(np.arange(first, first + length))
    assert np.abs(np.bincount(window, minlength=len(weights)) - length * share).max() < 2


@settings(max_examples=60)
@given(ratios, st.integers(0, 10**9))
def test_own_questions_count_without_gaps_and_lead_back(weights, far) -> None:
    schedule = Mixture(weights)
    tasks, own = schedule.places(np.arange(2 * schedule.period + 5))
    for task in range(len(weights)):
        assert own[tasks == task].tolist() == list(range(int((tasks == task).sum())))
    for prompt in (0, 1, 17, far):
        assert schedule.prompt(*schedule.place(prompt)) == prompt


def test_the_schedule_is_what_it_was() -> None:
    """Journals, checkpoints and other processes rely on it."""
    assert Mixture([3, 1]).places(range(9))[0].tolist() == [0, 0, 0, 1, 0, 0, 0, 1, 0]
    assert Mixture([0.5, 0.3, 0.2]).places(range(10))[0].tolist() == Mixture([5, 3, 2]).places(range(10))[0].tolist()
    assert Mixture([5, 3, 2]).places(range(10))[0].tolist() == [0, 1, 0, 2, 0, 1, 0, 1, 0, 2]
    assert Mixture([1]).places([0, 5, 10**15])[1].tolist() == [0, 5, 10**15]


def test_ratios_without_a_short_period_are_rounded_and_the_rest_refused() -> None:
    turns = turns_of([0.123456789, 1.0, 2.7182818])
    assert sum(turns) == LONGEST_PERIOD
    share = np.array([0.123456789, 1.0, 2.7182818]) / 3.841738589
    assert np.abs(np.array(turns) / LONGEST_PERIOD - share).max() < 1 / LONGEST_PERIOD
    for bad in ([], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")]):
        with pytest.raises(ConfigError, match="must be positive and finite"):
            turns_of(bad)
    with pytest.raises(ConfigError, match=r"at least 1/4096 of their sum"):
        turns_of([1.0, 1e-5])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("task.mix.guess.ration=2", r"unknown key task\.mix\.guess\.ration; did you mean 'ratio'"),
        ("task.mix.guess=2", r"task\.mix\.guess is a section and needs keys"),
        ("task.mix.guess.ratio=0", r"task\.mix: ratios of mixed tasks \[3\.0, 0\.0\]"),
        ("task.name=guess", r"task\.name='guess': each task of task\.mix has its own"),
        ("task.params={a: 1}", r"task\.params=.*remove one"),
        ("task.reward_weights.prefix=1", r"task\.reward_weights=.*remove one"),
    ],
)
def test_a_wrong_mixture_is_refused_by_name(tmp_path: Path, override: str, words: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("task:\n  mix:\n    sort6: {ratio: 3}\n    guess: {ratio: 1}\n")
    assert load(file).task.ratios == (3.0, 1.0)
    assert [entry.name for entry in load(file).task.entries.values()] == ["sort6", "guess"]
    with pytest.raises(ConfigError, match=words):
        load(file, [override])


def test_one_task_is_a_mixture_of_one() -> None:
    task = TaskSection(name="guess", params={"a": 1}, reward_weights={"b": 1.0})
    assert task.labels == ("guess",) and task.mixture.place(41) == (0, 41)
    assert task.entries == {"guess": TaskEntry("guess", 1.0, {"a": 1}, {"b": 1.0})}
    assert TaskSection().in_small_alphabet and MIX.in_small_alphabet and not task.in_small_alphabet
    assert not TaskSection(mix={"sort6": TaskEntry(), "gym:x": TaskEntry()}).in_small_alphabet


# ---- in the broker ------------------------------------------------------------------------------

CONFIG = RunConfig(
    run=RunSection(steps=3),
    rollout=RolloutSection(groups_per_step=4, group_size=2, max_prompt_tokens=2, max_tokens=4),
    staleness=StalenessSection(1),
    obrs=ObrsSection(mode="off"),
    task=MIX,
)


def message(group: int, rewards: list[float]) -> wire.Trajectories:
    n, size = len(rewards), 3
    on = np.tile([0, 1, 1], n).astype(np.uint8)
    return wire.Trajectories(
        "r", ["correct"], np.full(n, group), np.arange(n, dtype=np.int32), np.array(rewards, np.float32),
        np.zeros((n, 1), np.float32), np.zeros(n, np.uint8), np.arange(0, size * n + 1, size, dtype=np.int32),
        np.zeros(size * n, np.int32), on, np.where(on, -1, 0).astype(np.float32),
        np.where(on, 0, -1).astype(np.int32), np.zeros((size * n, 0), np.int32), np.zeros((size * n, 0), np.float32),
    )  # fmt: skip


def test_a_batch_knows_whose_prompt_each_trajectory_answers() -> None:
    pipeline = Pipeline(CONFIG, 16)
    grant = pipeline.grant("a", 5, 0)
    assert grant is not None and grant.prompts.tolist() == [0, 1, 2, 3, 4]
    pipeline.give_up(1, "actor_lost")  # prompt 1 comes again in a later group
    again = pipeline.grant("a", 1, 0)
    assert again is not None and again.prompts.tolist() == [1]
    for group, rewards in ((0, [0, 1]), (3, [1, 1]), (2, [1, 0]), (5, [0, 0])):
        assert set(pipeline.admit(message(group, rewards), "a", 0).reasons) == {""}
    pipeline.assemble(0)
    entry = pipeline.step(0)
    assert entry is not None
    batch = entry.batch
    assert batch.groups.tolist() == [0, 0, 2, 2, 3, 3, 5, 5]
    assert batch.prompts.tolist() == [0, 0, 2, 2, 3, 3, 1, 1]
    assert batch.tasks.tolist() == [0, 0, 0, 0, 1, 1, 0, 0] and batch.labels == ("easy: a", "b")
    tasks = entry.receipt["tasks"]
    assert tasks["b"] == {
        "trajectories": 2, "groups": 1, "groups_without_signal": 1, "reward": 1.0, "reward_std": 0.0,
        "length_mean": 2.0, "truncated": 0.0,
    }  # fmt: skip
    assert tasks["easy: a"]["reward"] == pytest.approx(2 / 6) and tasks["easy: a"]["groups_without_signal"] == 1
    pipeline.commit(0)
    assert pipeline.fates.counts["task"]["trained"] == {"easy: a": 6, "b": 2}
    pipeline.admit(message(4, [0]), "a", 0)
    pipeline.give_up(4, "actor_lost")
    assert pipeline.fates.counts["task"]["dropped"] == {"easy: a": 1}


def test_one_task_alone_has_no_such_figures() -> None:
    single = dataclasses.replace(CONFIG, task=TaskSection())
    batch = collate(0, unpack_all(message(0, [0, 1]), prompts=[7, 7]), single)
    assert batch.tasks.tolist() == [0, 0] and batch.prompts.tolist() == [7, 7]
    pipeline = Pipeline(single, 16)
    pipeline.grant("a", 4, 0)
    for group in range(4):
        pipeline.admit(message(group, [0, 1]), "a", 0)
    pipeline.assemble(0)
    entry = pipeline.step(0)
    assert entry is not None and entry.receipt["tasks"] is None


def test_a_task_whose_tokens_are_rejected_more_stands_out_by_its_label() -> None:
    config = dataclasses.replace(CONFIG, rollout=test_audit.CONFIG.rollout)
    batch, scores = test_audit.batch_of(3, {}, drift=0.0)
    members = [dataclasses.replace(t, prompt=t.group) for t in batch.members]
    mixed = collate(0, members, config)
    shift = np.where(mixed.tasks[mixed.owner] == 1, -1.5, 0.0)
    harmed = dataclasses.replace(scores, log_p=(scores.log_p + shift).astype(np.float32))
    line = receipt(mixed, reject(mixed, harmed, test_audit.Rule(5, 0.0)), 1.0)
    strata = line["audit"]["strata"]["task"]
    assert strata["b"][1] < 0.3 < strata["easy: a"][1] and strata["b"][2] < -4
    assert any(warning.startswith("task b: acceptance 0.2") for warning in line["audit"]["warnings"])
    table = audit_table([line])
    cells = list(zip(*(column.cells for column in table.columns), strict=True))
    assert {row[1]: row[-1] for row in cells if row[0] == "task"} == {"easy: a": "1", "b": "1"}
    filled = {**line, "dropped": {}, "reward_channels": {}}
    labels = list(receipt_table(filled).columns[0].cells)
    assert "task easy: a" in labels and "task b" in labels
