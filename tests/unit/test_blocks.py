"""Blocks from the ids that were sampled to the spans of a shard; the two tasks that have them."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actor.engine.base import Completion
from actor.outbox import Finished, pack
from actor.play import Play, open_task
from actor.rollout import Turn
from actor.tasks.base import Block, BlockTask, DemonstratedTask, make_task
from actor.tasks.sort6 import encode
from broker.batch import collate
from broker.trajectories import unpack_all
from common.config import RolloutSection, RunConfig, TaskSection
from common.errors import ConfigError, DataError, TaskError
from common.objective import AdvantageSection
from tests.properties.made import sibling_of

CONFIDENCE = make_task("sort6_confidence", "", 3, {})
TWICE = make_task("sort6_twice", "", 3, {})
ITEM = CONFIDENCE.prompt(0, "train")
RIGHT = ITEM.reference[:-1]
WRONG = RIGHT[::-1] if RIGHT[::-1] != RIGHT else "999999"


def scored(task, text):
    ids = encode(text)
    channels = task.reward(ITEM, ids)
    assert tuple(channels) == task.channels
    return channels, task.blocks(ITEM, [ids], channels)


def test_an_answer_and_its_confidence_are_two_blocks():
    assert isinstance(CONFIDENCE, BlockTask) and isinstance(CONFIDENCE, DemonstratedTask)
    channels, blocks = scored(CONFIDENCE, f"{RIGHT}a6$")
    assert channels["correct"] == channels["valid"] == 1
    assert channels["confidence"] == pytest.approx(6 / 9)
    assert channels["rlcr"] == pytest.approx(1 - (1 / 3) ** 2)
    assert blocks == [Block(0, 0, 6, 1.0), Block(1, 6, 9, pytest.approx(-((1 / 3) ** 2)), 1)]
    channels, blocks = scored(CONFIDENCE, f"{WRONG}a9$")
    assert channels["correct"] == 0 and blocks[1].outcome == 0 and blocks[1].reward == -1
    assert channels["bce"] == pytest.approx(np.log(0.01))
    sure = make_task("sort6_confidence", "", 3, {"score": "bce"})
    assert scored(sure, f"{RIGHT}a9$")[1][1].reward == 0


@pytest.mark.parametrize("text", ["{}$", "{}a$", "{}7$", "{}a7", "{}a7a7$", "a", "{}a>$", ""])
def test_a_garbled_confidence_is_one_block_with_a_penalty(text):
    channels, blocks = scored(CONFIDENCE, text.format(RIGHT))
    assert channels["valid"] == 0
    assert [(b.number, b.first, b.end) for b in blocks] == [(0, 0, len(text.format(RIGHT)))]
    assert blocks[0].reward == channels["correct"] - 0.5


def test_two_attempts():
    for text, rewards in (
        (f"{RIGHT}b{RIGHT}$", [1, 1]), (f"{WRONG}b{RIGHT}$", [0, 1]), (f"{RIGHT}b{WRONG}$", [1, 0.1]),
        (f"{WRONG}b{WRONG}$", [0, 0]), (f"{WRONG}$", [-0.5]), (f"{RIGHT}b{RIGHT}", [-0.5]),
        (f"{RIGHT}$", [0.5]), (f"{RIGHT}bb$", [-0.5]),
    ):  # fmt: skip
        channels, blocks = scored(TWICE, text)
        assert [b.reward for b in blocks] == pytest.approx(rewards), text
        if len(blocks) == 2:
            assert blocks[1].outcome == channels["first"]
            assert channels["correct"] == channels["second"]


@given(st.lists(st.integers(0, 15), max_size=16))
def test_any_ids_at_all_are_scored_and_their_blocks_lie_apart_within_them(ids):
    ids = np.array(ids, np.int32)
    for task in (CONFIDENCE, TWICE):
        channels = task.reward(ITEM, ids)
        at = 0
        for block in task.blocks(ITEM, [ids], channels):
            assert at <= block.first <= block.end <= len(ids)
            at = block.end
        task.answer(ITEM, ids)


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("sort6_confidence", {"score": "log"}, "brier or bce"),
        ("sort6_twice", {"penalty": 2}, "from 0 to 1"),
        ("sort6_confidence", {"penaltie": 1}, "did you mean 'penalty'"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(name, params, words):
    with pytest.raises(TaskError, match=words):
        make_task(name, "", 0, params)


def completion(ids, context=2):
    n = len(ids)
    return Completion(
        0, 0, np.array(ids, np.int32), np.full(n, -1, np.float32), np.zeros(n, np.int32), np.zeros((n, 0), np.int32),
        np.zeros((n, 0), np.float32), np.zeros((context + n, 0), np.uint16), "stop",
    )  # fmt: skip


def test_blocks_of_turns_travel_as_spans_of_the_trajectory():
    turns = [Turn(encode("c>"), completion([1, 2, 3])), Turn(encode("a>"), completion([4, 5], 7))]
    blocks = [Block(0, 0, 3, 1.0), Block(1, 1, 2, 0.5, 1, turn=1)]
    whole = Finished(7, 0, turns, {"correct": 1.0}, 1.0, blocks)
    plain = Finished(7, 1, turns[:1], {"correct": 0.0}, 0.0)
    message = pack("r", ("correct",), [plain, whole, whole])
    message.check()
    assert message.blocks.tolist() == [[1, 0, -1, 2, 5], [1, 1, 1, 8, 9], [2, 0, -1, 2, 5], [2, 1, 1, 8, 9]]
    first, second, _ = unpack_all(message)
    assert len(first.blocks) == 0
    assert second.blocks.tolist() == [[0, -1, 2, 5], [1, 1, 8, 9]] and second.block_rewards.tolist() == [1.0, 0.5]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([3, 0, -1, 2, 5], "no trajectory"), ([1, 0, -1, 5, 5], "within their trajectory"),
        ([1, 0, -1, 2, 99], "within their trajectory"), ([1, 300, -1, 2, 5], "impossible number"),
        ([0, 0, -1, 0, 2], "in order"),
    ],
)  # fmt: skip
def test_blocks_that_cannot_be_are_refused(row, words):
    turns = [Turn(encode("c>"), completion([1, 2, 3]))]
    message = pack(
        "r", ("correct",), [Finished(7, s, turns, {"correct": 1.0}, 1.0, [Block(0, 0, 3, 1.0)]) for s in (0, 1)]
    )
    message.blocks = np.array([message.blocks[0].tolist(), row], np.int32)
    with pytest.raises(DataError, match=words):
        message.check()


def test_an_actor_sends_the_blocks_of_what_it_scored_only_where_they_are_wanted():
    for blocks in ("ocb", "off"):
        config = RunConfig(
            task=TaskSection(name="sort6_confidence"), advantage=AdvantageSection(blocks=blocks),
            rollout=RolloutSection(group_size=2, max_tokens=9),
        )  # fmt: skip
        play = Play(config, open_task(config), Recorder(), Counter(), lambda message: None)
        play.start_group(5, 0)
        answers = (encode(f"{RIGHT}a6$"), encode("1$"))
        for sibling, ids in enumerate(answers):
            (finished,) = play.collect([replace(completion(ids.tolist(), 7), request_id=5, sibling=sibling)])
            assert [b.number for b in finished.blocks] == ([] if blocks == "off" else [[0, 1], [0]][sibling])
        play.close()
    with pytest.raises(ConfigError, match=r"advantage.blocks=ocb: task sort6 has no blocks"):
        open_task(RunConfig(advantage=AdvantageSection(blocks="ocb")))


class Recorder:
    """Stands for an engine."""

    def add(self, request):
        pass

    def cancel(self, request_id, sibling):
        pass


def test_a_block_without_a_trained_token_is_in_no_stratum():
    config = RunConfig(rollout=RolloutSection(group_size=4), advantage=AdvantageSection(blocks="ocb"))
    roles, last = np.array([0, 1, 1, 0, 0]), ((0, 0, 3, 5),)  # of the last sibling, what the environment said

    def advantages(of_last, rewards):
        members = [
            sibling_of(0, n, 0.0, [1] * 5, roles, np.where(roles, -0.5, 0), np.where(roles, 0, -1), blocks=blocks,
                       block_rewards=reward)
            for n, (blocks, reward) in enumerate([*[(((0, 0, 1, 3),), (r,)) for r in (1, 1, 0)], (of_last, rewards)])
        ]  # fmt: skip
        batch = collate(0, members, config)
        return dict(zip(batch.spans[:-1].tolist(), batch.span_advantages.tolist(), strict=True)), batch.span_scale.sum()

    with_it, scale = advantages(last, (0.0,))
    without, same = advantages((), ())
    assert scale == same == 3
    assert {at: with_it[at] for at in without} == without and without[1] == 0.5  # beside 1 and 0
