"""Waits of the weights group that end: for the learner's store, a NCCL communicator, a broadcast.

torch ends a process whose NCCL operation breaks, and waits without end where a peer stands still.
A receiver that dies must end neither the learner nor its neighbours. What torch makes is handed in.
"""

import contextlib
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

from common.errors import DeadlineError

T = TypeVar("T")

WATCH_S = 0.0005  # between two looks at a GPU's operation
GRACE_S = 1.0  # after torch's own deadline, whose words are better
# Read when a group is made. Under blocking wait torch starts no watchdog. A watchdog rethrows what it finds and so
# ends the process; where error handling forbids that (0 and 2) it still has the process's first group dump its
# traces and end the process eight minutes later. For a torch that starts one all the same: 0 (NoHandling) and not 2
# (CleanUpOnly), which aborts the communicator by itself: work of an aborted communicator looks done, without an error.
NO_WATCHDOG = {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}

_environment = threading.Lock()


def brief(error: BaseException) -> str:
    """What a collective says of its failure, without source paths and advice for its own developers."""
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return re.sub(r"^(\[[^]]*\]\s*)+", "", first.split(". This is typically")[0])[:500]


def answered(call: Callable[[], T], deadline_s: float, who: str) -> T:
    """What ``call``, which asks ``who``, returns within ``deadline_s`` and GRACE_S.

    torch's store has a deadline for what is not there yet and none for reading an answer, and NCCL has none for
    making a communicator: a process that stands still, not dead, would be waited for without end. The thread is
    left behind then; it ends with the connection. Raises what ``call`` raises, and :class:`DeadlineError`.
    """
    results: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue()

    def run() -> None:
        try:
            results.put((call(), None))
        except BaseException as error:  # noqa: BLE001  # raised where it was asked for
            results.put((None, error))

    threading.Thread(target=run, name="weights-answer", daemon=True).start()
    try:
        found, error = results.get(timeout=deadline_s + GRACE_S)
    except queue.Empty:
        raise DeadlineError(
            f"{who} has not answered for {deadline_s:.0f} s (weights.deadline_s): a process may stand still"
        ) from None
    if error is not None:
        raise error
    return cast(T, found)


@contextlib.contextmanager
def without_watchdog() -> Iterator[None]:
    """NCCL groups that are made inside have no watchdog (NO_WATCHDOG); those of the learner's mesh keep theirs."""
    with _environment:
        before = {name: os.environ.get(name) for name in NO_WATCHDOG}
        os.environ.update(NO_WATCHDOG)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def connected(make: Callable[[], Any], device: Any, deadline_s: float, name: str) -> Any:
    """The NCCL group that ``make`` makes, without a watchdog and with its communicator on ``device``.

    torch would make the communicator in the first broadcast, which waits on the host for every member without a
    deadline. It sets the device by itself, in whatever thread. Raises :class:`DeadlineError` naming the group.
    """
    with without_watchdog():
        group = make()
    answered(lambda: group.eager_connect_single_device(device), deadline_s, f"the NCCL communicator of {name}")
    return group


class Watched:
    """A NCCL operation with a deadline on the host: NCCL's own wait only orders streams."""

    def __init__(self, work: Any, deadline_s: float, abort: Callable[[], None]) -> None:
        """``work.is_completed()`` is polled; ``abort`` frees a communicator that is stuck or broken."""
        self._work, self._abort = work, abort
        self._deadline_s, self._deadline = deadline_s, time.monotonic() + deadline_s

    def wait(self) -> None:
        """Until it is done; RuntimeError after the deadline, and if it broke: work that broke is completed too."""
        while not self._work.is_completed():
            if time.monotonic() > self._deadline:
                self._abort()
                raise RuntimeError(f"a broadcast was not done within {self._deadline_s:.0f} s (weights.deadline_s)")
            time.sleep(WATCH_S)
        error = self._work.exception()
        if error is not None:
            self._abort()
            raise RuntimeError(f"a broadcast broke: {brief(error)}")
        self._work.wait()
