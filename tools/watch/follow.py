"""Follows one run directory: every look takes what is new, whatever happens to the files meanwhile."""

import time
from pathlib import Path

import yaml

from common.errors import DataError
from tools.run_files import CONFIG, METRICS, STATUS, Record, near_runs, read_status
from tools.watch.history import History
from tools.watch.shares import Window
from tools.watch.sound import mapping, text, whole
from tools.watch.tail import Tail
from tools.watch.view import View, make_view

LOOK_S = 0.3  # that one look may take while there is more to read


class Follower:
    """One run, as it goes."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.history, self.window = History(), Window()
        self.tail = Tail(run_dir / METRICS)
        self.epoch = 0  # of the history: raised when what was told before is void
        self._restarts = self._rewound = 0
        self._run_id: object = None
        self.status: Record = {}  # status.json as it was last read
        self._given: Record = {}  # config.yaml
        self._notes: list[str] = []
        self._disregarded = -1  # when status.json was replaced (ns) that is not told

    def disregard(self) -> None:
        """What status.json says now is an earlier launch's: nothing is known until it is replaced."""
        self._disregarded = self.sign[0]

    def look(self, seconds: float = LOOK_S) -> View:
        """Read what is new, for about ``seconds`` at most, and say how the run stands."""
        self._notes = []
        self._read_status()
        self._read_metrics(seconds)
        view = make_view(self.run_dir.resolve().name, self.status, self.history, self.window)
        view.status_age_s = self.age()
        self._from_config(view)
        if not self.status or not self.run_dir.is_dir():
            self._say_what_is_missing(view)
        if self.tail.behind:
            part = self.tail.offset / (self.tail.offset + self.tail.behind)
            self._notes.append(f"reading {METRICS}: {part:.0%}")
        if self.tail.too_long:
            self._notes.append(f"{self.tail.too_long} line(s) of {METRICS} too long to be ours left out")
        view.notes += self._notes
        return view

    @property
    def caught_up(self) -> bool:
        """Whether everything that is there was read."""
        return not self.tail.behind

    @property
    def sign(self) -> tuple[int, int]:
        """Another whenever somebody wrote: when status.json was replaced (ns), bytes read of metrics.jsonl."""
        try:
            written = (self.run_dir / STATUS).stat().st_mtime_ns
        except OSError:
            written = -1
        return written, self.tail.offset

    def _read_status(self) -> None:
        if self.sign[0] == self._disregarded:
            return
        try:
            found = read_status(self.run_dir)
        except (DataError, OSError, UnicodeDecodeError) as error:
            self._notes.append(f"{STATUS} cannot be read: {text(error, 200)}")
            return
        if not found:  # deleted, perhaps: what was known is still shown
            return
        if self._run_id is not None and found.get("run_id") != self._run_id:
            self._begin_anew()
        self._run_id, self.status = found.get("run_id"), found

    def _begin_anew(self) -> None:
        self.history, self.tail = History(), Tail(self.run_dir / METRICS)
        self.window.clear()
        self._given = {}
        self._restarts = self._rewound = 0
        self.epoch += 1

    def _read_metrics(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            lines = self.tail.read()
            if self.tail.restarts != self._restarts:
                self._restarts = self.tail.restarts
                self.history, self._rewound = History(), 0
                self.epoch += 1
            self.history.take(lines)
            if not self.tail.behind or time.monotonic() > deadline:
                break
        if self.history.steps.rewound != self._rewound:
            self._rewound = self.history.steps.rewound
            self.epoch += 1

    def age(self) -> float | None:
        """Seconds since the broker last replaced status.json."""
        try:
            written = (self.run_dir / STATUS).stat().st_mtime
        except OSError:
            return None
        if self.sign[0] == self._disregarded:
            return None
        return max(0.0, time.time() - written)  # noqa: TID251  beside a file's time, by the same clock

    def _from_config(self, view: View) -> None:
        """What a run's own configuration says where its broker does not."""
        if not self._given:
            try:
                self._given = mapping(yaml.safe_load((self.run_dir / CONFIG).read_text()))
            except (OSError, ValueError, yaml.YAMLError):
                return
        budget = mapping(self._given.get("staleness")).get("budget")
        view.budget_auto = view.budget_auto or budget == "auto"
        if view.budget is None:
            view.budget = whole(budget)
        if view.steps is None:
            view.steps = whole(mapping(self._given.get("run")).get("steps"))

    def _say_what_is_missing(self, view: View) -> None:
        if not self.status:
            view.phase, there = "nothing", self.run_dir.is_dir()
            what = f"{self.run_dir / STATUS}, which the broker writes" if there else f"the run directory {self.run_dir}"
            others = "" if there else text(near_runs(self.run_dir), 200)
            advice = f"python -m tools.launch RUN.yaml{others and '; there are others, '}{others}"
            view.words = f"{text(what, 200)} ({advice})"
        else:
            view.phase, view.words = (
                "gone",
                f"{text(self.run_dir, 200)} was removed; this is the last that was seen of it",
            )
