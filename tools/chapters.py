"""The chapters of a run's report, each a list of blocks from what was read of the run. Pure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from common.config import RunConfig, to_yaml
from tools.document import (
    Block,
    Bold,
    Code,
    Figure,
    Fold,
    Heading,
    Items,
    Link,
    Listing,
    Paragraph,
    Table,
    Text,
    Tiles,
    pairs,
)
from tools.drops import drop_rows
from tools.evaluations import NONE
from tools.plots import lag_shares
from tools.receipt import receipt_rows
from tools.run_files import CONFIG, LOGS, METRICS, STATUS, SUMMARY, Record, of_kind
from tools.runs import Run

END_STEPS = 5  # steps at either end whose mean reward the summary gives
LAGS_SHOWN = 12  # in the table; more are in the picture

Pictures = Mapping[str, Figure]


def show(pictures: Pictures, *names: str) -> list[Block]:
    """Those pictures that there are."""
    return [pictures[name] for name in names if name in pictures]


def mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return sum(values) / len(values) if values else None


def number(value: object, form: str) -> str:
    """``value`` formatted, a dash for none."""
    return format(value, form) if isinstance(value, int | float) else NONE


def change(first: object, last: object, form: str = ".3f") -> str:
    """``0.266 → 0.953``."""
    return f"{number(first, form)} → {number(last, form)}"


# ---- what was run -------------------------------------------------------------------------------


def what(config: RunConfig | None) -> Text:
    """The run in one sentence."""
    if config is None:
        return "The configuration is missing, so what was run is not known."
    section = config.staleness
    budget = f"staleness budget auto, at most {section.most}" if section.auto else f"staleness budget {section.budget}"
    rejection = {
        "off": "no rejection",
        "threshold": f"rejection at λ = {config.obrs.threshold:g}",
        "budget": f"rejection to accept {config.obrs.budget:g} of the tokens",
        "ess": f"rejection to an effective sample size of {config.obrs.target_ess:g}",
    }[config.obrs.mode]
    return (
        "Task ", *_tasks(config), ", model ", Code(config.model.path),
        f", {config.run.steps} steps of {config.rollout.groups_per_step} groups × {config.rollout.group_size}, "
        f"{'synchronous' if section.budget == 0 else budget}, {rejection}, clip anchored at ", Code(config.loss.anchor),
        f", {config.actor.count} actor(s), {config.learner.ranks} learner rank(s), seed {config.run.seed}.",
    )  # fmt: skip


def _tasks(config: RunConfig) -> tuple[str | Code, ...]:
    entries = config.task.entries
    if len(entries) == 1:
        return (Code(config.task.labels[0]),)
    whole = sum(entry.ratio for entry in entries.values())
    found: list[str | Code] = ["mixture of "]
    for label, entry in entries.items():
        found += [", "] if len(found) > 1 else []
        found += [Code(label), f" ({entry.ratio / whole:.0%})"]
    return tuple(found)


def configuration(config: RunConfig | None) -> list[Block]:
    """What differs from the defaults, then everything."""
    if config is None:
        return []
    rows = [(Code(key), str(value), str(default)) for key, value, default in changed_settings(config)]
    return [
        Heading("Configuration"),
        Paragraph("What differs from the defaults:") if rows else Paragraph("Nothing differs from the defaults."),
        Table(("setting", "here", "default"), rows),
        Fold("The complete configuration", [Listing(to_yaml(config).splitlines())], file=CONFIG),
    ]


def changed_settings(config: RunConfig) -> list[tuple[str, Any, Any]]:
    """(key, value, default) of every setting that is not at its default."""
    here = dict(_flat(OmegaConf.to_container(OmegaConf.structured(config)), ""))
    default = dict(_flat(OmegaConf.to_container(OmegaConf.structured(RunConfig())), ""))
    return [(key, value, default.get(key, NONE)) for key, value in here.items() if default.get(key) != value]


def _flat(node: Any, prefix: str) -> list[tuple[str, Any]]:
    if not isinstance(node, dict) or not node:
        return [(prefix, node)]
    return [pair for key, value in node.items() for pair in _flat(value, f"{prefix}.{key}" if prefix else str(key))]


# ---- how it went --------------------------------------------------------------------------------


def tiles(summary: Record) -> Tiles:
    """The headline."""
    speed = _speed(summary)
    reward = ("Held-out reward", summary["eval_first"], summary["eval_last"])
    if summary["eval_last"] is None:
        reward = ("Batch reward", summary["reward_first"], summary["reward_last"])
    budget = summary["staleness_budget"]
    return Tiles([
        (reward[0], number(reward[2], ".3f"), f"from {number(reward[1], '.3f')}"),
        ("Optimizer steps", f"{summary['steps']:,}", f"final version {summary['final_version']:,}"),
        ("Wall time", duration(summary["wall_s"]), f"{number(speed, ',.0f')} tokens/s generated"),
        ("Mean lag", number(summary["lag_mean"], ".2f"), f"versions, at most {NONE if budget is None else budget}"),
        ("Accepted", number(summary["acceptance"], ".2%"), "of the proposed tokens"),
    ])  # fmt: skip


def _speed(summary: Record) -> float | None:
    """Completion tokens a second of the brokers' lives."""
    return summary["tokens_generated"] / summary["working_s"] if summary["working_s"] else None


def duration(seconds: float) -> str:
    """In the unit that a person would use."""
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def result(summary: Record, pictures: Pictures) -> list[Block]:
    """The figures at either end."""
    speed = _speed(summary)
    ends = change(summary["reward_first"], summary["reward_last"])
    rows: list[tuple[Text, Text]] = [
        ("Held-out reward, first → last evaluation", change(summary["eval_first"], summary["eval_last"])),
        (f"Batch reward, first → last {END_STEPS} steps", ends),
        ("Optimizer steps, final version", f"{summary['steps']}, {summary['final_version']}"),
        ("Wall time", f"{summary['wall_s']:.1f} s"),
        (
            "Completion tokens",
            f"{summary['tokens_generated']:,} ({number(speed, ',.0f')} a second since the broker began)",
        ),
    ]
    return [Heading("Result"), pairs(rows), *show(pictures, "reward")]


def staleness(run: Run, summary: Record, pictures: Pictures) -> list[Block]:
    """Budget, lags and, where the budget is ``auto``, its moves."""
    if not run.steps:
        return []
    blocks: list[Block] = [
        Heading("Staleness"),
        Paragraph(
            f"The budget is {_budget(run, summary)}. Trained tokens had a mean lag of "
            f"{number(summary['lag_mean'], '.2f')}; the oldest, {summary['lag_max']}."
        ),
    ]
    shares = lag_shares(run.steps)
    if 0 < len(shares) <= LAGS_SHOWN:
        head, row = ["lag", *map(str, shares)], ["share of tokens", *(f"{share:.1%}" for share in shares.values())]
        blocks.append(Table(head, [row], numbers=range(1, len(head))))
    blocks += show(pictures, "lag", "lags")
    moves = of_kind(run.records, "budget")
    if moves:
        rows = [(str(m.get("step")), f"{m.get('old')} → {m.get('value')}", str(m.get("reason"))) for m in moves]
        table = Table(("after step", "budget", "why"), rows, numbers=(0,))
        blocks += [Heading("Moves of the budget", 3), table if len(rows) <= 20 else Fold(f"{len(rows)} moves", [table])]
    return blocks


def _budget(run: Run, summary: Record) -> str:
    if run.config is not None and run.config.staleness.auto:
        return f"moved while the run goes (auto), to at most {summary['staleness_budget']} versions"
    return f"{summary['staleness_budget']} version(s)"


def rejection(run: Run, summary: Record, pictures: Pictures) -> list[Block]:
    """What it took and what that bought."""
    if not run.steps:
        return []
    if run.config is not None and run.config.obrs.mode == "off":
        return [Heading("Rejection"), Paragraph("Switched off: every proposed token was trained.")]
    blocks: list[Block] = [
        Heading("Rejection"),
        Paragraph(
            f"{summary['tokens_accepted']:,} of {summary['tokens_proposed']:,} proposed tokens were accepted "
            f"({number(summary['acceptance'], '.4f')})."
        ),
    ]
    before, after = (mean([s[key] for s in run.steps if s.get(key) is not None]) for key in ("kl_before", "kl_after"))
    if before is not None and after is not None:
        words = f"Mean KL to the learner's policy, nats a token: {before:.2e} before, {after:.2e} after."
        blocks.append(Paragraph(words))
    return [*blocks, *show(pictures, "acceptance", "kl")]


def two_models(run: Run, pictures: Pictures) -> list[Block]:
    """A rollout model beside the policy."""
    config = run.config
    if config is None or not config.joint.path or not run.steps:
        return []
    own: Text = (
        "Actors ran ", Code(config.joint.path), ": rewards above, of batches and of held-out prompts, are its own. ",
        Code("python -m tools.evaluate"), " judges the policy.",
    )  # fmt: skip
    blocks: list[Block] = [Heading("Two models"), Paragraph(own)]
    if not config.joint.train:
        return [*blocks, Paragraph("It stayed as it was; its tokens are dated by their grants.")]

    def ends(key: str, form: str) -> str:
        found = [float(step[key]) for step in run.steps if step.get(key) is not None]
        return change(mean(found[:END_STEPS]), mean(found[-END_STEPS:]), form)

    first, second = ("policy", "rollout model") if config.joint.direction == "forward" else ("rollout model", "policy")
    rows: list[tuple[Text, Text]] = [
        (f"KL({first} ‖ {second}) on what was sampled, nats a token, first → last {END_STEPS} steps",
         ends("joint_kl", ".3f")),
        ("What a step's update takes from it", ends("joint_kl_drop", ".4f")),
        ("Gradient norm", ends("joint_grad_norm", ".2f")),
        ("Tokens whose gradient the clip took away", ends("joint_clip_fraction", ".3f")),
        ("Seconds of a step, beside the policy's", ends("seconds_joint", ".2f")),
    ]  # fmt: skip
    return [*blocks, pairs(rows), *show(pictures, "joint")]


def trajectories(run: Run, summary: Record) -> list[Block]:
    """The books, and whether long ones fare worse."""
    dropped = summary["trajectories_dropped"]
    queued = summary["trajectories_acked"] - summary["trajectories_trained"] - sum(dropped.values())
    rows: list[tuple[Text, Text]] = [
        ("Acknowledged", f"{summary['trajectories_acked']:,}"),
        ("Trained", f"{summary['trajectories_trained']:,}"),
        *((f"Dropped: {reason}", f"{count:,}") for reason, count in dropped.items()),
        ("Still queued at the end", f"{queued:,}"),
    ]
    blocks: list[Block] = [Heading("Trajectories"), pairs(rows)]
    rows_of_drops = drop_rows(run.status)
    if any(row.dropped for row in rows_of_drops):
        cells: list[tuple[Text, ...]] = [
            (
                row.words, f"{row.trained:,}", f"{row.dropped:,}",
                (f"{row.drop_rate:.2%} ", Bold("differs from the rest")) if row.stands_out else f"{row.drop_rate:.2%}",
            )
            for row in rows_of_drops
        ]  # fmt: skip
        blocks.append(Table(("by", "trained", "dropped", "drop rate"), cells, numbers=(1, 2, 3)))
    return blocks


# ---- receipts -----------------------------------------------------------------------------------

REMARKABLE = (  # (why, figure, whether the largest is meant)
    ("lowest acceptance", "acceptance", False),
    ("largest KL after rejection", "kl_after", True),
    ("smallest effective sample size", "weight_ess", False),
    ("largest mean lag", "lag_mean", True),
    ("most trajectories cut", "truncated", True),
    ("largest gradient", "grad_norm", True),
    ("lowest reward of the second half", "reward", False),
)


def receipts(run: Run) -> list[Block]:
    """The last batch in full, and those that stand out."""
    steps = run.steps
    if not steps:
        return []
    blocks: list[Block] = [Heading("Receipts")]
    rows = list(_remarkable(steps))
    if rows:
        head = ("batch", "step", "reward", "accepted", "KL after", "mean lag", "ESS", "cut", "gradient")
        blocks += [Paragraph("Batches that stand out:"), Table(head, rows, numbers=range(1, len(head)))]
    try:
        last = receipt_rows(steps[-1])
    except (KeyError, TypeError, ValueError, AttributeError):
        return [*blocks, Paragraph("The last receipt was written by another croupier and cannot be told in full.")]
    command = f"python -m tools.receipt {run.path} --step N"
    return [
        *blocks,
        Fold(f"The last batch, step {steps[-1]['step']}", [pairs(last)]),
        Paragraph((Code(command), " shows any other.")),
    ]


def _remarkable(steps: Sequence[Record]) -> list[tuple[Text, ...]]:
    rows: list[tuple[Text, ...]] = []
    for why, key, largest in REMARKABLE:
        among = [step for step in (steps[len(steps) // 2 :] if key == "reward" else steps) if step.get(key) is not None]
        if not among:
            continue
        found = (max if largest else min)(among, key=lambda step: step[key])
        if sum(step[key] == found[key] for step in among) > 1 + len(among) // 20:
            continue  # what so many have does not stand out
        rows.append((
            why, str(found["step"]), number(found.get("reward"), ".3f"), number(found.get("acceptance"), ".2%"),
            number(found.get("kl_after"), ".1e"), number(found.get("lag_mean"), ".2f"),
            number(found.get("weight_ess"), ".3f"), number(found.get("truncated"), ".1%"),
            number(found.get("grad_norm"), ".2f"),
        ))  # fmt: skip
    return rows


# ---- the rest -----------------------------------------------------------------------------------


def signs(pictures: Pictures) -> list[Block]:
    """Entropy, effective sample size and truncation over the run."""
    shown = show(pictures, "entropy", "signs")
    return [Heading("Health"), *shown] if shown else []


def speed(pictures: Pictures) -> list[Block]:
    """Throughput and the optimizer."""
    shown = show(pictures, "throughput", "seconds", "optimizer")
    return [Heading("Speed and optimisation"), *shown] if shown else []


def files(run_dir: Path) -> list[Block]:
    """What else lies there."""
    known = {
        CONFIG: "the complete configuration",
        SUMMARY: "the figures above, for programs",
        METRICS: "one line a step (its receipt), evaluation and publish",
        STATUS: "the broker's last word",
        LOGS: "what each process said",
        "trace": "timelines of every process, for tools.trace and tools.profile",
        "tensorboard": "event files, for tensorboard --logdir",
    }
    there = [(name, about) for name, about in known.items() if (run_dir / name).exists()]
    return [Heading("Files"), Items([(Link(name, name), f": {about}") for name, about in there])] if there else []
