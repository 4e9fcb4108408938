"""Nothing leaves the broker before what it follows from is on disk."""

from collections import deque
from collections.abc import Callable

from broker.recorder import Recorder


class Outlet:
    """Actions in order, each held until the journal has everything written before it."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._held: deque[tuple[int, Callable[[], None]]] = deque()

    @property
    def holding(self) -> bool:
        """Whether something waits for the disk."""
        return bool(self._held)

    def do(self, action: Callable[[], None]) -> None:
        """Run ``action`` as soon as the journal is durable up to now; at once if it is."""
        if self._held or self._recorder.last > self._recorder.durable:
            self._held.append((self._recorder.last, action))
        else:
            action()

    def release(self) -> None:
        """Run what may run; start the next group commit. Raises what stopped the journal."""
        self._recorder.flush()
        durable, acted = self._recorder.durable, False
        while self._held and self._held[0][0] <= durable:
            self._held.popleft()[1]()
            acted = True
        if acted:
            self._recorder.flush()  # an action may have written: a peer that is gone
