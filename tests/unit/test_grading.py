"""Grading processes: shared by threads, replaced when they die or hang, and gone with whoever started them."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading

import pytest

from actor.tasks.grading import ROOT, Graders, Overdue
from common.errors import TaskError

pytestmark = pytest.mark.slow
ONE = {"references": ["1"], "answer": "\\boxed{1}"}
TOWER = {"references": ["1"], "answer": "\\boxed{9^{9^{9^9}}}"}


@pytest.fixture
def one():
    found = Graders("math", 1, 1.0)
    yield found
    found.close()


def pid_of(graders: Graders) -> int:
    worker = graders._idle.get(timeout=10)
    graders._idle.put(worker)
    return worker._process.pid


def test_a_worker_that_was_killed_is_replaced_and_the_answer_graded(one: Graders) -> None:
    assert one.grade(ONE) == {"read": True, "correct": True}
    before = pid_of(one)
    os.kill(before, signal.SIGKILL)
    assert one.grade(ONE) == {"read": True, "correct": True}
    assert pid_of(one) != before


def test_a_stopped_worker_is_late(one: Graders) -> None:
    one.grade(ONE)
    os.kill(pid_of(one), signal.SIGSTOP)
    with pytest.raises(Overdue, match="was not graded within 1 s"):
        one.grade({**ONE, "answer": "x" * 1_000_000})  # more than its socket holds
    assert one.grade(ONE)["correct"]


def test_threads_share_workers_and_a_tower_of_one_delays_the_others_by_its_deadline_alone() -> None:
    graders, verdicts = Graders("math", 2, 1.0), queue.SimpleQueue()

    def ask(number: int) -> None:
        try:
            verdicts.put((number, graders.grade(TOWER if number == 3 else ONE)))
        except Overdue as error:
            verdicts.put((number, str(error)))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    found = dict(verdicts.get_nowait() for _ in range(12))
    assert found.pop(3) == "was not graded within 1 s"
    assert all(verdict == {"read": True, "correct": True} for verdict in found.values())
    workers = [graders._idle.get_nowait() for _ in range(2)]
    pids = [worker._process.pid for worker in workers if worker is not None]
    for worker in workers:
        graders._idle.put(worker)
    graders.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_worker_left_alone_with_a_tower_kills_itself() -> None:
    ours, theirs = socket.socketpair()
    worker = subprocess.Popen(
        [sys.executable, "-m", "actor.tasks.gradeworker", "math"], stdin=theirs.fileno(), cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    theirs.close()
    ours.settimeout(60)
    assert ours.recv(100) == b"{}\n"
    ours.sendall(json.dumps({**TOWER, "seconds": 0.5}).encode() + b"\n")
    ours.close()
    assert worker.wait(30) == -signal.SIGALRM


def test_a_process_that_has_grown_says_so() -> None:
    ours, theirs = socket.socketpair()
    grown = "import sys; from actor.tasks import gradeworker as g; kept = bytearray(g.SPENT_BYTES); g.main('math')"
    worker = subprocess.Popen([sys.executable, "-c", grown], stdin=theirs.fileno(), cwd=ROOT)
    theirs.close()
    ours.settimeout(60)
    assert ours.recv(100) == b"{}\n"
    ours.sendall(json.dumps({**ONE, "seconds": 60}).encode() + b"\n")
    assert json.loads(ours.recv(1000)) == {"read": True, "correct": True, "spent": True}
    ours.close()
    assert worker.wait(30) == 0


def test_a_worker_that_cannot_start_is_an_error_of_ours(one: Graders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(TaskError, match="a grading process did not start"):
        one.grade(ONE)
    monkeypatch.undo()
    assert one.grade(ONE)["correct"]
