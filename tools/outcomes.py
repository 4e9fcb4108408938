"""How a run ended and how long it was at work, from what it left behind."""

import json
from pathlib import Path
from typing import Literal, get_args

from common.errors import DataError
from tools.checked import checked_status
from tools.lived import Lived
from tools.run_files import SUMMARY, Record, of_kind, read_metrics, read_status
from tools.watch.sound import number

Outcome = Literal["finished", "interrupted", "failed"]


def earlier(run_dir: Path) -> tuple[Outcome, float]:
    """Outcome and seconds of work: by a summary that the run has not gone on since, else by the broker's files."""
    try:
        status = checked_status(read_status(run_dir))
    except (DataError, OSError):
        status = {}
    phase, step = status.get("phase"), status.get("step")
    outcome: Outcome = "finished" if phase == "finished" else "interrupted"
    try:
        summary = json.loads((run_dir / SUMMARY).read_text())
        known = (outcome, "failed") if phase else get_args(Outcome)
        if summary["status"] in known and step in (None, summary["steps"]):
            return summary["status"], float(summary["wall_s"])
    except (OSError, ValueError, TypeError, KeyError):
        pass  # none yet, or half of one: it is written anew
    return outcome, working_s(read_metrics(run_dir), status)


def working_s(records: list[Record], status: Record) -> float:
    """Seconds that the run's brokers lived, by ``metrics.jsonl`` and the last ``status.json``."""
    lived = Lived()
    for record in of_kind(records, "step"):
        lived.take(record)
    time, began = number(status.get("time")), number(status.get("started_at"))
    if time is not None and began is not None:
        lived.take({"time_s": time - began, "states": status.get("states")})
    return lived.seconds
