"""What answers, look-ups and the order of questions cost, beside the same done bare in this process."""

import json
import logging
from collections.abc import Callable
from functools import partial

import numpy as np

from actor.tasks.grading import Graders
from actor.tasks.gymrules import as_literal, make_dataset
from actor.tasks.passages import index_of
from actor.tasks.world import make_questions, make_world
from common.questions import question_of
from tools.bench.harness import Row, interleave, rate

PAIRS = [("\\frac{1}{2}", "so \\boxed{0.5}"), ("42", "it is \\boxed{43}"), ("3x+1", "\\boxed{1+3x}"), ("7", "maybe 7")]
SIZE = 7473  # questions: GSM8K's
PEOPLE, SEARCHES = 300, 50
GYM = "group_anagrams"
DEADLINE_S = 30.0


def run(reps: int) -> list[Row]:
    """Verdicts, searches and questions a second."""
    return [*_math(reps), *_gym(reps), *_search(reps), *_questions(reps)]


def _row(name: str, unit: str, reference: str, work: dict[str, Callable[[], object]], amount: int, reps: int) -> Row:
    speed = interleave({key: partial(rate, f, amount) for key, f in work.items()}, reps)
    return Row("verifiers", name, speed["ours"], unit, reference, speed["bare"], reps)


def _math(reps: int) -> list[Row]:
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it says at every call that it has no timeout
    graders = Graders("math", 1, DEADLINE_S)

    def bare() -> None:
        for reference, answer in PAIRS:
            gold = parse(f"\\boxed{{{reference}}}", parsing_timeout=None)
            verify(gold, parse(answer, parsing_timeout=None), timeout_seconds=None)

    def ours() -> None:
        for reference, answer in PAIRS:
            graders.grade({"references": [reference], "answer": answer})

    ours()
    row = _row(
        "math-verify in its process", "pairs/s", "called in this one", {"bare": bare, "ours": ours}, len(PAIRS), reps
    )
    graders.close()
    return [row]


def _gym(reps: int) -> list[Row]:
    from reasoning_gym import get_score_answer_fn

    entry = make_dataset(GYM, {}, 1, 0)[0]
    graders = Graders("gym", 1, DEADLINE_S)
    request = {"name": GYM, "params": json.dumps({}), "entry": as_literal(entry), "answer": entry["answer"]}

    def bare() -> object:
        return get_score_answer_fn(GYM)(answer=entry["answer"], entry=entry)

    graders.grade(request)
    work: dict[str, Callable[[], object]] = {"bare": bare, "ours": lambda: graders.grade(request)}
    row = _row(f"reasoning-gym's {GYM} in its process", "verdicts/s", "get_score_answer_fn in this one", work, 1, reps)
    graders.close()
    return [row]


def _search(reps: int) -> list[Row]:
    world = make_world(0, PEOPLE)
    index, passages = index_of(world.passages()), world.passages()
    texts = [question.text for question in make_questions(world, 0, SEARCHES, (2, 4))]
    words = [[set(passage.text.casefold().split()) for passage in passages], [set(t.casefold().split()) for t in texts]]

    def bare() -> None:
        for asked in words[1]:
            max(len(asked & known) for known in words[0])

    def ours() -> None:
        for text in texts:
            index.search(text, 3)

    reference = f"counting common words of {len(passages)} passages"
    return [
        _row("searches in the made-up world", "searches/s", reference, {"bare": bare, "ours": ours}, SEARCHES, reps)
    ]


def _questions(reps: int) -> list[Row]:
    def bare() -> object:
        return np.random.default_rng(0).permutation(SIZE).tolist()

    def ours() -> list[int]:
        return [question_of(0, index, SIZE) for index in range(SIZE)]

    assert sorted(ours()) == list(range(SIZE))
    reference = "a numpy permutation, all at once"
    return [_row("order of questions, one by one", "questions/s", reference, {"bare": bare, "ours": ours}, SIZE, reps)]
