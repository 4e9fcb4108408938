"""What a sweep is to run, and what of it lies there already.

::

    RUN.yaml + cells x seeds  ->  make_plan(): every configuration loaded and validated before anything runs
    SWEEP_DIR/sweep.json      <-  who this sweep is and how each run stands (replaced atomically)
    SWEEP_DIR/<cell>/seed-<n> ->  look(): what is there, judged by the run's own summary and configuration

A run is finished if its ``summary.json`` says so and its ``config.yaml`` is what the plan asks for.
``sweep.json`` is for people and for ``--report-only``; it never decides whether a run is done.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from common.config import RunConfig, load
from common.durable import replace_text
from common.errors import ConfigError
from tools.run_files import CONFIG, outcome_of
from tools.sweep.grid import Axis, Cell, cells
from tools.sweep.start import shared_start

STATE = "sweep.json"
FORMAT = 1  # of sweep.json
ADDRESS = "tcp://127.0.0.1:1"  # stands in configurations that are compared: every run has a port of its own
SHOWN = 4  # differing keys that are named
Record = dict[str, Any]


class Found(StrEnum):
    """What lies where a run belongs."""

    NOTHING = "nothing"
    FINISHED = "finished"
    HALF = "half"  # cut short or failed
    OTHER = "other"  # finished under another configuration


@dataclass(frozen=True)
class Job:
    """One cell under one seed."""

    cell: Cell
    seed: int
    config: RunConfig = field(repr=False)

    @property
    def key(self) -> str:
        """``<cell>/seed-<n>``, which is also where it lies under the sweep's directory."""
        return f"{self.cell.name}/{self.config.run.name}"

    @property
    def log(self) -> Path:
        """What its launcher said."""
        return self.config.run.path.with_suffix(".log")


@dataclass(frozen=True)
class Plan:
    """A whole sweep."""

    directory: Path
    config_file: str
    axes: tuple[Axis, ...]
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    originals: tuple[RunConfig, ...] = field(repr=False)  # of the cells, before the sweep placed them
    jobs: tuple[Job, ...] = field(repr=False)  # all cells of the first seed, then of the second, backwards

    def to_record(self) -> Record:
        """For :data:`STATE`."""
        return {
            "sweep": FORMAT,
            "config": self.config_file,
            "axes": {axis.key: list(axis.values) for axis in self.axes},
            "seeds": list(self.seeds),
            "cells": {cell.name: {"label": cell.label, "values": dict(cell.values)} for cell in self.cells},
        }


def make_plan(config_file: str, axes: Sequence[Axis], seeds: int, name: str) -> Plan:
    """Load every cell. Raises :class:`ConfigError` for what cannot be run, two cells that are one, or no seeds."""
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: at least one seed is needed")
    found = cells(axes)
    configs = {cell.name: _load(config_file, cell) for cell in found}
    _check_distinct(found, configs)
    first = next(iter(configs.values())).run
    directory = Path(first.dir) / (name or f"sweep-{Path(config_file).stem}")
    if directory.name in ("", ".", "..") or "/" in name:
        raise ConfigError(f"--name {name!r}: needs a plain name; the runs lie in {first.dir}/NAME (run.dir)")
    numbers = tuple(range(first.seed, first.seed + seeds))
    jobs = [
        Job(cell, seed, _placed(configs[cell.name], directory, cell, seed))
        for turn, seed in enumerate(numbers)
        for cell in (reversed(found) if turn % 2 else found)  # a machine that gets slower is not taken for a slow cell
    ]
    return Plan(directory, config_file, tuple(axes), tuple(found), numbers, tuple(configs.values()), tuple(jobs))


def _load(config_file: str, cell: Cell) -> RunConfig:
    try:
        return load(config_file, cell.overrides)
    except ConfigError as error:
        raise ConfigError(f"cell {cell.label}: {error}") from error


def _check_distinct(found: Sequence[Cell], configs: dict[str, RunConfig]) -> None:
    for index, cell in enumerate(found):
        for other in found[:index]:
            if configs[cell.name] == configs[other.name]:
                raise ConfigError(f"cells {other.label} and {cell.label} are the same run; remove one of the values")


def _placed(config: RunConfig, directory: Path, cell: Cell, seed: int) -> RunConfig:
    run = replace(config.run, dir=str(directory / cell.name), name=f"seed-{seed}", seed=seed)
    started = shared_start(config, directory)
    return replace(started, run=run, broker=replace(config.broker, address=ADDRESS))


def look(job: Job) -> tuple[Found, str]:
    """What lies at the job's place, and a word about it."""
    path = job.config.run.path
    if not path.exists():
        return Found.NOTHING, ""
    status = outcome_of(path)
    if status != "finished":
        return Found.HALF, status
    try:
        there = yaml.load((path / CONFIG).read_text(), Loader=yaml.CSafeLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        return Found.OTHER, f"its {CONFIG} cannot be read ({type(error).__name__})"
    changed = differences(there, job.config)
    return (Found.OTHER, "; ".join(changed)) if changed else (Found.FINISHED, "")


def differences(there: object, wanted: RunConfig) -> list[str]:
    """``key: there -> wanted`` of the first few settings that differ, the broker's port aside.

    ``there`` is what a ``config.yaml`` holds; a setting that it does not know had its default.
    """
    before, after = _usual() | dict(_leaves(there)), dict(_leaves(wanted))
    changed = [
        f"{key}: {before.get(key)} there, {after.get(key)} asked for"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key != "broker.address"
    ]
    more = len(changed) - SHOWN
    return [*changed[:SHOWN], f"and {more} more"] if more > 0 else changed


@cache
def _usual() -> dict[str, object]:
    return dict(_leaves(RunConfig()))


def _leaves(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """``section.key`` and value of everything in a mapping or a configuration."""
    if is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in fields(value)}
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from _leaves(child, f"{prefix}.{key}" if prefix else str(key))
    elif value or not isinstance(value, Mapping):
        yield prefix, list(value) if isinstance(value, tuple) else value


def check_directory(plan: Plan) -> Record:
    """The runs' states of an earlier call; raises :class:`ConfigError` if the directory is not this sweep's."""
    directory = plan.directory
    if not directory.exists():
        return {}
    if not directory.is_dir():
        raise ConfigError(f"{directory} is a file; remove it or choose another --name")
    if not (directory / STATE).exists():
        own = {cell.name for cell in plan.cells} | {"start", "lock"}
        strange = sorted(entry.name for entry in directory.iterdir() if entry.name not in own)
        if strange:
            raise ConfigError(
                f"{directory} holds {strange[0]} and no {STATE}: it is not a sweep's; choose another --name"
            )
        return {}
    known = read_state(directory)
    moving = {axis.key for axis in plan.axes if len(axis.values) > 1}
    earlier = {key for key, values in known["axes"].items() if len(values) > 1}
    if moving != earlier or Path(known["config"]).name != Path(plan.config_file).name:
        raise ConfigError(
            f"{directory} belongs to the sweep of {', '.join(sorted(earlier)) or 'one cell'} over {known['config']}; "
            "choose another --name, or move that directory away"
        )
    runs = known.get("runs", {})
    return runs if isinstance(runs, dict) else {}


def read_state(directory: Path) -> Record:
    """``sweep.json``. Raises :class:`ConfigError` if it is missing or not one of ours."""
    path = directory / STATE
    try:
        known = json.loads(path.read_text())
        sound = known["sweep"] == FORMAT and {"config", "axes", "seeds", "cells"} <= known.keys()
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; is {directory} a sweep's directory?") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: damaged ({type(error).__name__}: {error}); remove it and give the sweep's command again: "
            "finished runs are known by their own files"
        ) from error
    if not sound:
        raise ConfigError(f"{path}: written by another version of this tool; choose another --name")
    return dict(known)


def write_state(directory: Path, record: Record) -> None:
    """Replace ``sweep.json``: after a power cut it is the old or the new one."""
    replace_text(directory / STATE, json.dumps(record, indent=1) + "\n")
