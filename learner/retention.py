"""Which checkpoints stay: the newest, the best version's, and those whose evaluation may still come.

::

    checkpoints/best.json    {"version": 50, "reward": 0.91}: the checkpoint of step 50 is complete and is kept

The broker's word (KeepBest) arrives when the learner has moved on by some versions, so with
``evaluation.keep_best`` a checkpoint is written at every version that may be evaluated, and stays
until the broker has said that it is not wanted. best.json changes only once the new best's checkpoint
is complete, and what loses is deleted after that; so a kill at any moment leaves a best one. A broker
that came back without a journal has forgotten the best: it stays until a greater reward is told.
"""

import json
import logging
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

from common.durable import replace_text
from common.errors import CheckpointError
from common.wire import KeepBest

CHECKPOINTS = "checkpoints"  # in the run's directory
STATE = "state.json"  # written last: a checkpoint that has it is complete
PREFIX = "step-"
BEST = "best.json"

log = logging.getLogger("learner.retention")


def complete(directory: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = (p for p in directory.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdecimal())
    return sorted(p for p in found if (p / STATE).is_file())


def step_of(path: Path) -> int:
    """The step of a checkpoint's directory."""
    return int(path.name.removeprefix(PREFIX))


def path_of(directory: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return directory / f"{PREFIX}{step:08d}"


@dataclass(frozen=True)
class Best:
    """The best version so far whose checkpoint is here."""

    version: int
    reward: float  # mean held-out

    def beats(self, other: "Best") -> bool:
        """As the broker has it: the greater reward, the earlier of equals."""
        return (self.reward, -self.version) > (other.reward, -other.version)


def read_best(directory: Path) -> Best | None:
    """What best.json says; None without one. Raises :class:`CheckpointError` if it is damaged."""
    try:
        found = json.loads((directory / BEST).read_text())
        return Best(int(found["version"]), float(found["reward"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / BEST}: damaged ({error}); remove it, and export by --step") from error


class Retention:
    """Of one run's checkpoints. Called by the thread that writes them and by the one that trains."""

    def __init__(self, directory: Path, keep: int, evaluated_every: int = 0) -> None:
        """The newest ``keep`` stay; ``evaluated_every``: versions between evaluations, 0 where no best is kept."""
        self.directory, self.keep, self.every = directory, keep, evaluated_every
        self._said: KeepBest | None = None
        self._best = read_best(directory)
        self._lock = threading.Lock()

    def is_evaluated(self, step: int) -> bool:
        """Whether version ``step`` may be evaluated, so that a checkpoint of it is needed."""
        return self.every > 0 and step % self.every == 0

    def told(self, said: KeepBest) -> None:
        """The broker's word."""
        with self._lock:
            self._said = said
            self._settle()

    def prune(self) -> None:
        """Delete what nobody wants."""
        with self._lock:
            self._settle()

    def _settle(self) -> None:
        here = {step_of(path): path for path in complete(self.directory)}
        said = self._said
        if said is not None and said.version in here:
            best, held = Best(said.version, said.reward), self._best
            beaten = held is None or held.version not in here or best.beats(held)
            if beaten and best != held and _replace(self.directory / BEST, json.dumps(vars(best)) + "\n"):
                self._best = best
        for step in sorted(here)[: -self.keep]:
            if not self._wanted(step):
                _remove(here[step])

    def _wanted(self, step: int) -> bool:
        if self._best is not None and step == self._best.version:
            return True
        if not self.is_evaluated(step):
            return False
        said = self._said
        return said is None or step in (said.version, said.pending) or step > said.decided


def _replace(path: Path, text: str) -> bool:
    """Whether ``path`` holds ``text`` now; if not, the old one and both checkpoints stay, and it is tried again."""
    try:
        replace_text(path, text)
    except OSError as error:
        log.warning("%s: cannot be written: %s", path, error)
        return False
    return True


def _remove(path: Path) -> None:
    """Under another name first: what is half deleted must not look complete."""
    gone = path.with_name(f".{path.name}.gone.tmp")
    try:
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone)
    except OSError as error:
        log.warning("%s: cannot be deleted: %s", path, error)
