"""The game of several turns: what it answers, what it pays, and what a perfect player needs."""

import numpy as np
import pytest

from actor.tasks.base import MultiTurnTask, PromptItem, make_task
from actor.tasks.guess import ASK, HIGHER, LOWER, REPLY_TOKENS, Guess, read_guess
from actor.tasks.sort6 import decode, encode
from common.errors import TaskError


def test_it_says_which_way_the_number_lies_and_ends_when_it_is_found() -> None:
    task, item = Guess(0, {}), PromptItem(ASK, 625)
    assert task.reply(item, [encode("500$")]) is HIGHER
    assert task.reply(item, [encode("500$"), encode("750$")]) is LOWER
    assert task.reply(item, [encode("625$")]) is None
    for nonsense in ("$", "", "6a5$", "1000$", "9999", ">625$"):
        assert task.reply(item, [encode(nonsense)]) is ASK
    assert {len(reply) for reply in (ASK, HIGHER, LOWER)} == {REPLY_TOKENS}


def test_the_last_answer_is_what_pays() -> None:
    task, item = Guess(0, {}), PromptItem(ASK, 250)
    assert task.reward_turns(item, [encode("0$"), encode("250$")]) == {"correct": 1.0, "closeness": 1.0}
    assert task.reward_turns(item, [encode("250$"), encode("500$")]) == {"correct": 0.0, "closeness": 0.75}
    assert task.reward_turns(item, [encode("250$"), encode("$$")]) == {"correct": 0.0, "closeness": 0.0}
    assert task.reward(item, encode("0$")) == {"correct": 0.0, "closeness": 0.75}


@pytest.mark.parametrize(
    ("answer", "number"), [("7$", 7), ("007$", 7), ("999", 999), ("12$34$", 12), ("$12", None), ("1.2$", None)]
)
def test_a_guess_is_the_number_before_the_end(answer: str, number: int | None) -> None:
    assert read_guess(encode(answer)) == number


def test_questions_repeat_and_the_splits_share_none() -> None:
    task = make_task("guess", "", 3, {})
    assert isinstance(task, MultiTurnTask)
    numbers = {
        split: [task.prompt(i, split).reference for i in range(500)]
        for split in ("train", "heldout")  # type: ignore[arg-type]
    }
    assert numbers["train"] == [make_task("guess", "", 3, {}).prompt(i, "train").reference for i in range(500)]
    assert not set(numbers["train"]) & set(numbers["heldout"])
    assert len(set(numbers["train"])) > 300 and 80 <= len(set(numbers["heldout"])) <= 150
    assert decode(task.prompt(0, "train").prompt_ids) == "c>"


def test_bisection_finds_every_number_within_ten_turns() -> None:
    task = Guess(0, {})
    for number in range(1000):
        low, high, answers = 0, 1000, []
        while True:
            middle = (low + high) // 2
            answers.append(encode(f"{middle}$"))
            reply = task.reply(PromptItem(ASK, number), answers)
            if reply is None:
                break
            low, high = (middle + 1, high) if reply is HIGHER else (low, middle)
        assert len(answers) <= 10


def test_refusals_name_the_remedy() -> None:
    with pytest.raises(TaskError, match=r"params\.range: guess has no such parameter"):
        make_task("guess", "", 0, {"range": 10})
    with pytest.raises(TaskError, match="needs the quick start's model"):
        read_guess(np.array([3, 16], np.int32))
