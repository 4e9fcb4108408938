"""What policies write, read without trusting it. Pure."""

import re
import unicodedata

# Combining marks: parts of words, as vowels in Hindi and Thai, though not of re's \w. Selectors of a glyph are none.
MARKS = "".join(
    mark
    for mark in map(chr, range(0x300, 0x1F000))
    if unicodedata.category(mark).startswith("M") and not "\ufe00" <= mark <= "\ufe0f"
)
_BLOCK = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)


def first_block(text: str) -> str | None:
    """The contents of the first fenced block; None if there is none, or it has no end."""
    found = _BLOCK.search(text)
    return found[1] if found else None


def last_block(text: str) -> str | None:
    """The contents of the last fenced block."""
    found = _BLOCK.findall(text)
    return found[-1] if found else None
