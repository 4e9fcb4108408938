"""Verifiers and environments that are slow, in threads of their own with a deadline for each piece of work.

::

    submit -> waiting -> a worker runs it -> poll, in the actor's loop
                           | late: the loop is told, the thread is left behind, another takes its place

A thread cannot be stopped from outside; too many left behind end the actor with a word on what to do.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.errors import TaskError

END_S = 2.0  # for work under way to end when the actor does
LEFT_BEHIND = 4  # times the threads: more that are past their deadline end the actor


@dataclass(frozen=True, eq=False)
class Done:
    """What became of a piece of work."""

    owner: Any
    result: Any
    error: BaseException | None


class _Job:
    def __init__(self, owner: Any, work: Callable[[], Any]) -> None:
        self.owner, self.work = owner, work
        self.thread: threading.Thread | None = None  # that runs it
        self.late_at = 0.0  # on the clock of time.monotonic, once it runs
        self.over = False  # told of, or dropped; set under the pool's lock

    def run(self) -> Done:
        try:
            return Done(self.owner, self.work(), None)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # a task is foreign code
            return Done(self.owner, None, error)


class Pool:
    """At most ``threads`` pieces of work at once. All methods are for one thread, the actor's."""

    def __init__(self, threads: int, deadline_s: float, name: str = "verifier") -> None:
        """``deadline_s`` counts from when a piece of work begins."""
        self._limit, self._deadline_s, self._name = threads, deadline_s, name
        self._lock = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._running: set[_Job] = set()
        self._workers: set[threading.Thread] = set()
        self._idle = 0
        self._done: queue.SimpleQueue[Done] = queue.SimpleQueue()
        self._left: list[threading.Thread] = []
        self._hired = 0
        self._closed = False
        self.pending = 0  # pieces of work that :meth:`poll` will still tell of

    @property
    def left_behind(self) -> int:
        """Threads that still run past their deadline."""
        self._left = [thread for thread in self._left if thread.is_alive()]
        return len(self._left)

    def submit(self, owner: Any, work: Callable[[], Any]) -> None:
        """Have ``work()`` done as soon as a thread is free."""
        with self._lock:
            self._waiting.append(_Job(owner, work))
            self.pending += 1
            self._lock.notify()
            self._hire()

    def _hire(self) -> None:
        """One more worker, if there is work for it and room; under the lock."""
        if self._idle < len(self._waiting) and len(self._workers) < self._limit:
            thread = threading.Thread(target=self._serve, name=f"{self._name}-{self._hired}", daemon=True)
            self._hired += 1
            self._workers.add(thread)
            thread.start()

    def _serve(self) -> None:
        """A worker's life: until the pool is closed, or its work is late."""
        me = threading.current_thread()
        while True:
            with self._lock:
                self._idle += 1
                self._lock.wait_for(lambda: self._waiting or self._closed)
                self._idle -= 1
                if self._closed:
                    return
                job = self._waiting.popleft()
                job.thread, job.late_at = me, time.monotonic() + self._deadline_s
                self._running.add(job)
            done = job.run()
            with self._lock:
                if not job.over:
                    job.over = True
                    self._done.put(done)
                if me not in self._workers:
                    return
                self._running.discard(job)
            del job, done  # an idle worker holds no rollout

    def poll(self) -> list[Done]:
        """What has ended since; what is late ends with a TimeoutError. Never waits.

        Raises TaskError if too many threads are left behind.
        """
        late = self._expire()
        found = []
        while not self._done.empty():
            found.append(self._done.get())
        found += late
        self.pending -= len(found)
        return found

    def _expire(self) -> list[Done]:
        late, now = [], time.monotonic()
        with self._lock:
            for job in [j for j in self._running if j.late_at < now]:
                self._running.discard(job)
                assert job.thread is not None
                self._workers.discard(job.thread)
                self._left.append(job.thread)
                if not job.over:
                    job.over = True
                    error = TimeoutError(f"not done within reward.deadline_s={self._deadline_s:g}")
                    late.append(Done(job.owner, None, error))
                self._hire()
        if late and self.left_behind > LEFT_BEHIND * self._limit:
            raise TaskError(
                f"{self.left_behind} verifiers still run past reward.deadline_s={self._deadline_s:g}, and a thread "
                "cannot be stopped from outside: give the task's own work a deadline, or raise reward.deadline_s"
            )
        return late

    def drop(self, owner: Any) -> None:
        """Nobody waits for ``owner``'s work any more; what runs goes on and is not told of."""
        with self._lock:
            unwanted = [job for job in (*self._waiting, *self._running) if job.owner is owner and not job.over]
            for job in unwanted:
                job.over = True
            self._waiting = deque(job for job in self._waiting if not job.over)
            self.pending -= len(unwanted)

    def close(self) -> None:
        """Forget what waits and give what runs a moment to end."""
        with self._lock:
            self._closed = True
            self._waiting.clear()
            workers = [*self._workers, *self._left]
            self._lock.notify_all()
        deadline = time.monotonic() + END_S
        for thread in workers:
            thread.join(max(0.0, deadline - time.monotonic()))
