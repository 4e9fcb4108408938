"""The verdict as a picture: one stacked bar a process."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed or opened

from matplotlib.figure import Figure

from tools.pictures import INK, MUTED
from tools.profile.verdict import Verdict
from tools.profile.words import LEAST, shown
from tools.timelines import is_idle

WIDTH, ROW, REST = 5.6, 0.42, 1.9  # inches: of the picture, of a bar, of title, axis and legend
ON_GREY = "#1f2932"  # of words in a bar; INK is light where a page is dark
DPI = 130
WORK = (
    "#2563eb", "#0e9f6e", "#7c3aed", "#0891b2", "#4d7c0f", "#be185d", "#b45309", "#1d4ed8", "#047857", "#6d28d9",
)  # fmt: skip
IDLE_COLORS = ("#cbd2d9", "#9aa5b1", "#e4e7eb", "#7b8794", "#d9c7b8", "#b8a99a")  # of causes, one after the other
NAMED = 0.04  # of the window: a wait that long has its cause written into it


def draw(verdict: Verdict, path: Path) -> bool:
    """Write a PNG or SVG; False and no file where there is nothing to draw."""
    figure = figure_of(verdict)
    if figure is not None:
        figure.savefig(path)
    return figure is not None


def figure_of(verdict: Verdict) -> Figure | None:
    """None where there is nothing to draw."""
    processes = [p for p in shown(verdict.processes) if p.there_s]
    if not processes:
        return None
    figure = Figure(figsize=(WIDTH, REST + ROW * len(processes)), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    colors: dict[str, str] = {}
    for row, process in enumerate(processes):
        whole = process.there_s + process.absent_s
        at = 0.0
        work = [(s, wall) for s, (wall, _) in process.states.items() if not is_idle(s) and wall / whole >= LEAST]
        for state, wall in work:
            first = state not in colors
            color = colors.setdefault(state, WORK[len(colors) % len(WORK)])
            axes.barh(row, wall / whole, left=at, color=color, label=state if first else None)
            at += wall / whole
        for number, (cause, seconds) in enumerate(sorted(process.causes.items(), key=lambda pair: -pair[1])):
            share = seconds / whole
            axes.barh(row, share, left=at, color=IDLE_COLORS[number % len(IDLE_COLORS)])
            if share >= NAMED * max(1, len(cause) / 6):
                axes.text(at + share / 2, row, cause, ha="center", va="center", fontsize=8, color=ON_GREY)
            at += share
    axes.set_yticks(range(len(processes)), [process.name for process in processes])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.tick_params(colors=MUTED, length=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_title("Where the time went; grey is waiting, and for what", loc="left", fontsize=11, color=INK)
    if colors:
        figure.legend(loc="outside lower left", ncols=4, frameon=False, fontsize=9, labelcolor=INK, columnspacing=1.2)
    return figure
