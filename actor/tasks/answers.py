"""Final answers in what is written about a question, and when two of them are the same. Pure.

An answer is marked by ``\\boxed{...}``, ``<answer>...</answer>``, ``#### ...`` or ``answer: ...``; the
last mark of the first of these kinds that there is counts.
"""

import re
import unicodedata
from fractions import Fraction

from actor.tasks.reading import MARKS

MOST_DIGITS = 400  # of a number that is read
_TAGS = re.compile(r"<(/?)answer>", re.IGNORECASE)
_HASHES = re.compile(r"####[ \t]*(\S[^\n]*)")
_SAID = re.compile(
    r"\banswer(?:[ \t]{1,9}is)?[ \t]{0,9}[:=][ \t]{0,9}(\S[^\n]*)|\bthe answer is[ \t]{1,9}(\S[^\n]*)", re.IGNORECASE
)
_POWER = r"(?:[eE][-+−]?\d+)?"
_NUMBER = re.compile(
    rf"(?<![\w.])[-+−]?(?:\d{{1,3}}(?:,\d{{3}})+|\d+)(?:\.\d+)?{_POWER}(?:\s*/\s*\d+)?|(?<![\d.])[-+−]?\.\d+{_POWER}"
)
_BRACES = re.compile(r"\\f?boxed\{|\\fbox\{|\\.|[{}]", re.DOTALL)
_SIGNS = re.compile(rf"(?<!\w)-(?=\d)|(?<=\d)[.:/](?=\d)|([^\w\s{MARKS}])")
_PARTED = re.compile(r"(?<=\d)(?=[¼-¾⅐-⅟↉])")  # 1½, which NFKC would make 11/2
_ARTICLE = re.compile(r"^(?:a|an|the) (?=\S)")


def last_boxed(text: str) -> str | None:
    """What stands in the last ``\\boxed{...}`` whose braces close."""
    opened: list[tuple[bool, int]] = []  # (is a box, where its contents begin)
    begin = end = -1
    for found in _BRACES.finditer(text):
        brace = found[0]
        if brace == "}":
            if opened:
                is_box, at = opened.pop()
                if is_box and at > begin:
                    begin, end = at, found.start()
        elif brace == "{" or len(brace) > 2:  # \{ and \} are no braces
            opened.append((brace != "{", found.end()))
    return text[begin:end].strip() if begin >= 0 else None


def last_tagged(text: str) -> str | None:
    """What stands in the last ``<answer>...</answer>``."""
    begin = found = None
    for tag in _TAGS.finditer(text):
        if tag[1] and begin is not None:
            found = text[begin : tag.start()].strip()
        begin = None if tag[1] else tag.end()
    return found


def marked(text: str) -> str | None:
    """The answer that ``text`` marks as such; None if it marks none."""
    if (boxed := last_boxed(text)) is not None:
        return boxed
    if (tagged := last_tagged(text)) is not None:
        return _plain(tagged)
    found = _last(_HASHES, text)
    return _last(_SAID, text) if found is None else found


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    found = None
    for match in pattern.finditer(text):
        found = match
    return None if found is None else _plain(next(group for group in found.groups() if group is not None))


def _plain(text: str) -> str:
    """Without a full stop and Markdown's emphasis."""
    return text.strip().removesuffix(".").strip("* ").removesuffix(".") or text.strip()


def read_number(text: str) -> Fraction | None:
    """The last number in ``text``: 1,234 or -3.5 or 2e-3 or 2/3 in digits; None if there is none."""
    found = _NUMBER.findall(text)
    if not found or len(found[-1]) > MOST_DIGITS:
        return None
    upper, _, lower = re.sub(r"[,\s+]", "", found[-1]).replace("−", "-").partition("/")
    power = upper.lower().partition("e")[2]
    if (lower and not int(lower)) or (power and abs(int(power)) > MOST_DIGITS):
        return None
    return Fraction(upper) / (int(lower) if lower else 1)


def normalised(text: str) -> str:
    """For an exact comparison: case, white space, a leading article and signs that are no part of a number are gone."""
    folded = unicodedata.normalize("NFKC", _PARTED.sub(" ", text)).casefold().replace("−", "-").replace("\u2044", "/")
    folded = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", folded)
    words = " ".join(_SIGNS.sub(lambda sign: " " if sign[1] else sign[0], folded).split())
    return _ARTICLE.sub("", words) or " ".join(folded.split())
