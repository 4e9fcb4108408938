"""Data sets in files: formats, splits, graders, and errors by file and line."""

import json
from pathlib import Path

import numpy as np
import pytest

from actor.play import open_task
from actor.tasks.base import AnsweringTask, FiniteTask, HoldingTask, make_task
from actor.tasks.tokenizer import load_tokenizer
from common.config import EvaluationSection, ModelSection, RunConfig, TaskSection
from common.errors import ConfigError, TaskError
from tests.chatml import make_tokenizer

APPLES = [
    {"question": f"Ann has {n} apples and buys {n}. How many?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n:,}"}
    for n in (3, 40, 500, 6000)
]
HALVES = [
    {"problem": "What is half of 1?", "solution": r"It is $\boxed{\frac{1}{2}}$."},
    {"problem": "Solve $x^2 = 4$.", "solution": "no box at all", "answer": r"\{-2, 2\}"},
    {"problem": "What is 1 + 1?", "answer": 2},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tokenizer(tmp_path_factory.mktemp("model")))


def write(path: Path, rows: list) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def ids(model: str, text: str) -> np.ndarray:
    return np.array(load_tokenizer(model)(text, add_special_tokens=False)["input_ids"], np.int32)


def grade(task, model: str, question: int, text: str) -> dict[str, float]:
    return task.reward(task.prompt(question, "heldout"), ids(model, text))


def exact(model: str, tmp_path: Path, rows: list, **params):
    file = write(tmp_path / "q.jsonl", [*rows, {"question": "to train on?", "answer": "yes"}])
    heldout = write(tmp_path / "h.jsonl", rows)
    return make_task("jsonl", model, 0, {"file": file, "heldout": heldout, "grader": "exact", **params})


# ---- files --------------------------------------------------------------------------------------


def test_gsm8k_and_math_are_recognised(model: str, tmp_path: Path) -> None:
    for rows, wanted in ((APPLES, ["6", "80", "1,000", "12,000"]), (HALVES, [r"\frac{1}{2}", r"\{-2, 2\}", "2"])):
        task = exact(model, tmp_path, rows)
        lines = [task.prompt(i, "heldout").reference for i in range(len(rows))]
        assert [line.answers for line in lines] == [(answer,) for answer in wanted]
        assert [line.where for line in lines] == [f"{tmp_path}/h.jsonl:{n}" for n in range(1, len(rows) + 1)]


def test_every_epoch_asks_every_question_and_none_that_is_held_out(model: str, tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": str(n)} for n in range(10)]
    task = make_task("jsonl", model, 5, {"file": write(tmp_path / "q.jsonl", rows), "heldout": 3, "grader": "exact"})
    assert isinstance(task, FiniteTask) and isinstance(task, HoldingTask) and isinstance(task, AnsweringTask)
    assert (task.questions, task.held_out) == (7, 3)
    asked = [task.prompt(i, "train").reference.question for i in range(21)]
    assert [sorted(asked[i : i + 7]) for i in (0, 7, 14)] == [[f"q{n}" for n in range(7)]] * 3
    assert len({tuple(asked[i : i + 7]) for i in (0, 7, 14)}) > 1
    assert [task.prompt(i, "heldout").reference.question for i in range(3)] == ["q7", "q8", "q9"]
    with pytest.raises(TaskError, match="held-out question 3"):
        task.prompt(3, "heldout")


def test_a_training_question_that_is_also_held_out_is_left_out(model: str, tmp_path: Path) -> None:
    task = exact(model, tmp_path, APPLES)
    assert task.questions == 1 and task.held_out == len(APPLES)
    several = {"files": [write(tmp_path / f"{n}.jsonl", [APPLES[n]]) for n in range(3)], "grader": "number"}
    assert make_task("jsonl", model, 0, several).questions == 3


def test_the_prompt_is_system_question_and_suffix_in_the_chat_template(model: str, tmp_path: Path) -> None:
    task = exact(model, tmp_path, [{"question": "Why?", "answer": "so"}], system="Be brief.", suffix=" Say it.")
    text = load_tokenizer(model).decode(task.prompt(0, "heldout").prompt_ids.tolist())
    assert (
        text
        == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy? Say it.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "\\boxed{}" in load_tokenizer(model).decode(
        exact(model, tmp_path, APPLES, grader="number").prompt(0, "heldout").prompt_ids.tolist()
    )


@pytest.mark.parametrize(
    ("rows", "params", "words"),
    [
        ([APPLES[0], "{broken"], {}, r"q\.jsonl:2: not JSON"),
        ([APPLES[0], "", "[1]"], {}, r"q\.jsonl:3: must be a JSON object"),
        ([APPLES[0], {"text": "?"}], {}, r"q\.jsonl:2: no question under 'question' or .*, it has 'text'"),
        ([{"question": "?", "result": 1}], {}, r"q\.jsonl:1: no answer under .* name the key in task\.params\.answer"),
        ([APPLES[0]], {"question": "ask"}, r"q\.jsonl:1: no question under 'ask', it has 'question', 'answer'"),
        ([{"problem": "?", "solution": "no box"}], {}, r"q\.jsonl:1: its 'solution' holds neither"),
        ([{"question": "?", "answer": "work ####  "}], {}, r"q\.jsonl:1: its answer is empty"),
        (['{"question": "?", "answer": ' + "9" * 5000 + "}"], {}, r"q\.jsonl:1: not JSON: .*4300"),
        ([APPLES[0], {"question": "\ud83d?", "answer": "1"}], {}, r"q\.jsonl:2: holds half a character, '.ud83d'"),
        (['{"question": "?", "answer": NaN}'], {}, r"q\.jsonl:1: no answer under"),
        ([], {}, "holds no questions"),
        (APPLES, {"heldout": 4}, "heldout=4 of 4 questions leaves none"),
        (APPLES, {"heldout": True}, "must name a JSONL file"),
        (APPLES, {"files": ["x"]}, "must name a JSONL file of questions, or a list"),
        (APPLES, {"grader": "maths"}, "must be one of math, number, exact"),
        (APPLES, {"grade": "math"}, "did you mean 'grader'"),
        (APPLES, {"suffix": 3}, r"task\.params\.suffix=3: must be text"),
        (APPLES, {"grader": "math", "deadline_s": 0}, r"task\.params\.deadline_s=0"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(model: str, tmp_path: Path, rows, params, words) -> None:
    file = write(tmp_path / "q.jsonl", rows)
    with pytest.raises(TaskError, match=words):
        make_task("jsonl", model, 0, {"file": file, "grader": "exact", **params})


def test_missing_files_and_files_of_bytes_are_named(model: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"none\.jsonl: no such file"):
        make_task("jsonl", model, 0, {"file": str(tmp_path / "none.jsonl")})
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TaskError, match=r"b\.jsonl: 'utf-8'"):
        make_task("jsonl", model, 0, {"file": str(tmp_path / "b.jsonl")})


def test_an_evaluation_of_more_questions_than_are_held_out_is_refused_at_the_start(model: str, tmp_path: Path) -> None:
    params = {"file": write(tmp_path / "q.jsonl", APPLES), "heldout": 2, "grader": "number"}

    def config(prompts: int) -> RunConfig:
        return RunConfig(
            model=ModelSection(path=model),
            task=TaskSection("jsonl", params),
            evaluation=EvaluationSection(prompts=prompts),
        )

    assert isinstance(open_task(config(2)), FiniteTask)
    with pytest.raises(
        ConfigError, match=r"evaluation\.prompts=3: asks jsonl for 3 held-out questions, and .*heldout=2"
    ):
        open_task(config(3))


# ---- grading ------------------------------------------------------------------------------------


def test_exact_answers_are_normalised_and_any_of_several_is_right(model: str, tmp_path: Path) -> None:
    task = exact(model, tmp_path, [{"question": "Which tower?", "answer": ["Eiffel Tower", "La Tour Eiffel"]}])
    assert task.channels == ("correct", "format") and not task.slow
    right = {"correct": 1.0, "format": 1.0}
    assert grade(task, model, 0, "<answer>the eiffel tower.</answer><|im_end|>") == right
    assert grade(task, model, 0, "La tour Eiffel") == right
    assert grade(task, model, 0, "<answer>Big Ben</answer>") == {"correct": 0.0, "format": 1.0}
    assert grade(task, model, 0, "<|im_end|>") == {"correct": 0.0, "format": 0.0}
    assert grade(task, model, 0, "<think>Big Ben?</think>Eiffel Tower") == right
    assert grade(task, model, 0, "<think>Eiffel Tower") == {"correct": 0.0, "format": 0.0}


def test_a_question_may_be_asked_by_another_task(model: str, tmp_path: Path) -> None:
    lines = write(tmp_path / "q.jsonl", APPLES)
    inner = {"inner": "jsonl", "params": {"file": lines, "heldout": 2, "grader": "number"}}
    task = make_task("tagged", model, 0, inner)
    item = task.prompt(0, "heldout")
    assert "Ann has 500 apples and buys 500. How many?\n\nReason first" in load_tokenizer(model).decode(item.prompt_ids)
    found = task.reward(item, ids(model, "<answer>1000</answer> sure <confidence>0.9</confidence><|im_end|>"))
    assert (found["correct"], found["valid"], task.questions) == (1.0, 1.0, 2)
    assert isinstance(task, HoldingTask) and task.held_out == 2


def test_numbers_are_compared_exactly(model: str, tmp_path: Path) -> None:
    task = exact(model, tmp_path, APPLES, grader="number")
    for text, verdict in (
        ("6 + ... is 12000", (1.0, 1.0)), (r"\boxed{12,000.0} or 3", (1.0, 1.0)), ("#### 24000/2", (1.0, 1.0)),
        ("12001", (0.0, 1.0)), ("many", (0.0, 0.0)), ("1" * 9000, (0.0, 0.0)),
    ):  # fmt: skip
        assert tuple(grade(task, model, 3, text).values()) == verdict
    item = task.prompt(3, "heldout")
    assert task.answer(item, ids(model, "it is 12,000")) == task.answer(item, ids(model, r"\boxed{12000.0}")) == "12000"
    assert task.answer(item, ids(model, "many")) is None
    words = exact(model, tmp_path, [{"question": "?", "answer": "many"}], grader="number")
    with pytest.raises(TaskError, match=r"h\.jsonl:1: no number in its answer"):
        grade(words, model, 0, "4")


def test_numbers_in_a_file_are_what_they_are_in_json(model: str, tmp_path: Path) -> None:
    rows = [{"question": f"{n}?", "answer": n} for n in (0.00001, 1e16, 2.5, -3, 1.5e-7)]
    task = exact(model, tmp_path, rows, grader="number")
    answers = [task.prompt(i, "heldout").reference.answers for i in range(len(rows))]
    assert answers == [("0.00001",), ("10000000000000000",), ("2.5",), ("-3",), ("0.00000015",)]
    for number, text in enumerate(("1e-5", "1e16", "5/2", "-3", r"\boxed{1.5e-7}")):
        assert grade(task, model, number, text)["correct"] == 1.0
    assert grade(task, model, 0, "5")["correct"] == 0.0
    write(tmp_path / "h.jsonl", [{"question": "\U0001f600?", "answer": "yes"}])
    whole = make_task("jsonl", model, 0, {"file": str(tmp_path / "h.jsonl"), "grader": "exact"})
    assert whole.prompt(0, "train").reference.question == "\U0001f600?"  # two halves make a character


def test_math_verify_grades(model: str, tmp_path: Path) -> None:
    task = exact(model, tmp_path, HALVES, grader="math", workers=1)
    assert task.channels == ("correct", "format", "overdue") and task.slow
    right, wrong = {"correct": 1.0, "format": 1.0, "overdue": 0.0}, {"correct": 0.0, "format": 1.0, "overdue": 0.0}
    assert grade(task, model, 0, r"so $x = \boxed{0.5}$") == right
    assert grade(task, model, 0, r"\boxed{2} \boxed{\frac{3}{6}}") == right
    assert grade(task, model, 0, r"\boxed{0.6}") == wrong
    assert grade(task, model, 0, "no idea") == {"correct": 0.0, "format": 0.0, "overdue": 0.0}
    assert grade(task, model, 1, r"\boxed{\{2, -2\}}") == right
    item = task.prompt(0, "heldout")
    assert task.answer(item, ids(model, r"\boxed{ 1 }")) == "1" and task.answer(item, ids(model, "no idea")) is None


@pytest.mark.parametrize(
    ("text", "correct", "answer"),
    [
        ("<answer>42</answer>", 1, "42"), ("<answer>\n**42**\n</answer>", 1, "42"),
        ("<answer>$42$</answer>", 1, "$42$"),
        ("<answer>42</answer>\nNote: I used 2 facts and 43 steps.", 1, "42"),
        ("<answer>43</answer>\nIt is 42", 0, "43"), (r"<answer>43</answer> \boxed{42}", 1, "42"),
        ("#### 42\n\nThat is 6 + 36 = 42, using 2 facts", 1, "42"), ("####42", 1, "42"), ("#### 43\n42", 0, "43"),
        ("Answer: 42\nI hope this helps in 2024", 1, "42"), ("**Answer:** 42", 1, "42"), ("The answer is 43.", 0, "43"),
        ("6 * 7 = 42", 1, None),
    ],
)  # fmt: skip
def test_math_grades_what_is_marked_and_votes_count_the_same(model: str, tmp_path: Path, text, correct, answer) -> None:
    task = exact(model, tmp_path, [{"question": "What is 6 * 7?", "answer": 42}], grader="math", workers=1)
    assert grade(task, model, 0, text) == {"correct": correct, "format": 1.0, "overdue": 0.0}
    assert task.answer(task.prompt(0, "heldout"), ids(model, text)) == answer


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ("72", "#### 72 clips"),
        ("72", "<answer>The result is $72$ apples</answer>"),
        ("72", "#### $72 per week"),
        (r"\frac{1}{2}", r"<answer>The probability is $\frac{1}{2}$.</answer>"),
        ("5", "<answer>The answer is 5</answer>"),
        ("5", "Answer: 5 apples"),
        (r"\sqrt{2}", r"<answer>\sqrt{2}</answer>"),
        (r"\sqrt{2}", r"Answer: \sqrt{2}"),
        ("(1,2)", "<answer>(1,2)</answer>"),
        ("x^2+1", "<answer>x^2+1</answer>"),
    ],
)
def test_math_reads_words_and_formulas_behind_a_mark(model: str, tmp_path: Path, wanted, text) -> None:
    task = exact(model, tmp_path, [{"question": "What?", "answer": wanted}], grader="math", workers=1)
    assert grade(task, model, 0, text)["correct"] == 1.0
    other = exact(model, tmp_path, [{"question": "What?", "answer": "1234567"}], grader="math", workers=1)
    assert grade(other, model, 0, text)["correct"] == 0.0


def test_answers_in_tags_are_graded_by_math_in_blocks_too(model: str, tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", [{"question": f"What is {n} * 7?", "answer": 42} for n in (6, 7)])
    params = {"inner": "jsonl", "params": {"file": file, "heldout": 1, "workers": 1}}
    task = make_task("tagged", model, 0, params)
    item = task.prompt(0, "heldout")
    found = task.reward(item, ids(model, "<answer>42</answer> <confidence>0.9</confidence>"))
    assert (found["correct"], found["valid"]) == (1.0, 1.0)
    task = make_task("tagged", model, 0, {**params, "style": "attempts"})
    found = task.reward(item, ids(model, "<answer>41</answer> no, 6 * 7 is 42, in 3 steps <answer>42</answer>"))
    assert found == {"correct": 1.0, "valid": 1.0, "first": 0.0, "second": 1.0, "changed": 1.0}


@pytest.mark.slow
def test_a_tower_of_exponents_is_broken_off_and_wrong(model: str, tmp_path: Path, caplog) -> None:
    task = exact(model, tmp_path, HALVES, grader="math", workers=1, deadline_s=1)
    with caplog.at_level("WARNING", logger="actor.jsonl"):
        hostile = grade(task, model, 2, r"\boxed{9^{9^{9^9}}}")
    assert hostile == {"correct": 0.0, "format": 0.0, "overdue": 1.0}
    assert "h.jsonl:3: an answer was not graded within 1 s and counts as wrong: '9^{9^{9^9}}'" in caplog.text
    assert grade(task, model, 2, r"\boxed{2}") == {"correct": 1.0, "format": 1.0, "overdue": 0.0}  # by another process
