"""Blocks of text: cut at the sampled token that completes a tag, graded by the inner task from the ids themselves."""

import sys
import types

import numpy as np
import pytest

from actor.tasks import base
from actor.tasks.base import BlockTask, PromptItem, make_task
from actor.tasks.tokenizer import load_tokenizer
from common.errors import TaskError
from tests.chatml import make_tokenizer


class Sums:
    """A text task that a test can see through: the answer stands in the last answer tags."""

    channels = ("correct",)
    slow = True

    def __init__(self, model_dir, seed, params):
        self.tokenizer = load_tokenizer(model_dir)

    def prompt(self, index, split):
        return PromptItem(np.zeros(0, np.int32), str(index + 2))

    def question_text(self, item):
        return f"{item.reference} - 0 = ?"

    def reward(self, item, completion_ids):
        text = self.tokenizer.decode(completion_ids.tolist())
        return {"correct": float(f"<answer>{item.reference}</answer>" in text)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(make_tokenizer(tmp_path_factory.mktemp("chatml")))


@pytest.fixture
def make(directory, monkeypatch):
    here = types.ModuleType("sums_of_the_test")
    here.Sums = Sums
    monkeypatch.setitem(sys.modules, here.__name__, here)
    monkeypatch.setitem(base.BUILT_IN, "sums", ("sums_of_the_test:Sums", True))

    def build(**params):
        return make_task("tagged", directory, 0, {"inner": "sums", **params})

    return build


def scored(task, directory, text):
    ids = np.array(load_tokenizer(directory)(text, add_special_tokens=False)["input_ids"], np.int32)
    item = task.prompt(40, "train")
    channels = task.reward(item, ids)
    assert tuple(channels) == task.channels
    return channels, task.blocks(item, [ids], channels), ids


def test_a_confidence_is_cut_off_at_the_token_that_completes_the_answer(make, directory):
    task = make()
    assert isinstance(task, BlockTask) and task.slow
    text = "the weather is sunny <answer>42</answer> how are you? <confidence>0.75</confidence><|im_end|>"
    channels, blocks, ids = scored(task, directory, text)
    assert channels["correct"] == channels["valid"] == 1
    assert channels["rlcr"] == pytest.approx(1 - 0.0625)
    assert [(b.number, b.reward, b.outcome) for b in blocks] == [(0, 1.0, -1), (1, pytest.approx(-0.0625), 1)]
    tokenizer = load_tokenizer(directory)
    assert tokenizer.decode(ids[: blocks[0].end].tolist()).endswith("</answer>")
    assert "</answer>" not in tokenizer.decode(ids[: blocks[0].end - 1].tolist())
    assert blocks[1].first == blocks[0].end and blocks[1].end == len(ids)


@pytest.mark.parametrize(
    ("text", "sure", "clipped"),
    [("{}<confidence>80%</confidence>", 0.8, 0), ("{}<confidence> 1.7 </confidence>", 1.0, 1),
     ("{}<confidence>-2</confidence>", 0.0, 1), ("{} {}<confidence>.5</confidence>", 0.5, 0)],
)  # fmt: skip
def test_confidences_are_read_and_clipped(make, directory, text, sure, clipped):
    channels, _, _ = scored(make(), directory, text.replace("{}", "<answer>41</answer>"))
    assert (channels["confidence"], channels["clipped"], channels["correct"]) == (pytest.approx(sure), clipped, 0)


@pytest.mark.parametrize(
    "text",
    ["", "42", "<answer>42</answer>", "<confidence>0.9</confidence><answer>42</answer>",
     "<answer>42</answer><confidence>sure</confidence>", "<answer>42<confidence>0.9</confidence>"],
)  # fmt: skip
def test_garbled_completions_are_one_block_with_a_penalty(make, directory, text):
    channels, blocks, ids = scored(make(), directory, text)
    assert channels["valid"] == 0
    if len(ids):
        assert [(b.first, b.end) for b in blocks] == [(0, len(ids))]
        assert blocks[0].reward == channels["correct"] - 0.5


def test_two_attempts_are_graded_apart(make, directory):
    task = make(style="attempts")
    for answers, rewards in (((41, 42), [0, 1]), ((42, 42), [1, 1]), ((42, 41), [1, 0.1]), ((41, 41), [0, 0])):
        text = "<answer>{}</answer> the weather in Paris <answer>{}</answer>".format(*answers)
        _, blocks, _ = scored(task, directory, text)
        assert [b.reward for b in blocks] == rewards
        assert blocks[1].outcome == rewards[0]


def test_what_cannot_be_asked_is_refused(make, directory):
    for params, words in (
        ({"style": "both"}, "confidence, attempts"), ({"inner": "sort6"}, "no question in words"),
        ({"inner": "summs"}, "did you mean 'sums'"), ({"stile": "x"}, "did you mean 'style'"),
    ):  # fmt: skip
        with pytest.raises(TaskError, match=words):
            make(**params)
    with pytest.raises(TaskError, match=r"needs task.params.inner"):
        make_task("tagged", directory, 0, {})
