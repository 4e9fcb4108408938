"""Files that one process at a time holds: whoever dies lets go."""

import errno
import fcntl
import time
from collections.abc import Callable
from typing import IO, Any

LOOK_S = 0.05  # between two tries

LOCKLESS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # what a file system without locks says, such as some Lustre


def try_lock(file: int | IO[Any]) -> bool:
    """Hold an open ``file`` until it is closed or the process ends; False where somebody else holds it.

    Where the file system knows no locks, everybody gets it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in LOCKLESS:
            raise
    return True


def lock_within(
    file: int | IO[Any],
    seconds: float,
    waits: Callable[[], None] = lambda: None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> bool:
    """:func:`try_lock` for ``seconds``, or until ``is_stopped``; ``waits`` is called if somebody else holds it."""
    deadline = time.monotonic() + seconds
    if try_lock(file):
        return True
    waits()
    while not try_lock(file):
        if is_stopped() or time.monotonic() > deadline:
            return False
        time.sleep(LOOK_S)
    return True
