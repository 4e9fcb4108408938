"""The study as docs/results/closed-loop.md and a picture."""

import os
import statistics
from pathlib import Path

import numpy as np

from tools.bench.closed_loop.runs import AUTO, CONFIG, HALF, LAST, RATIOS, TIME_S, Cell, Done
from tools.bench.closed_loop.runs import HELD_OUT as PROMPTS
from tools.bench.closed_loop.study import HELD_OUT, MEASURES, ROLLOUTS, Found, chosen

NAME = "closed-loop"
COLOURS = ("#9e9e9e", "#c6dbef", "#9ecae1", "#6baed6", "#3182bd", "#08519c")  # of fixed budgets, ascending
AUTO_COLOUR = "#ea7317"
SMOOTHED_S = 16.0  # seconds that batch rewards are averaged over in the picture


def write_report(found: Found, docs: Path) -> None:
    """``results/closed-loop.md`` and ``results/closed-loop.png`` in ``docs``."""
    (docs / "results").mkdir(parents=True, exist_ok=True)
    _plot(found, docs / "results" / f"{NAME}.png")
    (docs / "results" / f"{NAME}.md").write_text("\n".join(lines(found)) + "\n")


def lines(found: Found) -> list[str]:
    """The whole document."""
    seeds = len(found.options.seeds)
    return [
        "# A budget that finds itself",
        "",
        f"Written by `python -m tools.bench closed_loop`. The quick start (`{CONFIG}`) at a constant learning rate, "
        f"{seeds} seeds, {os.cpu_count()} cores, no GPU, at three ratios of speeds made by sleeping "
        f"(`actor.pace_s`, `learner.pace_s`). The {len(found.options.budgets)} runs of a ratio and seed go side by "
        "side, asleep for much of the time, so that whatever else happens on the machine happens to all of them. Every "
        f"run is judged at {TIME_S:g} s after its first step, in two ways:",
        "",
        f"- **{ROLLOUTS}**: of the answers that were trained on, to questions hardly any of which is asked twice, at "
        f"the moment when the version that gave them was made; the mean over the last {HALF:.0%} of the clock, 9,000 "
        "to 26,000 answers a run.",
        f"- **{HELD_OUT}** of saved versions ({PROMPTS} prompts each, judged off the clock, the same questions for all "
        f"of a seed); the mean over the last {LAST:.0%} of the clock, some five versions.",
        "",
        "Budgets so large that nothing waits for them make the same run: how far they are apart is what chance does.",
        "",
        f"![reward by wall-clock and what auto chose]({NAME}.png)",
        "",
        "*Batches are drawn at the moment when they were trained on.*",
        "",
        "## Auto over the best fixed budget",
        "",
        "The best is chosen by the same figures that are then compared, which flatters it.",
        "",
        "| ratio | measured by | auto | best fixed | its reward | auto / best, each seed | mean |",
        "|---|---|---|---|---|---|---|",
        *(_verdict(found, measure, ratio) for measure in MEASURES for ratio in found.options.ratios),
        "",
        "## Every budget",
        "",
        f"{ROLLOUTS.capitalize()}, mean (each seed); {HELD_OUT}, mean (each seed); steps a second; mean lag.",
        "",
        "| budget | " + " | ".join(_heading(found, r) for r in found.options.ratios) + " |",
        "|---|" + "---|" * len(found.options.ratios),
        *(
            f"| {budget} | " + " | ".join(_cell(found, ratio, budget) for ratio in found.options.ratios) + " |"
            for budget in found.options.budgets
        ),
        "",
        "## What auto chose",
        "",
        "Budget × steps that it was in force, in order.",
        "",
        *(
            f"- {RATIOS[ratio].title}, seed {seed}: {chosen(found.done[Cell(ratio, AUTO, seed)])}"
            for ratio in found.options.ratios
            for seed in found.options.seeds
        ),
    ]


def _heading(found: Found, ratio: str) -> str:
    idle = statistics.fmean(d.machine_idle for cell, d in found.done.items() if cell.ratio == ratio)
    return f"{RATIOS[ratio].title} (at most {RATIOS[ratio].steps_per_s:.2f}/s; cores idle {idle:.0%})"


def _verdict(found: Found, measure: str, ratio: str) -> str:
    best, ratios = found.best(measure, ratio), found.over_best(measure, ratio)
    ours, theirs = found.mean(measure, ratio, AUTO), found.mean(measure, ratio, best)
    each = ", ".join(f"{value:.3f}" for value in ratios)
    return (
        f"| {RATIOS[ratio].title} | {measure} | {ours:.3f} | {best} | {theirs:.3f} | {each} | **{ours / theirs:.3f}** |"
    )


def _cell(found: Found, ratio: str, budget: str) -> str:
    done = [found.done[Cell(ratio, budget, seed)] for seed in found.options.seeds]
    of_rollouts, held_out = (
        f"({', '.join(f'{value:.3f}' for value in found.rewards(measure, ratio, budget))})" for measure in MEASURES
    )
    speed, lag = statistics.fmean(d.speed() for d in done), statistics.fmean(d.lag_mean for d in done)
    return (
        f"**{found.mean(ROLLOUTS, ratio, budget):.3f}** {of_rollouts}; {found.mean(HELD_OUT, ratio, budget):.3f} "
        f"{held_out}; {speed:.2f}/s; {lag:.1f}"
    )


def _smoothed(done: Done, grid: np.ndarray) -> np.ndarray:
    """Mean reward of the batches of the last SMOOTHED_S at each second of ``grid``."""
    at, rewards = np.array(done.at_s), np.concatenate(([0.0], np.cumsum(done.rewards)))
    upper = np.searchsorted(at, grid, side="right")
    lower = np.minimum(np.searchsorted(at, grid - SMOOTHED_S, side="right"), upper - 1)
    found: np.ndarray = (rewards[upper] - rewards[lower]) / (upper - lower)
    return found


def _plot(found: Found, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    seeds, ratios = found.options.seeds, found.options.ratios
    figure, axes = plt.subplots(
        2, len(ratios), figsize=(4.4 * len(ratios), 5.6), sharex=True, height_ratios=(2.2, 1), squeeze=False
    )
    grid = np.linspace(1.0, TIME_S, 160)
    for column, ratio in enumerate(ratios):
        upper, lower = axes[0][column], axes[1][column]
        fixed = iter(COLOURS)
        for budget in found.options.budgets:
            cells = [found.done[Cell(ratio, budget, seed)] for seed in seeds]
            colour = AUTO_COLOUR if budget == AUTO else next(fixed)
            curve = np.mean([_smoothed(done, grid) for done in cells], axis=0)
            upper.plot(grid, curve, color=colour, linewidth=2.2 if budget == AUTO else 1.3, label=budget)
        for seed in seeds:
            done = found.done[Cell(ratio, AUTO, seed)]
            lower.step(done.at_s, done.budgets, where="post", color=AUTO_COLOUR, linewidth=1.2, alpha=0.8)
        upper.set_title(RATIOS[ratio].title, fontsize=11)
        lower.set_xlabel("seconds since the first step")
        lower.set_xlim(0, TIME_S)
        for axis in (upper, lower):
            axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(f"batch reward, mean of {SMOOTHED_S:g} s and {len(seeds)} seeds")
    axes[1][0].set_ylabel("auto's budget, each seed")
    axes[0][0].legend(title="budget", fontsize=8, frameon=False, ncol=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
