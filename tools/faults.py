"""What went wrong in a run and what became of it: alerts, restarts, losses, refusals, warnings."""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tools.document import Block, Code, Fold, Heading, Listing, Note, Paragraph, Table, Text
from tools.run_files import LOGS, Record, of_kind
from tools.runs import Run
from tools.timelines import Timelines

TAIL_BYTES = 1 << 20  # of a log that are looked at
ALERTS = "Alerts"  # the section's title
LINES_SHOWN = 30  # of warnings, and of a log's end
SERIOUS = re.compile(r"^\d\d:\d\d:\d\d \S+ (WARNING|ERROR|CRITICAL) ")
LEFT = re.compile(r"^\S+ broker WARNING (actor|replica|learner) \S+ left: ")
RESTARTED = re.compile(r"^\S+ launch WARNING (\S+) .*; restart \d+ of \d+$")


def alert_blocks(run: Run) -> list[Block]:
    """What the broker raised (broker.alerts), and whether it is over."""
    told = of_kind(run.records, "alert")
    raised = [alert for alert in told if alert.get("state") == "raised"]
    if not raised:
        return []
    rows = [
        (str(alert.get("sign")), str(alert.get("since")), _ended(alert, told), str(alert.get("text")))
        for alert in raised
    ]
    return [Heading(ALERTS), Table(("sign", "from step", "until", "what"), rows, numbers=(1,))]


def _ended(alert: Record, told: Sequence[Record]) -> str:
    later = (
        other
        for other in told
        if other.get("state") == "cleared"
        and (other.get("sign"), other.get("since")) == (alert.get("sign"), alert.get("since"))
    )
    found = next(later, None)
    return str(found["step"]) if found else "the end"


def fault_blocks(run: Run) -> list[Block]:
    """The section on faults: figures first, then the processes' own words."""
    logs = read_logs(run.path)
    rows = [*_restarts(run, logs), *_losses(run.status, logs), *_data(run), *_misconduct(run.status)]
    serious = [line for name in sorted(logs) for line in logs[name] if SERIOUS.match(line)]
    blocks: list[Block] = [Heading("Faults survived")]
    if not rows and not serious:
        return [*blocks, Note("None: no process was restarted, nothing was lost, refused or given up.", "good")]
    if rows:
        blocks.append(Table(("what", "how often", "detail"), rows, numbers=(1,)))
    else:
        blocks.append(Paragraph("No process was restarted, nothing was lost, refused or given up."))
    if serious:
        part = " (of the last megabyte of each)" if _are_long(run.path) else ""
        counted = f"Warnings in the logs{part}: {len(serious)}"
        more = [f"… and {len(serious) - LINES_SHOWN} more in {LOGS}/"] if len(serious) > LINES_SHOWN else []
        blocks.append(Fold(counted, [Listing([*serious[:LINES_SHOWN], *more])]))
    return blocks


def last_words(run: Run) -> list[Block]:
    """How the logs of processes end that said something serious last: for a run that failed."""
    found: list[Block] = []
    for name, lines in sorted(read_logs(run.path).items()):
        if any(SERIOUS.match(line) or line.startswith("Traceback") for line in lines[-LINES_SHOWN:]):
            found.append(Fold(f"The end of {name}.log", [Listing(lines[-LINES_SHOWN:])]))
    return found


def read_logs(run_dir: Path) -> dict[str, list[str]]:
    """The last lines of every log, by process."""
    found: dict[str, list[str]] = {}
    for path in sorted((run_dir / LOGS).glob("*.log")):
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - TAIL_BYTES))
                found[path.stem] = file.read().decode(errors="replace").splitlines()
        except OSError:
            continue  # gone since it was listed
    return found


def _are_long(run_dir: Path) -> bool:
    """Whether a log holds more than :func:`read_logs` reads."""
    return any(path.stat().st_size > TAIL_BYTES for path in (run_dir / LOGS).glob("*.log") if path.is_file())


Row = tuple[Text, Text, Text]


def _row(what: Text, times: int, detail: str = "") -> list[Row]:
    return [(what, f"{times:,}", detail)] if times else []


def _restarts(run: Run, logs: dict[str, list[str]]) -> Iterable[Row]:
    """From the launcher's words, else from the lives that timelines tell of."""
    if "launch" in logs:
        counted = Counter(found[1] for line in logs["launch"] if (found := RESTARTED.match(line)))
    else:
        counted = _begun_again(run.timelines)
    for name, times in sorted(counted.items()):
        yield from _row(("restarts of ", Code(name)), times, "the run went on")


def _begun_again(timelines: Timelines) -> Counter[str]:
    """How often each process began again under a broker that lived, and the broker at all."""
    begun = [life.start for life in timelines.of("broker")]
    lives = Counter(
        (life.process, bisect_right(begun, life.start)) for life in timelines.lives if life.role != "broker"
    )
    found = Counter({"broker": len(begun) - 1} if len(begun) > 1 else {})
    for (process, _), times in lives.items():
        found[process] += times - 1
    return found


def _losses(status: Record, logs: dict[str, list[str]]) -> Iterable[Row]:
    left = Counter(found[1] for line in logs.get("broker", []) if (found := LEFT.match(line)))
    for role, times in sorted(left.items()):
        yield from _row(f"{role}s lost", times, "what they owed was granted or asked again")
    for name, times in sorted(_counts(status.get("receivers_late")).items()):
        yield from _row(("late for a new version: ", Code(name)), times, "left out, and caught up afterwards")


def _data(run: Run) -> Iterable[Row]:
    status, steps = run.status, run.steps
    for reason, times in sorted(_counts(status.get("trajectories_dropped")).items()):
        yield from _row(f"trajectories dropped: {reason}", times)
    for reason, times in sorted(_counts(status.get("trajectories_refused")).items()):
        yield from _row(f"trajectories refused: {reason}", times)
    padded = sum(int(step.get("groups_padded") or 0) for step in steps)
    yield from _row("incomplete groups", padded, "trained without the siblings that failed")
    skipped = max((int(step.get("skipped_updates") or 0) for step in steps), default=0)
    yield from _row("updates skipped", skipped, "their gradients were not finite")
    missing = Counter[str]()
    for step in steps:
        missing.update(_counts(step.get("channels_missing")))
    for channel, times in sorted(missing.items()):
        yield from _row(("rewards missing: ", Code(channel)), times, "their verifier or model failed")


def _misconduct(status: Record) -> Iterable[Row]:
    for kind, times in sorted(_counts(status.get("bad_messages")).items()):
        yield from _row(f"bad messages: {kind}", times, "refused and named in the broker's log")
    for name, kinds in sorted((status.get("offences") or {}).items()):
        counted = _counts(kinds)
        detail = ", ".join(f"{kind} {times}" for kind, times in counted.items())
        yield from _row(("offences of ", Code(name)), sum(counted.values()), detail)
    for name, times in sorted(_counts(status.get("impostors")).items()):
        yield from _row(("messages under another's name: ", Code(name)), times)
    for name, ratio in sorted((status.get("suspects") or {}).items()):
        yield (("claims that cannot be true: ", Code(name)), "", f"mean p/q {ratio}, where 1 is possible")


def _counts(found: object) -> dict[str, int]:
    """A dict of counts, whatever else stood there left out."""
    if not isinstance(found, dict):
        return {}
    return {str(name): int(times) for name, times in found.items() if isinstance(times, int | float)}
