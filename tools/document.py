"""A report as a list of blocks, written once and rendered as Markdown and as one self-contained HTML page.

::

    Document("Run quickstart", [Heading("Result"), Table(...), Figure(...)])  ->  tools.markdown  ->  report.md
                                                                              ->  tools.page      ->  report.html

Text is never parsed: a plain string is shown as it stands, in both, whatever it holds; emphasis, code and
links are :class:`Bold`, :class:`Code` and :class:`Link` beside strings in a tuple.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

SAFE_TARGET = re.compile(r"(https?://|#|[\w.@~-][\w./@~#-]*$)[^\s()<>]*$")  # the web, this page, a file beside it


# ---- text ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Code:
    """Something a machine says or is told."""

    text: str


@dataclass(frozen=True)
class Bold:
    """Emphasis."""

    text: str


@dataclass(frozen=True)
class Link:
    """``text`` leading to ``target``: the web, a #heading or a file beside the report; else it is only text."""

    text: str
    target: str

    @property
    def is_safe(self) -> bool:
        """Whether ``target`` is one of those."""
        return SAFE_TARGET.match(self.target) is not None


Inline = str | Code | Bold | Link
Text = Inline | tuple[Inline, ...]


# ---- blocks -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heading:
    """Opens a section; those of level 2 are the table of contents."""

    text: str
    level: Literal[2, 3] = 2


@dataclass(frozen=True)
class Paragraph:
    """Prose."""

    text: Text


@dataclass(frozen=True)
class Note:
    """Prose that must not be overlooked."""

    text: Text
    kind: Literal["info", "warning", "good"] = "info"


@dataclass(frozen=True)
class Items:
    """An unordered list."""

    items: Sequence[Text]


@dataclass(frozen=True)
class Table:
    """``rows`` under ``head``; empty titles for a table of labels and values. ``numbers``: right-aligned columns."""

    head: Sequence[Text]
    rows: Sequence[Sequence[Text]]
    numbers: Sequence[int] = ()

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.head) for row in self.rows), self.head


@dataclass(frozen=True)
class Tiles:
    """A few headline figures: (what, figure, a word on it)."""

    tiles: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Listing:
    """Lines of a log or a file, as they are."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Figure:
    """A picture: a file beside the report for Markdown, its SVG or else its PNG inside the page."""

    path: str  # relative to the report
    alt: str
    svg: str = ""  # tools.pictures makes it
    png: bytes = b""


@dataclass(frozen=True)
class Fold:
    """Blocks that the page shows on demand and Markdown in full, or by ``file`` where they lie beside it anyway."""

    title: str
    blocks: Sequence["Block"]
    file: str = ""


Block = Heading | Paragraph | Note | Items | Table | Tiles | Listing | Figure | Fold


@dataclass(frozen=True)
class Document:
    """A title and what stands under it."""

    title: str
    blocks: list[Block] = field(default_factory=list)


def pairs(rows: Sequence[tuple[Text, Text]]) -> Table:
    """A table of labels and their values."""
    return Table(("", ""), rows)


def parts(text: Text) -> tuple[Inline, ...]:
    """``text`` as its pieces."""
    return text if isinstance(text, tuple) else (text,)
