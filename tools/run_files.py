"""What lies in a run directory, and how to read it while it is being written.

::

    runs/<name>/
      config.yaml     the complete configuration        (launch)
      status.json     how the run stands, every 0.5 s   (broker, replaced atomically)
      metrics.jsonl   one line a step, evaluation and publish   (broker, appended)
      logs/*.log      what each process said            (launch)
      summary.json report.md *.png                      (report)
"""

import json
from pathlib import Path
from typing import Any

from common.errors import DataError

CONFIG, STATUS, METRICS, LOGS, SUMMARY, REPORT = (
    "config.yaml",
    "status.json",
    "metrics.jsonl",
    "logs",
    "summary.json",
    "report.md",
)
Record = dict[str, Any]  # one JSON object


def read_status(run_dir: Path) -> Record:
    """The broker's last status, or ``{}`` before it wrote one."""
    try:
        text = (run_dir / STATUS).read_text()
    except FileNotFoundError:
        return {}
    try:
        status = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{run_dir / STATUS}: not JSON ({error}); the broker replaces it whole, so who wrote it?"
        ) from error
    if not isinstance(status, dict):
        raise DataError(f"{run_dir / STATUS}: must hold an object, not {type(status).__name__}")
    return status


def read_metrics(run_dir: Path) -> list[Record]:
    """Every whole line of ``metrics.jsonl``; a torn last line is left out, a torn inner one is an error."""
    try:
        lines = (run_dir / METRICS).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise DataError(f"{run_dir / METRICS}:{number}: not JSON: {error}") from error
        records.append(record)
    return records


def of_kind(records: list[Record], kind: str) -> list[Record]:
    """The records of one kind: ``step``, ``eval`` or ``publish``."""
    return [record for record in records if record.get("kind") == kind]


def last_lines(path: Path, count: int) -> list[str]:
    """The last ``count`` lines of a log, or none if it was never opened."""
    try:
        return path.read_text(errors="replace").splitlines()[-count:]
    except FileNotFoundError:
        return []


def set_aside(run_dir: Path) -> Path | None:
    """Move an earlier run to ``<name>.1``, ``.2``, …: the first free; returns where, or None if there was none."""
    if not run_dir.exists():
        return None
    number = 1
    while (target := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    run_dir.rename(target)
    return target
