"""Rejection against the worked example of algorithms.md 1.14 and exact sums over small vocabularies."""

import numpy as np
import pytest

from common.errors import DataError
from common.obrs import (
    check_scores,
    coins,
    divergence,
    log_acceptance,
    log_inclusion,
    thin,
    wilson_interval,
)
from common.philox import STREAM_COINS, philox4x32

P = np.array([0.50, 0.25, 0.15, 0.08, 0.02])
Q = np.array([0.40, 0.10, 0.30, 0.15, 0.05])
LP, LQ = np.log(P).astype(np.float32), np.log(Q).astype(np.float32)

# algorithms.md 1.14: lambda -> acceptance, Z, KL(p || q after rejection)
WORKED = {
    0.5: ([1, 1, 1, 1, 0.8], 0.990, 0.16247),
    1.0: ([1, 1, 0.5, 0.53333, 0.4], 0.750, 0.05296),
    2.0: ([0.625, 1, 0.25, 0.26667, 0.2], 0.475, 0.00449),
}


@pytest.mark.parametrize("threshold", WORKED)
def test_worked_example(threshold):
    acceptance, z, kl = WORKED[threshold]
    a = np.exp(log_acceptance(LP, LQ, np.log(threshold)))
    m = np.exp(log_inclusion(LP, LQ, np.log(threshold)))
    np.testing.assert_allclose(a, acceptance, atol=1e-4)
    np.testing.assert_allclose(m, Q * a, rtol=1e-5)
    assert abs(m.sum() - z) < 1e-5
    after = m / m.sum()
    assert abs(float((P * np.log(P / after)).sum()) - kl) < 1e-4


def naive_thin(log_p, log_q, uniforms, threshold):
    out = []
    for p, q, u in zip(np.exp(log_p), np.exp(log_q), uniforms, strict=True):
        out.append(u < min(1.0, p / (threshold * q)))
    return out


def test_thin_equals_the_naive_loop():
    rng = np.random.default_rng(0)
    lq = np.log(rng.uniform(0.01, 1, 5000)).astype(np.float32)
    lp = np.minimum(0, lq + rng.normal(0, 0.5, 5000)).astype(np.float32)
    u = rng.uniform(0.001, 0.999, 5000).astype(np.float32)
    for threshold in (0.5, 1.0, 2.0):
        got = thin(lp, lq, u, float(np.log(threshold))).accept
        expected = np.array(naive_thin(lp.astype(np.float64), lq.astype(np.float64), u, threshold))
        assert (got != expected).sum() == 0


def test_equal_policies_accept_everything_with_weight_one_bitwise():
    lq = np.log(np.random.default_rng(1).uniform(1e-6, 1, 100_000)).astype(np.float32)
    u = coins(0, np.arange(100), np.zeros(100, np.int32), np.full(100, 1000), 3)
    result = thin(lq, lq, u, 0.0)
    assert result.accept.all()
    assert (result.log_m == lq).all()


def test_impossible_token_is_rejected_and_absurd_densities_are_named():
    lp = np.array([-np.inf, -1.0], np.float32)
    lq = np.array([-1.0, -1.0], np.float32)
    assert thin(lp, lq, np.array([1e-7, 1e-7], np.float32), 0.0).accept.tolist() == [False, True]
    with pytest.raises(DataError, match=r"log_q\[1\]=nan"):
        check_scores(lp, np.array([-1.0, np.nan], np.float32))
    with pytest.raises(DataError, match=r"log_p\[0\]=0.5"):
        check_scores(np.array([0.5, -1], np.float32), lq)
    with pytest.raises(DataError, match="equally long"):
        check_scores(lp, lq[:1])


def naive_coin(seed, group, sibling, position, version):
    """One token's coin, from the reference cipher."""
    word = philox4x32((seed, STREAM_COINS + version), position // 4, sibling, group & 0xFFFFFFFF, group >> 32)[
        position % 4
    ]
    return (int(word >> np.uint64(9)) + 0.5) * 2.0**-23


def test_coins_are_a_function_of_the_tokens_identity_alone():
    rng = np.random.default_rng(2)
    groups, siblings = rng.integers(0, 1 << 40, 40), rng.integers(0, 8, 40).astype(np.int32)
    lengths = rng.integers(0, 30, 40)
    base = np.split(coins(5, groups, siblings, lengths, 9), np.cumsum(lengths)[:-1])
    for g, s, n, drawn in zip(groups.tolist(), siblings.tolist(), lengths.tolist(), base, strict=True):
        assert drawn.tolist() == [naive_coin(5, g, s, t, 9) for t in range(n)]
    order = rng.permutation(40)
    again = coins(5, groups[order], siblings[order], lengths[order], 9)
    assert again.tolist() == np.concatenate([base[i] for i in order]).tolist()
    together = np.concatenate(base)
    for other in (
        coins(6, groups, siblings, lengths, 9),
        coins(5, groups + (1 << 33), siblings, lengths, 9),
        coins(5, groups, siblings + 8, lengths, 9),
        coins(5, groups, siblings, lengths, 10),
    ):
        assert (other != together).mean() > 0.99
    assert len(coins(5, groups[:0], siblings[:0], lengths[:0], 9)) == 0


def test_unbiased_whatever_policy_the_learner_weighs_with_later():
    """algorithms.md 1.4: E[M pi/m f] = E_pi[f], by enumeration; recomputing the weight is wrong."""
    rng = np.random.default_rng(3)
    f = rng.normal(size=5)
    for threshold in (0.3, 1.0, 1.7):
        a = np.exp(log_acceptance(LP, LQ, np.log(threshold)).astype(np.float64))
        m = np.exp(log_inclusion(LP, LQ, np.log(threshold)).astype(np.float64))
        pi = rng.dirichlet(np.ones(5))
        assert abs((Q * a * (pi / m) * f).sum() - (pi * f).sum()) < 1e-6
        wrong = (Q * a * np.maximum(threshold, pi / Q) * f).sum()
        assert abs(wrong - (pi * f).sum()) > 1e-3


def test_divergence_estimates_agree_with_the_exact_ones():
    rng = np.random.default_rng(4)
    n = 400_000
    tokens = rng.choice(5, size=n, p=Q)
    u = rng.uniform(1e-6, 1 - 1e-6, n).astype(np.float32)
    thinning = thin(LP[tokens], LQ[tokens], u, 0.0)
    got = divergence(LP[tokens], LQ[tokens], thinning)
    assert abs(got.kl_before - 0.16806) < 0.003
    assert abs(got.kl_after - 0.05296) < 0.003
    assert abs(got.expected_acceptance - 0.75) < 0.003
    assert got.ess == pytest.approx(0.889, abs=0.005)  # algorithms.md 1.3, per trained token


def test_divergence_of_nothing_and_of_nothing_accepted():
    none = np.zeros(0, np.float32)
    assert divergence(none, none, thin(none, none, none, 0.0)).kl_before == 0.0
    lp, lq = np.full(3, -np.inf, np.float32), np.full(3, -1.0, np.float32)
    result = divergence(lp, lq, thin(lp, lq, np.full(3, 0.5, np.float32), 0.0))
    assert result.expected_acceptance == 0.0
    assert np.isfinite(result.kl_before) and result.ess == 0.0


def test_wilson_interval():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(50, 100)
    assert low == pytest.approx(0.4038, abs=1e-3) and high == pytest.approx(0.5962, abs=1e-3)
    assert wilson_interval(10, 10)[1] == 1.0
