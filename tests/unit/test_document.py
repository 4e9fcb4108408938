"""One list of blocks, two renderings: nothing is parsed, everything is shown as it stands."""

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from tools.document import (
    Bold,
    Code,
    Document,
    Figure,
    Fold,
    Heading,
    Items,
    Link,
    Listing,
    Note,
    Paragraph,
    Table,
    Tiles,
    pairs,
)
from tools.markdown import to_markdown
from tools.page import to_html

SVG = (
    '<?xml version="1.0"?>\n<svg xmlns:xlink="x" width="360pt" height="216pt" viewBox="0 0 360 216">'
    '<defs><path id="m1" d="M 0 0"/></defs><g id="axes_1"><use xlink:href="#m1" clip-path="url(#m1)"/></g></svg>'
)


class Page(HTMLParser):
    """Tags balanced, identifiers and texts collected."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        found = dict(attributes)
        assert not any(name.startswith("on") for name in found)
        self.ids += [found["id"]] if "id" in found else []
        self.targets += [value for name, value in found.items() if name in ("href", "src", "xlink:href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def document() -> Document:
    blocks = [
        Tiles([("Reward", "0.95", "from 0.27")]),
        Heading("Result"),
        Paragraph(("Model ", Code("models/sort6"), ", ", Bold("done"), ", see ", Link("status", "status.json"), ".")),
        Note("watch out", "warning"),
        Table(("lag", "share"), [("0", "99 %"), (Code("a|b"), "<1 %")], numbers=(1,)),
        pairs([("Steps", "600")]),
        Figure("a b.png", "one", svg=SVG),
        Figure("two.png", "two", png=b"\x89PNG"),
        Heading("Result"),
        Fold("All of it", [Paragraph("long")], file="all.yaml"),
        Fold("More", [Heading("Inside", 3), Listing(["```", "<script>alert(1)</script>"]), Items(["1. one", "- two"])]),
    ]
    return Document("Run <x>", blocks)


def test_markdown_is_what_a_person_would_write() -> None:
    assert to_markdown(document()) == (
        "# Run \\<x\\>\n\n"
        "| | | |\n|---|---|---|\n| Reward | 0.95 | from 0.27 |\n\n"
        "## Result\n\n"
        "Model `models/sort6`, **done**, see [status](status.json).\n\n"
        "> watch out\n\n"
        "| lag | share |\n|---|---:|\n| 0 | 99 % |\n| `a\\|b` | \\<1 % |\n\n"
        "| | |\n|---|---|\n| Steps | 600 |\n\n"
        "![one](a b.png)\n\n![two](two.png)\n\n"
        "## Result\n\n"
        "All of it: [all.yaml](all.yaml)\n\n"
        "### More\n\n### Inside\n\n````\n```\n<script>alert(1)</script>\n````\n\n- \\1. one\n- \\- two\n"
    )


def test_the_page_is_sound_html_whole_in_itself() -> None:
    text = to_html(document())
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert {"result", "result-2", "inside", "a-b-png-m1", "a-b-png-axes_1"} <= set(page.ids)
    fragments = [target[1:] for target in page.targets if target.startswith("#")]
    assert set(fragments) <= set(page.ids)
    others = [target for target in page.targets if not target.startswith("#")]
    assert others == ["status.json", "data:image/png;base64,iVBORw=="]
    assert "script" not in page.tags and "<script>alert(1)</script>" in page.text
    assert "width=" not in re.search("<svg[^>]*>", text)[0] and "url(#a-b-png-m1)" in text
    assert "http-equiv" in text and "@import" not in text and "url(h" not in text


@pytest.mark.parametrize("target", ["javascript:alert(1)", "data:text/html,x", "//elsewhere", "a b", "x)y"])
def test_a_link_to_anything_else_is_only_text(target: str) -> None:
    document = Document("x", [Paragraph(Link("here", target))])
    assert to_markdown(document) == "# x\n\nhere\n"
    assert Page(to_html(document)).targets == []


def test_a_table_without_rows_and_a_document_without_blocks_are_nothing() -> None:
    assert to_markdown(Document("x", [Table(("a",), []), Paragraph("y")])) == "# x\n\ny\n"
    assert "<table" not in to_html(Document("x", [Table(("a",), [])]))
    assert "<nav>" not in to_html(Document("x"))


ANY = st.text("`*_[]<>|\\&;#~x1.-+()! \n\t\"'é\u2028", max_size=16) | st.just("&lt;b&gt; http://x.y <b>")


@settings(max_examples=60)
@given(ANY, ANY)
def test_any_text_comes_through_both_as_it_stands(plain: str, code: str) -> None:
    """A real Markdown parser and a real HTML parser read the same words back."""
    flat_plain, flat_code = (" ".join("".join(c if c.isprintable() else " " for c in t).split()) for t in (plain, code))
    cell = (("-> ", plain, " <-"), Code(f"x{code}x"))
    blocks = [Paragraph(cell[0]), Paragraph(plain), Paragraph(cell[1]), Table(("h", "i"), [cell])]
    for page in (
        MarkdownIt("commonmark").enable("table").render(to_markdown(Document("t", blocks))),
        to_html(Document("t", blocks)),
    ):
        words = " ".join("".join(c if c.isprintable() else " " for c in Page(page).text).split())
        assert words.count(" ".join(f"-> {flat_plain} <-".split())) >= 2, page
        assert words.count(" ".join(f"x{' ' * (code != code.lstrip())}{flat_code}".split())) >= 2, page
