"""The study as docs/results/end2end.md and a picture: what was run, what came of it, what it does not show."""

import os
import statistics
from collections.abc import Callable
from pathlib import Path

from tools.bench.end2end import trl_env
from tools.bench.end2end.analysis import Ratio, band, paired
from tools.bench.end2end.contestants import (
    ANSWERS,
    APART,
    CONFIG,
    HELD_OUT,
    LARGER,
    MAIN,
    SAVE_EVERY,
    SLOWDOWN,
    SYNCHRONOUS,
    TRL,
)
from tools.bench.end2end.study import TRY_ROUNDS, Found, Values
from tools.bench.loop import COMPLETION, GROUPS, PROMPT, SIBLINGS

COLOURS = {SYNCHRONOUS: "#7f7f7f", TRL: "#d62728", "obrs": "#1f77b4", "bare": "#2ca02c"}
NAME = "end2end"


def write_report(found: Found, docs: Path) -> None:
    """``results/end2end.md`` and ``results/end2end.png`` in ``docs``."""
    (docs / "results").mkdir(parents=True, exist_ok=True)
    _plot(found, docs / "results" / f"{NAME}.png")
    (docs / "results" / f"{NAME}.md").write_text("\n".join(lines(found)) + "\n")


def lines(found: Found) -> list[str]:
    """The whole document."""
    options = found.options
    seeds = len(options.seeds)
    return [
        "# What asynchrony is worth",
        "",
        f"Written by `python -m tools.bench end2end`. The quick start's task, model and rates (`{CONFIG}`), "
        f"{options.steps} steps of 32 × 8 completions, {seeds} seed{'s' * (seeds != 1)} (a starting model and "
        f"questions for each), {os.cpu_count()} cores, no GPU. Figures are means ± standard deviation over seeds.",
        "",
        f"![held-out reward by wall-clock]({NAME}.png)",
        "",
        *_table(found),
        "",
        "## Ratios, seed by seed",
        "",
        "Each contestant over a reference: of means over seeds ± standard deviation over seeds (and every seed). "
        "Speeds: more is better; wall-clock: less.",
        "",
        *_ratios(found),
        "",
        *_missed(found),
        *_elsewhere(found),
        "## What was made equal",
        "",
        *_equal(found),
        "",
        "## What it does not show",
        "",
        *_limits(found),
    ]


def _table(found: Found) -> list[str]:
    target = found.options.target
    columns: list[tuple[str, int, Callable[[str], Values]]] = [
        ("start-up, s", 1, lambda key: found.each(key, lambda t: t.startup_s)),
        ("completions/s", 0, lambda key: found.each(key, lambda t: t.samples_per_s)),
        ("tokens/s", 0, lambda key: found.each(key, lambda t: t.tokens_per_s)),
        (f"s to {target:g}", 1, found.seconds),
        (f"steps to {target:g}", 0, found.steps),
        ("held out at the end", 3, lambda key: _last(found, key)),
        ("mean lag", 2, lambda key: found.each(key, lambda t: t.figures["lag"])),
    ]
    return [
        "| contestant | as run | " + " | ".join(title for title, _, _ in columns) + " |",
        "|---|---|" + "---|" * len(columns),
        *(
            f"| {one.title} | {found.settings[MAIN][key].title} | "
            + " | ".join(spread(values(key), digits) for _, digits, values in columns)
            + " |"
            for key, one in found.main.items()
        ),
    ]


def _last(found: Found, key: str) -> dict[int, float | None]:
    return {seed: of[max(of)] if of else None for seed, of in found.rewards[key].items()}


def spread(values: Values, digits: int) -> str:
    """``mean ± deviation`` of the seeds that have a value, or a dash."""
    known = [value for value in values.values() if value is not None]
    if not known:
        return "–"
    mean = f"{statistics.fmean(known):,.{digits}f}"
    return f"{mean} ± {statistics.stdev(known):,.{digits}f}" if len(known) > 1 else mean


def _ratios(found: Found) -> list[str]:
    references = [key for key in (SYNCHRONOUS, TRL) if key in found.main]
    return [
        "| figure | contestant | " + " | ".join(f"over {found.main[key].title}" for key in references) + " |",
        "|---|---|" + "---|" * len(references),
        *(
            f"| {name} | {one.title} | "
            + " | ".join("1" if key == r else _ratio(paired(values(key), values(r))) for r in references)
            + " |"
            for name, _, values in found.figures(MAIN)
            for key, one in found.main.items()
        ),
    ]


def _ratio(ratio: Ratio | None) -> str:
    return "–" if ratio is None else f"**{ratio}** ({', '.join(f'{value:.2f}' for value in ratio.by_seed)})"


def _elsewhere(found: Found) -> list[str]:
    """The arenas in which speed alone is compared."""
    about = {
        APART: [
            "## With a machine for each side",
            "",
            "Actor and learner share the cores above. Here one actor and the learner sleep, so that decoding and "
            f"training take {SLOWDOWN} × as long and the cores are not short: as if each had a machine of its own.",
        ],
        LARGER: [
            "## A larger shape",
            "",
            f"The shape of `python -m tools.bench loop`: a random Qwen3-MoE of 4 layers of 256, {GROUPS * SIBLINGS} × "
            f"({PROMPT} + {COMPLETION}) tokens a step, all sampled to the end.",
        ],
    }
    said = []
    for name, words in about.items():
        if name in found.arenas:
            said += [*words, f"{found.arenas[name].steps} steps, speed alone.", "", *_speeds(found, name), ""]
    return said


def _speeds(found: Found, arena: str) -> list[str]:
    [(_, unit, values)] = found.figures(arena)
    among, settings = found.arenas[arena].contestants, found.settings[arena]
    references = [key for key in (SYNCHRONOUS, TRL) if key in among]
    return [
        f"| contestant | as run | {unit} | " + " | ".join(f"over {among[key].title}" for key in references) + " |",
        "|---|---|---|" + "---|" * len(references),
        *(
            f"| {one.title} | {settings[key].title} | {spread(values(key), 0)} | "
            + " | ".join("1" if key == r else _ratio(paired(values(key), values(r))) for r in references)
            + " |"
            for key, one in among.items()
        ),
    ]


def _missed(found: Found) -> list[str]:
    said = [
        f"- {one.title} did not reach {found.options.target:g} on seed{'s' * (len(missed) > 1)} "
        f"{', '.join(map(str, missed))}; its wall-clock is of the others."
        for key, one in found.main.items()
        if (missed := [seed for seed, value in found.seconds(key).items() if value is None])
    ]
    return [*said, ""] if said else []


def _equal(found: Found) -> list[str]:
    trl = [
        f"- TRL ({trl_env.PACKAGES[2]}) is given the same questions in the same order, the same verifier, "
        "`loss_type=dapo` (the mean over the batch's tokens, croupier's default), no reference model, one update a "
        "batch of 256, transformers' `generate`, AdamW fused with the same decay of the rate, and half of the balance "
        "loss's coefficient, which transformers counts twice; no logging, no saving, no activation checkpointing.",
        "- The time in which TRL saves a version is taken out of its clock; croupier's checkpoints and its journal, "
        "which is on disk before anything is acknowledged, are on its clock.",
    ]  # fmt: skip
    return [
        "- Everyone: float32, temperature 1, the same steps, and advantages over the sample's deviation of the group.",
        f"- Held-out reward is measured off the clock, for everyone by one sampler with the same noise: {HELD_OUT} "
        f"questions, {ANSWERS} answers each, of a version every {SAVE_EVERY} steps. Seconds to the target are "
        "interpolated between two of these.",
        "- The clock starts when the first step is done; start-up is from the command to that moment.",
        f"- Each runs in its fastest setting of those tried {TRY_ROUNDS} × for {found.arenas[MAIN].try_steps} steps: "
        "croupier with one actor or two (synchronous also with two threads for the learner), TRL with one thread or "
        "two and both of transformers' faster ways to compute experts.",
        "- The synchronous run and the uncorrected one need no policy replica and have none.",
        *(trl if TRL in found.main else [f"- TRL was not installed: `{trl_env.HOW}`, then run this again."]),
        "- Seed by seed, contestants in turn.",
    ]


def _limits(found: Found) -> list[str]:
    lags = [t.figures["lag"] for key in ("obrs", "bare") for t in found.timed[MAIN].get(key, {}).values()]
    ages = " to ".join(dict.fromkeys(f"{lag:.1f}" for lag in (min(lags), max(lags))))
    return [
        "- Actors and learner share the cores, so there is nothing to gain from using both at once but what a "
        "synchronous run leaves idle: hand-overs, stragglers and what one thread cannot spread. With a machine for "
        "each the limit is the slower of the two instead of their sum; how near they come depends on their ratio "
        "(`python -m tools.simulate`).",
        "- The quick start's model has a quarter of a million parameters and a step takes about a tenth of a second: "
        "what is compared is as much the cost of each system's own work as that of its arithmetic."
        + (" The larger shape is still a small one." if LARGER in found.arenas else ""),
        f"- The data of the asynchronous runs were {ages} versions old on average. What other ages cost, with and "
        "without a correction: [../results.md](../results.md).",
        "- TRL's fast path, vLLM on a GPU, does not run here; its AsyncGRPOTrainer needs a vLLM server.",
    ]


def _plot(found: Found, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8.5, 4.8))
    for key, one in found.main.items():
        x, mean, low, high = band([found.curve(key, seed) for seed in found.rewards[key]])
        axis.plot(x, mean, color=COLOURS[key], label=one.title, linewidth=1.6)
        axis.fill_between(x, low, high, color=COLOURS[key], alpha=0.15, linewidth=0)
    axis.axhline(found.options.target, color="black", linewidth=0.7, linestyle=":")
    axis.set_xlabel("seconds since the first step")
    axis.set_ylabel(f"held-out reward; band: lowest to highest of {len(found.options.seeds)} seeds")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="lower right", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
