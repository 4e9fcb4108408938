"""reasoning-gym: every data set by name; verifiers that raise, hang, run what they are given or can be fooled."""

import contextlib
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from actor.tasks.base import make_task
from actor.tasks.gym import GymTask
from actor.tasks.gymrules import CORRECT_FROM, as_literal, is_arithmetic, score
from actor.tasks.tokenizer import load_tokenizer
from common.errors import TaskError
from tests.chatml import make_tokenizer

ANSWERS = {  # of data sets whose questions carry none: a right one by the metadata
    "propositional_logic": lambda entry: entry["metadata"]["example_answer"],
    "rubiks_cube": lambda entry: entry["metadata"]["example_correct_answer"],
}
UNSOLVED = ("boxnet", "graph_color", "rush_hour")  # nor do those
WRONG = ("", "nonsense", "[]", '{"a": 1}', "0", "nan", "1e999", "((((", "[[1, 2], [3, 4]]", "None", "a,b", "\x00")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tokenizer(tmp_path_factory.mktemp("model")))


def ids(model: str, text: str) -> np.ndarray:
    return np.array(load_tokenizer(model)(text, add_special_tokens=False)["input_ids"], np.int32)


def entry_of(name: str, index: int = 0, **params):
    dataset = reasoning_gym.create_dataset(name, size=8, seed=3, **params)
    return dataset, dataset[index]


# ---- every name ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(DATASETS))
def test_every_data_set_asks_scores_its_own_answer_and_survives_wrong_ones(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)  # codeio's programs write files
    params = {"heldout": 2}
    if name == "composite":
        with pytest.raises(TaskError, match=r"task\.params for gym:composite: Must specify at least one dataset"):
            make_task("gym:composite", model, 0, params)
        params["datasets"] = [{"name": "leg_counting"}, {"name": "gcd", "weight": 2.0, "config": {"max_numbers": 3}}]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # open files and numpy's opinions
        task = make_task(f"gym:{name}", model, 0, params)
        assert isinstance(task, GymTask)
        item = task.prompt(0, "train")
        held_out = task.prompt(1, "heldout")
    assert len(item.prompt_ids) and len(held_out.prompt_ids)
    entry = item.reference
    answer = ANSWERS[name](entry) if name in ANSWERS else entry["answer"]
    if name in UNSOLVED:
        assert answer is None
    else:
        assert task.reward(item, ids(model, answer)) == {"correct": 1.0, "score": pytest.approx(1.0, abs=1e-4)}
        assert task.reward(item, ids(model, f"I think <answer>{answer}</answer>"))["correct"] == 1.0
    for wrong in WRONG:
        if wrong.strip().casefold() != str(answer).strip().casefold():
            assert task.reward(item, ids(model, wrong))["correct"] == 0.0, wrong


@pytest.mark.slow
def test_code_in_an_answer_is_not_run(model: str, tmp_path: Path) -> None:
    for name in ("n_queens", "spiral_matrix", "binary_matrix", "string_insertion", "countdown", "puzzle24",
                 "simple_integration", "intermediate_integration", "polynomial_multiplication"):  # fmt: skip
        task = make_task(f"gym:{name}", model, 0, {"heldout": 0})
        written = tmp_path / name
        attack = f"__import__('pathlib').Path({str(written)!r}).write_text('x')"
        for text in (attack, f"[{attack}]", f"().__class__ or {attack}"):
            assert task.reward(task.prompt(0, "train"), ids(model, text))["correct"] == 0.0
        assert not written.exists(), name


@pytest.mark.slow
def test_an_answer_that_hangs_its_verifier_is_wrong(
    model: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("actor.tasks.gym.DEADLINE_S", 1.0)
    for name, text in (("countdown", "9**9**9**9"), ("coin_flip", "1e999999999")):
        task = make_task(f"gym:{name}", model, 0, {"heldout": 0})
        item = task.prompt(0, "train")
        task.reward(item, ids(model, "1"))
        with caplog.at_level("WARNING", logger="actor.gym"):
            assert task.reward(item, ids(model, text)) == {"correct": 0.0, "score": 0.0}
        assert f"gym:{name}: an answer was not graded within 1 s" in caplog.text
        assert task.reward(item, ids(model, item.reference["answer"]))["correct"] == 1.0


# ---- verifiers that are wrong -------------------------------------------------------------------


def test_what_a_verifier_lets_pass_though_it_is_wrong_is_checked_once_more() -> None:
    found = {}
    for name, answer in (
        ("game_of_life_halting", "anything"), ("coin_flip", "0"), ("complex_arithmetic", "nan"),
        ("puzzle24", "6*4*1*1"), ("spell_backward", "{0}{0}"), ("letter_jumble", "{0} {0}"),
    ):  # fmt: skip
        dataset, entry = entry_of(name, **({"min_word_len": 10} if name == "spell_backward" else {}))
        answer = answer.format(entry["answer"])
        assert float(dataset.score_answer(answer, entry)) >= 0.99, f"{name} is mended: take its check out"
        found[name] = (score(dataset, name, answer, entry), score(dataset, name, entry["answer"], entry))
    assert found == dict.fromkeys(found, (0.0, 1.0))


def test_one_wrong_cell_of_a_hundred_is_not_correct() -> None:
    dataset, entry = entry_of("game_of_life")
    cells = entry["answer"]
    at = cells.index("0")
    almost = cells[:at] + "1" + cells[at + 1 :]
    assert (
        0.98
        < score(dataset, "game_of_life", almost, entry)
        < CORRECT_FROM
        <= score(dataset, "game_of_life", cells, entry)
    )


def test_a_verifier_that_raises_gives_nothing() -> None:
    dataset, entry = entry_of("prime_factorization")
    with pytest.raises(ValueError):
        dataset.score_answer("nonsense", entry)
    assert score(dataset, "prime_factorization", "nonsense", entry) == 0.0
    assert score(dataset, "prime_factorization", entry["answer"], entry) == 1.0


@pytest.mark.parametrize(
    "text", ["x**2/2 + C", "(1 + 2)*3 - 4/5", "2*sin(x)*exp(-x) + log(x)", "3 × 4 = 12", "1.5*x", ""]
)
def test_arithmetic_may_be_evaluated(text: str) -> None:
    assert is_arithmetic(text)


@pytest.mark.parametrize(
    "text",
    ["__import__('os')", "x.__class__", "().mro", "lambda: 1", "[1]", "os", "preview(x)", "x . y", "'a'", "x;y"],
)  # fmt: skip
def test_anything_else_may_not(text: str) -> None:
    assert not is_arithmetic(text)


def test_entries_travel_as_literals() -> None:
    import ast

    entry = {"answer": "a", "metadata": {"pair": (np.float64(1.5), {np.int64(2)}), 3: [np.str_("x"), None]}}
    back = ast.literal_eval(as_literal(entry))
    assert back == {"answer": "a", "metadata": {"pair": (1.5, {2}), 3: ["x", None]}}
