"""``key=a,b,c`` lists into cells: the arithmetic of a sweep's command line. Pure.

::

    ["staleness.budget=0,4", "obrs.budget=off,0.9", "run.steps=150"]
        -> axes staleness.budget x obrs.budget, run.steps=150 for all
        -> 4 cells, each with its overrides as common.config.load takes them
"""

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import ConfigError

# key -> the obrs.mode that a number for it means; off means obrs.mode=off
MODES = {"obrs.budget": "budget", "obrs.threshold": "threshold", "obrs.target_ess": "ess"}
OPENING, CLOSING, QUOTES = "[{(", "]})", "\"'"
LONGEST_NAME = 120  # characters of a cell's directory; file systems allow 255 bytes
MAX_CELLS = 500
RESERVED = {
    "run.name": "the sweep names its runs; name the sweep with --name",
    "broker.address": "every run gets a free port; leave it out",
    "learner.resume": "a run that was cut short is set aside and run again; leave it out",
}
SINGLE = {
    "run.seed": "every cell is run with the same seeds; ask for more of them with --seeds",
    "run.dir": "all runs of a sweep lie in one directory",
}


@dataclass(frozen=True)
class Axis:
    """A key and its values as they were written; one value is an override for every cell."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One combination of values."""

    name: str  # of its directory
    label: str  # for people
    values: tuple[tuple[str, str], ...]  # (key, value) of each axis with several values
    overrides: tuple[str, ...]  # section.key=value, those for every cell first


def parse(words: Sequence[str]) -> list[Axis]:
    """Read ``key=a,b,c`` words. Raises :class:`ConfigError` that names the word and the remedy."""
    axes: list[Axis] = []
    for word in words:
        key, equals, rest = word.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"{word!r}: must read section.key=value or section.key=value,value,…")
        values = tuple(_split(word, rest))
        if key in RESERVED:
            raise ConfigError(f"{word!r}: {RESERVED[key]}")
        if key in SINGLE and len(values) > 1:
            raise ConfigError(f"{word!r}: {SINGLE[key]}")
        if len(values) > 1 and "" in values:
            raise ConfigError(f"{word!r}: one of the values is empty; remove the comma")
        if len(set(values)) < len(values):
            twice = next(value for value in values if values.count(value) > 1)
            raise ConfigError(f"{word!r}: {twice} is there twice; every cell is run once for each of --seeds")
        if any(axis.key == key for axis in axes):
            raise ConfigError(f"{key} is given twice; write its values as one list: {key}=a,b")
        axes.append(Axis(key, values))
    return axes


def _split(word: str, rest: str) -> list[str]:
    """At commas outside brackets, braces and quotes."""
    values, depth, quote, current = [], 0, "", ""
    for character in rest:
        if quote:
            quote = "" if character == quote else quote
        elif character in QUOTES:
            quote = character
        elif character in OPENING:
            depth += 1
        elif character in CLOSING:
            depth -= 1
        elif character == "," and depth == 0:
            values.append(current.strip())
            current = ""
            continue
        if depth < 0:
            break
        current += character
    if depth or quote:
        raise ConfigError(f"{word!r}: brackets, braces or quotes are not closed; a list is one value: key=[1,2],[3,4]")
    return [*values, current.strip()]


def expand(key: str, value: str) -> list[str]:
    """The overrides that ``key=value`` stands for: rejection's numbers choose its mode, ``off`` turns it off."""
    if key not in MODES:
        return [f"{key}={value}"]
    if value.lower() == "off":
        return ["obrs.mode=off"]
    return [f"obrs.mode={MODES[key]}", f"{key}={value}"]


def cells(axes: Sequence[Axis]) -> list[Cell]:
    """Every combination, the last axis fastest. Raises :class:`ConfigError` where two words say different things."""
    fixed = [(axis.key, axis.values[0]) for axis in axes if len(axis.values) == 1]
    moving = [axis for axis in axes if len(axis.values) > 1]
    count = 1
    for axis in moving:
        count *= len(axis.values)
    if count > MAX_CELLS:
        raise ConfigError(f"{count:,} cells: at most {MAX_CELLS:,}; give fewer values")
    found: list[Cell] = []
    for chosen in itertools.product(*(axis.values for axis in moving)):
        values = tuple(zip((axis.key for axis in moving), chosen, strict=True))
        label = " ".join(f"{key}={value}" for key, value in values) or "all"
        overrides = _without_conflicts(label, [*fixed, *values])
        found.append(Cell(directory_name(values), label, values, tuple(overrides)))
    return found


def _without_conflicts(label: str, values: Sequence[tuple[str, str]]) -> list[str]:
    said: dict[str, tuple[str, str]] = {}  # key -> (value, the word that said so)
    for key, value in values:
        for override in expand(key, value):
            name, _, wanted = override.partition("=")
            earlier, word = said.setdefault(name, (wanted, f"{key}={value}"))
            if earlier != wanted:
                raise ConfigError(
                    f"cell {label}: {word} sets {name}={earlier} and {key}={value} sets {name}={wanted}; "
                    "remove one of the two"
                )
    return [f"{name}={value}" for name, (value, _) in said.items()]


def directory_name(values: Sequence[tuple[str, str]]) -> str:
    """A cell's directory: plain characters; what had to be changed is told apart by a hash."""
    full = ",".join(f"{key}={value}" for key, value in values) or "all"
    plain = re.sub(r"[^A-Za-z0-9._=,+-]+", "_", full)
    if plain == full and len(plain) <= LONGEST_NAME and not plain.startswith("."):
        return plain
    return f"{plain[:LONGEST_NAME].lstrip('.')}-{hashlib.sha256(full.encode()).hexdigest()[:8]}"
