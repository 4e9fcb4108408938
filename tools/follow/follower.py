"""Tails ``metrics.jsonl`` into sinks, and remembers how far each has come.

::

    whole lines -> records -> points -> every sink that has not had them -> flush -> place.json

A follower that was killed goes on where its place says, whatever it had written beyond.
"""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import yaml

from common.errors import ConfigError, DataError
from common.locks import try_lock
from tools.follow.points import points_of
from tools.follow.sinks import TENSORBOARD, WANDB, Sink, TensorBoard, Wandb, find_wandb, read_place, write_place
from tools.outputs import writing
from tools.run_files import CONFIG, ENDED, METRICS, Record, check_there, read_status, record_of
from tools.watch.tail import Tail

LOOK_S = 1.0  # between two looks at a file that has not grown
IDENTITY = "run.json"


class Follower:
    """One run into its sinks; :meth:`run` returns when the run is over or ``stop`` is set."""

    def __init__(self, run_dir: Path, run_id: str, sinks: Sequence[Sink]) -> None:
        self.run_dir, self._run_id = run_dir, run_id
        self._tail = Tail(run_dir / METRICS)
        self._lines = self._restarts = 0  # read so far; of the tail
        self._sinks = [(sink, int(read_place(sink.directory, run_id).get("lines", 0))) for sink in sinks]
        self._tell_config([sink for sink, lines in self._sinks if lines == 0])

    def _tell_config(self, sinks: list[Sink]) -> None:
        path = self.run_dir / CONFIG
        if not sinks or not path.is_file():
            return
        text = path.read_text(errors="replace")
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError:
            return
        for sink in sinks:
            sink.config(text, values if isinstance(values, dict) else {})

    def run(self, stop: threading.Event, to_the_end: bool = True) -> None:
        """Follow until ``stop``, or ``to_the_end``: the broker has said that the run is over; and all is read."""
        while True:
            last = stop.is_set() or (to_the_end and self._is_over())
            while self.look():
                pass
            if last:
                break
            stop.wait(LOOK_S)

    def look(self) -> int:
        """Take what is new; returns how many lines that was."""
        lines = self._tail.read()
        if self._tail.restarts != self._restarts:
            self._begin_again()
        for line in lines:
            self._lines += 1
            record = record_of(line.decode(errors="replace"))
            points = points_of(record) if record is not None else None
            for sink, had in self._sinks:
                if points is not None and self._lines > had:
                    sink.take(points)
        if lines:
            for sink, had in self._sinks:
                place = {"run_id": self._run_id, "lines": max(had, self._lines), **sink.flush()}
                write_place(sink.directory, place)
        return len(lines)

    def _begin_again(self) -> None:
        """A broker without a journal has cut what is done again: what was told before that is not told again."""
        if read_identity(self.run_dir)["run_id"] != self._run_id:
            raise DataError(f"{self._tail.path} is another file now: another run has begun, follow that one")
        there = self._tail.path.read_bytes().count(b"\n")
        self._sinks = [(sink, min(max(had, self._lines), there)) for sink, had in self._sinks]
        self._lines, self._restarts = 0, self._tail.restarts

    def _is_over(self) -> bool:
        try:
            return read_status(self.run_dir).get("phase") in ENDED
        except (DataError, OSError):
            return False  # in a moment, perhaps


@contextlib.contextmanager
def following(run_dir: Path, tensorboard: bool, wandb: str) -> Iterator[Follower]:
    """A follower, the only one of its run. Raises :class:`ConfigError` where there is nothing to follow."""
    check_there(run_dir)
    identity = read_identity(run_dir)
    run_id, started_at = str(identity["run_id"]), float(identity["started_at"])
    package = find_wandb() if wandb else None
    with contextlib.ExitStack() as held:
        sinks: list[Sink] = []
        if tensorboard:
            directory = run_dir / TENSORBOARD
            _hold(held, directory)
            sinks.append(TensorBoard(directory, started_at, read_place(directory, run_id)))
            held.callback(sinks[-1].close)
        if wandb:
            _hold(held, run_dir / WANDB)
            sinks.append(Wandb(run_dir / WANDB, wandb, run_dir.resolve().name, run_id, package))
            held.callback(sinks[-1].close)
        yield Follower(run_dir, run_id, sinks)


def read_identity(run_dir: Path) -> Record:
    """``run.json``, which the broker writes first."""
    path = run_dir / IDENTITY
    try:
        identity = json.loads(path.read_text())
        return {"run_id": str(identity["run_id"]), "started_at": float(identity["started_at"])}
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: missing; name a run directory whose broker has started") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error


def _hold(held: contextlib.ExitStack, directory: Path) -> None:
    """Two followers would write everything twice."""
    with writing(directory, "make it writable, or copy the run and follow the copy"):
        directory.mkdir(parents=True, exist_ok=True)
        lock = held.enter_context((directory / "lock").open("w"))
    if not try_lock(lock):
        raise ConfigError(
            f"{directory}: somebody else follows this run there already; tools.launch does by itself "
            "(metrics.tensorboard, metrics.wandb)"
        )


class Background:
    """A follower in a thread of the launcher. Whatever fails in it is said once, and the run goes on."""

    def __init__(self, run_dir: Path, tensorboard: bool, wandb: str, say: Callable[[str], None]) -> None:
        self._run_dir, self._tensorboard, self._wandb, self._say = run_dir, tensorboard, wandb, say
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follow", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not (self._run_dir / IDENTITY).exists():  # the broker has not started yet
                if self._stop.wait(LOOK_S):
                    return
            with following(self._run_dir, self._tensorboard, self._wandb) as follower:
                follower.run(self._stop, to_the_end=False)  # the end may be an earlier launch's
        except Exception as error:  # noqa: BLE001  # nobody's run ends because a chart cannot be drawn
            where = " and ".join(self._tensorboard * [TENSORBOARD] + bool(self._wandb) * [WANDB])
            self._say(f"nothing more goes to {where}: {type(error).__name__}: {error}")

    def close(self, timeout_s: float) -> None:
        """Let it take what is there, for so long at most."""
        self._stop.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._say(f"gave up on {TENSORBOARD if self._tensorboard else WANDB} after {timeout_s:.0f} s")
