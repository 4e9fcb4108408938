"""Bounds of Z from the top-k against full sums over small vocabularies (algorithms.md 1.5, 1.6, J7)."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from common.zbounds import enumerated_acceptance, interpolate, kappa, z_bounds

P = np.array([0.50, 0.25, 0.15, 0.08, 0.02])
Q = np.array([0.40, 0.10, 0.30, 0.15, 0.05])


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class Contexts(NamedTuple):
    p: np.ndarray  # [N, V]
    q: np.ndarray
    topk: np.ndarray  # [N, K] ids
    sampled: np.ndarray  # [N] ids

    def arguments(self):
        rows = np.arange(len(self.q))
        with np.errstate(divide="ignore"):
            lq, lp = np.log(self.q).astype(np.float32), np.log(self.p).astype(np.float32)
        inside = (self.topk == self.sampled[:, None]).any(1)
        return (
            np.take_along_axis(lq, self.topk, 1),
            np.take_along_axis(lp, self.topk, 1),
            lq[rows, self.sampled],
            lp[rows, self.sampled],
            inside,
        )

    def z(self, threshold):
        return np.minimum(self.q, self.p / threshold).sum(1)


def contexts(seed, n, v, k):
    """Peaked contexts in the manner of J7."""
    rng = np.random.default_rng(seed)
    logits = -rng.uniform(1.1, 3.0, (n, 1)) * np.log(np.arange(1, v + 1)) + rng.normal(0, 0.6, (n, v))
    p, q = softmax(logits), softmax(logits + rng.normal(0, 1, (n, v)) * rng.uniform(0.05, 0.8, (n, 1)))
    sampled = (q.cumsum(1) < rng.uniform(0, 1 - 1e-9, (n, 1))).sum(1).clip(0, v - 1)
    return Contexts(p, q, np.argsort(-q, 1)[:, :k], sampled)


def naive_bounds(c, threshold):
    out = []
    for p, q, topk, y in zip(*c, strict=True):
        known = sorted({*topk.tolist(), int(y)})
        core = sum(min(q[i], p[i] / threshold) for i in known)
        rest_q, rest_p = max(0, 1 - q[known].sum()), max(0, 1 - p[known].sum())
        out.append((core, core + min(rest_q, rest_p / threshold), rest_q))
    return np.array(out).T


def naive_enumerated(c, threshold):
    out = []
    for p, q, topk, y in zip(*c, strict=True):
        z = 1 - sum(max(0, q[i] - p[i] / threshold) for i in topk)
        out.append(z - (0 if y in topk else 1 - min(1, p[y] / (threshold * q[y]))))
    return np.array(out)


@pytest.mark.parametrize("threshold", [0.5, 1.0, 2.0])
def test_bounds_equal_the_naive_loop_and_hold_z(threshold):
    c = contexts(0, 300, 200, 10)
    assert 0.05 < (~c.arguments()[-1]).mean() < 0.5  # both kinds of sampled token
    bounds = z_bounds(*c.arguments(), float(np.log(threshold)))
    np.testing.assert_allclose(np.array(bounds), naive_bounds(c, threshold), rtol=1e-5, atol=1e-6)
    z = c.z(threshold)
    assert (bounds.core <= z + 1e-6).all() and (z <= bounds.upper + 1e-6).all()
    assert (bounds.upper - bounds.core <= bounds.missing_q + 1e-6).all()
    assert all(x.dtype == np.float32 for x in bounds)


def test_worked_example_all_ids_known():
    """algorithms.md 1.14: with nothing missing both bounds are Z."""
    c = Contexts(P[None], Q[None], np.arange(5)[None], np.array([3]))
    for threshold, z in ((0.5, 0.990), (1.0, 0.750), (2.0, 0.475)):
        bounds = z_bounds(*c.arguments(), float(np.log(threshold)))
        assert bounds.core[0] == pytest.approx(z, abs=1e-6) and bounds.upper[0] == pytest.approx(z, abs=1e-6)
        assert bounds.missing_q[0] < 1e-6
        assert enumerated_acceptance(*c.arguments(), float(np.log(threshold))) == pytest.approx(z, abs=1e-6)


def test_worked_example_top_two():
    """top-2 of q holds tokens 0 and 2; token 4 was sampled and is known besides, tokens 1 and 3 are not."""
    c = Contexts(P[None], Q[None], np.array([[0, 2]]), np.array([4]))
    core, upper, missing = (float(x[0]) for x in z_bounds(*c.arguments(), 0.0))
    assert core == pytest.approx(0.40 + 0.15 + 0.02, abs=1e-6)
    assert missing == pytest.approx(0.25, abs=1e-6)
    assert upper == pytest.approx(core + 0.25, abs=1e-6)  # R_p = 0.33
    _, upper, _ = (float(x[0]) for x in z_bounds(*c.arguments(), float(np.log(2))))
    assert upper == pytest.approx(0.25 + 0.075 + 0.01 + 0.165, abs=1e-6)


@st.composite
def small_contexts(draw):
    v = draw(st.integers(2, 9))
    logits = st.lists(st.floats(-4, 4), min_size=v, max_size=v)
    p, q = (softmax(np.array(draw(logits))) for _ in range(2))
    if draw(st.booleans()):  # p that cannot produce some of q's tokens
        p = p * np.array(draw(st.lists(st.booleans(), min_size=v, max_size=v)))
        p = p / p.sum() if p.sum() > 0 else np.eye(v)[0]
    k = draw(st.integers(1, v))
    topk = np.argsort(-q)[:k]
    return Contexts(np.tile(p, (v, 1)), np.tile(q, (v, 1)), np.tile(topk, (v, 1)), np.arange(v)), draw(
        st.floats(-1.4, 1.4)
    )


@settings(max_examples=150)
@given(small_contexts())
def test_core_below_z_below_upper_whatever_was_sampled(example):
    c, log_threshold = example
    threshold = np.exp(log_threshold)
    core, upper, _ = z_bounds(*c.arguments(), log_threshold)
    z = c.z(threshold)
    assert (core <= z + 1e-6).all() and (z <= upper + 1e-6).all()
    assert (upper <= min(1, 1 / threshold) + 1e-6).all() and (core <= upper).all()


@settings(max_examples=50)
@given(small_contexts())
def test_enumerated_acceptance_is_unbiased(example):
    """Exactly: the expectation over the sampled token, each in a batch of its own."""
    c, log_threshold = example
    arguments = c.arguments()
    each = [enumerated_acceptance(*(x[i : i + 1] for x in arguments), log_threshold) for i in range(len(c.q))]
    assert np.dot(c.q[0], each) == pytest.approx(c.z(np.exp(log_threshold))[0], abs=1e-5)
    np.testing.assert_allclose(each, naive_enumerated(c, np.exp(log_threshold)), atol=1e-5)


def test_interpolation_beats_kappa_beats_the_core():
    """J7: same batch mean, but only the interpolation stays inside the bounds."""
    c = contexts(1, 2000, 400, 10)
    z = c.z(1.0)
    arguments = c.arguments()
    core, upper, _ = z_bounds(*arguments, 0.0)
    acceptance = float(np.exp(np.minimum(0, arguments[3].astype(np.float64) - arguments[2])).mean())
    enumerated = enumerated_acceptance(*arguments, 0.0)
    noise = naive_enumerated(c, 1.0) - z
    coins = np.minimum(1, np.exp(arguments[3].astype(np.float64) - arguments[2])) - z
    assert abs(acceptance - z.mean()) < 0.01 and abs(enumerated - z.mean()) < 0.005
    assert (noise**2).mean() < (coins**2).mean()  # the enumerated form is the less noisy

    z_theta, theta = interpolate(core, upper, enumerated)
    z_kappa, factor = kappa(core, enumerated)
    assert z_theta.dtype == z_kappa.dtype == np.float32
    assert z_theta.mean() == pytest.approx(enumerated, abs=1e-5)
    assert z_kappa.mean() == pytest.approx(enumerated, abs=1e-5)
    assert 0 < theta < 1 < factor
    assert (core <= z_theta).all() and (z_theta <= upper).all()
    assert (z_kappa > 1).any() and (z_kappa > upper).mean() > 0.2  # impossible values, as the paper has them
    error = [float(np.sqrt(((x - z) ** 2).mean())) for x in (z_theta, z_kappa, core)]
    assert error[0] < 0.3 * error[1] and error[1] < error[2]


def test_interpolation_is_clipped_and_knows_no_width():
    core, upper = np.array([0.4, 0.6], np.float32), np.array([0.6, 0.9], np.float32)
    for acceptance, theta, z in ((0.3, 0.0, core), (0.95, 1.0, upper)):  # noise beyond the bounds
        got, got_theta = interpolate(core, upper, acceptance)
        assert got_theta == theta and got.tolist() == z.tolist()
    got, theta = interpolate(core, upper, 0.625)
    assert theta == pytest.approx(0.5, abs=1e-6) and got == pytest.approx([0.5, 0.75], abs=1e-6)
    assert interpolate(core, core, 0.7)[1] == 0.0
    none = np.zeros(0, np.float32)
    assert interpolate(none, none, 0.5)[1] == 0.0
    assert kappa(none, 0.5)[1] == 1.0 and kappa(np.zeros(2, np.float32), 0.0)[1] == 1.0


def test_edge_cases():
    """algorithms.md 1.10: p = 0, padding, residuals that rounding makes negative, no tokens at all."""
    inf = np.inf
    lq = np.array([[-0.2, -inf], [1e-7, -inf]], np.float32)  # short rows; a mass of 1 + 1e-7
    lp = np.array([[-inf, -inf], [0.0, -inf]], np.float32)
    sampled_q, sampled_p = np.array([-0.2, 1e-7], np.float32), np.array([-inf, 0.0], np.float32)
    inside = np.array([True, True])
    core, upper, missing = z_bounds(lq, lp, sampled_q, sampled_p, inside, 0.0)
    assert core.tolist() == [0.0, 1.0] and upper[1] == 1.0 and missing[1] == 0.0
    assert upper[0] == pytest.approx(1 - np.exp(-0.2)) == pytest.approx(missing[0])
    mean = enumerated_acceptance(lq, lp, sampled_q, sampled_p, inside, 0.0)
    assert mean == pytest.approx((1 - np.exp(-0.2) + 1) / 2, abs=1e-6)

    none, empty = np.zeros(0, np.float32), np.zeros((0, 3), np.float32)
    nothing = (empty, empty, none, none, np.zeros(0, bool))
    assert len(z_bounds(*nothing, 0.0).core) == 0
    assert enumerated_acceptance(*nothing, 0.0) == 1.0


def test_equal_policies_have_z_one():
    c = contexts(2, 50, 100, 8)
    core, upper, missing = z_bounds(*c._replace(p=c.q).arguments(), 0.0)
    assert upper == pytest.approx(np.ones(50), abs=1e-6) and core == pytest.approx(1 - missing, abs=1e-6)
    assert enumerated_acceptance(*c._replace(p=c.q).arguments(), 0.0) == 1.0


def test_mistakes_are_named():
    good = contexts(3, 4, 20, 5).arguments()

    def broken(**changes):
        return [changes.get(name, value) for name, value in zip(("q", "p", "lq", "lp", "inside"), good, strict=True)]

    nan = good[0].copy()
    nan[2, 1] = np.nan
    doubled = np.repeat(good[0][:, :1], 5, axis=1)
    for arguments, match in (
        (broken(q=nan), r"topk_log_q\[2, 1\]=nan"),
        (broken(p=good[1][:, :3]), r"must be \[4, K\]"),
        (broken(q=doubled), r"row \d of topk_log_q holds a mass"),
        (broken(lp=good[3] + 9), r"log_p\[0\]"),
        (broken(inside=good[4].astype(np.int8)), "sampled_in_topk must be bool"),
    ):
        for function in (z_bounds, enumerated_acceptance):
            with pytest.raises(DataError, match=match):
                function(*arguments, 0.0)
    with pytest.raises(DataError, match="log_threshold=-inf must be finite"):
        z_bounds(*good, -np.inf)
    for function in (lambda: interpolate(good[2], good[2], 1.5), lambda: kappa(good[2], np.nan)):
        with pytest.raises(DataError, match=r"must lie in \[0, 1\]"):
            function()
