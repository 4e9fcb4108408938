"""Read the receipt of one batch: what it was, how old, what rejection took from it and what that bought.

::

    python -m tools.receipt RUN_DIR              the last step
    python -m tools.receipt RUN_DIR --step 12
    python -m tools.receipt RUN_DIR --audit      whose tokens were rejected, over the whole run
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from common.errors import ConfigError, CroupierError, DataError
from tools.checked import checked
from tools.console import make_console, print_error
from tools.drops import DropRow, drop_rows
from tools.run_files import Record, check_run_dir
from tools.runs import print_notes, read_run


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m tools.receipt", description="Read the receipt of a batch."
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--step", type=int, help="which step (default: the last)")
    parser.add_argument(
        "--audit",
        action="store_true",
        help="over all steps: acceptance by length, advantage, lag and task, drops by length, reward, lag and task",
    )
    given = parser.parse_args(arguments)
    console = make_console()
    try:
        check_run_dir(given.run_dir)
        run = checked(read_run(given.run_dir, timelines=False))
        print_notes(console, run.notes)
        steps = run.steps
        if not steps:
            raise ConfigError(f"{given.run_dir}: no step was trained yet; python -m tools.watch shows how far it is")
        if given.audit:
            console.print(audit_table(steps))
            console.print(drop_table(drop_rows(run.status)))
            return 0
        wanted = steps[-1]["step"] if given.step is None else given.step
        found = [step for step in steps if step["step"] == wanted]
        if not found:
            raise ConfigError(f"step {wanted}: has no receipt; steps {steps[0]['step']} to {steps[-1]['step']} have")
        console.print(receipt_table({name: value for name, value in found[0].items() if value is not None}))
    except KeyError as missing:  # the table is whole or not at all: half a receipt misleads
        said = f"a line of metrics.jsonl has no {missing}: another croupier wrote it, or it was damaged"
        print_error(console, DataError(said))
        return 2
    except CroupierError as error:
        print_error(console, error)
        return 2
    return 0


def receipt_table(line: Record) -> Table:
    """One step's receipt in words."""
    table = Table(box=None, pad_edge=False, padding=(0, 2), show_header=False, title=f"receipt of step {line['step']}")
    table.add_column(style="dim")
    table.add_column()
    for label, value in receipt_rows(line):
        table.add_row(label, value)
    return table


def receipt_rows(line: Record) -> list[tuple[str, str]]:
    """(what, figure); KeyError for a line of another croupier."""
    lags = ", ".join(f"{lag}: {count:,}" for lag, count in line["lag_histogram"].items())
    rows = [
        (
            "batch",
            f"{line['trajectories']} trajectories, {line['tokens']:,} tokens, {line['tokens_proposed']:,} sampled",
        ),
        (
            "reward",
            f"{line['reward']:.3f} ± {line['reward_std']:.3f}; {line['groups_without_signal']} groups all alike",
        ),
        ("lag in versions", f"mean {line['lag_mean']:.2f}, oldest {line['lag_max']}  (tokens: {lags})"),
        ("length", f"mean {line['length_mean']:.1f}, longest {line['length_max']}, cut {line['truncated']:.1%}"),
    ]
    if len(channels := line.get("reward_channels") or {}) > 1:
        rows.append(("reward channels", ", ".join(f"{name} {mean:.3f}" for name, mean in channels.items())))
    if (mixed := line.get("reward_mixed")) is not None and (mixed, line["reward_mixed_std"]) != (
        line["reward"], line["reward_std"]
    ):  # fmt: skip
        rows.append(("reward as mixed", f"{mixed:.3f} ± {line['reward_mixed_std']:.3f}" + _left_out(line)))
    if line.get("exemplars"):
        rows.append(("exemplars", f"{line['exemplars']} of the trajectories were written by people"))
    if rates := line.get("pass_rates"):
        words = ", ".join(f"{rate}: {groups}" for rate, groups in rates.items())
        retired = line.get("questions_retired")
        beside = "" if retired is None else f"; {retired} questions retired, {line['questions_skipped']} skipped"
        rows.append(("passed of a group", f"{words} groups, before any filter{beside}"))
    for label, task in (line.get("tasks") or {}).items():
        rows.append((
            f"task {label}",
            f"{task['trajectories']} trajectories, reward {task['reward']:.3f} ± {task['reward_std']:.3f}, "
            f"length {task['length_mean']:.1f}; {task['groups_without_signal']} of {task['groups']} groups all alike",
        ))  # fmt: skip
    if line.get("rethinned_by_version") is not None:
        rows.append(
            ("thinned again", f"by version {line['rethinned_by_version']}: {line['rethinned_tokens']:,} tokens fewer")
        )
    rows += _frozen(line)
    drops = ", ".join(f"{reason}: {count}" for reason, count in (line.get("dropped") or {}).items())
    dropped = ("dropped so far", drops or "nothing")
    if line.get("scored_by_version") is None:
        return [*rows, ("rejection", "off: every token was trained"), dropped]
    rows += [
        ("scored by", f"version {line['scored_by_version']}, λ = {line['threshold']:.4f}" + _next(line)),
        (
            "accepted",
            f"{line['tokens_accepted']:,} = {line['acceptance']:.4f}, 95 % interval {line['acceptance_low']:.4f} to "
            f"{line['acceptance_high']:.4f}; expected without coins {line['acceptance_expected']:.4f}",
        ),
        ("KL to the policy", f"{line['kl_before']:.3e} before, {line['kl_after']:.3e} after, nats a token" + _se(line)),
        (
            "effective sample size",
            f"{line['ess']:.3f} a trained token, {line['ess'] * line['acceptance']:.3f} a generated one",
        ),
    ]
    if line.get("z_lower") is not None:
        rows.append((
            "acceptance bounds",
            f"{line['z_lower']:.4f} to {line['z_upper']:.4f} from the alternatives, which miss "
            f"{line['topk_missing_mass']:.4f} of q; θ = {line['z_theta']:.3f}, κ = {line['z_kappa']:.3f}",
        ))  # fmt: skip
    if line["unscorable"]:
        rows.append(("unscorable", f"{line['unscorable']} tokens whose score was NaN: rejected"))
    rows.append(dropped)
    warnings = (line.get("audit") or {}).get("warnings", [])
    rows.append(("audit", "; ".join(warnings) or "no stratum stands out"))
    return rows


def _frozen(line: Record) -> list[tuple[str, str]]:
    """What the reference and the teachers said, if there are any."""
    rows = []
    if line.get("kl_reference") is not None:
        lost = f"; {line['reference_unscorable']} tokens without a score" if line["reference_unscorable"] else ""
        rows.append(("KL to the reference", f"{line['kl_reference']:.3e} nats a token, of the behaviour" + lost))
    for name, found in (line.get("teachers") or {}).items():
        gap = "–" if found["gap"] is None else f"{found['gap']:+.4f} nats a token"
        rows.append((
            f"teacher {name}",
            f"{gap} beside the behaviour, over {found['tokens']:,} tokens; {found['clipped']} cut "
            f"(loss.distill_clip), {found['unscorable']} without a score",
        ))  # fmt: skip
    return rows


def _next(line: Record) -> str:
    if line.get("threshold_next") is None:
        return ""
    return f", next {line['threshold_next']:.4f}" + ("" if line["budget_feasible"] else "; the target cannot be met")


def _se(line: Record) -> str:
    return (
        f" (± {line['kl_before_se']:.1e}, ± {line['kl_after_se']:.1e})" if line.get("kl_before_se") is not None else ""
    )


def _left_out(line: Record) -> str:
    """Which channels did not count for whom."""
    words = [f"{n} without {name}" for name, n in (line.get("channels_missing") or {}).items() if n]
    words += [f"{n} where the gate of {name} is shut" for name, n in (line.get("channels_gated") or {}).items() if n]
    return f"; {', '.join(words)}" if words else ""


def _rank(name: str, value: str) -> tuple[str, int, str]:
    """Strata in order: numbers by size, tasks by label."""
    sign, digits = (-1, value[1:]) if value.startswith("-") else (1, value)
    whole = digits.isascii() and digits.isdigit()
    return (name, sign * int(digits), "") if whole and name != "task" else (name, 0, value)


def audit_table(steps: Sequence[Record]) -> Table:
    """Acceptance by stratum, summed over steps, beside the rest of the run."""
    sums: dict[tuple[str, str], list[float]] = {}
    warned: dict[tuple[str, str], int] = {}
    for step in steps:
        audit = step.get("audit") or {"strata": {}, "warnings": []}
        for name, values in audit["strata"].items():
            for value, (tokens, rate, _) in values.items():
                entry = sums.setdefault((name, value), [0.0, 0.0])
                entry[0] += tokens
                entry[1] += tokens * rate
        for warning in audit["warnings"]:
            name, _, rest = warning.partition(" ")
            key = (name, rest.rpartition(": acceptance ")[0])
            warned[key] = warned.get(key, 0) + 1
    table = Table(box=None, pad_edge=False, padding=(0, 2), title="acceptance by stratum")
    for title in ("stratum", "value", "tokens", "accepted", "from the rest", "steps with a warning"):
        table.add_column(title, header_style="dim", justify="left" if title == "stratum" else "right")
    for (name, value), (tokens, accepted) in sorted(sums.items(), key=lambda item: _rank(*item[0])):
        others = [v for k, v in sums.items() if k[0] == name and k[1] != value]
        rest = sum(v[1] for v in others) / max(1.0, sum(v[0] for v in others))
        rate = accepted / tokens
        change = f"{rate - rest:+.4f}" if others else "–"
        table.add_row(name, value, f"{tokens:,.0f}", f"{rate:.4f}", change, str(warned.get((name, value), 0)))
    return table


def drop_table(rows: Sequence[DropRow]) -> Table:
    """Trained and dropped trajectories by length, reward, lag and task."""
    table = Table(box=None, pad_edge=False, padding=(0, 2), title="trajectories trained and dropped")
    for title in ("by", "trained", "dropped", "drop rate", ""):
        table.add_column(title, header_style="dim", justify="left" if title == "by" else "right")
    for row in rows:
        odd = "differs from the rest" if row.stands_out else ""
        table.add_row(row.words, f"{row.trained:,}", f"{row.dropped:,}", f"{row.drop_rate:.2%}", odd)
    return table


if __name__ == "__main__":
    sys.exit(main())
