"""Answers graded in processes of their own, which are killed at a deadline.

::

    grade(request) -> an idle worker (started if there is none) -> its verdict
                        | late, or dead twice -> killed; another is started when it is needed -> Overdue
                        | it says that its memory is spent -> its verdict; another is started when it is needed

What a policy writes ends in sympy here: a tower of exponents keeps it busy for ever and holds the
interpreter's lock meanwhile, so no thread and no signal of this process could end it. Workers are
:mod:`actor.tasks.gradeworker`, speak JSON lines over a socket pair and end with this process.
"""

import contextlib
import json
import queue
import socket
import subprocess
import sys
import time
import weakref
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from common.errors import TaskError

START_S = 60.0  # until a worker has imported what it needs
WAIT_S = 600.0  # for a worker to be idle
MARGIN_S = 2.0  # behind the deadline a worker kills itself, should nobody else be left to do it
ATTEMPTS = 2  # a worker may have died of something else than the answer
READ_AT_ONCE = 1 << 16
Kind = Literal["math", "gym"]  # see actor.tasks.gradeworker
ROOT = Path(__file__).parents[2]  # where the package lies


class Overdue(Exception):
    """An answer that could not be graded within its deadline, or that its worker died of."""


class _Worker:
    """One process. Raises TaskError if it does not come up."""

    def __init__(self, kind: str) -> None:
        self._socket, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "actor.tasks.gradeworker", kind],
            stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT,
        )  # fmt: skip
        theirs.close()
        self._received = b""
        self._ready_by = time.monotonic() + START_S
        self._ready = False

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Its answer. Raises TimeoutError if that is late, ConnectionError if it died."""
        if not self._ready:
            try:
                self._line(self._ready_by)
            except (TimeoutError, ConnectionError) as error:
                raise TaskError(f"a grading process did not start: {error!r}") from error
            self._ready = True
        deadline = time.monotonic() + seconds
        self._socket.settimeout(seconds)
        self._socket.sendall(json.dumps({**request, "seconds": seconds + MARGIN_S}).encode() + b"\n")
        found: dict[str, Any] = json.loads(self._line(deadline))
        return found

    def _line(self, deadline: float) -> bytes:
        while b"\n" not in self._received:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            piece = self._socket.recv(READ_AT_ONCE)
            if not piece:
                raise ConnectionError("it ended")
            self._received += piece
        line, _, self._received = self._received.partition(b"\n")
        return line

    def end(self) -> None:
        """Kill it, whatever it does."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


class Graders:
    """``count`` workers of one kind at most, shared by threads."""

    def __init__(self, kind: Kind, count: int, deadline_s: float) -> None:
        self.kind, self.deadline_s = kind, deadline_s
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()  # None: one may be started
        for _ in range(count):
            self._idle.put(None)
        self.close = weakref.finalize(self, _end_all, self._idle)  # also when the interpreter ends

    def grade(self, request: dict[str, Any]) -> dict[str, Any]:
        """The verdict on ``request`` (see :mod:`actor.tasks.gradeworker`).

        Raises Overdue if there is none within ``deadline_s``, TaskError if workers cannot be had.
        """
        for attempt in range(ATTEMPTS):
            try:
                worker = self._idle.get(timeout=WAIT_S)
            except queue.Empty:
                raise TaskError(f"no grading process was free within {WAIT_S:g} s; raise task.params.workers") from None
            kept: _Worker | None = None
            try:
                worker = worker or _Worker(self.kind)
                verdict = worker.ask(request, self.deadline_s)
                kept = None if verdict.pop("spent") else worker
                return verdict
            except TimeoutError:
                raise Overdue(f"was not graded within {self.deadline_s:g} s") from None
            except ConnectionError:
                if attempt + 1 == ATTEMPTS:
                    raise Overdue("made the grading process die") from None
            finally:
                if kept is None and worker is not None:
                    worker.end()
                self._idle.put(kept)
        raise AssertionError("the last attempt returns or raises")


@lru_cache(maxsize=8)
def graders(kind: Kind, count: int, deadline_s: float) -> Graders:
    """Those of this process: a worker takes 100 to 200 MB, so tasks share them."""
    return Graders(kind, count, deadline_s)


def _end_all(idle: "queue.LifoQueue[_Worker | None]") -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            worker = idle.get_nowait()
            if worker is not None:
                worker.end()
