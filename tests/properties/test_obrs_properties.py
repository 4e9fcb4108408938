"""The theorems of algorithms.md 1 on random pairs of distributions."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from common.obrs import log_acceptance, log_inclusion


@st.composite
def pairs(draw):
    size = draw(st.integers(2, 12))
    logits = st.lists(st.floats(-4, 4), min_size=size, max_size=size)
    p, q = (np.exp(np.array(draw(logits))) for _ in range(2))
    return p / p.sum(), q / q.sum(), draw(st.floats(0.05, 20))


def masses(p, q, threshold):
    lp, lq = np.log(p).astype(np.float32), np.log(q).astype(np.float32)
    a = np.exp(log_acceptance(lp, lq, np.log(threshold)).astype(np.float64))
    m = np.exp(log_inclusion(lp, lq, np.log(threshold)).astype(np.float64))
    return a, m


def kl(p, q):
    return float((p * np.log(p / q)).sum())


@settings(max_examples=200, deadline=None)
@given(pairs())
def test_identities(pair):
    p, q, threshold = pair
    a, m = masses(p, q, threshold)
    z = m.sum()
    np.testing.assert_allclose(q * a, m, rtol=1e-4, atol=1e-9)
    assert z <= min(1.0, 1 / threshold) + 1e-5
    assert abs(z - (1 - np.maximum(q - p / threshold, 0).sum())) < 1e-5
    if threshold == 1.0:
        assert abs(z - (1 - 0.5 * np.abs(p - q).sum())) < 1e-5


@settings(max_examples=200, deadline=None)
@given(pairs())
def test_rejection_never_moves_away_from_the_target(pair):
    p, q, threshold = pair
    _, m = masses(p, q, threshold)
    after = m / m.sum()
    assert kl(p, after) <= kl(p, q) + 1e-5
    assert kl(after, p) <= kl(q, p) + 1e-5
    assert np.abs(p - after).sum() <= np.abs(p - q).sum() + 1e-5


@settings(max_examples=200, deadline=None)
@given(pairs(), st.floats(1.0, 5.0))
def test_monotone_in_the_threshold_and_closed_under_composition(pair, factor):
    p, q, threshold = pair
    a1, m1 = masses(p, q, threshold)
    a2, m2 = masses(p, q, threshold * factor)
    assert (a2 <= a1 + 1e-6).all()
    assert kl(p, m2 / m2.sum()) <= kl(p, m1 / m1.sum()) + 1e-5
    second, _ = masses(p, m1, threshold * factor)  # re-thinning the inclusion density itself
    np.testing.assert_allclose(a1 * second, a2, rtol=1e-3, atol=1e-6)
