"""Code repair: bugs that show, verdicts that cannot be talked into, and a whole play of it."""

import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from actor.play import Play, open_task
from actor.tasks.base import FittedTask, MultiTurnTask, PromptItem, make_task
from actor.tasks.mutations import NO_RESULT, as_json, mutants, outcomes
from actor.tasks.programs import PROGRAMS, Program
from actor.tasks.repair import SHOWN, Question, Repair, read_source
from common.config import ModelSection, RolloutSection, RunConfig, TaskSection
from common.errors import ConfigError, SandboxError, TaskError
from tests.chatml import make_tokenizer
from tests.unit.sandboxed import require_sandbox
from tests.unit.scripted import ScriptedEngine, play_out

require_sandbox()
ROLLOUT = RolloutSection(max_turns=3, max_tokens=400, max_prompt_tokens=900, max_reply_tokens=300, group_size=2)
END = "<|im_end|>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("repair"))


@pytest.fixture(scope="module")
def task(model: Path) -> Repair:
    made = make_task("repair", str(model), 0, {"cpu_s": 0.5, "wall_s": 10})
    assert isinstance(made, Repair) and isinstance(made, MultiTurnTask) and isinstance(made, FittedTask)
    made.fit(ROLLOUT)
    return made


def ids(task: Repair, text: str) -> Any:
    return task._chat._encode(text)


def block(source: str) -> str:
    return f"Here it is:\n```python\n{source}\n```{END}"


def said(task: Repair, reply: Any) -> str:
    return str(task._chat._tokenizer.decode(reply.tolist(), skip_special_tokens=True))


ADD = Program("add", "adds a and b", "def add(a, b):\n    return a + b\n", lambda rng: [1, 2])
CASES: tuple[list[Any], ...] = ([2, 1], [0, 0], [5, 5], [7, 1], [1, 1])
QUESTION = Question(
    "add", ADD, "def add(a, b):\n    return a - b\n", CASES, ("3", "0", "10", "8", "2"), ("1", "0", "0", "6", "0")
)
ITEM = PromptItem(np.zeros(1, np.int32), QUESTION)


# ---- bugs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_a_program_works_and_its_bugs_show(program: Program) -> None:
    rng = Random(1)
    source = program.source.replace("$k", "3")
    cases = [program.arguments(rng) for _ in range(12)]
    right = outcomes(source, program.name, cases)
    assert len(set(right)) > 1
    for case, outcome in zip(cases, right, strict=True):
        assert json.loads(as_json(case)) == case, "its arguments are what JSON has"
        json.loads(outcome)  # a result, not an error
    changed = list(mutants(source))
    wrong = [kind for kind, mutant in changed if outcomes(mutant, program.name, cases) != right]
    assert len(changed) >= 5 and len(wrong) / len(changed) > 0.5
    assert all(mutant != source for _, mutant in changed)


def test_the_library_is_large_and_its_bugs_are_of_many_kinds() -> None:
    assert len({program.name for program in PROGRAMS}) == len(PROGRAMS) >= 12
    kinds = Counter(kind for program in PROGRAMS for kind, _ in mutants(program.source.replace("$k", "3")))
    assert set(kinds) == {
        "comparison", "operator", "constant", "off by one", "condition", "dropped return", "dropped statement"
    }  # fmt: skip
    assert min(kinds.values()) >= 10


def test_endless_bugs_end() -> None:
    loop = "def f(n):\n    while n != 0:\n        n -= 2\n    return n\n"
    assert outcomes(loop, "f", [[4], [3], [4]]) == ["0", NO_RESULT, "0"]
    assert outcomes("def f(n):\n    return f(n)\n", "f", [[1]])[0].startswith(("raises RecursionError", NO_RESULT))
    assert outcomes("def f(n):\n    return n[9]\n", "f", [[[]]]) == ["raises IndexError: list index out of range"]
    assert outcomes("def f(n):\n    n.append(1)\n    return n\n", "f", [[[]], [[]]]) == ["[1]", "[1]"]


@pytest.mark.parametrize("bugs", [1, 3])
def test_questions_have_a_failing_test_and_an_answer(model: Path, bugs: int) -> None:
    made = Repair(str(model), 3, {"bugs": bugs})
    for index in range(30):
        one: Question = made.prompt(index, "train").reference
        assert outcomes(one.broken, one.program.name, one.cases) == list(one.given) != list(one.expected)
        assert outcomes(one.program.source, one.program.name, one.cases) == list(one.expected)
        assert one.given[0] != one.expected[0] and "$" not in one.program.says


def test_questions_repeat_and_the_splits_share_none(model: Path, task: Repair) -> None:
    def broken(made: Repair, split: Any) -> list[str]:
        return [made.prompt(i, split).reference.broken for i in range(60)]

    train, held_out = broken(task, "train"), broken(task, "heldout")
    assert train == broken(Repair(str(model), 0, {}), "train")
    other = broken(Repair(str(model), 1, {}), "train")
    assert other != train and not set(train + other) & set(held_out) and len(set(train)) > 40


def test_the_prompt_shows_the_bug_and_one_failing_test(task: Repair) -> None:
    one = task.prompt(0, "heldout")
    text, question = task._chat.text(one.prompt_ids), one.reference
    assert task.question_text(one) in text
    assert question.broken in text and question.program.says in text and question.program.source not in text
    assert repr(json.loads(question.expected[0])) in text and "should return" in text


def test_refusals_name_the_remedy(model: Path) -> None:
    for params, reason in (
        ({"bugs": 4}, r"task\.params\.bugs=4: must be a number in \[1, 3\]"),
        ({"programs": ["depht"]}, "did you mean 'depth'"),
        ({"test": 3}, "did you mean 'tests'"),
    ):
        with pytest.raises(TaskError, match=reason):
            Repair(str(model), 0, params)
    narrow = RolloutSection(max_turns=2, max_reply_tokens=10)
    config = RunConfig(model=ModelSection(path=str(model)), task=TaskSection(name="repair"), rollout=narrow)
    with pytest.raises(ConfigError, match=r"rollout\.max_reply_tokens=10: repair needs \d+"):
        Play(config, open_task(config), ScriptedEngine(lambda r, s: None), Counter(), list[Any]().append)


# ---- verdicts ----------------------------------------------------------------------------------------


WORKS = [
    ("def add(a, b):\n    return b + a", 1, 1),
    ("import operator\nadd = operator.add\n# def add", 1, 1),
    (QUESTION.broken, 0, 0.2),
    ("def add(a, b):\n    return float(a + b)", 0, 0),  # 3.0 is not 3
    ("def add(a, b):\n    return (a + b == 2) or a + b", 0, 0.8),  # True is not 2
    ("def add(a, b):\n    if a == 7:\n        while True: pass\n    return a + b", 0, 0.6),
    ("def add(a, b):\n    if a == 7:\n        import os; os._exit(0)\n    return a + b", 0, 0.6),
]
WORKS_NOT = [
    "def add(a, b):\n    return 1 / (a - a)",
    "def add(a, b):\n    return float('nan')",
    "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
    "def add(a, b):\n    return '[' * 100000",
    "def add(a):\n    return a",
]
IS_NO_FUNCTION = [
    "def add(a, b:\n    return",
    "raise SystemExit\ndef add(a, b): ...",
    "while True: pass\ndef add(a, b): ...",
    "add = 3  # def add",
    "print('x' * 10**8)\ndef add(a, b):\n    return a + b",
    "(" * 5000 + ")" * 5000 + "\ndef add(a, b): ...",
]


@pytest.mark.parametrize(("source", "correct", "passed"), WORKS)
def test_answers_are_judged_by_what_they_do(task: Repair, source: str, correct: float, passed: float) -> None:
    got = task.reward(ITEM, ids(task, block(source)))
    assert got == {"correct": correct, "passed": pytest.approx(passed), "valid": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("source", WORKS_NOT + IS_NO_FUNCTION)
def test_answers_of_any_kind_are_judged(task: Repair, source: str) -> None:
    got = task.reward(ITEM, ids(task, block(source)))
    assert got == {"correct": 0.0, "passed": 0.0, "valid": float(source in WORKS_NOT)}


CHEATS = {
    "another equality": "class Any:\n    def __eq__(self, other): return True\ndef add(a, b):\n    return Any()",
    "forged results": """
import os
with open("results", "w") as file:
    file.write('{"value": "usable"}\\n' + '{"value": 0, "passed": true}\\n' * 5)
os._exit(0)
def add(a, b): ...""",
    "nested": 'open("results", "w").write("[" * 900000)\nimport os; os._exit(0)\ndef add(a, b): ...',
    "no json": 'open("results", "wb").write(bytes(range(256)) * 9)\nimport os; os._exit(0)\ndef add(a, b): ...',
    "a link": 'import os\nos.symlink("/work/cases.json", "results")\nos._exit(0)\ndef add(a, b): ...',
    "the harness": """
import sys, gc
def add(a, b):
    frame = sys._getframe(1)
    space = {**frame.f_globals, **frame.f_locals}
    wanted = ([3, 0, 10, 8, 2], ["3", "0", "10", "8", "2"])
    found = [x for x in gc.get_objects() if isinstance(x, (list, tuple)) and list(x) in wanted]
    return space.get("expected", found)""",
}  # fmt: skip


@pytest.mark.parametrize("name", CHEATS)
def test_nobody_is_right_without_knowing(task: Repair, name: str) -> None:
    got = task.reward(ITEM, ids(task, block(CHEATS[name])))
    assert got["correct"] == 0.0 and got["passed"] <= 0.2


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("```python\ndef f(): 1\n```", "def f(): 1\n"),
        ("```\ndef f(): 1\n```\nor better\n```py\ndef f(): 2\n```", "def f(): 2\n"),
        ("\ndef f(): 1", "def f(): 1"),
        ("I think def f is fine", None),
        ("```python\ndef f(): 1", None),
        ("```python\ndef g(): 1\n```", None),
        ("```python\ndef f(): '" + "x" * 20_000 + "'\n```", None),
        ("", None),
    ],
)
def test_sources_are_read(text: str, source: str | None) -> None:
    assert read_source(text, "f") == source


def test_replies_tell_what_failed_but_not_the_hidden_tests(task: Repair) -> None:
    assert task.reply(ITEM, [ids(task, block(ADD.source))]) is None
    reply = said(task, task.reply(ITEM, [ids(task, block(QUESTION.broken))]))
    assert "1 of 5 tests pass. For example, add(2, 1) should return 3, but returns 1." in reply
    hidden = said(
        task, task.reply(ITEM, [ids(task, block("def add(a, b):\n    return min(10, a + b) if a < 7 else 0"))])
    )
    assert "4 of 5 tests pass. The tests that fail are hidden." in hidden
    assert all(str(case) not in hidden for case in CASES[SHOWN:])
    raised = said(task, task.reply(ITEM, [ids(task, block("def add(a, b):\n    return c"))]))
    assert "but raises NameError: name 'c' is not defined." in raised
    broken = said(task, task.reply(ITEM, [ids(task, block("def add(a, b:"))]))
    assert "The function could not be called: raises SyntaxError: '(' was never closed" in broken
    assert "No function could be read" in said(task, task.reply(ITEM, [ids(task, "sorry")]))


def test_a_sandbox_that_does_not_start_is_no_verdict(
    task: Repair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match="cannot be started"):
        task.reward(ITEM, ids(task, block("def add(a, b):\n    return 'never run before'")))


# ---- a whole play ------------------------------------------------------------------------------------


def test_a_scripted_policy_is_played_and_paid(model: Path) -> None:
    config = RunConfig(
        model=ModelSection(path=str(model)),
        task=TaskSection(name="repair", params={"cpu_s": 0.3}, reward_weights={"correct": 1.0, "passed": 0.5}),
        rollout=ROLLOUT,
    )
    task = open_task(config)
    assert isinstance(task, Repair)
    questions = {i: task.prompt(i, "train").reference for i in range(3)}

    def script(request: Any, sibling: int) -> str:
        """Sibling 0 gives the bug back once, then what is right; sibling 1 never learns."""
        turn = task._chat._tokenizer.decode(request.prompt_ids.tolist()).count("<|im_start|>assistant")
        question = questions[request.request_id]
        return block(question.program.source if sibling == 0 and turn == 2 else question.broken)

    sent: list[Any] = []
    engine = ScriptedEngine(script, encode=lambda text: ids(task, text))
    play = Play(config, task, engine, Counter(), sent.append)
    for group in questions:
        play.start_group(group, group)
    finished = play_out(play, engine)
    play.close()
    assert not sent and len(finished) == 6
    for one in finished:
        question = questions[one.group]
        if one.sibling == 0:
            assert len(one.turns) == 2 and one.reward == 1.5
        else:
            share = sum(a == b for a, b in zip(question.given, question.expected, strict=True)) / len(question.cases)
            assert len(one.turns) == 3 and one.reward == pytest.approx(share / 2) and one.channels["valid"] == 1.0
