"""``python -m tools.report RUN_DIR``: summary.json, report.html, report.md and curves from what a run has written.

::

    config.yaml + status.json + metrics.jsonl + logs  ->  summarize()  ->  summary.json
                                                      ->  compose()    ->  report.html, report.md + *.png

report.html needs no other file: it can be sent to somebody. It may be written at any moment of a run's
life: what is missing is said to be missing.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from common.config import RunConfig
from common.errors import CroupierError
from common.trace import SUFFIX, TRACE
from tools import chapters
from tools.chapters import END_STEPS, mean
from tools.checked import checked
from tools.document import Block, Bold, Document, Figure, Items, Link, Note, Paragraph
from tools.evaluations import evaluation_blocks
from tools.faults import ALERTS, alert_blocks, fault_blocks, last_words
from tools.markdown import to_markdown
from tools.outcomes import Outcome, earlier, working_s
from tools.outputs import writing
from tools.page import to_html
from tools.plots import plot_all
from tools.profile.chapter import verdict_blocks
from tools.run_files import CONFIG, METRICS, PAGE, REPORT, STATUS, SUMMARY, Record, check_run_dir, of_kind
from tools.runs import Run, read_run

TIMELINES_BYTES = 64 << 20  # read for the verdict, about a second for each 10 MB


def write_report(run_dir: Path, status: Outcome, wall_s: float) -> Record:
    """Write summary, curves and both reports; returns the summary. ``wall_s``: without the pauses before a resume.

    Raises :class:`ConfigError` if it cannot.
    """
    run = _read(run_dir)
    summary = summarize(run.config, run.status, run.records, status, wall_s)
    with writing(run_dir, "make it writable, or copy it and name the copy"):
        (run_dir / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
        pictures = plot_all(run_dir, run.records, summary["staleness_budget"] or 0)
        report = compose(run, summary, pictures, verdict_blocks(run))
        (run_dir / REPORT).write_text(to_markdown(report))
        (run_dir / PAGE).write_text(to_html(report))
    return summary


def _read(run_dir: Path) -> Run:
    """The run; of very long timelines not, so that one that is interrupted ends in seconds."""
    size = sum(path.stat().st_size for path in (run_dir / TRACE).glob(f"*{SUFFIX}"))
    run = read_run(run_dir, timelines=size <= TIMELINES_BYTES)
    if size > TIMELINES_BYTES:
        run.notes.append(f"{TRACE}: {size >> 20} MB of timelines are left to `python -m tools.profile {run_dir}`")
    return checked(run)


def summarize(config: RunConfig | None, last: Record, records: list[Record], status: Outcome, wall_s: float) -> Record:
    """The keys that other tools read. Rewards and lags are None where no step, no evaluation was recorded."""
    steps = _last_of_each(of_kind(records, "step"), "step")
    evaluations = _last_of_each(of_kind(records, "eval"), "version_asked")
    if len(last.get("evaluations") or ()) > len(evaluations):
        evaluations = last["evaluations"]
    rewards = [step["reward"] for step in steps if step.get("reward") is not None]
    proposed = _count(last, steps, "tokens_proposed")
    accepted = _count(last, steps, "tokens_accepted")
    return {
        "status": status,
        "wall_s": round(wall_s, 2),
        "working_s": round(working_s(records, last), 2),
        "steps": _steps_done(last, steps),
        "final_version": int(last.get("version") or 0),
        "reward_first": mean(rewards[:END_STEPS]),
        "reward_last": mean(rewards[-END_STEPS:]),
        "eval_first": evaluations[0]["reward"] if evaluations else None,
        "eval_last": evaluations[-1]["reward"] if evaluations else None,
        "tokens_generated": int(
            last.get("tokens_generated") or (steps[-1].get("tokens_generated") or 0 if steps else 0)
        ),
        "tokens_proposed": proposed,
        "tokens_accepted": accepted,
        "acceptance": accepted / proposed if proposed else None,
        "lag_mean": _mean_lag(steps),
        "lag_max": max((step["lag_max"] for step in steps if step.get("lag_max") is not None), default=None),
        "staleness_budget": config.staleness.limit if config else None,
        "trajectories_acked": int(last.get("trajectories_acked") or 0),
        "trajectories_trained": int(last.get("trajectories_trained") or 0),
        "trajectories_dropped": dict(sorted((last.get("trajectories_dropped") or {}).items())),
        "seed": config.run.seed if config else None,
    }


def _last_of_each(records: list[Record], key: str) -> list[Record]:
    """In order of what they tell of, ``key`` or its version; of what was done again the last line."""
    found: dict[float, Record] = {}
    for record in records:
        number = record.get(key)
        found[float(record["version"] if number is None else number)] = record
    return [found[number] for number in sorted(found)]


def _steps_done(last: Record, steps: list[Record]) -> int:
    """By whichever was written later: a broker that was killed may have told fewer in its status."""
    return max(int(last.get("step") or 0), int(steps[-1]["step"]) + 1 if steps else 0)


def _count(last: Record, steps: list[Record], key: str) -> int:
    if last.get(key) is not None:
        return int(last[key])
    return sum(int(step.get(key) or 0) for step in steps)


def _histogram(steps: list[Record]) -> Counter[int]:
    total: Counter[int] = Counter()
    for step in steps:
        for lag, count in (step.get("lag_histogram") or {}).items():
            total[int(lag)] += int(count)
    return total


def _mean_lag(steps: list[Record]) -> float | None:
    histogram = _histogram(steps)
    tokens = sum(histogram.values())
    if tokens:
        return sum(lag * count for lag, count in histogram.items()) / tokens
    return mean([step["lag_mean"] for step in steps if step.get("lag_mean") is not None])


def compose(run: Run, summary: Record, pictures: Mapping[str, Figure], judged: Sequence[Block] = ()) -> Document:
    """The report, chapter by chapter; ``judged``: the verdict's."""
    title = f"Run {run.config.run.name if run.config else run.path.name}: {summary['status']}"
    return Document(title, [
        Paragraph(chapters.what(run.config)),
        *_warnings(run, summary),
        chapters.tiles(summary),
        *chapters.result(summary, pictures),
        *evaluation_blocks(run.evaluations, run.status.get("best"), pictures),
        *judged,
        *chapters.staleness(run, summary, pictures),
        *chapters.rejection(run, summary, pictures),
        *chapters.signs(pictures),
        *alert_blocks(run),
        *chapters.two_models(run, pictures),
        *chapters.trajectories(run, summary),
        *chapters.receipts(run),
        *fault_blocks(run),
        *chapters.speed(pictures),
        *chapters.configuration(run.config),
        *chapters.files(run.path),
    ])  # fmt: skip


def _warnings(run: Run, summary: Record) -> Iterator[Block]:
    """What a reader must know first."""
    if summary["status"] == "failed":
        yield Note("The run failed; what is known of it follows.", "warning")
        yield from last_words(run)
    missing = [name for name in (CONFIG, STATUS, METRICS) if not (run.path / name).is_file()]
    if missing:
        words = f"Missing: {', '.join(missing)}. The figures below leave out what they would have said."
        yield Note(words, "warning")
    if run.notes:
        yield Paragraph("What could not be read:")
        yield Items(run.notes)
    if raised := run.status.get("alerts"):
        signs = ", ".join(str(alert.get("sign")) for alert in raised)
        words = f" lasted to the end: {signs}. See "
        yield Note((Bold("Signs of a collapse"), words, Link(ALERTS, f"#{ALERTS.lower()}"), "."), "warning")
    if not run.steps:
        yield Paragraph("No optimizer step was completed, so there are no curves.")


def main(arguments: list[str] | None = None) -> int:
    """Write the report of a run directory again, or for the first time."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m tools.report", description="Write a run's summary, reports and curves."
    )
    parser.add_argument("run_dir", type=Path, help="such as runs/quickstart")
    given = parser.parse_args(arguments)
    try:
        check_run_dir(given.run_dir)
        outcome, wall_s = earlier(given.run_dir)
        write_report(given.run_dir, outcome, wall_s)
    except CroupierError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(given.run_dir / PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
