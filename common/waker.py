"""Ends a poll of ZeroMQ sockets from another thread."""

import contextlib
import threading

import zmq


class Waker:
    """A pair of sockets within ``context``: a poll looks at :attr:`seen`, and any thread may :meth:`wake` it."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
        self.seen: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        self._told: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        self._lock = threading.Lock()
        self.seen.bind("inproc://wake")
        self._told.connect("inproc://wake")

    def wake(self) -> None:
        """Once is as good as often. Nobody is woken after :meth:`close`."""
        with self._lock:
            if not self._told.closed:
                with contextlib.suppress(zmq.Again):  # plenty of wake-ups are waiting already
                    self._told.send(b"", flags=zmq.NOBLOCK)

    def clear(self) -> None:
        """Forget those so far; of the thread that polls."""
        while self.seen.poll(0):
            self.seen.recv()

    def close(self) -> None:
        """Before the context is destroyed, once nobody polls any more."""
        with self._lock:
            self._told.close(linger=0)
            self.seen.close(linger=0)
