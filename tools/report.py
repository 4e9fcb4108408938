"""``python -m tools.report RUN_DIR``: summary.json, report.md and curves from what a run has written.

::

    config.yaml + status.json + metrics.jsonl  ->  summarize()  ->  summary.json
                                               ->  report.md + *.png

It may be run at any moment of a run's life: what is missing is said to be missing.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Literal, get_args

from common.config import RunConfig
from common.errors import CroupierError
from tools.evaluations import evaluation_lines
from tools.lengths import length_rows
from tools.plots import plot_all
from tools.run_files import CONFIG, LOGS, METRICS, REPORT, STATUS, SUMMARY, Record, of_kind
from tools.runs import Run, read_run

Outcome = Literal["finished", "interrupted", "failed"]
END_STEPS = 5  # steps at either end whose mean reward the summary gives


def write_report(run_dir: Path, status: Outcome, wall_s: float) -> Record:
    """Write summary, curves and report; returns the summary."""
    run = read_run(run_dir, timelines=False)
    config, records, last = run.config, run.records, run.status
    summary = summarize(config, last, records, status, wall_s)
    (run_dir / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    budget = summary["staleness_budget"]
    curves = plot_all(run_dir, records, budget if budget is not None else 0)
    (run_dir / REPORT).write_text(_report(run, summary, curves))
    return summary


def summarize(config: RunConfig | None, last: Record, records: list[Record], status: Outcome, wall_s: float) -> Record:
    """The keys that other tools read. Rewards and lags are None where no step, no evaluation was recorded."""
    steps = of_kind(records, "step")
    evaluations = last.get("evaluations") or of_kind(records, "eval")
    rewards = [step["reward"] for step in steps if step.get("reward") is not None]
    proposed = _count(last, steps, "tokens_proposed")
    accepted = _count(last, steps, "tokens_accepted")
    return {
        "status": status,
        "wall_s": round(wall_s, 2),
        "steps": len(steps) if not last.get("step") else int(last["step"]),
        "final_version": int(last.get("version") or 0),
        "reward_first": _mean(rewards[:END_STEPS]),
        "reward_last": _mean(rewards[-END_STEPS:]),
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


def _count(last: Record, steps: list[Record], key: str) -> int:
    if last.get(key) is not None:
        return int(last[key])
    return sum(int(step.get(key) or 0) for step in steps)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


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
    return _mean([step["lag_mean"] for step in steps if step.get("lag_mean") is not None])


def _report(run: Run, summary: Record, curves: list[str]) -> str:
    run_dir, config, records = run.path, run.config, run.records
    steps = of_kind(records, "step")
    lines = [f"# Run {config.run.name if config else run_dir.name}: {summary['status']}", "", _what(config), ""]
    missing = [name for name in (CONFIG, STATUS, METRICS) if not (run_dir / name).is_file()]
    if missing:
        lines += [f"**Missing: {', '.join(missing)}.** The figures below leave out what they would have said.", ""]
    if run.notes:
        lines += ["What could not be read:", "", *(f"- {note}" for note in run.notes), ""]
    if not steps:
        lines += ["No optimizer step was completed, so there are no curves.", ""]
    lines += ["## Result", "", *_table(_results(summary)), ""]
    if "reward.png" in curves:
        lines += ["![reward](reward.png)", ""]
    lines += evaluation_lines(of_kind(records, "eval"), run.status.get("best"), curves)
    lines += _staleness(summary, steps, curves)
    lines += _rejection(config, summary, steps, curves)
    lines += _two_models(config, steps, curves)
    lines += _receipt(summary)
    lines += _lengths(run.status)
    if "throughput.png" in curves:
        lines += [
            "## Speed and optimisation",
            "",
            "![throughput](throughput.png)",
            "",
            "![optimizer](optimizer.png)",
            "",
        ]
    lines += ["## Files", "", *_files(run_dir)]
    return "\n".join(lines) + "\n"


def _what(config: RunConfig | None) -> str:
    if config is None:
        return "The configuration is missing, so what was run is not known."
    mode = "synchronous" if config.staleness.budget == 0 else f"staleness budget {config.staleness.budget}"
    rejection = {
        "off": "no rejection",
        "threshold": f"rejection at λ = {config.obrs.threshold:g}",
        "budget": f"rejection to accept {config.obrs.budget:g} of the tokens",
    }[config.obrs.mode]
    return (
        f"Task {_tasks(config)}, model `{config.model.path}`, {config.run.steps} steps of "
        f"{config.rollout.groups_per_step} groups × {config.rollout.group_size}, {mode}, {rejection}, "
        f"clip anchored at `{config.loss.anchor}`, {config.actor.count} actor(s), "
        f"{config.learner.ranks} learner rank(s), seed {config.run.seed}."
    )


def _tasks(config: RunConfig) -> str:
    entries = config.task.entries
    if len(entries) == 1:
        return f"`{config.task.labels[0]}`"
    whole = sum(entry.ratio for entry in entries.values())
    return "mixture of " + ", ".join(f"`{label}` ({entry.ratio / whole:.0%})" for label, entry in entries.items())


def _figure(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "–"


def _table(rows: list[tuple[str, str]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows)]


def _change(first: object, last: object) -> str:
    return f"{_figure(first, '.3f')} → {_figure(last, '.3f')}"


def _results(summary: Record) -> list[tuple[str, str]]:
    speed = summary["tokens_generated"] / summary["wall_s"] if summary["wall_s"] else None
    return [
        ("Held-out reward, first → last evaluation", _change(summary["eval_first"], summary["eval_last"])),
        (f"Batch reward, first → last {END_STEPS} steps", _change(summary["reward_first"], summary["reward_last"])),
        ("Optimizer steps, final version", f"{summary['steps']}, {summary['final_version']}"),
        ("Wall time", f"{summary['wall_s']:.1f} s"),
        ("Completion tokens", f"{summary['tokens_generated']:,} ({_figure(speed, ',.0f')} a second of wall time)"),
    ]


def _staleness(summary: Record, steps: list[Record], curves: list[str]) -> list[str]:
    if not steps:
        return []
    lines = [
        "## Staleness",
        "",
        f"The budget is {summary['staleness_budget']} version(s). Trained tokens had a mean lag of "
        f"{_figure(summary['lag_mean'], '.2f')}; the oldest, {summary['lag_max']}.",
        "",
    ]
    histogram = _histogram(steps)
    if total := sum(histogram.values()):
        lags = sorted(histogram)
        lines += ["| lag | " + " | ".join(map(str, lags)) + " |", "|---" * (len(lags) + 1) + "|"]
        lines += ["| share of tokens | " + " | ".join(f"{histogram[lag] / total:.1%}" for lag in lags) + " |", ""]
    return [*lines, "![lag](lag.png)", ""] if "lag.png" in curves else lines


def _rejection(config: RunConfig | None, summary: Record, steps: list[Record], curves: list[str]) -> list[str]:
    if not steps:
        return []
    if config is not None and config.obrs.mode == "off":
        return ["## Rejection", "", "Switched off: every proposed token was trained.", ""]
    lines = [
        "## Rejection",
        "",
        f"{summary['tokens_accepted']:,} of {summary['tokens_proposed']:,} proposed tokens were accepted "
        f"({_figure(summary['acceptance'], '.4f')}).",
        "",
    ]
    before = _mean([step["kl_before"] for step in steps if step.get("kl_before") is not None])
    after = _mean([step["kl_after"] for step in steps if step.get("kl_after") is not None])
    if before is not None and after is not None:
        lines += [f"Mean KL to the learner's policy, nats a token: {before:.2e} before, {after:.2e} after.", ""]
    for name in ("acceptance.png", "kl.png"):
        if name in curves:
            lines += [f"![{name.removesuffix('.png')}]({name})", ""]
    return lines


def _two_models(config: RunConfig | None, steps: list[Record], curves: list[str]) -> list[str]:
    if config is None or not config.joint.path or not steps:
        return []
    lines = [
        "## Two models",
        "",
        f"Actors ran `{config.joint.path}`: rewards above, of batches and of held-out prompts, are its own. "
        "`python -m tools.evaluate` judges the policy.",
        "",
    ]
    if not config.joint.train:
        return [*lines, "It stayed as it was; its tokens are dated by their grants.", ""]

    def ends(key: str, form: str) -> str:
        found = [float(step[key]) for step in steps if step.get(key) is not None]
        first, last = _mean(found[:END_STEPS]), _mean(found[-END_STEPS:])
        return f"{_figure(first, form)} → {_figure(last, form)}"

    first, second = ("policy", "rollout model") if config.joint.direction == "forward" else ("rollout model", "policy")
    lines += _table([
        (f"KL({first} ‖ {second}) on what was sampled, nats a token, first → last {END_STEPS} steps",
         ends("joint_kl", ".3f")),
        ("What a step's update takes from it", ends("joint_kl_drop", ".4f")),
        ("Gradient norm", ends("joint_grad_norm", ".2f")),
        ("Tokens whose gradient the clip took away", ends("joint_clip_fraction", ".3f")),
        ("Seconds of a step, beside the policy's", ends("seconds_joint", ".2f")),
    ])  # fmt: skip
    return [*lines, "", *(["![joint](joint.png)", ""] if "joint.png" in curves else [])]


def _receipt(summary: Record) -> list[str]:
    dropped = summary["trajectories_dropped"]
    total = sum(dropped.values())
    queued = summary["trajectories_acked"] - summary["trajectories_trained"] - total
    rows = [
        ("Acknowledged", f"{summary['trajectories_acked']:,}"),
        ("Trained", f"{summary['trajectories_trained']:,}"),
        *((f"Dropped: {reason}", f"{count:,}") for reason, count in dropped.items()),
        ("Still queued at the end", f"{queued:,}"),
    ]
    return ["## Trajectories", "", *_table(rows), ""]


def _lengths(status: Record) -> list[str]:
    rows = length_rows(status)
    if not any(row.dropped for row in rows):
        return []
    lines = ["| sampled tokens, up to | trained | dropped | drop rate |", "|---:|---:|---:|---:|"]
    for row in rows:
        warned = " **differs from the rest**" if row.stands_out else ""
        lines.append(f"| {row.longest:,} | {row.trained:,} | {row.dropped:,} | {row.drop_rate:.2%}{warned} |")
    return [*lines, ""]


def _files(run_dir: Path) -> list[str]:
    known = {
        CONFIG: "the complete configuration",
        SUMMARY: "the figures above, for programs",
        METRICS: "one line a step (its receipt), evaluation and publish",
        STATUS: "the broker's last word",
        LOGS: "what each process said",
    }
    return [f"- [`{name}`]({name}): {what}" for name, what in known.items() if (run_dir / name).exists()]


def main(arguments: list[str] | None = None) -> int:
    """Write the report of a run directory again, or for the first time."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.report", description="Write a run's summary, report and curves."
    )
    parser.add_argument("run_dir", type=Path, help="such as runs/quickstart")
    given = parser.parse_args(arguments)
    if not given.run_dir.is_dir():
        print(f"error: {given.run_dir}: no such directory", file=sys.stderr)
        return 2
    try:
        outcome, wall_s = _earlier(given.run_dir)
        write_report(given.run_dir, outcome, wall_s)
    except CroupierError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(given.run_dir / REPORT)
    return 0


def _earlier(run_dir: Path) -> tuple[Outcome, float]:
    """Outcome and wall time: from an earlier summary, else from the broker's status."""
    try:
        summary = json.loads((run_dir / SUMMARY).read_text())
        if summary["status"] in get_args(Outcome):
            return summary["status"], float(summary["wall_s"])
    except (OSError, ValueError, TypeError, KeyError):
        pass  # none yet, or half of one: it is written anew
    status = read_run(run_dir, timelines=False).status
    outcome: Outcome = "finished" if status.get("phase") == "finished" else "interrupted"
    return outcome, float(status.get("time", 0.0) - status.get("started_at", status.get("time", 0.0)))


if __name__ == "__main__":
    sys.exit(main())
