"""Runs what a plan still lacks, one run at a time or a few.

::

    look at every job -> skip the finished -> start -> poll -> settle: finished | failed -> ... -> Tally

Nothing is kept in memory that is not on disk: the same command goes on wherever an earlier one was
interrupted. A run that failed is told, counted and tried again by the next call.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from common.errors import ConfigError, DataError
from tools.checked import checked_status
from tools.run_files import LOGS, claim, last_lines, read_status, set_aside
from tools.sweep.child import Child, Launcher
from tools.sweep.plan import Found, Job, Plan, look, write_state

POLL_S = 0.3
STALL_S = 1800.0  # without a new step, by default: longer than every deadline of a run's own processes
LOG_LINES = 8  # of a run that failed
Record = dict[str, Any]


class View(Protocol):
    """Who shows a person how it goes."""

    def say(self, text: str, style: str = "") -> None:
        """One line."""
        ...

    def show(self, runner: "Runner") -> None:
        """How it stands now; called often."""
        ...


@dataclass
class Active:
    """A run that is going on."""

    job: Job
    child: Child
    started: float
    step: int = -1
    stepped: float = 0.0  # when the last new step was seen
    status: Record = field(default_factory=dict)
    first: tuple[float, int] | None = None  # (time, step) from which the pace is taken


@dataclass
class Runner:
    """Carries a plan out."""

    plan: Plan
    launch: Launcher
    view: View
    stopped: Callable[[], bool]
    jobs: int = 1
    redo: bool = False  # run again what was finished under other settings
    states: dict[str, Record] = field(default_factory=dict)  # job key -> state, attempts, wall_s, reason
    write: Callable[[Path, Record], None] = write_state
    sleep: Callable[[float], None] = time.sleep
    stall_s: float = STALL_S
    active: list[Active] = field(default_factory=list)
    waiting: deque[Job] = field(default_factory=deque)
    walls: list[float] = field(default_factory=list)  # seconds that runs of this call took

    def prepare(self) -> None:
        """Find what is left to do. Raises :class:`ConfigError` for runs that were finished under other settings."""
        self.plan.directory.mkdir(parents=True, exist_ok=True)
        earlier, self.states = self.states, {}
        changed: list[str] = []
        for job in self.plan.jobs:
            found, about = look(job)
            state = dict(earlier.get(job.key) or {})
            if found is Found.FINISHED:
                self.states[job.key] = state | {"state": "finished", "reason": ""}
                continue
            if found is Found.OTHER and not self.redo:
                changed.append(f"{job.key} ({about})")
            failed = found is Found.HALF and state.get("state") == "failed"
            self.states[job.key] = state | {"state": "failed" if failed else "waiting"}
            self.waiting.append(job)
        if changed:
            more = f" and {len(changed) - 1} more runs" if len(changed) > 1 else ""
            raise ConfigError(
                f"{self.plan.directory}: {changed[0]}{more} finished under other settings; choose another --name, "
                "or give --redo to set them aside and run them again"
            )

    def run(self) -> bool:
        """Run until nothing is left or a stop is asked for; returns whether all runs are finished."""
        self.save()
        try:
            while (self.waiting or self.active) and not self.stopped():
                while self.waiting and len(self.active) < self.jobs and not self.stopped():
                    self._start(self.waiting.popleft())
                self.sleep(POLL_S)
                for active in list(self.active):
                    self._follow(active)
                self.view.show(self)
        finally:
            for active in self.active:
                active.child.ask()  # all at once: each may take a minute for its last checkpoint
            for active in self.active:
                active.child.stop()
                self._set(active.job, state="waiting", reason="interrupted")
            self.active.clear()
        self.save()
        return self.count("finished") == len(self.plan.jobs)

    def count(self, state: str) -> int:
        """Runs in that state."""
        return sum(1 for known in self.states.values() if known["state"] == state)

    def save(self) -> None:
        """Write down how it stands."""
        self.write(self.plan.directory, self.plan.to_record() | {"runs": self.states})

    def _set(self, job: Job, **values: object) -> None:
        self.states[job.key] = self.states[job.key] | values

    def _start(self, job: Job) -> None:
        waits = f"{job.key}: waiting for the processes of an earlier attempt to end"
        try:
            with claim(job.config.run.path, lambda: self.view.say(waits, "dim"), self.stopped):  # nobody works there
                moved = set_aside(job.config.run.path)
        except ConfigError as error:  # the others can go on
            if self.stopped():
                self._set(job, state="waiting", reason="interrupted")
            else:
                self._set(job, state="failed", reason=str(error))
                self.view.say(f"not started: {job.key}: {error}", "bold red")
            self.save()
            return
        if moved is not None:
            self.view.say(f"{job.key}: an earlier attempt was set aside as {moved.name}", "dim")
        self._set(job, state="running", attempts=int(self.states[job.key].get("attempts", 0)) + 1, reason="")
        self.save()
        now = time.monotonic()
        self.active.append(Active(job, self.launch(job.config, job.log), now, stepped=now))
        self.view.say(f"started {job.key} ({self.count('finished') + 1} of {len(self.plan.jobs)})")

    def _follow(self, active: Active) -> None:
        code = active.child.poll()
        if code is not None:
            self._settle(active, f"exit code {code}")
            return
        try:
            active.status = checked_status(read_status(active.job.config.run.path))
        except (DataError, OSError) as error:  # the run's own end will tell; until then there is nothing to show
            active.status = {"phase": "waiting", "waiting_for": f"a readable status ({error})"}
        step, at, now = int(active.status.get("step") or 0), active.status.get("time"), time.monotonic()
        if step != active.step:
            active.step, active.stepped = step, now
            if step and at is not None and active.first is None:
                active.first = (float(at), step)
        elif now - active.stepped > self.stall_s:
            active.child.stop()
            self._settle(active, f"no new step for {self.stall_s:g} s (--stall-s)")

    def _settle(self, active: Active, how: str) -> None:
        self.active.remove(active)
        job, wall_s = active.job, time.monotonic() - active.started
        found, about = look(job)
        if found is Found.FINISHED:
            self.walls.append(wall_s)
            self._set(job, state="finished", wall_s=round(wall_s, 1), reason="")
            self.view.say(f"finished {job.key} in {wall_s:.0f} s", "green")
        else:
            self._set(job, state="failed", wall_s=round(wall_s, 1), reason=f"{how}; {about or 'it left nothing'}")
            self.view.say(f"FAILED {job.key} after {wall_s:.0f} s: {how}; the last lines of {job.log}:", "bold red")
            for line in last_lines(job.log, LOG_LINES):
                self.view.say(f"  {line}")
            logs = job.config.run.path / LOGS
            self.view.say(f"  its processes' own words are in {logs}; the same command tries it again", "dim")
        self.save()
