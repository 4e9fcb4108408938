"""Every epoch asks every question once, in an order that nobody can tell from a random one, the same everywhere."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.questions import question_of

MILLION = [965546, 81187, 669702, 125413]


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31 - 1), size=st.integers(1, 300), epoch=st.integers(0, 2**40))
def test_an_epoch_asks_every_question_once(seed: int, size: int, epoch: int) -> None:
    assert sorted(question_of(seed, epoch * size + i, size) for i in range(size)) == list(range(size))


def test_the_order_is_what_it_was_on_every_machine_and_in_every_version() -> None:
    assert [question_of(7, i, 10) for i in range(20)] == [6, 4, 0, 9, 7, 1, 3, 2, 5, 8, 1, 2, 6, 0, 5, 7, 8, 3, 9, 4]
    assert [question_of(2**31 - 1, i, 1_000_003) for i in (0, 1, 1_000_002, 10**15)] == MILLION


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(question_of(seed, epoch * 50 + i, 50) for i in range(50))

    assert len({order(seed, epoch) for seed in range(5) for epoch in range(5)}) == 25


def test_every_order_of_few_questions_is_about_as_likely() -> None:
    epochs, size = 1200, 5
    seen = Counter(tuple(question_of(3, e * size + i, size) for i in range(size)) for e in range(epochs))
    expected = epochs / 120
    chi_square = sum((seen[order] - expected) ** 2 / expected for order in permutations(range(size)))
    assert chi_square < 119 + 6 * np.sqrt(2 * 119)


def test_neighbours_are_not_kept_together() -> None:
    size = 10_000
    order = np.array([question_of(1, i, size) for i in range(size)])
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.05
    steps = np.diff(order)
    assert (np.abs(steps) == 1).mean() < 10 / size


@pytest.mark.parametrize(("index", "size"), [(-1, 5), (0, 0), (3, -2)])
def test_what_cannot_be_asked_is_refused(index: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"question {index} of {size}"):
        question_of(0, index, size)
