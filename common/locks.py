"""Files that one process at a time holds: whoever dies lets go."""

import errno
import fcntl
from typing import IO, Any

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
