"""A document (:mod:`tools.document`) as Markdown, GitHub's kind."""

import re
from collections.abc import Sequence

from tools.document import (
    Block,
    Bold,
    Code,
    Document,
    Figure,
    Fold,
    Heading,
    Inline,
    Items,
    Link,
    Listing,
    Note,
    Paragraph,
    Table,
    Text,
    Tiles,
    parts,
)

MARKUP = re.compile(r"([\\`*<>\[\]|~])|(&)(?=#?\w+;)|(?<!\w)(_)|(_)(?!\w)")  # a _ within a word is only a _
LINE_START = re.compile(r"^(#{1,6} |[-+] |>|\d+[.)] )")


def to_markdown(document: Document) -> str:
    """The whole document."""
    blocks = "\n\n".join(found for found in map(_block, document.blocks) if found)
    return f"# {_text(document.title)}\n\n{blocks}\n"


def _block(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {_text(block.text)}"
        case Paragraph():
            return _line(block.text)
        case Note():
            return f"> {_line(block.text)}"
        case Items():
            return "\n".join(f"- {_line(item)}" for item in block.items)
        case Table():
            return _table(block)
        case Tiles():
            return _table(Table(("", "", ""), block.tiles))
        case Listing():
            longest = max((len(run) for line in block.lines for run in re.findall("`+", line)), default=0)
            fence = "`" * max(3, longest + 1)
            return "\n".join([fence, *(line.rstrip("\r\n") for line in block.lines), fence])
        case Figure():
            return f"![{_text(block.alt)}]({block.path})"
        case Fold() if block.file:
            return f"{_line(block.title)}: {_text(Link(block.file, block.file))}"
        case Fold():
            return "\n\n".join([f"### {_text(block.title)}", *filter(None, map(_block, block.blocks))])


def _table(table: Table) -> str:
    if not table.rows:
        return ""
    rule = "".join("|---:" if column in table.numbers else "|---" for column in range(len(table.head)))
    return "\n".join([_row(table.head), f"{rule}|", *map(_row, table.rows)])


def _row(cells: Sequence[Text]) -> str:
    def shown(piece: Inline) -> str:
        found = _inline(piece)
        return found.replace("|", r"\|") if isinstance(piece, Code) else found  # a bar ends the cell, even in code

    texts = ["".join(map(shown, parts(cell))) for cell in cells]
    return "|" + "|".join(f" {text} " if text else " " for text in texts) + "|"


def _line(text: Text) -> str:
    """As :func:`_text`, where a line begins with it."""
    found = _text(text)
    return "\\" + found if LINE_START.match(found) and isinstance(parts(text)[0], str) else found


def _text(text: Text) -> str:
    return "".join(map(_inline, parts(text)))


def _inline(piece: Inline) -> str:
    match piece:
        case Code():
            flat = _flat(piece.text)
            fence = "`" * (1 + max((len(run) for run in re.findall("`+", flat)), default=0))
            return f"{fence} {flat} {fence}" if len(fence) > 1 else f"`{flat}`"
        case Bold():
            return f"**{_escaped(piece.text)}**"
        case Link():
            return f"[{_escaped(piece.text)}]({piece.target})" if piece.is_safe else _escaped(piece.text)
        case str():
            return _escaped(piece)


def _escaped(text: str) -> str:
    return MARKUP.sub(lambda found: "\\" + found[0], _flat(text))


def _flat(text: str) -> str:
    """On one line, without characters that do not print."""
    return "".join(c if c.isprintable() else " " for c in text)
