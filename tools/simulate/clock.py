"""Virtual time: pure delays, and processors that busy threads share.

::

    Clock    one heap by time: sleeps, wires, disks, processors of somebody's own
    Cores    one heap by work: tasks of a known cost that share so many cores

Threads on one machine all progress at the same rate, min(1, cores / busy threads), so a task that begins
when the machine's *work clock* W shows w ends when it shows w + cost, whatever comes and goes meanwhile:
ends never move in the heap, and an event costs O(log n) (Kleinrock 1967, processor sharing in virtual time).
"""

import heapq
import math
from collections.abc import Callable
from typing import Any, Protocol

Action = Callable[..., None]


class Task:
    """Something under way, by the clock of whoever runs it."""

    __slots__ = ("action", "alive", "arguments", "start", "threads")

    def __init__(self, start: float, threads: int, action: Action, arguments: tuple[Any, ...]) -> None:
        self.start, self.threads = start, threads
        self.action, self.arguments = action, arguments
        self.alive = True


Heap = list[tuple[float, int, Task]]


class Processors(Protocol):
    """Where work is done."""

    @property
    def work(self) -> float:
        """The work clock: seconds that a thread which was never idle has worked."""

    @property
    def contended(self) -> bool:
        """Whether threads wait for each other here."""

    def start(self, cost: float, action: Action, *arguments: Any, threads: int = 1) -> Task:
        """Begin ``cost`` seconds of work on ``threads`` threads at once; ``action(*arguments)`` at its end."""

    def stop(self, task: Task) -> None:
        """Abandon it."""


class Cores:
    """``cores`` processors that all share; at most one for each thread."""

    contended = True

    def __init__(self, cores: float, crowded: float = 1.0) -> None:
        """``crowded``: speed of a thread while others run beside it (caches and memory are shared), 1 alone."""
        self.cores, self.crowded = cores, crowded
        self.work = 0.0  # seconds
        self.busy = 0  # threads
        self.heap: Heap = []
        self.rate = 1.0  # of the work clock
        self._order = 0

    def start(self, cost: float, action: Action, *arguments: Any, threads: int = 1) -> Task:
        """See :class:`Processors`."""
        task = Task(self.work, threads, action, arguments)
        self._order += 1
        heapq.heappush(self.heap, (self.work + cost, self._order, task))
        self.count(threads)
        return task

    def stop(self, task: Task) -> None:
        """See :class:`Processors`."""
        assert task.alive
        task.alive = False
        self.count(-task.threads)

    def count(self, threads: int) -> None:
        """So many more are busy."""
        self.busy += threads
        speed = self.crowded if self.busy > 1 else 1.0
        self.rate = speed * min(1.0, self.cores / max(1, self.busy))


class Clock:
    """What happens when. It is also the processors of those who have their own: nobody waits there."""

    contended = False

    def __init__(self, cores: float = 1.0, crowded: float = 1.0) -> None:
        self.now = 0.0  # seconds
        self.events = 0  # that have happened
        self.halted = False  # set by whoever has seen enough
        self.shared = Cores(cores, crowded)
        self._heap: Heap = []
        self._order = 0

    @property
    def work(self) -> float:
        """See :class:`Processors`."""
        return self.now

    def start(self, cost: float, action: Action, *arguments: Any, threads: int = 1) -> Task:
        """See :class:`Processors`."""
        task = Task(self.now, threads, action, arguments)
        self._order += 1
        heapq.heappush(self._heap, (self.now + cost, self._order, task))
        return task

    def stop(self, task: Task) -> None:
        """See :class:`Processors`."""
        assert task.alive
        task.alive = False

    def after(self, seconds: float, action: Action, *arguments: Any) -> None:
        """``action(*arguments)`` in so many seconds."""
        self.start(seconds, action, *arguments)

    def run(self, events: int = 1) -> int:
        """Let up to so many things happen; returns how many did: fewer if nothing is left, or :attr:`halted`."""
        own, shared, pop, done = self._heap, self.shared, heapq.heappop, 0
        working = shared.heap
        while done < events and not self.halted:
            while own and not own[0][2].alive:
                pop(own)
            at = own[0][0] if own else math.inf
            while working and not working[0][2].alive:
                pop(working)
            if working and (ends := self.now + max(0.0, working[0][0] - shared.work) / shared.rate) < at:
                self.now = ends
                work, _, task = pop(working)
                shared.work = max(shared.work, work)
                shared.count(-task.threads)
            elif own:
                if working or shared.busy:
                    shared.work += (at - self.now) * shared.rate
                self.now = at
                task = pop(own)[2]
            else:
                break
            done += 1
            task.alive = False
            task.action(*task.arguments)
        self.events += done
        return done
