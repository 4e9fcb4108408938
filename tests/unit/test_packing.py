"""Balanced shards against brute force and by property."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.packing import balance, runs


@settings(max_examples=100)
@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 6))
def test_every_trajectory_once_and_within_the_lpt_bound(lengths, ranks):
    lengths = np.array(lengths, np.int64)
    parts = balance(lengths, ranks)
    assert len(parts) == ranks
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))
    if len(lengths):
        loads = [lengths[p].sum() for p in parts]
        ideal = max(lengths.sum() / ranks, lengths.max())
        assert max(loads) <= ideal * 4 / 3 + lengths.max() / 3


def test_near_the_optimum_found_by_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(1, 30, 8)
        best = min(
            max(sum(lengths[i] for i in range(8) if a[i] == r) for r in (0, 1))
            for a in itertools.product((0, 1), repeat=8)
        )
        assert max(lengths[p].sum() for p in balance(lengths, 2)) <= best * 7 / 6 + 1e-9


def test_runs_are_the_members_in_pieces_of_neighbours():
    rng = np.random.default_rng(0)
    for _ in range(50):
        members = np.flatnonzero(rng.random(30) < rng.random())
        found = runs(members)
        assert [i for a, b in found for i in range(a, b)] == members.tolist()
        assert all(b < c for (_, b), (c, _) in itertools.pairwise(found))
