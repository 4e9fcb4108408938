"""A document (:mod:`tools.document`) as one HTML page that needs no other file and no network.

It fetches nothing and runs nothing: styles and pictures are in it, and its policy forbids the rest. It is
readable on a phone, in the dark and on paper; tables scroll inside themselves.
"""

import base64
import html
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

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

STYLE = Path(__file__).with_name("page.css")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def to_html(document: Document) -> str:
    """The whole page; it needs no other file. The table of contents stands before the first heading."""
    headings = list(_headings(document.blocks))
    anchors = _anchors([heading.text for heading in headings])
    lead = list(itertools.takewhile(lambda block: not isinstance(block, Heading), document.blocks))
    rest = document.blocks[len(lead) :]
    names = iter(anchors)
    contents = "".join(
        f'<li><a href="#{anchor}">{_text(heading.text)}</a></li>'
        for heading, anchor in zip(headings, anchors, strict=True)
        if heading.level == 2
    )
    navigation = f"<nav><details open><summary>Contents</summary><ol>{contents}</ol></details></nav>\n"
    title = _text(document.title)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>\n{STYLE.read_text()}</style>\n</head>\n<body>\n"
        f"<header><h1>{title}</h1>\n{_blocks(lead, names)}</header>\n{navigation if contents else ''}"
        f"<main>\n{_blocks(rest, names)}\n</main>\n</body>\n</html>\n"
    )


def _headings(blocks: Sequence[Block]) -> Iterator[Heading]:
    for block in blocks:
        if isinstance(block, Heading):
            yield block
        elif isinstance(block, Fold):
            yield from _headings(block.blocks)


def _anchors(titles: Sequence[str]) -> list[str]:
    """One a heading, each different."""
    found: list[str] = []
    for title in titles:
        stem = anchor = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        number = 1
        while anchor in found:
            number += 1
            anchor = f"{stem}-{number}"
        found.append(anchor)
    return found


def _blocks(blocks: Sequence[Block], anchors: Iterator[str]) -> str:
    """Figures that follow one another stand beside one another where there is room."""
    found: list[str] = []
    gallery: list[Figure] = []
    for block in [*blocks, None]:
        if isinstance(block, Figure):
            gallery.append(block)
            continue
        if gallery:
            found.append(f'<div class="gallery">{"".join(map(_figure, gallery))}</div>')
            gallery = []
        if block is not None:
            found.append(_block(block, anchors))
    return "\n".join(found)


def _block(block: Block, anchors: Iterator[str]) -> str:
    match block:
        case Heading():
            return f'<h{block.level} id="{next(anchors)}">{_text(block.text)}</h{block.level}>'
        case Paragraph():
            return f"<p>{_text(block.text)}</p>"
        case Note():
            return f'<p class="note {block.kind}">{_text(block.text)}</p>'
        case Items():
            return f"<ul>{''.join(f'<li>{_text(item)}</li>' for item in block.items)}</ul>"
        case Table():
            return _table(block)
        case Tiles():
            return f'<div class="tiles">{"".join(_tile(*tile) for tile in block.tiles)}</div>'
        case Listing():
            lines = "\n".join(html.escape(line.rstrip("\r\n")) for line in block.lines)
            return f"<pre>{lines}</pre>"
        case Figure():
            return _figure(block)
        case Fold():
            return f"<details><summary>{_text(block.title)}</summary>{_blocks(block.blocks, anchors)}</details>"


def _tile(what: str, figure: str, word: str) -> str:
    beside = f"<small>{_text(word)}</small>" if word else ""
    return f"<div><span>{_text(what)}</span><b>{_text(figure)}</b>{beside}</div>"


def _table(table: Table) -> str:
    if not table.rows:
        return ""

    def row(cells: Sequence[Text], tag: str) -> str:
        of = ('class="n"' if column in table.numbers else "" for column in range(len(cells)))
        return "".join(f"<{tag}{' ' * bool(c)}{c}>{_text(cell)}</{tag}>" for cell, c in zip(cells, of, strict=True))

    head = f"<thead><tr>{row(table.head, 'th')}</tr></thead>" if any(map(_text, table.head)) else ""
    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in table.rows)
    kind = "" if head else ' class="pairs"'
    return f'<div class="table" tabindex="0"><table{kind}>{head}<tbody>{body}</tbody></table></div>'


def _figure(figure: Figure) -> str:
    if figure.svg:
        picture = _inlined(figure)
    elif figure.png:
        data = base64.b64encode(figure.png).decode()
        picture = f'<img alt="{html.escape(figure.alt)}" src="data:image/png;base64,{data}">'
    else:
        return f"<p>{_text(figure.alt)}: no picture</p>"
    return f"<figure>{picture}</figure>"


def _inlined(figure: Figure) -> str:
    """The SVG element alone, its identifiers its own within the page; the page says how wide it is."""
    drawing = figure.svg[figure.svg.index("<svg") :]
    prefix = re.sub(r"\W+", "-", figure.path)
    drawing = re.sub(r'\bid="([^"]*)"', rf'id="{prefix}-\1"', drawing)
    drawing = re.sub(r'href="#', f'href="#{prefix}-', drawing)
    drawing = drawing.replace("url(#", f"url(#{prefix}-")
    tag, rest = drawing.split(">", 1)
    tag = re.sub(r' (width|height)="[^"]*"', "", tag)
    return f'{tag} role="img" aria-label="{html.escape(figure.alt)}">{rest}'


def _text(text: Text) -> str:
    return "".join(map(_inline, parts(text)))


def _inline(piece: Inline) -> str:
    match piece:
        case Code():
            return f"<code>{html.escape(piece.text)}</code>"
        case Bold():
            return f"<strong>{html.escape(piece.text)}</strong>"
        case Link():
            shown = html.escape(piece.text)
            return f'<a href="{html.escape(piece.target)}">{shown}</a>' if piece.is_safe else shown
        case str():
            return html.escape(piece)
