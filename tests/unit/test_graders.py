"""What becomes of grading processes that run out of memory, or are about to."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actor.tasks.gradeworker import grade_math
from actor.tasks.grading import Graders, Overdue
from actor.tasks.gymrules import score

FAKE = """#!{python} -IS
import json, os, socket
channel = socket.socket(fileno=os.dup(0))
channel.sendall(b"{{}}\\n")
for number, line in enumerate(channel.makefile("rb"), 1):
    if json.loads(line)["answer"] == "large":
        os._exit(1)
    channel.sendall(json.dumps({{"pid": os.getpid(), "number": number, "spent": number == 3}}).encode() + b"\\n")
"""


@pytest.fixture
def graders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Graders]:
    """Of processes that say who they are, and after three answers that they are spent."""
    script = tmp_path / "worker"
    script.write_text(FAKE.format(python=sys.executable))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    found = Graders("math", 1, 5.0)
    yield found
    found.close()


def test_a_spent_process_gives_its_verdict_and_is_replaced(graders: Graders) -> None:
    verdicts = [graders.grade({"answer": "1"}) for _ in range(7)]
    assert [verdict["number"] for verdict in verdicts] == [1, 2, 3, 1, 2, 3, 1]
    assert len({verdict["pid"] for verdict in verdicts}) == 3
    assert all(set(verdict) == {"pid", "number"} for verdict in verdicts)


def test_an_answer_that_no_process_survives_is_told_from_a_wrong_one(graders: Graders) -> None:
    assert graders.grade({"answer": "1"})["number"] == 1
    with pytest.raises(Overdue, match="made the grading process die"):
        graders.grade({"answer": "large"})
    assert graders.grade({"answer": "1"})["number"] == 1


class Exhausted:
    """A data set, and references, that there is no memory for."""

    def __iter__(self) -> Iterator[str]:
        raise MemoryError

    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        raise MemoryError


def test_no_memory_is_no_verdict() -> None:
    with pytest.raises(MemoryError):
        grade_math({"references": Exhausted(), "answer": "\\boxed{1}"})
    with pytest.raises(MemoryError):
        score(Exhausted(), "chain_sum", "1", {})
