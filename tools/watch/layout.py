"""A screen made of blocks: which of them fit into so many lines, and how they stand beside each other. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

GAP = "  "  # between a table's columns
DIM = "bright_black"

Cell = tuple[str, str]  # what and in which style


@dataclass(frozen=True)
class Block:
    """A titled part of the screen. ``draw(width, lines)`` gives at most ``lines`` lines."""

    title: str
    rank: int  # the greater goes first where room is short
    least: int  # lines below the title without which it is left out
    wanted: int  # lines that it can use
    draw: Callable[[int, int], list[Text]]
    stretch: int = 0  # further lines that make it nicer


def fitted(line: Text, width: int) -> Text:
    """``line`` in exactly ``width`` cells."""
    found = line.copy()
    found.truncate(width, overflow="ellipsis", pad=True)
    return found


def rule(title: str, width: int) -> Text:
    """A block's title line."""
    return fitted(Text.assemble((title, "bold"), " ", ("─" * (width - cell_len(title) - 1), DIM)), width)


def allot(blocks: Sequence[Block], height: int) -> list[tuple[Block, int]]:
    """The blocks that fit into ``height`` lines, in their order, each with its lines below the title."""
    chosen = list(blocks)
    while chosen and sum(block.least + 1 for block in chosen) > height:
        chosen.remove(max(reversed(chosen), key=lambda block: block.rank))
    lines = {id(block): block.least for block in chosen}
    left = height - sum(block.least + 1 for block in chosen)
    for stretching in (False, True):
        hungry = sorted(chosen, key=lambda block: block.rank)
        while left > 0 and hungry:
            hungry = [block for block in hungry if lines[id(block)] < block.wanted + block.stretch * stretching]
            for block in hungry[:left]:
                lines[id(block)] += 1
                left -= 1
    return [(block, lines[id(block)]) for block in chosen]


def column(blocks: Sequence[Block], width: int, height: int) -> list[Text]:
    """Blocks below each other: at most ``height`` lines of exactly ``width`` cells."""
    found: list[Text] = []
    for block, lines in allot(blocks, height):
        drawn = block.draw(width, lines)[:lines]
        found += [rule(block.title, width), *(fitted(line, width) for line in drawn)]
    return found[:height]


def beside(left: Sequence[Text], right: Sequence[Text], width: int, right_width: int) -> list[Text]:
    """Two columns, ``width`` and ``right_width`` cells wide, three cells apart."""
    rows = max(len(left), len(right))
    blank = Text()
    return [
        Text.assemble(
            fitted(left[i] if i < len(left) else blank, width),
            "   ",
            fitted(right[i] if i < len(right) else blank, right_width),
        )
        for i in range(rows)
    ]


def table(
    header: Sequence[str], rows: Sequence[Sequence[Cell | Text]], width: int, lines: int, counting: bool = True
) -> list[Text]:
    """``header`` and rows in columns, the first aligned left, the others right.

    Columns are left out from the right until the rest fits into ``width``; ``counting``: the last line says how
    many rows are left out.
    """
    if lines < 1:
        return []
    room = lines - 1
    cut = len(rows) > room and counting and room > 0
    shown = rows[: room - cut]
    cells = [[Text(cell[0], style=cell[1]) if isinstance(cell, tuple) else cell for cell in row] for row in shown]
    widths = [max([cell_len(name), *(row[i].cell_len for row in cells)]) for i, name in enumerate(header)]
    count = len(header)
    while count > 1 and sum(widths[:count]) + len(GAP) * (count - 1) > width:
        count -= 1
    found = [_row([Text(name, style=DIM) for name in header], widths, count)]
    found += [_row(row, widths, count) for row in cells]
    if cut:
        found.append(Text(f"… {len(rows) - len(shown)} more", style=DIM))
    return found


def _row(cells: Sequence[Text], widths: Sequence[int], count: int) -> Text:
    line = Text()
    for i, cell in enumerate(cells[:count]):
        space = " " * max(0, widths[i] - cell.cell_len)
        line.append(GAP if i else "")
        line = Text.assemble(line, *((cell, space) if i == 0 else (space, cell)))
    return line
