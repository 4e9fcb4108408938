"""What a run directory says, taken with care: another version wrote it, or a peer named itself."""

import math
from collections.abc import Mapping
from typing import Any

from tools.run_files import Record

NAME_CELLS = 64  # of a peer's name; wire.MAX_TEXT allows more
UNPRINTABLE = "�"


def number(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def whole(value: object) -> int | None:
    """A whole number that a float can tell from its neighbours, or None."""
    found = number(value)
    return None if found is None or abs(found) > 2**53 else int(found)


def text(value: object, limit: int = NAME_CELLS) -> str:
    """One printable line of at most ``limit`` characters: no escape sequence reaches a terminal."""
    shown = "".join(c if c.isprintable() else UNPRINTABLE for c in str(value if value is not None else "")[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def mapping(value: object) -> Record:
    """An object, empty if it is none."""
    return dict(value) if isinstance(value, Mapping) else {}


def records(value: object) -> list[Record]:
    """The objects of a list."""
    return [dict(one) for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def numbers(value: object) -> dict[str, float]:
    """The numbers of an object, by printable names."""
    found: dict[str, float] = {}
    for key, one in mapping(value).items():
        if (sound := number(one)) is not None:
            found[text(key)] = sound
    return found


def counts(value: object) -> dict[int, int]:
    """An object with whole keys and whole values, such as a histogram of lags."""
    found: dict[int, int] = {}
    for key, one in mapping(value).items():
        count = whole(one)
        if count is not None and _is_whole(key):
            found[int(key)] = count
    return found


def _is_whole(key: Any) -> bool:
    return isinstance(key, int) or (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10)
