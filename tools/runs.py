"""A run directory, read as far as it can be.

::

    config.yaml + status.json + metrics.jsonl + trace/*.trace  ->  read_run()  ->  Run, with notes of what was not read

A directory may be empty, cut short by a kill, written by another croupier, or still be written. Every tool
reads it here, prints ``Run.notes`` and goes on with the rest. Nothing is unpickled.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from yaml import YAMLError

from common.config import RunConfig, defaults, load, merge, read_overrides
from common.errors import ConfigError, DataError
from tools.run_files import (
    CONFIG,
    ENDED,
    METRICS,
    STATUS,
    Record,
    check_run_dir,
    check_there,
    of_kind,
    read_status,
    scan_metrics,
)
from tools.timelines import Timelines, read_timelines


@dataclass
class Run:
    """What could be read of a run, and in ``notes`` what could not."""

    path: Path
    config: RunConfig | None  # None: missing, or not this croupier's
    status: Record  # {} before the broker wrote one
    records: list[Record]  # of metrics.jsonl, in its order
    timelines: Timelines = field(default_factory=Timelines)
    notes: list[str] = field(default_factory=list)  # a sentence each, the file's name first

    @cached_property
    def steps(self) -> list[Record]:
        """Trained steps in order; of a step that was written twice the last."""
        found = {int(record["step"]): record for record in of_kind(self.records, "step")}
        return [found[step] for step in sorted(found)]

    @cached_property
    def evaluations(self) -> list[Record]:
        """Held-out evaluations."""
        return of_kind(self.records, "eval")

    @cached_property
    def publishes(self) -> list[Record]:
        """Versions that went out."""
        return of_kind(self.records, "publish")

    @property
    def ended(self) -> bool:
        """Whether the broker said that it was over; otherwise the run goes on, or was killed."""
        return self.status.get("phase") in ENDED


def read_run(run_dir: Path, timelines: bool = True) -> Run:
    """Everything in ``run_dir``, which may still be written; ``timelines`` false leaves the traces unread.

    Raises :class:`ConfigError` where there is no such directory, and for nothing else.
    """
    check_there(run_dir)
    config, notes = read_config(run_dir)
    try:
        status = read_status(run_dir)
    except (DataError, OSError) as error:
        status = {}
        notes.append(f"{STATUS}: cannot be read ({_brief(error)})")
    records, of_metrics = scan_metrics(run_dir)
    run = Run(run_dir, config, status, records, notes=notes + of_metrics)
    run.notes += [f"{name}: missing" for name in (STATUS, METRICS) if not (run_dir / name).exists()]
    if status and not run.ended:
        at = f"at step {status.get('step', '?')} of {status.get('steps', '?')}"
        run.notes.append(f"{STATUS}: {status.get('phase', 'unknown phase')} {at}; the run goes on, or was killed")
    if timelines:
        run.timelines = read_timelines(run_dir)
        run.notes += run.timelines.notes
    return run


def print_notes(console: Console, notes: Sequence[str]) -> None:
    """A line each."""
    for note in notes:
        console.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


# ---- the configuration --------------------------------------------------------------------------


def load_config(run_dir: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """What a run was run with, whole, with ``overrides``. Raises :class:`ConfigError`."""
    check_run_dir(run_dir)
    if not (run_dir / CONFIG).is_file():
        raise ConfigError(f"{run_dir}: {CONFIG} is missing, so what was run is not known; put the run's YAML there")
    return load(run_dir / CONFIG, overrides)


def known_config(run_dir: Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, list[str]]:
    """As :func:`load_config`, but without the keys that this croupier does not know; notes say which."""
    config, notes = read_config(run_dir)
    if config is None or not notes:
        return load_config(run_dir, overrides), []
    return merge(RunConfig, OmegaConf.create(), read_overrides(overrides), CONFIG, start=config), notes


def read_config(run_dir: Path) -> tuple[RunConfig | None, list[str]]:
    """``config.yaml``, without the keys that this croupier does not know; notes say which, or why there is none."""
    path = run_dir / CONFIG
    if not path.exists():
        return None, [f"{CONFIG}: missing, so what was run is not known"]
    try:
        return load(path), []
    except (ConfigError, OSError, ValueError) as error:
        first = _brief(error)
    try:
        given = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(given, dict):
            raise ConfigError(first)
        unknown: list[str] = []
        known = _known(copy.deepcopy(given), RunConfig, "", unknown)
        config = OmegaConf.to_object(OmegaConf.merge(defaults(RunConfig), known))
    except (ConfigError, OmegaConfBaseException, YAMLError, OSError, ValueError, TypeError) as error:
        return None, [f"{CONFIG}: cannot be read, left out ({_brief(error)})"]
    assert isinstance(config, RunConfig)
    return config, [f"{CONFIG}: of another croupier; left out what this one does not know: {', '.join(unknown)}"]


def _known(given: Mapping[Any, Any], schema: Any, prefix: str, unknown: list[str]) -> dict[Any, Any]:
    """``given`` without what ``schema`` has no name for; names of those are added to ``unknown``."""
    types = {f.name: f.type for f in fields(schema)}
    kept: dict[Any, Any] = {}
    for key, value in given.items():
        kind, name = types.get(key), f"{prefix}{key}"
        if kind is None:
            unknown.append(name)
        elif is_dataclass(kind) and isinstance(value, Mapping):
            kept[key] = _known(value, kind, f"{name}.", unknown)
        elif get_origin(kind) is dict and is_dataclass(get_args(kind)[1]) and isinstance(value, Mapping):
            entry = get_args(kind)[1]
            kept[key] = {
                label: _known(section, entry, f"{name}.{label}.", unknown) if isinstance(section, Mapping) else section
                for label, section in value.items()
            }
        else:
            kept[key] = value
    return kept
