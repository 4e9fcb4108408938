"""Which pictures a sweep's report has, in which order, and what is said under them."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from matplotlib.axes import Axes

from tools.document import Block, Heading, Paragraph
from tools.pictures import BLUE, GREEN, MUTED, ORANGE, RED, Picture, place
from tools.sweep import charts
from tools.sweep.analysis import by_samples, by_time, curves

if TYPE_CHECKING:
    from tools.sweep.report import Sweep, Verdict

REMAINING = {"kl_after": "KL after rejection", "kl_learner": "KL that the learner sees"}
SPEEDS = (
    ("generated_per_s", BLUE, "generated"), ("trained_per_s", ORANGE, "trained"), ("accepted_per_s", GREEN, "accepted")
)  # fmt: skip
WASTE = (("unused", RED, "generated and never trained"), ("rejected", ORANGE, "rejected"))
LAGS = (("lag_max", BLUE, "oldest token"), ("lag_mean", GREEN, "mean"))
SHARES = (("acceptance", GREEN, "acceptance"), ("ess", BLUE, "ESS of the learner's weights"))


def draw_all(sweep: "Sweep", verdict: "Verdict") -> list[Block]:
    """Draw what can be drawn into the sweep's directory; returns the blocks that show it."""
    blocks: list[Block] = []
    for section, pictures, caption in (
        ("Reward", _rewards(sweep, verdict), _bands(verdict)),
        ("Pareto fronts", _fronts(sweep, verdict), _fronted(sweep)),
        ("What each cell costs", _costs(sweep, verdict), ""),
    ):
        if pictures:
            blocks += [Heading(section), *(place(picture, sweep.directory) for picture in pictures)]
            blocks += [Paragraph(caption)] if caption else []
    return blocks


def _bands(verdict: "Verdict") -> str:
    known = verdict.at_time.knows_seeds
    band = "Bands are 95 % intervals over seeds, their spread pooled over the cells." if known else (
        "One seed: no band can be drawn."
    )  # fmt: skip
    return f"{band} The dashed line is where cells are compared: what the fastest run took, and the fewest samples."


def _fronted(sweep: "Sweep") -> str:
    keys = " · ".join(key for key, _ in sweep.cells[0].values) or "the only cell"
    return f"Points are named by {keys}; the line joins those that no other beats in both."


def _labelled(xlabel: str, ylabel: str, draw: Callable[[Axes], None]) -> Callable[[Axes], None]:
    def fill(axes: Axes) -> None:
        axes.set_xlabel(xlabel, color=MUTED)
        axes.set_ylabel(ylabel, color=MUTED)
        draw(axes)

    return fill


def _looks(sweep: "Sweep") -> dict[str, charts.Look]:
    return charts.looks([(cell.name, cell.label, cell.values) for cell in sweep.cells])


def _rewards(sweep: "Sweep", verdict: "Verdict") -> list[Picture]:
    looks, over_time, over_samples = _looks(sweep), curves(sweep.runs, by_time), curves(sweep.runs, by_samples)
    if not over_time:
        return []
    time, samples = verdict.at_time.where, verdict.at_samples.where
    return [
        Picture("reward-time.png", "Held-out reward against wall-clock", _labelled(
            "seconds of training", "held-out reward", lambda axes: charts.rewards(axes, over_time, looks, time))),
        Picture("reward-samples.png", "Held-out reward against samples", _labelled(
            "trajectories generated", "held-out reward",
            lambda axes: charts.rewards(axes, over_samples, looks, samples))),
    ]  # fmt: skip


def _fronts(sweep: "Sweep", verdict: "Verdict") -> list[Picture]:
    looks, chosen, found = _looks(sweep), verdict.advice.cell, []
    if verdict.frugal:
        found.append(Picture("pareto-reward.png", "Reward at equal wall-clock", _labelled(
            f"trajectories generated in {verdict.at_time.where:.1f} s", "held-out reward then",
            lambda axes: charts.pareto(axes, verdict.frugal, looks, chosen, verdict.at_time))))  # fmt: skip
    if verdict.fast:
        found.append(Picture("pareto-speed.png", "Throughput and divergence", _labelled(
            f"{REMAINING[verdict.remaining]}, nats a token", "tokens generated a second",
            lambda axes: charts.pareto(axes, verdict.fast, looks, chosen, None))))  # fmt: skip
    return found


def _costs(sweep: "Sweep", verdict: "Verdict") -> list[Picture]:
    cells = [cell.name for cell in sweep.cells if cell.name in sweep.runs]
    if not cells:
        return []
    row = charts.Row(cells, _looks(sweep), verdict.figures)
    return [
        Picture("throughput.png", "Throughput", _labelled("", "tokens/s", lambda a: charts.bars(a, row, SPEEDS))),
        Picture("kl.png", "Divergence", _labelled("", "KL, nats a token", lambda a: charts.divergences(a, row))),
        Picture("acceptance.png", "Acceptance and ESS", _labelled("", "share", lambda a: charts.lines(a, row, SHARES))),
        Picture("waste.png", "Waste", _labelled("", "share of the generated", lambda a: charts.stacks(a, row, WASTE))),
        Picture("lag.png", "Lag of trained tokens", _labelled("", "versions", lambda a: charts.lines(a, row, LAGS))),
    ]
