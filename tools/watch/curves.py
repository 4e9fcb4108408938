"""Curves, bars and sparklines out of characters."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

SPARKS = "▁▂▃▄▅▆▇█"
PARTS = " ▏▎▍▌▋▊▉█"
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille cell: [row][column]
BRAILLE = 0x2800

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One curve: points by x, and a colour. ``joined``: dots between the points too."""

    points: Sequence[Point]
    style: str
    joined: bool = True
    bands: Sequence[tuple[float, float, float]] = ()  # x, low, high


def sparkline(values: Sequence[float], width: int, low: float | None = None, high: float | None = None) -> str:
    """The values as bars between ``low`` and ``high`` (theirs unless given), each bar the mean of its share."""
    if not values or width < 1:
        return ""
    size = -(-len(values) // width)
    means = [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]
    low, high = min(means) if low is None else low, max(means) if high is None else high
    span = high - low
    top = len(SPARKS) - 1
    return "".join(
        SPARKS[min(top, max(0, int((mean - low) / span * len(SPARKS)))) if span > 0 else 0] for mean in means
    )


def bar(share: float, width: int) -> str:
    """``share`` of ``width`` cells, in eighths of a cell."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (PARTS[rest] if rest else ""))[:width]


def stacked(parts: Sequence[tuple[float, str, str]], width: int) -> Text:
    """(share of 1, colour, character) beside each other; whole cells, given to the largest remainders."""
    exact = [max(0.0, share) * width for share, *_ in parts]
    cells = [int(value) for value in exact]
    missing = min(width, round(sum(exact))) - sum(cells)
    for place in sorted(range(len(parts)), key=lambda i: cells[i] - exact[i])[: max(0, missing)]:
        cells[place] += 1
    text = Text()
    for count, (_, style, character) in zip(cells, parts, strict=True):
        text.append(character * count, style=style)
    text.append("·" * (width - sum(cells)), style="dim")
    return text


def bounds(lines: Sequence[Line]) -> tuple[float, float, float, float] | None:
    """x and y from lowest to highest; None without a point."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    ys += [y for line in lines for _, low, high in line.bands for y in (low, high)]
    return (min(xs), max(xs), min(ys), max(ys)) if xs else None


class Canvas:
    """Braille cells, two by four dots each; a later line's colour wins a cell."""

    def __init__(self, width: int, height: int, box: tuple[float, float, float, float]) -> None:
        self.width, self.height, self.box = width, height, box
        self._dots = [[0] * width for _ in range(height)]
        self._styles = [[""] * width for _ in range(height)]

    def _at(self, x: float, y: float) -> tuple[int, int]:
        x0, x1, y0, y1 = self.box
        columns, rows = 2 * self.width - 1, 4 * self.height - 1
        column = round((x - x0) / (x1 - x0) * columns) if x1 > x0 else 0
        row = round((y1 - y) / (y1 - y0) * rows) if y1 > y0 else rows // 2
        return min(columns, max(0, column)), min(rows, max(0, row))

    def _dot(self, column: int, row: int, style: str) -> None:
        self._dots[row // 4][column // 2] |= DOTS[row % 4][column % 2]
        self._styles[row // 4][column // 2] = style

    def draw(self, line: Line) -> None:
        """Add a curve with its bands."""
        for x, low, high in line.bands:
            column, top = self._at(x, high)
            for row in range(top, self._at(x, low)[1] + 1):
                self._dot(column, row, line.style)
        dots = [self._at(x, y) for x, y in line.points]
        for place, (column, row) in enumerate(dots):
            self._dot(column, row, line.style)
            if line.joined and place:
                before, level = dots[place - 1]
                steps = max(abs(column - before), abs(row - level))
                for i in range(1, steps):
                    self._dot(
                        before + round((column - before) * i / steps),
                        level + round((row - level) * i / steps),
                        line.style,
                    )

    def rows(self) -> list[Text]:
        """``height`` lines of ``width`` cells."""
        found = []
        for dots, styles in zip(self._dots, self._styles, strict=True):
            text = Text()
            for value, style in zip(dots, styles, strict=True):
                text.append(chr(BRAILLE + value) if value else " ", style=style)
            found.append(text)
        return found


def thinned(points: Sequence[Point], width: int) -> list[Point]:
    """At most ``width`` points, each the mean of its share."""
    size = max(1, -(-len(points) // max(1, width)))
    parts = (points[i : i + size] for i in range(0, len(points), size))
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def short(value: float | None) -> str:
    """A figure in at most seven characters, a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e7):
        return f"{value:.0e}"
    if size >= 1000:
        return f"{value:,.0f}" if size < 1e5 else f"{value / 1000:,.0f}k"
    return f"{value:.3f}" if size < 10 else f"{value:.1f}"
