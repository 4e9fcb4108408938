"""Which pictures a sweep's report has, in which order, and what is said under them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from matplotlib.axes import Axes

from tools.plots import BLUE, GREEN, ORANGE, RED
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


@dataclass(frozen=True)
class Picture:
    """A file in the sweep's directory."""

    name: str
    title: str
    caption: str = ""
    opens: bool = True  # a section of its own


def draw_all(sweep: "Sweep", verdict: "Verdict") -> list[Picture]:
    """Draw what can be drawn; returns the pictures in the report's order."""
    looks = charts.looks([(cell.name, cell.label, cell.values) for cell in sweep.cells])
    cells = [cell.name for cell in sweep.cells if cell.name in sweep.runs]
    found: list[Picture] = []

    def add(name: str, title: str, xlabel: str, ylabel: str, fill: Callable[[Axes], None], caption: str = "") -> None:
        charts.draw(sweep.directory / name, title, xlabel, ylabel, fill)
        found.append(Picture(name, title, caption))

    over_time, over_samples = curves(sweep.runs, by_time), curves(sweep.runs, by_samples)
    if over_time:
        known = verdict.at_time.knows_seeds
        band = "Bands are 95 % intervals over seeds, their spread pooled over the cells." if known else (
            "One seed: no band can be drawn."
        )  # fmt: skip
        fill = partial(charts.rewards, curves=over_time, looks=looks, where=verdict.at_time.where)
        title = "Held-out reward against wall-clock"
        add("reward-time.png", title, "seconds of training", "held-out reward", fill,
            f"{band} The dashed line is where cells are compared: the training time of the fastest run.")  # fmt: skip
        fill = partial(charts.rewards, curves=over_samples, looks=looks, where=verdict.at_samples.where)
        title = "Held-out reward against samples"
        add("reward-samples.png", title, "trajectories generated", "held-out reward", fill)
    if verdict.frugal:
        chosen = verdict.advice.cell
        fill = partial(
            charts.pareto, places=verdict.frugal, looks=looks, chosen=chosen, halves=verdict.at_time
        )  # fmt: skip
        add("pareto-reward.png", "Reward at equal wall-clock, and what it took",
            f"trajectories generated in {verdict.at_time.where:.1f} s", "held-out reward then", fill)  # fmt: skip
    if verdict.fast:
        fill = partial(charts.pareto, places=verdict.fast, looks=looks, chosen=verdict.advice.cell, halves=None)
        add("pareto-speed.png", "Throughput, and what it costs in divergence",
            f"{REMAINING[verdict.remaining]}, nats a token", "tokens generated a second", fill)  # fmt: skip
    if cells:
        row = charts.Row(cells, looks, verdict.figures)
        add("throughput.png", "Throughput", "", "tokens/s", lambda axes: charts.bars(axes, row, SPEEDS))
        add("kl.png", "Divergence from the policy", "", "KL, nats a token", lambda axes: charts.divergences(axes, row))
        add("acceptance.png", "Acceptance and ESS", "", "share", lambda axes: charts.lines(axes, row, SHARES))
        add("waste.png", "Waste", "", "share of the generated", lambda axes: charts.stacks(axes, row, WASTE))
        add("lag.png", "Lag of trained tokens", "", "versions", lambda axes: charts.lines(axes, row, LAGS))
    return found
