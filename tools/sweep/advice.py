"""One recommended cell and its reasons, from rewards at equal wall-clock. Pure.

The rule, which the report repeats:

1. The best cell has the greatest mean held-out reward at T, the training time of the fastest run.
2. A cell stands in for it if its paired difference to the best is not separated from 0 **and** its mean
   gives up at most :data:`GIVE_UP` of what training gained. Without the second half, a sweep too
   noisy to separate anything would always end at the smallest budget, however much it costs.
3. Of those the smallest staleness budget is recommended, and among equal budgets the greatest mean:
   fresher data cost the learner less correction, and what is not seen to pay is not worth risking.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tools.sweep.analysis import Comparison, Runs

GIVE_UP = 0.05  # of the gain in held-out reward until T
ROUNDING = 1e-7  # nats; below it a divergence is a rounding error
FEW_SEEDS = 3  # fewer of them say little about another seed


@dataclass(frozen=True)
class Advice:
    """What to set, and why."""

    cell: str  # "" where nothing can be recommended
    best: str
    separated: bool  # whether any cell is seen to be worse than the best
    reasons: Sequence[str]  # sentences


def advise(
    comparison: Comparison,
    runs: Runs,
    figures: Mapping[str, Mapping[str, float]],
    budgets: Mapping[str, float],
    labels: Mapping[str, str],
) -> Advice:
    """Recommend one cell; ``budgets`` are the cells' staleness budgets, ``figures`` as :func:`analysis.means` gives."""
    compared = comparison.cells()
    if not compared:
        return Advice("", "", False, ["No run was evaluated twice, so there is no reward to recommend a cell by."])
    best = max(compared, key=comparison.level)
    if len(compared) == 1:
        return Advice(best, best, False, [f"{labels[best]} is the only cell that can be compared."])
    gaps = {cell: comparison.difference(best, cell) for cell in compared}
    allowed = GIVE_UP * max(0.0, comparison.level(best) - _start(runs))
    worse = [cell for cell in compared if gaps[cell][0] > gaps[cell][1]]
    close = [cell for cell in compared if cell not in worse and gaps[cell][0] <= allowed]
    chosen = min(close, key=lambda cell: (budgets[cell], -comparison.level(cell)))
    reasons = [_level(comparison, chosen, labels)]
    if chosen != best:
        reasons.append(
            f"The greatest mean is that of {labels[best]}: {_gap(*gaps[chosen])} above it, which these runs do not "
            f"separate from 0 and which is at most {allowed:.3f}, {GIVE_UP:.0%} of what training gained."
        )
        reasons += _traded(chosen, best, figures, labels)
    else:
        reasons.append("It has the greatest mean of all.")
    reasons += _others(comparison, chosen, gaps, budgets, labels)
    reasons += _certainty(comparison, gaps, worse)
    return Advice(chosen, best, bool(worse), reasons)


def _start(runs: Runs) -> float:
    """Mean reward before any training; of the first evaluations where version 0 was not evaluated."""
    firsts = [run.points[0].reward for found in runs.values() for run in found if run.points]
    return sum(firsts) / len(firsts)


def _level(comparison: Comparison, cell: str, labels: Mapping[str, str]) -> str:
    half = comparison.half(cell)
    spread = f" ± {half:.3f}" if math.isfinite(half) else ""
    return (
        f"At {comparison.where:.1f} s of training, which every run reached, {labels[cell]} has a held-out reward of "
        f"{comparison.level(cell):.3f}{spread}."
    )


def _gap(mean: float, half: float) -> str:
    return f"{mean:+.3f} ± {half:.3f}" if math.isfinite(half) else f"{mean:+.3f} (interval unknown)"


def _traded(chosen: str, best: str, figures: Mapping[str, Mapping[str, float]], labels: Mapping[str, str]) -> list[str]:
    """What the smaller budget gives up and gets, beside reward."""
    said = []
    for name, title, form in (
        ("generated_per_s", "tokens generated a second", ",.0f"),
        ("lag_mean", "mean lag", ".2f"),
        ("kl_learner", "KL that the learner sees", ".2e"),
        ("rejected", "share of tokens rejected", ".2%"),
        ("unused", "share of tokens never trained", ".2%"),
    ):
        values = figures.get(name, {})
        if chosen in values and best in values:
            here, there = figure(values[chosen], form), figure(values[best], form)
            said += [f"{title} {here} instead of {there}"] if here != there else []
    return [f"Beside reward it has, against {labels[best]}: {', '.join(said)}."] if said else []


def figure(value: float, form: str) -> str:
    """Formatted; what is only rounding is 0."""
    return "0" if form.endswith("e") and abs(value) < ROUNDING else format(value, form)


def _others(
    comparison: Comparison,
    chosen: str,
    gaps: Mapping[str, tuple[float, float]],
    budgets: Mapping[str, float],
    labels: Mapping[str, str],
) -> list[str]:
    """Why not a smaller budget, and why not another."""
    lines = []
    smaller = [cell for cell in gaps if budgets[cell] < budgets[chosen]]
    if smaller:
        said = [f"{labels[cell]} ({_gap(*gaps[cell])})" for cell in smaller]
        words = "The means of smaller budgets are further below the best than the rule allows"
        lines.append(f"{words}: {', '.join(said)}.")
    rest = {cell: comparison.difference(chosen, cell) for cell in gaps if cell != chosen and cell not in smaller}
    for words, wanted in (("Separated below it", True), ("Not separated from it", False)):
        said = [f"{labels[cell]} ({_gap(*d)})" for cell, d in rest.items() if (d[0] > d[1]) is wanted]
        if said:
            lines.append(f"{words}, as differences in its favour: {', '.join(said)}.")
    return lines


def _certainty(comparison: Comparison, gaps: Mapping[str, tuple[float, float]], worse: Sequence[str]) -> list[str]:
    lines = []
    seeds = len({seed for _, seed in comparison.rewards})
    if not comparison.knows_seeds:
        lines.append(
            "There is one seed, so the intervals are of the evaluations alone: another seed may change the order. "
            "Give --seeds 3 to the same command, which runs only what is missing."
        )
    elif seeds < FEW_SEEDS:
        lines.append(f"There are {seeds} seeds; intervals pool their spread over the cells, and one more would help.")
    if not worse:
        lines.append("Nothing separates: no cell is seen to be worse than the best. " + _needed(comparison, gaps))
    return lines


def _needed(comparison: Comparison, gaps: Mapping[str, tuple[float, float]]) -> str:
    """How many seeds would show the greatest difference: where 1.96 standard errors of a paired mean are below it."""
    largest = max(mean for mean, _ in gaps.values())
    if comparison.fit is None or not comparison.fit.freedom or largest <= 0:
        return "The order is that of the means."
    seeds = len({seed for _, seed in comparison.rewards})
    count = max(seeds, math.ceil(2 * (1.96 * comparison.fit.deviation / largest) ** 2)) + 1
    return f"The order is that of the means; about {count} seeds would show the largest difference, {largest:+.3f}."
