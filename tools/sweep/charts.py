"""The sweep's pictures, one question each."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed or opened

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.plots import BLUE, GREEN, GRID, INK, MUTED, ORANGE, RED
from tools.sweep.analysis import Comparison, Curve, front

SIZE = (8.0, 4.4)  # inches
DPI = 110
STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P")
LEAST_KL = 1e-7  # nats; below it a divergence is a rounding error
Figures = Mapping[str, Mapping[str, float]]  # figure -> cell -> mean over seeds


@dataclass(frozen=True)
class Look:
    """How a cell is drawn: colour by the first axis, line and marker by the others."""

    label: str
    color: tuple[float, float, float, float]
    style: str
    marker: str


def looks(cells: Sequence[tuple[str, str, Sequence[tuple[str, str]]]]) -> dict[str, Look]:
    """``(name, label, values)`` of each cell -> how it is drawn."""
    firsts = list(dict.fromkeys(values[0][1] if values else "" for _, _, values in cells))
    rests = list(dict.fromkeys(tuple(values[1:]) for _, _, values in cells))
    colors = colormaps["viridis"]
    found = {}
    for name, label, values in cells:
        place = firsts.index(values[0][1] if values else "") / max(1, len(firsts) - 1)
        rest = rests.index(tuple(values[1:]))
        found[name] = Look(
            label, colors(0.05 + 0.85 * place), STYLES[rest % len(STYLES)], MARKERS[rest % len(MARKERS)]
        )  # fmt: skip
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


def draw(path: Path, title: str, xlabel: str, ylabel: str, fill: Callable[[Axes], None]) -> str:
    """One figure; returns the file's name."""
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=INK, pad=12)
    axes.set_xlabel(xlabel, color=MUTED)
    axes.set_ylabel(ylabel, color=MUTED)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=MUTED, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    fill(axes)
    figure.savefig(path)
    return path.name


def rewards(axes: Axes, curves: Mapping[str, Curve], looks: Mapping[str, Look], where: float) -> None:
    """Mean curves with their bands, and the place where they are compared."""
    for cell, curve in curves.items():
        look = looks[cell]
        axes.plot(curve.x, curve.mean, color=look.color, linestyle=look.style, linewidth=1.8, label=look.label)
        if not any(map(math.isnan, curve.half)):
            low, high = curve.mean - curve.half, curve.mean + curve.half
            axes.fill_between(curve.x, low, high, color=look.color, alpha=0.1, linewidth=0)
    if math.isfinite(where):
        axes.axvline(where, color=MUTED, linewidth=1.0, linestyle=(0, (5, 3)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    _legend(axes, len(curves))


def bars(axes: Axes, row: Row, parts: Parts) -> None:
    """Side by side for each cell."""
    width = 0.8 / len(parts)
    for number, (name, color, label) in enumerate(parts):
        values = row.of(name)
        at = [index + (number - (len(parts) - 1) / 2) * width for index in range(len(row.cells))]
        axes.bar(at, [values.get(cell, math.nan) for cell in row.cells], width * 0.92, color=color, label=label)
    _ticks(axes, row)
    _legend(axes, len(parts))


def stacks(axes: Axes, row: Row, parts: Parts) -> None:
    """On top of each other for each cell; what was not recorded counts as nothing."""
    bottom = [0.0] * len(row.cells)
    for name, color, label in parts:
        heights = [row.of(name).get(cell, 0.0) for cell in row.cells]
        axes.bar(range(len(row.cells)), heights, 0.6, bottom=bottom, color=color, label=label)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
    _ticks(axes, row)
    _legend(axes, len(parts))


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
        axes.set_ylim(bottom=max(LEAST_KL, axes.get_ylim()[0]))
    _ticks(axes, row)
    _legend(axes, 3)


def lines(axes: Axes, row: Row, parts: Parts) -> None:
    """A point for each cell and figure, joined."""
    for name, color, label in parts:
        values = row.of(name)
        known = [(index, values[cell]) for index, cell in enumerate(row.cells) if cell in values]
        if known:
            axes.plot(*zip(*known, strict=True), color=color, marker="o", linewidth=1.4, label=label)
    _ticks(axes, row)
    _legend(axes, len(parts))


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
        axes.annotate(look.label, (cost, worth), xytext=(7, 5), textcoords="offset points", fontsize=8, color=INK)
    if chosen in places:
        axes.plot(
            *places[chosen], marker="o", markersize=16, markerfacecolor="none", markeredgecolor=RED,
            markeredgewidth=1.8, linestyle="none", label="recommended",
        )  # fmt: skip
    axes.margins(0.14)
    _legend(axes, 2)


def _ticks(axes: Axes, row: Row) -> None:
    short = [row.looks[cell].label for cell in row.cells]
    if all(label.count("=") == 1 for label in short):
        axes.set_xlabel(short[0].partition("=")[0], color=MUTED)
        axes.set_xticks(range(len(short)), [label.partition("=")[2] for label in short])
        return
    axes.set_xticks(range(len(short)), [label.replace(" ", "\n") for label in short])
    axes.tick_params(axis="x", labelsize=7 if len(short) < 9 else 5)


def _legend(axes: Axes, count: int) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=INK, fontsize=8, ncols=1 if count < 7 else 2, handlelength=1.8)
