"""Reasoning is told from the answer, whoever opens it and whatever tokens mark it."""

import json
from pathlib import Path

import numpy as np
import pytest

from actor.engine.base import Completion
from actor.rollout import Turn
from actor.scoring.texts import Texts
from actor.tasks.base import make_task
from actor.tasks.chat import Chat
from actor.tasks.reasoning import is_opened, without_reasoning
from actor.tasks.tokenizer import load_tokenizer
from tests.chatml import TEMPLATE, make_tokenizer

END = "<|im_end|>"
OPENING = TEMPLATE.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")


@pytest.fixture(scope="module", params=["plain", "special"])
def opening(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose template opens reasoning, by ordinary tokens or by special ones."""
    directory = make_tokenizer(tmp_path_factory.mktemp(request.param))
    tokenizer = load_tokenizer(str(directory))
    tokenizer.chat_template = OPENING
    if request.param == "special":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.save_pretrained(directory)
    return str(directory)


def ids(model: str, text: str) -> np.ndarray:
    return np.array(load_tokenizer(model)(text, add_special_tokens=False)["input_ids"], np.int32)


def test_what_is_behind_the_last_end_is_the_answer() -> None:
    assert without_reasoning("<think>a</think>\nb") == "\nb" and without_reasoning(" b ") == " b "
    assert without_reasoning("<think>a") == "" and without_reasoning("a</think> b") == " b"
    assert without_reasoning("a", opened=True) == "" and without_reasoning("a</think>b", opened=True) == "b"
    assert is_opened("assistant\n<think>\n") and not is_opened("<think>\n\n</think>\n\n") and not is_opened("")


def test_a_template_that_opens_reasoning_leaves_no_answer_until_it_ends(opening: str) -> None:
    chat = Chat(opening)
    assert chat.text(ids(opening, "maybe 42? wait")) == ""
    assert chat.text(ids(opening, f"maybe 41</think>\n42{END}")) == "\n42"
    assert chat.text(ids(opening, f"<think>41</think>42{END}")) == "42"


def test_special_tokens_that_mark_reasoning_are_seen_where_the_policy_opens_it(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(make_tokenizer(tmp_path)))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.save_pretrained(tmp_path)
    chat = Chat(str(tmp_path))
    texts = [f"<think>41</think>42{END}", "<think>41", f"42{END}", "41</think><think>42"]
    assert [chat.text(ids(str(tmp_path), text)) for text in texts] == ["42", "", "42", "<think>42"]


def test_a_judge_is_shown_answers_alone(opening: str) -> None:
    class Nothing:
        channels = ()

    texts, chat = Texts(Nothing(), opening), Chat(opening)  # type: ignore[arg-type]

    def turn(given: np.ndarray, text: str) -> Turn:
        sampled, nothing = ids(opening, text), np.zeros((0, 0))
        n = len(sampled)
        completion = Completion(0, 0, sampled, np.zeros(n), np.zeros(n, np.int32), nothing, nothing, nothing, "stop")
        return Turn(given, completion)

    first = turn(chat.prompt("q"), f"hm</think>42{END}")
    reply = chat.reply("sure?", first.completion.token_ids, 100)
    assert texts.answer([first]) == "42" and texts.answer([turn(chat.prompt("q"), "hm, 42")]) == ""
    assert texts.answer([first, turn(reply, "let me see")]) == "42\nuser\nsure?\nassistant\n"
    assert texts.answer([first, turn(reply, "yes</think>42.")]) == "42\nuser\nsure?\nassistant\n42."


def test_the_second_attempt_needs_no_end_of_its_own(opening: str, tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps({"question": f"{n} * 7?", "answer": "42"}) + "\n" for n in (6, 7)))
    inner = {"file": str(file), "heldout": 1, "grader": "number"}
    task = make_task("tagged", opening, 0, {"inner": "jsonl", "params": inner, "style": "attempts"})
    item = task.prompt(0, "heldout")
    for text, rewards in (
        ("hm</think><answer>41</answer> no <answer>42</answer>", (0.0, 1.0)),
        ("<answer>42</answer> no </think> <answer>42</answer>", (0.0, 1.0)),
        ("<answer>42</answer> no <answer>42</answer>", (0.0, 0.0)),
    ):
        found = task.reward(item, ids(opening, text + END))
        assert (found["first"], found["second"]) == rewards, text
