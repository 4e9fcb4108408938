"""The sweep's pictures, one question each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from tools.pictures import BLUE, GREEN, INK, MUTED, ORANGE, RED, SERIES, from_floor, legend, plain
from tools.sweep.analysis import Comparison, Curve, front

# The page's own colours, which it changes in the dark, in the order of a rainbow.
RAINBOW = (BLUE, SERIES[5], GREEN, SERIES[7], ORANGE, RED, SERIES[6], SERIES[4])
STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P")
FEW_CELLS = 8  # more of them are named in smaller letters
LEAST_KL = 1e-7  # nats; below it a divergence is a rounding error
Figures = Mapping[str, Mapping[str, float]]  # figure -> cell -> mean over seeds


@dataclass(frozen=True)
class Look:
    """How a cell is drawn: colour by the first axis, line and marker by the others."""

    label: str
    short: str  # the values alone
    color: str
    style: str
    marker: str


def looks(cells: Sequence[tuple[str, str, Sequence[tuple[str, str]]]]) -> dict[str, Look]:
    """``(name, label, values)`` of each cell -> how it is drawn."""
    firsts = list(dict.fromkeys(values[0][1] if values else "" for _, _, values in cells))
    rests = list(dict.fromkeys(tuple(values[1:]) for _, _, values in cells))
    colors: Sequence[str] = RAINBOW
    if len(firsts) > len(RAINBOW):
        colors = [to_hex(colormaps["viridis"](place / len(firsts))) for place in range(len(firsts))]
    found = {}
    for name, label, values in cells:
        color = colors[firsts.index(values[0][1] if values else "")]
        rest = rests.index(tuple(values[1:]))
        short = " · ".join(value for _, value in values) or label
        found[name] = Look(label, short, color, STYLES[rest % len(STYLES)], MARKERS[rest % len(MARKERS)])
    return found


@dataclass(frozen=True)
class Row:
    """Cells side by side, each with its figures."""

    cells: Sequence[str]
    looks: Mapping[str, Look]
    figures: Figures

    def of(self, name: str) -> Mapping[str, float]:
        """One figure by cell."""
        return self.figures.get(name, {})


Parts = Sequence[tuple[str, str, str]]  # (figure, colour, label)


def rewards(axes: Axes, curves: Mapping[str, Curve], looks: Mapping[str, Look], where: float) -> None:
    """Mean curves with their bands, and the place where they are compared."""
    for cell, curve in curves.items():
        look = looks[cell]
        axes.plot(curve.x, curve.mean, color=look.color, linestyle=look.style, linewidth=1.8, label=plain(look.label))
        if not any(map(math.isnan, curve.half)):
            low, high = curve.mean - curve.half, curve.mean + curve.half
            axes.fill_between(curve.x, low, high, color=look.color, alpha=0.08, linewidth=0)
    if math.isfinite(where):
        axes.axvline(where, color=MUTED, linewidth=1.0, linestyle=(0, (5, 3)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    legend(axes)


def bars(axes: Axes, row: Row, parts: Parts) -> None:
    """Side by side for each cell."""
    width = 0.8 / len(parts)
    for number, (name, color, label) in enumerate(parts):
        values = row.of(name)
        at = [index + (number - (len(parts) - 1) / 2) * width for index in range(len(row.cells))]
        axes.bar(at, [values.get(cell, math.nan) for cell in row.cells], width * 0.92, color=color, label=label)
    _ticks(axes, row)
    legend(axes)


def stacks(axes: Axes, row: Row, parts: Parts) -> None:
    """On top of each other for each cell; what was not recorded counts as nothing."""
    bottom = [0.0] * len(row.cells)
    for name, color, label in parts:
        heights = [row.of(name).get(cell, 0.0) for cell in row.cells]
        axes.bar(range(len(row.cells)), heights, 0.6, bottom=bottom, color=color, label=label)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
    _ticks(axes, row)
    legend(axes)


def divergences(axes: Axes, row: Row) -> None:
    """Before and after rejection, and what the learner saw, on a logarithmic scale."""
    for name, color, label in (
        ("kl_before", RED, "before rejection"),
        ("kl_after", GREEN, "after it"),
        ("kl_learner", BLUE, "at the learner"),
    ):
        known = [(index, value) for index, cell in enumerate(row.cells) if (value := row.of(name).get(cell, 0)) > 0]
        if known:
            axes.plot(*zip(*known, strict=True), color=color, marker="o", linewidth=1.4, label=label)
    if axes.lines:
        axes.set_yscale("log")
        from_floor(axes, LEAST_KL)
    _ticks(axes, row)
    legend(axes)


def lines(axes: Axes, row: Row, parts: Parts) -> None:
    """A point for each cell and figure, joined."""
    for name, color, label in parts:
        values = row.of(name)
        known = [(index, values[cell]) for index, cell in enumerate(row.cells) if cell in values]
        if known:
            axes.plot(*zip(*known, strict=True), color=color, marker="o", linewidth=1.4, label=label)
    _ticks(axes, row)
    legend(axes)


def pareto(
    axes: Axes,
    places: Mapping[str, tuple[float, float]],
    looks: Mapping[str, Look],
    chosen: str,
    halves: Comparison | None,
) -> None:
    """Every cell at (cost, worth), the front joined, the recommended cell ringed."""
    best = front(places)
    axes.plot(
        [places[c][0] for c in best], [places[c][1] for c in best], color=ORANGE, linewidth=1.6, label="Pareto front"
    )
    for cell, (cost, worth) in places.items():
        look = looks[cell]
        half = halves.half(cell) if halves is not None else math.inf
        if math.isfinite(half):
            axes.errorbar(cost, worth, yerr=half, color=look.color, linewidth=1.0, alpha=0.6)
        axes.plot(cost, worth, marker=look.marker, color=look.color, markersize=8, linestyle="none")
        name = plain(look.short)
        axes.annotate(name, (cost, worth), xytext=(7, 5), textcoords="offset points", fontsize=9, color=INK)
    if chosen in places:
        axes.plot(
            *places[chosen], marker="o", markersize=16, markerfacecolor="none", markeredgecolor=RED,
            markeredgewidth=1.8, linestyle="none", label="recommended",
        )  # fmt: skip
    axes.margins(0.14)
    legend(axes)


def _ticks(axes: Axes, row: Row) -> None:
    shorts = [row.looks[cell].short for cell in row.cells]
    labels = [row.looks[cell].label for cell in row.cells]
    axes.set_xlabel(" · ".join(part.partition("=")[0] for part in labels[0].split(" ")), color=MUTED)
    axes.set_xticks(range(len(shorts)), [plain(short).replace(" · ", "\n") for short in shorts])
    if len(shorts) > FEW_CELLS:
        axes.tick_params(axis="x", labelsize=6)
