"""How pictures look and where they go: a PNG beside the report, and the same as SVG inside its page.

::

    Picture(name, title, draw)  ->  place(picture, directory)  ->  document.Figure

The page's SVG keeps its words as text and takes the page's colours, so it is sharp on a phone and readable in
the dark. A picture too heavy for that goes in as PNG.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed or opened

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from tools import document
from tools.run_files import Record

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE, GREEN, RED = "#2563eb", "#ea7317", "#0e9f6e", "#d64545"
SERIES = (BLUE, ORANGE, GREEN, RED, "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
VARIABLES = dict(
    zip(
        (INK, MUTED, GRID, *SERIES),
        ("ink", "muted", "grid", "blue", "orange", "green", "red", "violet", "cyan", "rose", "olive"),
        strict=True,
    )
)  # of page.css
SIZE = (5.4, 3.5)  # inches: half of a desktop's width, all of a phone's
DPI = 180
SVG_LIMIT = 160_000  # characters; beyond it the page holds the PNG
SMOOTH = 9  # points in the running mean drawn over a noisy curve
LARGEST = ("lag_max", "staleness_budget")  # of which the largest is drawn where steps are too many to be told apart
FINER = re.compile(r"(\d+\.\d{2})\d+")  # than can be seen
SO_FAR = ("step", "time_s", "tokens_generated", "version")  # of which the last is
MAX_POINTS = 1000  # of a curve; more cannot be told apart


@dataclass(frozen=True)
class Picture:
    """``draw`` fills axes that are dressed already."""

    name: str  # of the PNG
    title: str
    draw: Callable[[Axes], None]

    @property
    def stem(self) -> str:
        """Its name without the suffix."""
        return self.name.removesuffix(".png")


def place(picture: Picture, directory: Path) -> document.Figure:
    """Write the PNG into ``directory`` and return the block that shows it."""
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    dress(axes, picture.title)
    picture.draw(axes)
    return place_figure(figure, picture.name, picture.title, directory)


def place_figure(figure: Figure, name: str, alt: str, directory: Path) -> document.Figure:
    """As :func:`place`, for a picture that was drawn already; ``alt`` says what it shows."""
    FigureCanvasAgg(figure).print_png(directory / name)  # savefig would draw it twice, and drawing is what takes time
    figure.set_layout_engine("none")  # it is laid out
    svg = to_svg(figure)
    png = b"" if len(svg) <= SVG_LIMIT else (directory / name).read_bytes()
    return document.Figure(name, alt, "" if png else svg, png)


def to_svg(figure: Figure) -> str:
    """Its SVG element, in the page's colours and type; two decimals of a point are enough."""
    buffer = io.StringIO()
    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set_facecolor("none")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "croupier"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", lambda tag: FINER.sub(r"\1", tag[0]), text)  # and not the words between the tags
    text = re.sub(r"\s*\n\s*", " ", text)
    for color, name in VARIABLES.items():
        text = text.replace(color, f"var(--{name})")
    return text


def dress(axes: Axes, title: str) -> None:
    """Grid, title and axes as everywhere."""
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=INK, pad=12)
    axes.set_xlabel("optimizer step", color=MUTED)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=MUTED, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def plain(name: str) -> str:
    """``name``, which anybody may have chosen, as matplotlib draws it: no formula, and not left out of a legend."""
    escaped = name.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def from_floor(axes: Axes, floor: float) -> None:
    """Draw a logarithmic axis from ``floor`` on, where anything lies above it."""
    low, high = axes.get_ylim()
    if low < floor < high:
        axes.set_ylim(bottom=floor)


def legend(axes: Axes, *others: Axes) -> None:
    """Under the picture, where no curve runs."""
    lines, labels = axes.get_legend_handles_labels()
    for other in others:
        more, names = other.get_legend_handles_labels()
        lines, labels = [*lines, *more], [*labels, *names]
    figure = axes.get_figure()
    if lines and figure is not None:
        figure.legend(
            lines, labels, loc="outside lower left", ncols=2, frameon=False, labelcolor=INK, fontsize=10,
            handlelength=1.6, columnspacing=1.4,
        )  # fmt: skip


def series(steps: Sequence[Record], key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of those that have ``key``, as a number."""
    found = [(step["step"], step[key]) for step in steps if step.get(key) is not None and math.isfinite(step[key])]
    return [x for x, _ in found], [y for _, y in found]


def running_mean(values: Sequence[float]) -> list[float]:
    """Over SMOOTH values around each."""
    half = SMOOTH // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def noisy(axes: Axes, steps: Sequence[Record], key: str, color: str, label: str) -> None:
    """A curve with its running mean, or points where they are few."""
    x, y = series(steps, key)
    if len(x) < 2 * SMOOTH:
        axes.plot(x, y, color=color, linewidth=1.8, marker="o", markersize=3.5, label=label)
        return
    axes.plot(x, y, color=color, linewidth=0.8, alpha=0.3)
    axes.plot(x, running_mean(y), color=color, linewidth=2.0, label=f"{label} (mean of {SMOOTH})")


def thinned(steps: Sequence[Record]) -> list[Record]:
    """At most MAX_POINTS records: of neighbours the means, of lags and budgets the largest, of sums so far the last."""
    if len(steps) <= MAX_POINTS:
        return list(steps)
    size = -(-len(steps) // MAX_POINTS)
    return [_merged(steps[at : at + size]) for at in range(0, len(steps), size)]


def _merged(steps: Sequence[Record]) -> Record:
    last = dict(steps[-1])
    for key in dict.fromkeys(key for step in steps for key in step):
        known = [step[key] for step in steps if isinstance(step.get(key), int | float)]
        if not known or isinstance(known[-1], bool) or not isinstance(last.get(key), int | float | None):
            continue
        if key in SO_FAR:
            last[key] = known[-1]
        else:
            last[key] = max(known) if key in LARGEST else sum(known) / len(known)
    return last
