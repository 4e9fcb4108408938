"""The order in which a finite set of training questions is gone through.

::

    index of a prompt -> epoch, place -> a permutation of [0, size) that the epoch and the seed choose -> question

Broker and actors work it out apart and agree bit for bit: the permutation is a Feistel network over
a rectangle of about ``size`` cells whose round functions are tables drawn from Philox, walked until
it lands on a question (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002:
generalised Feistel and cycle walking). A lookup takes a few microseconds and needs tables of about
``ROUNDS * sqrt(size)`` words, kept for the two epochs in use.
"""

import math
from functools import lru_cache

import numpy as np

from common.philox import STREAM_QUESTIONS, philox4x32

ROUNDS = 12  # with 8, the orders of five questions are not all as likely; with 12 they are


def question_of(seed: int, index: int, size: int) -> int:
    """Which of ``size`` questions prompt ``index`` (from 0) asks; every epoch of ``size`` prompts asks each once.

    Raises ValueError for a negative index or a set without questions.
    """
    if index < 0 or size < 1:
        raise ValueError(f"question {index} of {size}: needs an index of at least 0 and at least 1 question")
    epoch, place = divmod(index, size)
    rows, columns = _rectangle(size)
    tables = _tables(seed, epoch, size)
    while True:
        row, column = divmod(place, columns)
        for even, odd in tables:
            row = (row + even[column]) % rows
            column = (column + odd[row]) % columns
        place = row * columns + column
        if place < size:
            return place


def _rectangle(size: int) -> tuple[int, int]:
    """Rows and columns, as many as nearly square: fewer than ``sqrt(size) + 1`` cells are too many."""
    columns = math.isqrt(size - 1) + 1
    return -(-size // columns), columns


@lru_cache(maxsize=32)  # two epochs of as many tasks as anybody mixes
def _tables(seed: int, epoch: int, size: int) -> list[tuple[list[int], list[int]]]:
    """For every two rounds, what is added to the row by column, and to the column by row."""
    rows, columns = _rectangle(size)
    found = []
    for number in range(ROUNDS // 2):
        counters = np.arange(max(rows, columns))
        words = philox4x32((seed, STREAM_QUESTIONS), counters, epoch, epoch >> 32, number)
        found.append(((words[0][:columns] % rows).tolist(), (words[1][:rows] % columns).tolist()))
    return found
