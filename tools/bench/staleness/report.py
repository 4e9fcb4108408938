"""The study as docs/results.md: curves, means with intervals, paired differences, and what they support."""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tools.bench.staleness.methods import METHODS, RATES, REGIMES
from tools.bench.staleness.study import LAST, TUNING_SEED, Results, final_rewards
from tools.bench.staleness.trainer import EVALUATE_EVERY, GROUPS, HELD_OUT, SIBLINGS, TUNING_UPDATES, UPDATES
from tools.intervals import t_95

Floats = NDArray[np.float64]
PAIRS = (  # (method, what it is compared with)
    ("tis", "none"), ("ppo", "none"), ("ppo", "tis"), ("icepop", "tis"), ("m2po", "ppo"), ("double_sided", "ppo"),
    ("obrs", "tis"), ("z_tis", "tis"), ("jackpot", "tis"), ("jackpot", "z_tis"), ("obrs_clip", "ppo"),
    ("obrs_clip", "jackpot"),
)  # fmt: skip
COLOURS = (
    "#9e9e9e", "#1f77b4", "#17becf", "#2ca02c", "#bcbd22", "#8c564b", "#e377c2", "#9467bd", "#ff7f0e", "#d62728"
)  # fmt: skip


def interval(values: Floats) -> tuple[float, float]:
    """Mean and half of its 95 % interval (Student's t over seeds); infinite for one value."""
    n = len(values)
    if n < 2:
        return float(values.mean()), math.inf
    return float(values.mean()), t_95(n - 1) * float(values.std(ddof=1)) / math.sqrt(n)


def write_report(results: Results, seeds: list[int], directory: Path) -> None:
    """``results.md`` and ``results/staleness.png`` in ``directory``."""
    rewards = {key: np.array(values) for key, values in final_rewards(results, seeds).items()}
    (directory / "results").mkdir(parents=True, exist_ok=True)
    _plot(results, seeds, directory / "results" / "staleness.png")
    (directory / "results.md").write_text("\n".join(_lines(results, seeds, rewards)) + "\n")


def _lines(results: Results, seeds: list[int], rewards: dict[tuple[str, str], Floats]) -> list[str]:
    differences = [_difference(pair, rewards) for pair in PAIRS]
    marks = [[results.rate(a, r) != results.rate(b, r) for r in REGIMES] + [False] for a, b in PAIRS]
    chosen = [results.rate(m, r) for m in METHODS for r in REGIMES]
    return [
        "# What staleness costs each method",
        "",
        f"Written by `python -m tools.bench staleness`. The quick start's task in one process: {UPDATES} updates of "
        f"{GROUPS} × {SIBLINGS} answers, GRPO advantages, token-mean loss, AdamW; every method at the best of the "
        f"rates {', '.join(f'{r:g}' for r in RATES)} after {TUNING_UPDATES} updates on a seed of its own "
        f"({TUNING_SEED}), then {len(seeds)} seeds, each with its own starting model. A run's result is the held-out "
        f"reward ({HELD_OUT} sampled answers) averaged over its last {LAST} evaluations, one every {EVALUATE_EVERY}.",
        "",
        "![held-out reward by update](results/staleness.png)",
        "",
        "## Held-out reward, mean ± 95 % interval over seeds",
        "",
        "| method | " + " | ".join(r.title for r in REGIMES.values()) + " |",
        "|---|" + "---|" * len(REGIMES),
        *(
            f"| {method.title} | " + " | ".join(_cell(rewards[m, r]) for r in REGIMES) + " |"
            for m, method in METHODS.items()
        ),
        "",
        "Rates that were chosen:",
        "",
        "| method | " + " | ".join(r.title for r in REGIMES.values()) + " |",
        "|---|" + "---|" * len(REGIMES),
        *(
            f"| {method.title} | " + " | ".join(f"{results.rate(m, r):g}" for r in REGIMES) + " |"
            for m, method in METHODS.items()
        ),
        "",
        "## Paired differences, seed by seed",
        "",
        "Bold where the 95 % interval excludes 0. The last column pools all stale regimes (everything but lag 0): "
        "of each seed the mean over them.",
        "",
        "| difference | " + " | ".join(r.title for r in REGIMES.values()) + " | all stale |",
        "|---|" + "---|" * (len(REGIMES) + 1),
        *(
            f"| {name} | " + " | ".join(_bold(*c) + " †" * m for c, m in zip(cells, mark, strict=True)) + " |"
            for (name, cells), mark in zip(differences, marks, strict=True)
        ),
        "",
        "† the two were given different rates: part of such a difference may be the choice, which one seed made.",
        "",
        "## What the figures support",
        "",
        f"One tiny model, one task, short runs; {sum(r == min(RATES) for r in chosen)} of {len(chosen)} choices lie at "
        f"the lower edge of the grid of rates and {sum(r == max(RATES) for r in chosen)} at the upper. Intervals are "
        f"of {len(seeds)} seeds, and {len(PAIRS) * (len(REGIMES) + 1)} of them are looked at: some would exclude 0 by "
        "chance.",
        "",
        *_reading(differences, rewards),
    ]


def _cell(values: Floats) -> str:
    mean, half = interval(values)
    return f"{mean:.2f} ± {half:.2f}"


def _bold(mean: float, half: float) -> str:
    text = f"{mean:+.3f} ± {half:.3f}"
    return f"**{text}**" if abs(mean) > half else text


def _difference(pair: tuple[str, str], rewards: dict[tuple[str, str], Floats]) -> tuple[str, list[tuple[float, float]]]:
    """Mean and half interval by regime, then over all stale ones."""
    ours, theirs = pair
    by_regime = [rewards[ours, r] - rewards[theirs, r] for r in REGIMES]
    stale = np.mean([d for d, r in zip(by_regime, REGIMES, strict=True) if r != "lag0"], axis=0)
    name = f"{METHODS[ours].title} − {METHODS[theirs].title}"
    return name, [interval(d) for d in (*by_regime, stale)]


def _reading(
    differences: list[tuple[str, list[tuple[float, float]]]], rewards: dict[tuple[str, str], Floats]
) -> list[str]:
    """One sentence a comparison, by its pooled interval; and who is best where."""
    lines = []
    for name, cells in differences:
        mean, half = cells[-1]
        if abs(mean) <= half:
            said = "does not separate from 0 over the stale regimes"
        else:
            said = f"is {'above' if mean > 0 else 'below'} 0 over the stale regimes"
        lines.append(f"- {name}: {said} ({mean:+.3f} ± {half:.3f}).")
    for regime, about in REGIMES.items():
        means = {m: float(rewards[m, regime].mean()) for m in METHODS}
        best = max(means, key=lambda m: means[m])
        near = [
            METHODS[m].title
            for m in METHODS
            if m != best
            and (d := interval(rewards[best, regime] - rewards[m, regime]))[0] <= d[1]
        ]  # fmt: skip
        apart = f"; not separated from it: {', '.join(near)}" if near else ", apart from all others"
        lines.append(f"- {about.title}: the greatest mean is that of {METHODS[best].title} ({means[best]:.2f}){apart}.")
    return lines


def _plot(results: Results, seeds: list[int], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 7.5), sharex=True, sharey=True)
    for axis, (regime, about) in zip(axes.flat, REGIMES.items(), strict=True):
        for (method, its), colour in zip(METHODS.items(), COLOURS, strict=True):
            runs = results.of(method, regime, seeds)
            updates = [u for u, _ in runs[0].curve]
            curves = np.array([[reward for _, reward in run.curve] for run in runs])
            mean = curves.mean(axis=0)
            axis.plot(updates, mean, color=colour, label=its.title, linewidth=1.4)
            if len(seeds) > 1:
                half = t_95(len(seeds) - 1) * curves.std(axis=0, ddof=1) / math.sqrt(len(seeds))
                axis.fill_between(updates, mean - half, mean + half, color=colour, alpha=0.08, linewidth=0)
        axis.set_title(about.title, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("update")
    for axis in axes[:, 0]:
        axis.set_ylabel("held-out reward")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="lower center", ncol=5, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
