"""The run directory as the broker writes it: identity, status, metrics. Nothing here decides anything."""

import json
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from common.durable import make_directory, replace_text
from common.errors import ConfigError, JournalError, ProtocolError
from common.locks import lock_within, try_lock

STATUS_EVERY_S = 0.5
LOCK_S = 120.0  # for a lock that network file systems keep for a dead machine, 90 s as a rule
CONFIG = "config.yaml"

log = logging.getLogger("broker.runfiles")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What the disk refuses says where, and what to do."""
    try:
        yield
    except OSError as error:
        raise JournalError(
            f"{path}: cannot be written ({error}); make room on the disk, then start the broker again: nothing "
            "acknowledged is lost"
        ) from error


def write_json(path: Path, value: Any, durable: bool = False) -> None:
    """Replace ``path`` atomically: a reader sees the old or the new content. Raises :class:`JournalError`."""
    _write(path, _to_json(value, indent=1) + "\n", durable)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Numbers that are not finite become null: JSON has no others."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, text: str, durable: bool = False) -> None:
    """Whole or not at all; ``durable``: also where the machine loses its power."""
    with _named(path):
        replace_text(path, text, durable)


def _cut_torn_line(path: Path) -> None:
    """Forget a last line that a kill cut short: what is appended would become part of it."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


AGAIN = {"step": "step", "alert": "step", "budget": "step", "eval": "version_asked", "publish": "version"}  # by kind


def _is_done_again(line: str, version: int) -> bool:
    """Whether a run that goes on at ``version`` without a journal writes such a line anew; its weights are out."""
    try:
        found = json.loads(line)
        value = found.get(AGAIN[found["kind"]], -1)
        return bool(value > version if found["kind"] == "publish" else value >= version)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


class RunFiles:
    """``run.json`` (who this run is), ``config.yaml``, ``status.json`` (now), ``metrics.jsonl`` (one line an event).

    ``metrics.jsonl`` is locked as long as they are open: two brokers never write into one directory.
    """

    def __init__(self, directory: Path, is_stopped: Callable[[], bool] = lambda: False) -> None:
        """Raises :class:`ConfigError` where another broker holds the directory, or nothing can be written."""
        self.directory = directory
        try:
            make_directory(directory)
            self._metrics = (directory / "metrics.jsonl").open("a")
            self._replaced: list[IO[str]] = []  # stay locked: another broker may wait for one
        except OSError as error:
            raise ConfigError(f"run.dir: {directory} cannot be written ({error}); name another directory") from error
        try:
            self._lock(is_stopped)
            self._begin()
        except BaseException:
            self._metrics.close()
            raise

    def _lock(self, is_stopped: Callable[[], bool]) -> None:
        held = f"{self.directory}: another broker is at work there (it holds metrics.jsonl)"
        waiting = "%s, or its machine died and the file system does not know; waiting %g s"
        path = self.directory / "metrics.jsonl"
        while True:
            if not lock_within(self._metrics, LOCK_S, lambda: log.warning(waiting, held, LOCK_S), is_stopped):
                raise ConfigError(f"{held}; stop it, or choose another run.name")
            if path.exists() and os.path.samestat(os.fstat(self._metrics.fileno()), path.stat()):
                return
            self._metrics.close()  # who held it has put another in its place meanwhile
            try:
                self._metrics = path.open("a")
            except OSError as error:
                raise ConfigError(
                    f"{self.directory} was moved away while this broker waited for it ({error}); start it again"
                ) from error

    def _begin(self) -> None:
        self.started_at = now = time.time()  # noqa: TID251  the wall clock is asked once: it may jump
        self.run_id, self.generation = self._identify(self.directory / "run.json")
        self._began = time.monotonic() - max(0.0, now - self.started_at)
        _cut_torn_line(self.directory / "metrics.jsonl")
        self._next_status = 0.0

    def _identify(self, path: Path) -> tuple[str, int]:
        run_id, generation = secrets.token_hex(6), 0
        if path.exists():
            try:
                known = json.loads(path.read_text())
                run_id, generation = str(known["run_id"]), int(known["generation"]) + 1
                self.started_at = float(known["started_at"])
            except (ValueError, KeyError, TypeError) as error:
                raise ProtocolError(
                    f"{path} is damaged ({error}); move {self.directory} away to start a new run"
                ) from error
        known = {"run_id": run_id, "generation": generation, "started_at": self.started_at}
        write_json(path, known, durable=True)  # a journal is of no use without its run's name
        return run_id, generation

    def keep_config(self, text: str) -> None:
        """``config.yaml``, for the tools that take a run directory, is what this broker runs with."""
        path = self.directory / CONFIG
        if not path.is_file() or path.read_text() != text:
            _write(path, text)

    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self._began

    def metric(self, kind: str, values: dict[str, Any], *more: tuple[str, dict[str, Any]]) -> None:
        """Append one line; those of ``more`` (kind, values) with it, at once."""
        time_s = round(self.seconds(), 3)
        lines = [_to_json({"kind": kind, "time_s": time_s, **values}) for kind, values in ((kind, values), *more)]
        with _named(self.directory / "metrics.jsonl"):
            self._metrics.write("".join(f"{line}\n" for line in lines))
            self._metrics.flush()

    def forget_from(self, version: int) -> None:
        """Cut the lines of what is done again by a run that goes on at ``version`` without a journal, all at once."""
        path = self.directory / "metrics.jsonl"
        with _named(path):
            lines = path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if not _is_done_again(line, version)]
            if len(kept) == len(lines):
                return
            temporary = path.with_suffix(f".tmp{os.getpid()}")
            temporary.unlink(missing_ok=True)
            replacement = temporary.open("a")
            replacement.writelines(kept)
            replacement.flush()
            try_lock(replacement)  # nobody else knows it
            os.replace(temporary, path)
        self._replaced.append(self._metrics)
        self._metrics = replacement
        log.info("%s: the run goes on at version %d; %d lines cut", path, version, len(lines) - len(kept))

    def last(self, kind: str, key: str) -> int:
        """The greatest ``key`` in metrics.jsonl's lines of ``kind``, -1 for none; a line cut short is ignored."""
        last, head = -1, json.dumps({"kind": kind})[:-1]
        with (self.directory / "metrics.jsonl").open() as lines:
            for line in lines:
                if line.startswith(head) and line.endswith("}\n"):
                    last = max(last, int(json.loads(line)[key]))
        return last

    def status_due(self) -> bool:
        """Whether status.json should be written now."""
        return time.monotonic() >= self._next_status

    def status(self, values: dict[str, Any]) -> None:
        """Replace status.json."""
        write_json(
            self.directory / "status.json",
            {"time": self.started_at + self.seconds(), "started_at": self.started_at, **values},
        )
        self._next_status = time.monotonic() + STATUS_EVERY_S

    def close(self) -> None:
        """Close the metrics file; what a full disk did not take of it is gone."""
        for file in (self._metrics, *self._replaced):
            with suppress(OSError):
                file.close()
