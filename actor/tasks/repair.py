"""Code repair: a function with a bug and a failing test; the policy writes the function anew, hidden tests judge it.

::

    program -> bug(s) -> tests fail -> prompt -> answer -> sandbox calls it -> results -> as expected?

Bugs are edits of the functions in :mod:`actor.tasks.programs`, tried when a question is made: the
function as it was gives every expected result, the broken one does not. What the policy wrote is
parsed and run in the sandbox alone; it is given the arguments of all tests and no expected result,
and what it returns is compared out here, so it cannot claim to be right.

With ``rollout.max_turns`` above 1 it is told what failed and may try again; hidden tests are only counted.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actor.sandbox.backends import find_backend, interpreter
from actor.sandbox.box import Entry, Limits, Result
from actor.sandbox.run import run
from actor.tasks.arguments import Arguments
from actor.tasks.base import PromptItem, Split, refuse_params
from actor.tasks.chat import Chat
from actor.tasks.drawn import draw
from actor.tasks.latest import Latest
from actor.tasks.mutations import as_json, mutant, outcomes
from actor.tasks.params import read_limits, read_names, read_number
from actor.tasks.programs import CONSTANTS, PROGRAMS, Program
from actor.tasks.reading import last_block
from common.config import RolloutSection
from common.errors import TaskError

PARAMS = ("bugs", "programs", "tests", "wall_s", "cpu_s", "memory_mb")
LIMITS = Limits(wall_s=10.0, cpu_s=2.0, memory_mb=128, processes=4, disk_mb=1, files=50, output_kb=4)
SHOWN = 3  # tests that the policy sees, once one of them has failed; the others are hidden
SOURCE_CHARACTERS = 16_000  # of an answer at most
KEPT_BYTES = 4 << 20  # of verdicts: a turn that is answered is scored again if it was the last
RESULT_SHOWN = 200  # characters
NO_CODE = "No function could be read: write it in a block ```python ... ```."
ASK = """This Python function has a bug. It should be a function that {says}.
```python
{source}```
{failure}
Write the whole corrected function in a block:
```python
def {name}(...):
```"""
# Runs in the sandbox. Each result is on the disk before the next call: an endless one costs only those behind it.
HARNESS = """
import json, sys
name = sys.argv[1]
with open("cases.json") as file:
    cases = json.load(file)
def tell(**said):
    with open("results", "a") as file:
        file.write(json.dumps(said, sort_keys=True, allow_nan=False) + "\\n")
try:
    with open("solution.py") as file:
        space = {"__name__": "solution"}
        exec(compile(file.read(), "solution.py", "exec"), space)
    function = space[name]
    if not callable(function):
        raise TypeError(f"{name} is no function")
except BaseException as error:
    tell(unusable=f"{type(error).__name__}: {error}"[:400])
    sys.exit(1)
tell(value="usable")
for case in cases:
    try:
        tell(value=function(*case))
    except BaseException as error:
        tell(error=f"{type(error).__name__}: {error}"[:400])
"""

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Question:
    """A broken function and its tests."""

    key: str
    program: Program  # with its constant in place
    broken: str  # source
    cases: tuple[Arguments, ...]  # those that are shown first
    expected: tuple[str, ...]  # JSON, for each case
    given: tuple[str, ...]  # what the broken function gives


@dataclass(frozen=True)
class Verdict:
    """What became of an answer."""

    usable: bool  # it defines the function
    passed: tuple[bool, ...]  # for each case; () if it is not
    said: str  # to the policy


class Repair:
    """See the module. ``correct``: all tests pass; ``passed``: their share; ``valid``: the function could be called.

    Raises SandboxError where no sandbox can be had, and TaskError for parameters that cannot be used.
    """

    channels = ("correct", "passed", "valid")
    slow = True  # a verdict takes a sandbox: tens of milliseconds, seconds at worst

    def __init__(self, model_dir: str, seed: int, params: dict[str, Any]) -> None:
        refuse_params("repair", params, PARAMS)
        self._seed = seed
        by_name = {program.name: program for program in PROGRAMS}
        self._programs = [by_name[name] for name in read_names(params, "programs", tuple(by_name))]
        self._bugs = int(read_number(params, "bugs", 1, 1, 3))
        self._tests = int(read_number(params, "tests", 10, SHOWN + 1, 100))
        self._limits = read_limits(params, LIMITS)
        self._chat = Chat(model_dir)
        self._backend = find_backend()
        self._verdicts: Latest[Verdict] = Latest(KEPT_BYTES)
        self._room = 0  # tokens of a reply

    def fit(self, rollout: RolloutSection) -> None:
        """Keep replies within ``rollout.max_reply_tokens``. Raises ConfigError if that has no room for any."""
        self._room = self._chat.room(
            rollout, NO_CODE, needs="repair needs {} for its shortest replies", times=4,
            remedy=", or rollout.max_turns to 1",
        )  # fmt: skip

    # ---- questions ----------------------------------------------------------------------------------

    def prompt(self, index: int, split: Split) -> PromptItem:
        """Question ``index``; the splits share no broken function. Raises TaskError if the programs have too few."""
        try:
            question = draw(self._seed, index, split, self._break, lambda sketch: sketch[1], self._test)
        except ValueError as error:
            raise TaskError(f"task.params.programs: {error}; name more of them") from error
        return PromptItem(self._chat.prompt(_ask(question)), replace(question, key=f"{split} {index}"))

    def question_text(self, item: PromptItem) -> str:
        """The broken function, what it should do, and a failing test."""
        return _ask(item.reference)

    def _break(self, rng: Random) -> tuple[Program, str]:
        """A program with its constant in place, and its source with bugs."""
        program = rng.choice(self._programs)
        constant = {"k": str(rng.choice(CONSTANTS))}
        says, source = (Template(text).substitute(constant) for text in (program.says, program.source))
        broken = source
        for _ in range(self._bugs):
            broken = mutant(broken, rng)
        return replace(program, says=says, source=source), broken

    def _test(self, rng: Random, sketch: tuple[Program, str]) -> Question | None:
        """With tests, of which the first fails; None if none does."""
        program, broken = sketch
        cases = [program.arguments(rng) for _ in range(self._tests)]
        expected, given = (outcomes(source, program.name, cases) for source in (program.source, broken))
        failing = [i for i in range(len(cases)) if given[i] != expected[i]]
        if not failing:
            return None
        order = sorted(range(len(cases)), key=lambda i: i != failing[0])
        rows = [(cases[i], expected[i], given[i]) for i in order]
        return Question("", program, broken, *(tuple(column) for column in zip(*rows, strict=True)))

    # ---- answers ------------------------------------------------------------------------------------

    def reply(self, item: PromptItem, completions: Sequence[Ids]) -> Ids | None:
        """What failed; None once all tests pass. Raises SandboxError if they could not be run."""
        verdict = self._judge(item.reference, completions[-1])
        if verdict.usable and all(verdict.passed):
            return None
        return self._chat.reply(verdict.said, completions[-1], self._room)

    def reward_turns(self, item: PromptItem, completions: Sequence[Ids]) -> dict[str, float]:
        """Of the last answer. Raises SandboxError if the tests could not be run."""
        verdict = self._judge(item.reference, completions[-1])
        share = sum(verdict.passed) / len(item.reference.cases)
        return {"correct": float(share == 1.0), "passed": share, "valid": float(verdict.usable)}

    def reward(self, item: PromptItem, completion_ids: Ids) -> dict[str, float]:
        """That of a conversation of one turn."""
        return self.reward_turns(item, [completion_ids])

    def _judge(self, question: Question, completion: Ids) -> Verdict:
        source = read_source(self._chat.text(completion), question.program.name)
        if source is None:
            return Verdict(False, (), NO_CODE)
        key = (question.key, hashlib.blake2b(source.encode(errors="replace"), digest_size=16).digest())
        verdict = self._verdicts.get(key)
        if verdict is None:
            verdict = judge(question, self._run(question, source))
            self._verdicts.put(key, verdict, 500 + len(verdict.said))
        return verdict

    def _run(self, question: Question, source: str) -> Result:
        files = {
            "solution.py": Entry(data=source.encode(errors="replace")),
            "cases.json": Entry(data=json.dumps(question.cases).encode()),
        }
        argv = [interpreter(), "-I", "-S", "-c", HARNESS, question.program.name]
        return run(argv, files, self._limits, self._backend)


def read_source(text: str, name: str) -> str | None:
    """The last block of an answer, or all of one that is a function and nothing more; None if there is neither."""
    source = last_block(text)
    if source is None and text.lstrip().startswith(("def ", "import ", "from ")) and "```" not in text:
        source = text.lstrip()
    if source is None or len(source) > SOURCE_CHARACTERS or f"def {name}" not in source or "\0" not in source + "\0":
        return None
    return source


def judge(question: Question, result: Result) -> Verdict:
    """The verdict on what the harness told; the policy's code may have written any of it."""
    entry = (result.files or {}).get("results")
    lines = entry.data.splitlines() if entry is not None and entry.kind == "file" else []
    usable, why = _read(lines[0], "unusable") if lines else (False, f"it was killed ({result.killed_by})")
    if not usable:
        return Verdict(False, (), f"The function could not be called: {why[:RESULT_SHOWN]}.")
    given = [_read(line, "error")[1] for line in lines[1:]]
    stopped = f"is killed: {result.killed_by}" if result.killed_by else "ends without a result"
    given += [stopped] * (len(question.cases) - len(given))
    passed = tuple(given[i] == wanted for i, wanted in enumerate(question.expected))
    said = [f"{sum(passed)} of {len(passed)} tests pass."]
    failing = [i for i in range(SHOWN) if not passed[i]]
    if failing:
        said.append(f"For example, {_failure(question, failing[0], given[failing[0]])}.")
    elif not all(passed):
        said.append("The tests that fail are hidden.")
    return Verdict(True, passed, " ".join(said))


def _read(line: bytes, trouble: str) -> tuple[bool, str]:
    """(whether a line of the harness tells of a result, that as JSON; else what went wrong, in words)."""
    try:
        told = json.loads(line)
        if not isinstance(told, dict) or trouble in told:
            return False, f"raises {told[trouble]}" if isinstance(told, dict) else "tells nothing"
        return True, as_json(told.get("value"))
    except (ValueError, RecursionError):
        return False, "tells nothing"


def _ask(question: Question) -> str:
    """All that the policy is told."""
    return ASK.format(
        says=question.program.says, source=question.broken, name=question.program.name,
        failure=f"For example, {_failure(question, 0, question.given[0])}.",
    )  # fmt: skip


def _failure(question: Question, case: int, given: str) -> str:
    """One failed test in words."""
    arguments = ", ".join(map(repr, question.cases[case]))
    wanted = json.loads(question.expected[case])
    try:
        does = f"returns {json.loads(given)!r}"
    except ValueError:
        does = given
    shown = does if len(does) <= RESULT_SHOWN else does[:RESULT_SHOWN] + " ..."
    return f"{question.program.name}({arguments}) should return {wanted!r}, but {shown}"
