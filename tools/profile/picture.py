"""The verdict as a picture: one stacked bar a process."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed or opened

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.pictures import INK, MUTED, plain
from tools.profile.spent import Process
from tools.profile.verdict import Verdict
from tools.profile.words import shown
from tools.timelines import is_idle

WIDTH, ROW, REST = 5.6, 0.42, 1.9  # inches: of the picture, of a bar, of title, axis and legend
ON_GREY = "#1f2932"  # of words in a bar; INK is light where a page is dark
DPI = 130
WORK = (
    "#2563eb", "#0e9f6e", "#be185d", "#b45309", "#7c3aed", "#0891b2", "#4d7c0f", "#d64545", "#ea7317", "#0f766e",
    "#9333ea", "#60a5fa", "#34d399", "#f472b6", "#fbbf24", "#a78bfa", "#22d3ee", "#a3e635", "#fb7185",
)  # fmt: skip  # one for each state, as long as they last
OTHER, OTHER_COLOR = "other work", "#52606d"
IDLE_COLORS = ("#cbd2d9", "#9aa5b1", "#e4e7eb", "#7b8794", "#d9c7b8", "#b8a99a")  # of causes, one after the other
SMALL = 0.02  # of the window: less work in one state is drawn as OTHER
LETTER = 0.0115  # of the window: what is as wide as its name has it written into it


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
        at = 0.0
        for state, share in work_of(process):
            label = None if state in colors else state
            color = colors.setdefault(state, OTHER_COLOR if state == OTHER else WORK[len(colors) % len(WORK)])
            at = _part(axes, row, at, share, state, color, "white", label)
        for number, (cause, seconds) in enumerate(sorted(process.causes.items(), key=lambda pair: -pair[1])):
            share = seconds / (process.there_s + process.absent_s)
            at = _part(axes, row, at, share, cause, IDLE_COLORS[number % len(IDLE_COLORS)], ON_GREY, None)
    axes.set_yticks(range(len(processes)), [plain(process.name) for process in processes])
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


def work_of(process: Process) -> list[tuple[str, float]]:
    """Shares of the window, in the order in which the states came; small ones together at the end."""
    whole = process.there_s + process.absent_s
    parts = [(state, wall / whole) for state, (wall, _) in process.states.items() if not is_idle(state)]
    other = sum(share for _, share in parts if share < SMALL)
    large = [(state, share) for state, share in parts if share >= SMALL]
    return [*large, (OTHER, other)] if other > 0 else large


def _part(axes: Axes, row: int, at: float, share: float, name: str, color: str, ink: str, label: str | None) -> float:
    """One part of a bar; returns where the next begins."""
    axes.barh(row, share, left=at, color=color, label=label)
    words = name.replace(".", ".\n")
    if share >= LETTER * (max(map(len, words.split("\n"))) + 1):
        axes.text(at + share / 2, row, words, ha="center", va="center", fontsize=8, color=ink, linespacing=0.9)
    return at + share
