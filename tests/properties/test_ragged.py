"""Sums over pieces, long and short, beside a loop."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from common.ragged import LONG, count, least

EMPTY = 99


@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=9),
    factor=st.sampled_from([1, LONG]),
    seed=st.integers(0, 2**16),
)
def test_pieces_are_counted_as_one_by_one(lengths, factor, seed):
    random = np.random.default_rng(seed)
    offsets = np.concatenate(([0], np.cumsum(lengths) * factor)).astype(np.int32)
    flags = random.random(offsets[-1]) < 0.5
    values = random.integers(-5, 50, offsets[-1]).astype(np.int32)
    pieces = [slice(a, b) for a, b in pairwise(offsets)]
    assert count(flags, offsets).tolist() == [sum(flags[p].tolist()) for p in pieces]
    assert least(values, offsets, EMPTY).tolist() == [min(values[p].tolist(), default=EMPTY) for p in pieces]
