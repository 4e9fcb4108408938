"""Where points go: event files in the run directory, or a Weights & Biases project."""

import importlib
import importlib.util
import json
import os
import socket
from pathlib import Path
from typing import Any, Protocol

from common.errors import ConfigError
from tools.follow.events import EventFile, Histogram, Scalar, Words
from tools.follow.points import Points
from tools.run_files import Record

TENSORBOARD, WANDB = "tensorboard", "wandb"  # within the run directory
PLACE = "place.json"  # how far a sink has come


class Sink(Protocol):
    """Takes points; what it was given before :meth:`flush` returned is kept, and not wanted again."""

    directory: Path  # where it remembers its place

    def config(self, text: str, values: Record) -> None:
        """The run's configuration as YAML and as a tree; told before everything else, once a run."""

    def take(self, points: Points) -> None:
        """More points."""

    def flush(self) -> Record:
        """Write; returns what :func:`open_tensorboard` wants to know of it again."""

    def close(self) -> None:
        """No more points."""


class TensorBoard:
    """Event files; a file is a life of the follower."""

    def __init__(self, directory: Path, started_at: float, place: Record) -> None:
        """``place``: what :meth:`flush` said last. What was written after it is cut off: it will come again."""
        self.directory, self._started_at = directory, started_at
        directory.mkdir(parents=True, exist_ok=True)
        self._cut(place)
        number = len(list(directory.glob("events.out.tfevents.*")))
        host = socket.gethostname()
        path = directory / f"events.out.tfevents.{int(started_at):010d}.{number:04d}.{host}"
        self._file = EventFile(path, started_at)

    def _cut(self, place: Record) -> None:
        kept, size = place.get("file"), place.get("bytes")
        for path in self.directory.glob("events.out.tfevents.*"):
            if not place:
                path.unlink()  # of a follower that was killed before it could say where it was
            elif path.name == kept and isinstance(size, int) and path.stat().st_size > size:
                os.truncate(path, size)
            elif kept is not None and path.name > kept:
                path.unlink()

    def config(self, text: str, values: Record) -> None:
        """As text."""
        shown = "\n".join(f"    {line}" for line in text.splitlines())
        self._file.write(self._started_at, 0, [Words("config", shown)])

    def take(self, points: Points) -> None:
        """One event."""
        if points.values:
            self._file.write(self._started_at + points.time_s, points.step, points.values)

    def flush(self) -> Record:
        """The file and its size."""
        return {"file": self._file.path.name, "bytes": self._file.flush()}

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def find_wandb() -> Any:
    """The package. Raises :class:`ConfigError` where it is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "wandb is not installed in this environment: `pip install wandb`, or leave metrics.wandb empty; "
            "WANDB_MODE=offline keeps everything on this machine"
        )
    return importlib.import_module("wandb")


class Wandb:
    """A run of a project; its mode and key are wandb's own business (WANDB_MODE, WANDB_API_KEY)."""

    def __init__(self, directory: Path, project: str, name: str, run_id: str, package: Any) -> None:
        """``run_id``: the croupier run's; a follower that comes back goes on in the same run.

        ``package``: wandb, see :func:`find_wandb`.
        """
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._wandb = package
        self._run = package.init(
            project=project, name=name, id=run_id, resume="allow", dir=str(directory),
            settings=package.Settings(console="off", silent=True),  # the terminal is the launcher's
        )  # fmt: skip
        for axis, pattern in (("step", "*"), ("version", "eval/*"), ("version", "publish/*")):
            self._run.define_metric(axis)
            self._run.define_metric(pattern, step_metric=axis)

    def config(self, text: str, values: Record) -> None:
        """As the run's configuration."""
        self._run.config.update(values, allow_val_change=True)

    def take(self, points: Points) -> None:
        """One row, over the step or the version that it is of."""
        axis = "version" if points.kind in ("eval", "publish") else "step"
        row: Record = {axis: points.step, "seconds_since_start": points.time_s}
        for value in points.values:
            match value:
                case Scalar():
                    row[value.tag] = value.value
                case Histogram():
                    row[value.tag] = self._wandb.Histogram(np_histogram=(list(value.counts), list(value.edges)))
                case Words() if points.kind == "alert":
                    self._run.alert(title=f"{value.tag}, step {points.step}", text=value.text)
        self._run.log(row)

    def flush(self) -> Record:
        """Wandb's own process writes and sends."""
        return {}

    def close(self) -> None:
        """Wait for what is still to be sent."""
        self._run.finish()


def read_place(directory: Path, run_id: str) -> Record:
    """Where the sink of ``directory`` was with this run; {} at the beginning."""
    try:
        place = json.loads((directory / PLACE).read_text())
    except (OSError, ValueError):
        return {}
    return place if isinstance(place, dict) and place.get("run_id") == run_id else {}


def write_place(directory: Path, place: Record) -> None:
    """Replace it whole."""
    half = directory / f"{PLACE}.tmp"
    half.write_text(json.dumps(place) + "\n")
    half.replace(directory / PLACE)
