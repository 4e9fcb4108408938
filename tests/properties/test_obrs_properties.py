"""The theorems of algorithms.md 1 on random pairs of distributions."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from common.obrs import coins, log_acceptance, log_inclusion, thin


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


@settings(max_examples=200)
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


@settings(max_examples=200)
@given(pairs())
def test_rejection_never_moves_away_from_the_target(pair):
    p, q, threshold = pair
    _, m = masses(p, q, threshold)
    after = m / m.sum()
    assert kl(p, after) <= kl(p, q) + 1e-5
    assert kl(after, p) <= kl(q, p) + 1e-5
    assert np.abs(p - after).sum() <= np.abs(p - q).sum() + 1e-5


@settings(max_examples=200)
@given(pairs(), st.floats(1.0, 5.0))
def test_monotone_in_the_threshold_and_closed_under_composition(pair, factor):
    p, q, threshold = pair
    a1, m1 = masses(p, q, threshold)
    a2, m2 = masses(p, q, threshold * factor)
    assert (a2 <= a1 + 1e-6).all()
    assert kl(p, m2 / m2.sum()) <= kl(p, m1 / m1.sum()) + 1e-5
    second, _ = masses(p, m1, threshold * factor)  # re-thinning the inclusion density itself
    np.testing.assert_allclose(a1 * second, a2, rtol=1e-3, atol=1e-6)


@settings(max_examples=15)
@given(pairs(), st.integers(0, 1000))
def test_a_second_thinning_at_a_later_version_keeps_every_expectation(pair, seed):
    """For any pi: E_q[accepted twice * pi / m'] is pi's mass where both p are positive, here all of it."""
    p, q, threshold = pair
    threshold = min(max(threshold, 0.5), 2.0)
    rng, n = np.random.default_rng(seed), 40_000
    later, pi = rng.dirichlet(np.ones(len(p)) * 3) + 1e-3, rng.dirichlet(np.ones(len(p)) * 3)
    later /= later.sum()
    drawn = rng.choice(len(q), n, p=q)
    lq, lp, ll = (np.log(x).astype(np.float32)[drawn] for x in (q, p, later))
    one = (np.zeros(1, np.int64), np.zeros(1, np.int32), np.array([n]))
    first = thin(lp, lq, coins(seed, *one, 3), np.log(threshold))
    on = np.flatnonzero(first.accept)
    second = thin(ll[on], first.log_m[on], coins(seed, *one, 4)[on], np.log(threshold))
    kept = on[second.accept]
    weights = np.zeros(n)
    weights[kept] = pi[drawn[kept]] / np.exp(second.log_m[second.accept].astype(np.float64))
    error = weights.std() / np.sqrt(n)
    assert abs(weights.mean() - 1.0) < 5 * error + 1e-3
