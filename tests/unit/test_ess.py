"""Lambda for an effective sample size: against enumeration and bisection, monotone, bit for bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import ObrsSection, RolloutSection, RunConfig
from common.errors import ConfigError, DataError
from common.ess import EssController, ess_of, solve_ess
from common.objective import LossSection
from common.obrs import divergence, thin

ratios = st.lists(
    st.one_of(st.just(0.0), st.just(1.0), st.floats(1e-3, 1e3), st.sampled_from([0.5, 2.0])), min_size=1, max_size=40
).map(lambda found: np.array(found, np.float64))


def naive(ratio, threshold):
    """E[a w]^2 / (E[a] E[a w^2]) token by token, with the learner's weight p/m of each that may be accepted."""
    accept = [min(1.0, r / threshold) for r in ratio]
    weight = [r / a if a else 0.0 for r, a in zip(ratio, accept, strict=True)]
    n = len(ratio)
    first = sum(a * w for a, w in zip(accept, weight, strict=True)) / n
    second = sum(a * w * w for a, w in zip(accept, weight, strict=True)) / n
    return first**2 / (sum(accept) / n * second) if second else 0.0


@settings(max_examples=60)
@given(ratios, st.floats(1e-3, 1e3))
def test_the_formula_is_the_definition(ratio, threshold):
    assert ess_of(ratio, threshold) == pytest.approx(naive(ratio, threshold), rel=1e-9)


@settings(max_examples=60)
@given(ratios, st.floats(1e-3, 1e3), st.floats(1, 10))
def test_it_never_falls_with_lambda_and_ends_at_one(ratio, threshold, factor):
    assert ess_of(ratio, factor * threshold) >= ess_of(ratio, threshold) * (1 - 1e-12)
    if ratio.any():
        assert ess_of(ratio, float(ratio.max())) == pytest.approx(1.0)


@settings(max_examples=60)
@given(ratios, st.floats(0.01, 0.999))
def test_the_solution_is_the_least_that_attains_the_target(ratio, target):
    found = solve_ess(ratio, target)
    if not ratio.any():
        assert found == np.inf
    elif found == 0:
        assert ess_of(ratio, 1e-9) >= target * (1 - 1e-9)
    else:
        assert ess_of(ratio, found) >= target * (1 - 1e-9)
        low, high = 1e-9, float(ratio.max())  # bisection, the reference
        for _ in range(200):
            middle = (low * high) ** 0.5
            low, high = (low, middle) if ess_of(ratio, middle) >= target else (middle, high)
        assert ess_of(ratio, found) == pytest.approx(ess_of(ratio, high), rel=1e-6)
        assert found <= high * (1 + 1e-6)


def batch(seed, n=20_000, sd=0.8):
    """log p, log q of tokens sampled from q; E[p/q] = 1."""
    rng = np.random.default_rng(seed)
    log_q = -rng.exponential(1.0, n) - 3 * sd
    return np.minimum(0, log_q + rng.normal(-sd * sd / 2, sd, n)).astype(np.float32), log_q.astype(np.float32)


def test_the_next_batch_has_the_ess_that_was_asked_for():
    controller = EssController(0.9, window=2)
    for seed in range(4):
        log_p, log_q = batch(seed)
        used = controller.log_threshold
        choice = controller.update(log_p, log_q)
        assert choice.feasible and not choice.clamped
        if seed:
            uniforms = np.random.default_rng(99).random(len(log_q)).astype(np.float32) * 0.999 + 5e-4
            seen = divergence(log_p, log_q, thin(log_p, log_q, uniforms.astype(np.float32), used))
            assert seen.ess == pytest.approx(0.9, abs=0.025)
            assert choice.expected_acceptance == pytest.approx(seen.expected_acceptance, abs=0.02)


def test_a_higher_target_costs_tokens():
    log_p, log_q = batch(0)
    kept = [EssController(target).update(log_p, log_q).expected_acceptance for target in (0.7, 0.9, 0.97)]
    assert kept == sorted(kept, reverse=True) and kept[0] - kept[-1] > 0.1


def test_limits_are_answered():
    on_policy = EssController(0.9).update(np.full(9, -1, np.float32), np.full(9, -1, np.float32))
    assert on_policy.feasible and on_policy.clamped and on_policy.log_threshold == pytest.approx(-np.log(4))
    assert on_policy.expected_acceptance == 1.0
    wild = batch(0, sd=3.0)
    beyond = EssController(0.999).update(*wild)
    assert not beyond.feasible and beyond.clamped and beyond.log_threshold == pytest.approx(np.log(4))
    impossible = EssController(0.5).update(np.full(3, -np.inf, np.float32), np.full(3, -1, np.float32))
    assert not impossible.feasible and impossible.expected_acceptance == 0.0
    assert EssController(0.5).update(np.zeros(0, np.float32), np.zeros(0, np.float32)) is None


def test_extreme_ratios_stay_finite():
    assert 0 < solve_ess(np.array([1e-130, 1.0, 1e130]), 0.5) < np.inf
    assert ess_of(np.array([1e-130, 1.0]), 1e-4) > 0


@pytest.mark.parametrize("window", [1, 3])
def test_it_continues_bit_for_bit(window):
    batches = [batch(seed, 300) for seed in range(8)]
    whole, first, second = (EssController(0.8, window=window) for _ in range(3))
    expected = [whole.update(*b) for b in batches]
    for b in batches[:4]:
        first.update(*b)
    second.restore(first.state())
    assert [second.update(*b) for b in batches[4:]] == expected[4:]


def test_mistakes_are_named():
    for target in (0.0, 1.0, np.nan):
        with pytest.raises(DataError, match=r"must lie in \(0, 1\)"):
            EssController(target)
        with pytest.raises(DataError, match=r"must lie in \(0, 1\)"):
            solve_ess(np.ones(2), target)
    with pytest.raises(DataError, match="nan"):
        solve_ess(np.array([np.nan]), 0.5)
    with pytest.raises(ConfigError, match=r"obrs.target_ess=1.0"):
        ObrsSection(mode="ess", target_ess=1.0)
    with pytest.raises(ConfigError, match=r"obrs.z_weight=.context.*obrs.mode=ess.*obrs.mode=budget"):
        ObrsSection(mode="ess", z_weight="context")
    with pytest.raises(ConfigError, match=r"obrs.mode=off"):
        RunConfig(obrs=ObrsSection(mode="ess"), loss=LossSection(correction="uncorrected", anchor="proximal"))
    RunConfig(obrs=ObrsSection(mode="ess", target_ess=0.8, window=4), rollout=RolloutSection())
