"""Questions that were passed too often are not asked again, in mixtures too, and pass rates are counted unfiltered."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.curriculum import MAX_QUESTIONS, RATES, Curriculum, History, pass_rate, passed
from broker.journal import Journal
from broker.pipeline import Pipeline
from broker.recorder import Recorder, apply
from broker.recovery import recover
from broker.trajectories import unpack_all
from common import wire
from common.config import (
    AdvantageSection,
    ObrsSection,
    RolloutSection,
    RunConfig,
    RunSection,
    StalenessSection,
    TaskEntry,
    TaskSection,
)
from common.errors import ConfigError
from common.questions import question_of

G, SEED, SIZE = 4, 11, 6


def config(skip_passed: float = 0.75, zero_signal: str = "keep", **sections) -> RunConfig:
    base = {
        "run": RunSection(steps=20, seed=SEED),
        "rollout": RolloutSection(groups_per_step=2, group_size=G, max_prompt_tokens=1, max_tokens=2),
        "staleness": StalenessSection(2),
        "obrs": ObrsSection(mode="off"),
        "advantage": AdvantageSection(skip_passed=skip_passed, zero_signal=zero_signal),
        "task": TaskSection(name="jsonl"),
    }
    return RunConfig(**{**base, **sections})


def group_of(group: int, right: int, channel: str = "correct", version: int = 0) -> wire.Trajectories:
    """``right`` of G siblings pass, each of one prompt token and one sampled token."""
    won = np.array([float(i < right) for i in range(G)], np.float32)
    on = np.tile(np.array([0, 1], np.uint8), G)
    return wire.Trajectories(
        "r", [channel], np.full(G, group, np.int64), np.arange(G, dtype=np.int32), won, won[:, None],
        np.zeros(G, np.uint8), np.arange(0, 2 * G + 1, 2, dtype=np.int32), np.ones(2 * G, np.int32), on,
        np.where(on, -1, 0).astype(np.float32), np.where(on, version, -1).astype(np.int32),
        np.zeros((2 * G, 0), np.int32), np.zeros((2 * G, 0), np.float32),
    )  # fmt: skip


def members_of(right: int, channel: str = "correct"):
    return unpack_all(group_of(0, right, channel))


def live(recorder: Recorder, right_of, steps: int) -> tuple[list[int], list[dict]]:
    """Train ``steps`` steps; siblings of a question pass as ``right_of`` says. Returns prompts and receipts."""
    asked, receipts = [], []
    for step in range(recorder.pipeline.committed_step + 1, recorder.pipeline.committed_step + 1 + steps):
        while (grant := recorder.grant("a", 2, step)) is not None:
            for group, prompt in zip(grant.groups.tolist(), grant.prompts.tolist(), strict=True):
                asked.append(prompt)
                right = right_of(question_of(SEED, prompt, SIZE))
                assert recorder.admit(group_of(group, right, version=step), "a", step).reasons == [""] * G
        recorder.assemble(step)
        receipts.append(recorder.commit(step, {}))
    return asked, receipts


# ---- what passes, and how often -----------------------------------------------------------------


def test_a_trajectory_passes_by_its_channel_or_else_by_a_reward_above_0() -> None:
    assert [passed(t) for t in members_of(2)] == [True, True, False, False]
    assert [passed(t) for t in members_of(3, "closeness")] == [True, True, True, False]
    half = group_of(0, 4)
    half.channels[:] = 0.5  # the reward is 1 nevertheless
    assert not any(passed(t) for t in unpack_all(half))


@pytest.mark.parametrize("tries", [1, 2, 3, 8, 16, 64])
def test_only_none_and_all_of_a_group_have_the_outer_rates(tries: int) -> None:
    rates = [pass_rate(right, tries) for right in range(tries + 1)]
    assert rates[0] == 0 and rates[-1] == len(RATES) - 1
    assert all(0 < rate < 10 and abs(rate - 10 * right / tries) <= 1 for right, rate in enumerate(rates[1:-1], 1))
    assert rates == sorted(rates)


# ---- histories against a naive oracle -----------------------------------------------------------


@settings(max_examples=60)
@given(
    size=st.integers(1, 7),
    share=st.sampled_from([0.25, 0.5, 0.7, 0.9, 1.0]),
    results=st.lists(st.integers(0, 10), min_size=1, max_size=60),
)
def test_a_question_is_asked_until_an_epoch_begins_after_it_was_passed_often_enough(size, share, results) -> None:
    history = History(SEED, size, share)
    passes, tries, retired, epoch, index = Counter(), Counter(), set(), -1, 0
    for turn, right in enumerate(results):
        while True:  # what the module says, in sets
            if index // size != epoch:
                epoch = index // size
                retired |= {q for q in range(size) if tries[q] and passes[q] / tries[q] >= share}
                if len(retired) == size:
                    passes, tries, retired = Counter(), Counter(), set()
            question = question_of(SEED, index, size)
            index += 1
            if question not in retired:
                break
        own = history.draw(turn)
        assert own == index - 1
        again = History(SEED, size, share)
        again.restore(history.state())
        assert again.state() == history.state()
        history = again
        history.note(own, right, 10)
        passes[question] += right
        tries[question] += 10


def test_when_every_question_is_retired_all_begin_anew_and_it_is_counted() -> None:
    curriculum = Curriculum(config())
    curriculum.begin([3])
    asked = []
    for turn in range(9):
        asked.append(curriculum.prompt(turn))
        curriculum.settled(asked[-1], members_of(G))
    assert asked == list(range(9))
    assert curriculum.resets == 2
    assert curriculum.receipt(0)["questions_reset"] == 2


def test_a_mixture_keeps_its_ratio_where_one_task_skips() -> None:
    task = TaskSection(mix={"easy": TaskEntry("jsonl", 1.0), "endless": TaskEntry("sort6", 2.0)})
    curriculum = Curriculum(config(task=task))
    assert curriculum.objection([SIZE, 0]) == ""
    curriculum.begin([SIZE, 0])
    mixture, asked = task.mixture, []
    easy = {question_of(SEED, i, SIZE) for i in range(2)}
    for turn in range(60):
        prompt = curriculum.prompt(turn)
        number, own = mixture.place(prompt)
        asked.append((number, own))
        right = G if number == 0 and question_of(SEED, own, SIZE) in easy else 1
        curriculum.settled(prompt, members_of(right))
    assert Counter(number for number, _ in asked) == {0: 20, 1: 40}
    assert [own for number, own in asked if number] == list(range(40))
    of_first = Counter(question_of(SEED, own, SIZE) for number, own in asked if number == 0)
    assert {of_first[q] for q in easy} == {1}  # the first epoch's
    assert min(of_first[q] for q in range(SIZE) if q not in easy) >= 3
    curriculum.assembled(0)
    line = curriculum.receipt(0)
    assert line["pass_rates_by_task"] == {"easy": {"0.3": 18, "1": 2}, "endless": {"0.3": 40}}
    assert line["pass_rates"] == {"0.3": 58, "1": 2}


# ---- in the pipeline ----------------------------------------------------------------------------


def test_passed_questions_leave_from_the_next_epoch_on_and_the_receipt_says_so(tmp_path: Path) -> None:
    def right_of(question: int) -> int:
        return G if question < 2 else 1

    journal = Journal(tmp_path / "j", "r", 64)
    recorder = Recorder(Pipeline(config(), 16), journal, dict)
    recorder.begin(0)
    recorder.questions([SIZE])
    asked, receipts = live(recorder, right_of, 6)
    first, later = asked[:SIZE], asked[SIZE:]
    assert first == list(range(SIZE))
    assert not {question_of(SEED, p, SIZE) for p in later} & {0, 1}
    assert {question_of(SEED, p, SIZE) for p in later} == {2, 3, 4, 5}
    assert sum((Counter(r["pass_rates"]) for r in receipts), Counter())["1"] == 2
    assert receipts[-1]["questions_retired"] == 2
    assert receipts[-1]["questions_skipped"] == later[-1] + 1 - len(asked)

    recorder.snapshot()
    more, _ = live(recorder, right_of, 3)
    journal.flush()
    while journal.durable < journal.last:
        journal.check()
    for replayed in (False, True):
        again = Pipeline(config(), 16)
        if replayed:
            for event in journal.events():
                result = apply(again, event)
                if event.kind == "grant":
                    assert len(result.groups) == event.head["count"]
        else:
            assert recover(again, journal).differences == []
        assert again.state() == recorder.pipeline.state()
    assert not {question_of(SEED, p, SIZE) for p in more} & {0, 1}
    journal.close()


def test_pass_rates_are_those_of_before_the_filter(tmp_path: Path) -> None:
    recorder = Recorder(Pipeline(config(skip_passed=0.0, zero_signal="resample"), 16), None, dict)
    rights = iter([0, G, 2, G, 1, 3])
    grants = recorder.grant("a", 6, 0)
    queue = grants.groups.tolist()
    while queue:
        recorder.admit(group_of(queue.pop(0), next(rights)), "a", 0)
        if recorder.pipeline.ledger.queued == 2:
            break
        if not queue:
            queue = recorder.grant("a", 1, 0).groups.tolist()
    recorder.assemble(0)
    receipt = recorder.commit(0, {})
    assert receipt["pass_rates"] == {"0": 1, "0.3": 1, "0.5": 1, "1": 2}
    assert receipt["trajectories"] == 2 * G
    assert "questions_retired" not in receipt


# ---- who may serve ------------------------------------------------------------------------------


def test_a_share_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"advantage\.skip_passed=1\.5"):
        config(skip_passed=1.5)


@pytest.mark.parametrize(
    ("skip", "known", "sizes", "words"),
    [
        (0.9, [], [], "jsonl has no end; set it to 0"),
        (0.9, [], [0], "jsonl has no end; set it to 0"),
        (0.9, [], [MAX_QUESTIONS + 1], "at most 8,388,608 questions"),
        (0.9, [100], [99], "task jsonl has 99 training questions, that of this run 100 training questions"),
        (0.0, [100], [0], "task jsonl has no end of training questions"),
        (0.0, [], [-1], "counts questions of"),
        (0.0, [], [1, 2], "for the 1 tasks of this run"),
        (0.9, [], [100], ""),
        (0.0, [], [], ""),
        (0.0, [100], [], ""),
        (0.9, [100], [100], ""),
    ],
)
def test_actors_must_agree_on_how_many_questions_there_are(skip, known, sizes, words) -> None:
    curriculum = Curriculum(config(skip_passed=skip))
    if known:
        curriculum.begin(known)
    objection = curriculum.objection(sizes)
    assert (words in objection) if words else objection == ""
