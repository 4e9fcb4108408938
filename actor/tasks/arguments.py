"""Makers of arguments for the functions that are broken and repaired (actor.tasks.programs). Pure."""

from random import Random
from typing import Any

Arguments = list[Any]
LETTERS = "abcdeABxyz"


def numbers(rng: Random, least: int = 0, most: int = 8, top: int = 20) -> list[int]:
    """Some numbers, small and partly negative."""
    return [rng.randint(-top // 2, top) for _ in range(rng.randint(least, most))]


def word(rng: Random, least: int = 0, most: int = 10, letters: str = LETTERS) -> str:
    """A word of ``letters``."""
    return "".join(rng.choice(letters) for _ in range(rng.randint(least, most)))


def matrix(rng: Random) -> list[list[int]]:
    """Rows of equal length, one at least."""
    width = rng.randint(1, 4)
    return [[rng.randint(0, 9) for _ in range(width)] for _ in range(rng.randint(1, 4))]


def nested(rng: Random, depth: int = 0) -> list[Any]:
    """Lists in lists."""
    return [
        nested(rng, depth + 1) if depth < 3 and rng.random() < 0.4 else rng.randint(0, 9)
        for _ in range(rng.randint(0, 3))
    ]


def intervals(rng: Random) -> list[list[int]]:
    """Pairs [start, end]."""
    starts = [rng.randint(0, 20) for _ in range(rng.randint(0, 5))]
    return [[start, start + rng.randint(0, 6)] for start in starts]


def search(rng: Random) -> Arguments:
    """A sorted list and what is sought in it."""
    items = sorted({rng.randint(0, 30) for _ in range(rng.randint(0, 9))})
    return [items, rng.choice(items) if items and rng.random() < 0.7 else rng.randint(0, 30)]
