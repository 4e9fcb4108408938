"""What lies in a run directory, and how to read it while it is being written.

::

    runs/<name>/
      config.yaml     the complete configuration        (launch, broker)
      status.json     how the run stands, every 0.5 s   (broker, replaced atomically)
      metrics.jsonl   one line a step, evaluation and publish   (broker, appended and locked)
      launch.lock     empty; locked while a launcher is at work (launch)
      logs/*.log      what each process said            (launch)
      summary.json report.html report.md *.png          (report)
"""

import difflib
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import orjson

from broker.runfiles import CONFIG as CONFIG  # who keeps it names it
from common.errors import ConfigError, DataError
from common.locks import try_lock
from common.trace import TRACE
from learner.hold import LOCK as LEARNER_LOCK

STATUS, METRICS, LOGS, SUMMARY, REPORT, PAGE = (
    "status.json",
    "metrics.jsonl",
    "logs",
    "summary.json",
    "report.md",
    "report.html",
)
LOCK, IDENTITY = "launch.lock", "run.json"  # which every broker writes when it begins
LEARNER_S = 60.0  # for learner and broker of a launcher that was killed to end behind the last checkpoint
SETTLE_S = 2.0  # for that broker to have said that it ends
LOOK_S = 0.05  # between two looks
ENDED = ("finished", "stopped")  # phases of status.json behind which a broker only hears out who is there
UNDER_WAY = "a run of this name is under way; choose another run.name, or stop that run first"
LEARNER_STAYS = f"the learner of an earlier launch still holds {LEARNER_LOCK}; end it, or choose another run.name"
INTERRUPTED = "interrupted while an earlier launch's broker or learner still ended"
SIGNS = (CONFIG, STATUS, METRICS, LOGS, TRACE)  # any of them makes a directory a run's
Record = dict[str, Any]  # one JSON object
LINE_BEGINS = '{"kind":'  # every line of metrics.jsonl
NEEDED = {"step": ("step",), "eval": ("version", "reward"), "publish": ("version",)}  # numbers of a record
NEWEST_RUNS = 3  # named where a directory is none
NUMBERS_SHOWN = 5  # lines named in a note


def check_there(run_dir: Path) -> None:
    """Raise :class:`ConfigError` unless there is such a directory, whatever is in it."""
    if not run_dir.is_dir():
        others = near_runs(run_dir) or "such as runs/quickstart"
        raise ConfigError(f"{run_dir}: no such directory; name a run's, {others}")


def near_runs(run_dir: Path) -> str:
    """Of the runs where ``run_dir`` should be, that of the near name or the newest few, in words; "" without any."""
    try:
        found = {config.parent.name: config.stat().st_mtime for config in run_dir.parent.glob(f"*/{CONFIG}")}
    except OSError:
        return ""
    newest = sorted(found, key=lambda name: -found[name])[:NEWEST_RUNS]
    near = difflib.get_close_matches(run_dir.name, found, n=1) or newest
    return f"such as {', '.join(str(run_dir.parent / name) for name in near)}" if near else ""


def check_run_dir(run_dir: Path) -> None:
    """Raise :class:`ConfigError` unless a run has left something in ``run_dir``."""
    check_there(run_dir)
    if not any((run_dir / sign).exists() for sign in SIGNS):
        raise ConfigError(
            f"{run_dir}: no run directory: none of {', '.join(SIGNS)} is there; name a run's, such as runs/quickstart"
        )


def read_status(run_dir: Path) -> Record:
    """The broker's last status, or ``{}`` before it wrote one."""
    try:
        text = (run_dir / STATUS).read_text(errors="replace")
    except FileNotFoundError:
        return {}
    try:
        status = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{run_dir / STATUS}: not JSON ({error}); the broker replaces it whole, so who wrote it?"
        ) from error
    if not isinstance(status, dict):
        raise DataError(f"{run_dir / STATUS}: must hold an object, not {type(status).__name__}")
    return status


def read_metrics(run_dir: Path) -> list[Record]:
    """Every whole line of ``metrics.jsonl``; see :func:`scan_metrics` for what is left out."""
    return scan_metrics(run_dir)[0]


def scan_metrics(run_dir: Path) -> tuple[list[Record], list[str]]:
    """The records of ``metrics.jsonl``, and a note for what could not be read of it.

    A line that the broker's death cut short is left out. The broker that came back went on in the same
    line: what it wrote there is kept.
    """
    try:
        with (run_dir / METRICS).open("rb") as file:
            return _records_in(file)
    except FileNotFoundError:
        return [], []
    except OSError as error:
        return [], [f"{METRICS}: cannot be read ({error.strerror or error})"]


def _records_in(file: Iterable[bytes]) -> tuple[list[Record], list[str]]:
    records: list[Record] = []
    odd: list[int] = []
    number = 0
    for number, line in enumerate(file, 1):
        try:
            whole = orjson.loads(line)
        except orjson.JSONDecodeError:  # NaN too, which runs of an older croupier wrote
            whole = None
        found = whole if _is_record(whole) else record_of(text := line.decode(errors="replace"))
        if found is not None:
            records.append(found)
        if line.strip() and (found is None or (found is not whole and not _is_whole(text))):
            odd.append(number)
    if not odd:
        return records, []
    few = ", ".join(map(str, odd[:NUMBERS_SHOWN])) + (", …" if len(odd) > NUMBERS_SHOWN else "")
    return records, [f"{METRICS}: {len(odd)} of {number:,} lines torn or foreign, left out (line {few})"]


def _is_whole(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def record_of(line: str) -> Record | None:
    """The record of a line, or of its end where its beginning is torn; None for neither."""
    start = 0
    while start >= 0:
        try:
            found = json.loads(line[start:])
        except (ValueError, RecursionError):
            start = line.find(LINE_BEGINS, start + 1)
            continue
        return found if _is_record(found) else None
    return None


def _is_record(found: Any) -> bool:
    """Whether it has what every reader counts on: its kind, when it was, and of what."""
    if not isinstance(found, dict) or not isinstance(found.get("kind"), str):
        return False
    numbers = [found.get("time_s", 0.0), *(found.get(name) for name in NEEDED.get(found["kind"], ()))]
    return all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers)


def of_kind(records: list[Record], kind: str) -> list[Record]:
    """The records of one kind: ``step``, ``eval`` or ``publish``."""
    return [record for record in records if record.get("kind") == kind]


def outcome_of(run_dir: Path) -> str:
    """What ``summary.json`` says of how the run ended, or why it says nothing."""
    try:
        summary = json.loads((run_dir / SUMMARY).read_text())
    except FileNotFoundError:
        return "cut short: no summary"
    except (OSError, ValueError):
        return "cut short: its summary is damaged"
    return str(summary.get("status")) if isinstance(summary, dict) else "cut short: its summary is damaged"


def last_lines(path: Path, count: int) -> list[str]:
    """The last ``count`` lines of a log, or none if it was never opened."""
    try:
        return path.read_text(errors="replace").splitlines()[-count:]
    except FileNotFoundError:
        return []


def claim(
    run_dir: Path, waits: Callable[[], None] = lambda: None, is_stopped: Callable[[], bool] = lambda: False
) -> IO[str]:
    """Make ``run_dir``; nobody else can claim it until what is returned is closed, or the process ends.

    A learner that is still at work there, of a launcher that was killed, has LEARNER_S to write its checkpoint, and
    its broker to hear of that; ``waits`` is called if there is one. Raises :class:`ConfigError` where a launcher, a
    broker or a learner is.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    held = (run_dir / LOCK).open("a")
    words = UNDER_WAY
    if try_lock(held) and _is_there(held, run_dir / LOCK):
        words = _who_stays(run_dir, waits, is_stopped)
        if not words:
            return held
    held.close()
    raise ConfigError(f"{run_dir}: {words}")


def _who_stays(run_dir: Path, waits: Callable[[], None], is_stopped: Callable[[], bool]) -> str:
    """Who is at work there and does not end, or not within LEARNER_S; "" for nobody."""
    began, told = time.monotonic(), False
    while True:
        passed = time.monotonic() - began
        if _is_held(run_dir / METRICS):  # by a broker, perhaps one that was started by hand
            words, settling = UNDER_WAY, passed < SETTLE_S
            ends = settling or _phase(run_dir) in ENDED
        elif _is_held(run_dir / LEARNER_LOCK):
            words, settling, ends = LEARNER_STAYS, False, True
        else:
            return ""
        if ends and is_stopped():
            return INTERRUPTED
        if not ends or passed > LEARNER_S:
            return words
        if not told and not settling:
            told = True
            waits()
        time.sleep(LOOK_S)


def is_under_way(run_dir: Path) -> bool:
    """Whether a broker is at work there."""
    try:
        return _is_held(run_dir / METRICS)
    except OSError:  # it may not even be read, or not be locked by who may only read
        return (run_dir / IDENTITY).exists() and _phase(run_dir) not in ENDED  # it may only have begun


def _is_held(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        file = path.open("a")  # NFS locks no file that is only read
    except PermissionError:  # somebody else's
        file = path.open()
    with file:
        return not try_lock(file)


def _phase(run_dir: Path) -> Any:
    """Of the last broker's status; None where it has written none yet."""
    try:
        began, told = ((run_dir / name).stat().st_mtime_ns for name in (IDENTITY, STATUS))
        return read_status(run_dir).get("phase") if told >= began else None
    except (OSError, DataError):
        return None


def _is_there(file: IO[str], path: Path) -> bool:
    """Whether ``path`` still leads to it: somebody may have set the directory aside meanwhile."""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


class Before:
    """``config.yaml`` and ``status.json`` as an earlier launch left them, until something is written behind it."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._files = {name: found for name in (CONFIG, STATUS) if (found := _bytes_of(run_dir / name)) is not None}
        metrics = _bytes_of(run_dir / METRICS) or b""
        self._sizes = (len(metrics), metrics.rfind(b"\n") + 1)  # a broker cuts a torn line

    def put_back(self) -> bool:
        """Put them back if metrics.jsonl has no line more; returns whether there was an earlier launch's run."""
        metrics = self.run_dir / METRICS
        size = metrics.stat().st_size if metrics.exists() else 0
        if CONFIG not in self._files or size not in self._sizes:
            return False
        for name, content in self._files.items():
            if _bytes_of(self.run_dir / name) != content:
                temporary = self.run_dir / f"{name}.tmp{os.getpid()}"
                temporary.write_bytes(content)
                os.replace(temporary, self.run_dir / name)
        return True


def _bytes_of(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def set_aside(run_dir: Path) -> Path | None:
    """Move an earlier run to ``<name>.1``, ``.2``, …: the first free; returns where, or None if there was none."""
    if not run_dir.exists() or all(path.name == LOCK for path in run_dir.iterdir()):
        return None
    number = 1
    while (target := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    run_dir.rename(target)
    return target
