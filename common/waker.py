"""Wakes a thread that waits in a poll, from any other thread."""

import contextlib
import socket


class Waker:
    """A pair of sockets: one that a poll looks at, one that anybody may write to."""

    def __init__(self) -> None:
        self._seen, self._told = socket.socketpair()
        self._seen.setblocking(False)
        self._told.setblocking(False)

    def fileno(self) -> int:
        """Readable once woken, until :meth:`clear`."""
        return self._seen.fileno()

    def wake(self) -> None:
        """Of any thread; once is as good as often. Nobody is woken after :meth:`close`."""
        with contextlib.suppress(OSError):  # full: it is awake; closed: nobody waits
            self._told.send(b"\0")

    def clear(self) -> None:
        """Wait for the next wake."""
        with contextlib.suppress(BlockingIOError):
            while self._seen.recv(4096):
                pass

    def close(self) -> None:
        """Give both sockets back."""
        self._seen.close()
        self._told.close()
