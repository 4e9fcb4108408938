"""Threshold solvers against each other, exact sums and the worked numbers of algorithms.md (J4, J7)."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.budget import (
    BudgetController,
    Support,
    newton_iterates,
    solve_bisection,
    solve_newton,
    solve_sorted,
    solve_threshold,
    threshold_bounds,
)
from common.errors import DataError
from common.obrs import log_acceptance

P = np.array([0.50, 0.25, 0.15, 0.08, 0.02])
Q = np.array([0.40, 0.10, 0.30, 0.15, 0.05])
SOLVERS = (solve_newton, solve_sorted, solve_bisection)


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def naive_z(p, q, threshold):
    return sum(min(y, x / threshold) for x, y in zip(p, q, strict=True))


def naive_acceptance(log_p, log_q, log_threshold):
    ratios = np.exp(log_p.astype(np.float64) - log_q.astype(np.float64))
    return sum(min(1.0, r / np.exp(log_threshold)) for r in ratios) / len(ratios)


def tokens(seed, n, sd=0.5):
    rng = np.random.default_rng(seed)
    lq = np.log(rng.uniform(0.01, 1, n)).astype(np.float32)
    return np.minimum(0, lq + rng.normal(0, sd, n)).astype(np.float32), lq


@pytest.mark.parametrize("solver", SOLVERS)
def test_worked_thresholds(solver):
    """algorithms.md 1.14."""
    for budget, threshold in ((0.95, 1 / 1.8), (0.90, 0.625), (0.70, 1.25), (0.30, 1 / 0.3)):
        s = solver(Q, P, 1, budget)
        assert 1 / s == pytest.approx(threshold, rel=1e-12)
        assert naive_z(P, Q, 1 / s) == pytest.approx(budget, rel=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_support_gap(solver):
    """J4: q puts 0.2 where p is 0, so Z never exceeds 0.8; there the largest threshold is taken."""
    p, q = np.array([0.6, 0.4, 0.0]), np.array([0.5, 0.3, 0.2])
    assert solver(q, p, 1, 0.9) == np.inf
    assert solver(q, p, 1, 0.8) == pytest.approx(0.5 / 0.6, rel=1e-14)  # min p/q = 1.2 over p > 0
    assert solver(np.array([0.5]), np.array([0.0]), 1, 0.1) == np.inf


def problem(rng, size):
    return softmax(rng.normal(0, 2, size)), softmax(rng.normal(0, 2, size)), float(rng.uniform(0.02, 0.999))


def test_solvers_agree_and_newton_is_quick():
    """J4's random problems: at most 9 Newton steps over 2000 of them there."""
    rng = np.random.default_rng(0)
    steps = []
    for _ in range(300):
        p, q, budget = problem(rng, int(rng.integers(2, 400)))
        s = [solver(q, p, 1, budget) for solver in SOLVERS]
        np.testing.assert_allclose(s, s[0], rtol=1e-9)
        assert naive_z(p, q, 1 / s[0]) == pytest.approx(budget, abs=1e-12)
        steps.append(len(list(newton_iterates(q, p, 1, budget))))
    assert np.mean(steps) < 7 and max(steps) <= 12


@st.composite
def supports(draw):
    size = draw(st.integers(1, 12))
    values = st.lists(st.floats(-6, 6), min_size=size, max_size=size)
    p, q = (softmax(np.array(draw(values))) for _ in range(2))
    p = p * np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    return q, p, draw(st.floats(0.01, 1.0))


@settings(max_examples=200)
@given(supports())
def test_newton_rises_and_never_overshoots(example):
    q, p, budget = example
    attainable = float(q[p > 0].sum())
    s = list(newton_iterates(q, p, 1, budget))
    if budget > attainable * (1 + 1e-9):
        assert s == [np.inf]
        return
    assume(abs(budget - attainable) > 1e-9)
    assert s[0] == pytest.approx(min(budget / p.sum(), (q[p > 0] / p[p > 0]).max()), rel=1e-12)
    assert (np.diff(s) >= 0).all() and len(s) <= len(q) + 1
    values = [np.minimum(q, x * p).sum() for x in s]
    assert (np.array(values) <= budget * (1 + 1e-12)).all()
    assert values[-1] == pytest.approx(budget, rel=1e-12)


@settings(max_examples=200)
@given(supports())
def test_three_solvers_agree_and_the_threshold_is_unique_below_the_support(example):
    q, p, budget = example
    assume(budget < float(q[p > 0].sum()) - 1e-4)
    s = [solver(q, p, 1, budget) for solver in SOLVERS]
    np.testing.assert_allclose(s, s[0], rtol=1e-9)
    assert np.minimum(q, s[0] * (1 - 1e-6) * p).sum() < budget < np.minimum(q, s[0] * (1 + 1e-6) * p).sum()


def test_threshold_of_sampled_tokens():
    log_p, log_q = tokens(0, 4000)
    for budget in (0.5, 0.7, 0.9):
        choice = solve_threshold(log_p, log_q, budget)
        assert choice.feasible and not choice.clamped
        assert choice.expected_acceptance == pytest.approx(budget, rel=1e-12)
        assert naive_acceptance(log_p, log_q, choice.log_threshold) == pytest.approx(budget, abs=1e-7)
        # And what thin() will do with it, in float32.
        assert np.exp(log_acceptance(log_p, log_q, choice.log_threshold)).mean() == pytest.approx(budget, abs=1e-5)


def test_threshold_from_samples_estimates_the_exact_one():
    """E_q[min(1, s p/q)] = Z: with every token as often as q says, the two forms coincide."""
    counts = np.round(Q * 100).astype(int)
    log_p, log_q = (np.repeat(np.log(x), counts).astype(np.float32) for x in (P, Q))
    for budget in (0.95, 0.9, 0.7, 0.3):
        got = solve_threshold(log_p, log_q, budget).log_threshold
        assert np.exp(got) == pytest.approx(1 / solve_sorted(Q, P, 1, budget), rel=1e-6)


def test_one_threshold_for_all_contexts_beats_one_for_each():
    """J4: at equal acceptance the joint KL is lower, and matched contexts keep more."""
    rng = np.random.default_rng(1)
    p = softmax(rng.normal(0, 1.5, (6, 30)))
    q = softmax(np.log(p) + rng.normal(0, 1, (6, 30)) * np.linspace(0.05, 1.2, 6)[:, None])

    def joint_kl(m):
        return float((p / 6 * np.log(p / m * m.sum())).sum())

    together = solve_newton(*Support.rows(np.log(q), np.log(p)), 0.8)
    m_together = np.minimum(q, together * p)
    each = np.array(
        [[solve_newton(*Support.rows(np.log(y[None]), np.log(x[None])), 0.8)] for x, y in zip(p, q, strict=True)]
    )
    m_each = np.minimum(q, each * p)
    np.testing.assert_allclose(m_each.sum(1), 0.8, rtol=1e-12)
    assert m_together.sum() == pytest.approx(6 * 0.8, rel=1e-12)
    assert joint_kl(m_together) < joint_kl(m_each) < joint_kl(q)
    assert m_together.sum(1)[0] > 0.8 > m_together.sum(1)[-1]


def test_budget_beyond_the_support_takes_the_smallest_threshold():
    """algorithms.md 1.10: p = 0 on a fifth of the tokens."""
    log_q = np.full(5, -1.0, np.float32)
    log_p = np.array([-0.8, -1.0, -1.2, -1.1, -np.inf], np.float32)
    choice = solve_threshold(log_p, log_q, 0.9)
    assert not choice.feasible and choice.clamped
    assert choice.log_threshold == pytest.approx(-np.log(4)) and choice.expected_acceptance == pytest.approx(0.8)
    at = solve_threshold(log_p, log_q, 0.8)  # every threshold up to min p/q solves it: the largest is taken
    assert at.feasible and not at.clamped
    assert at.log_threshold == pytest.approx(-0.2, abs=1e-6) and at.expected_acceptance == pytest.approx(0.8)
    assert not solve_threshold(np.full(5, -np.inf, np.float32), log_q, 0.1).feasible


def test_a_share_that_floats_cannot_express_is_still_attainable():
    for n in range(2, 200):
        log_p = np.zeros(n, np.float32)
        log_p[0] = -np.inf
        choice = solve_threshold(log_p, np.zeros(n, np.float32), (n - 1) / n)
        assert choice.feasible and choice.log_threshold == 0.0


def test_thresholds_are_clamped_and_say_so():
    log_q = np.full(10, -3.0, np.float32)
    for log_p, sign in ((log_q - 2, -1), (log_q + 2, 1)):
        choice = solve_threshold(log_p, log_q, 0.9)
        assert choice.clamped and choice.feasible
        assert choice.log_threshold == pytest.approx(sign * np.log(4))
        assert choice.expected_acceptance == pytest.approx(np.exp(-2 + np.log(4)) if sign < 0 else 1.0)
        free = solve_threshold(log_p, log_q, 0.9, limit=3.0)
        assert not free.clamped and free.log_threshold == pytest.approx(sign * 2 - np.log(0.9), rel=1e-6)
    assert solve_threshold(log_p, log_q, 0.9, limit=0.0).log_threshold == 0.0


def test_equal_policies_need_no_threshold():
    _, log_q = tokens(2, 1000)
    choice = solve_threshold(log_q, log_q, 1.0)
    assert (choice.log_threshold, choice.expected_acceptance, choice.clamped) == (0.0, 1.0, False)
    assert solve_threshold(log_q, log_q, 0.5).log_threshold == pytest.approx(np.log(2))


def test_extreme_ratios_stay_finite():
    log_q = np.array([-1, -1, -5000, -0.5], np.float32)
    log_p = np.array([-4000, -np.inf, -0.1, -0.5], np.float32)
    for budget in (0.2, 0.6, 0.75):
        support = Support.sampled(log_p - log_q)
        s = [solver(*support, budget) for solver in SOLVERS]
        np.testing.assert_allclose(np.log(s), np.log(s[0]), rtol=1e-9)
        assert support.acceptance(s[0]) == pytest.approx(budget, rel=1e-12)
        assert solve_threshold(log_p, log_q, budget).feasible
    assert not solve_threshold(log_p, log_q, 0.8).feasible


@settings(max_examples=100)
@given(st.integers(0, 1000), st.floats(0.05, 0.95), st.integers(1, 12))
def test_bounds_hold_the_true_threshold(seed, budget, k):
    """J7: lambda_lo <= lambda* <= lambda_hi, and lambda_lo guarantees the budget."""
    rng = np.random.default_rng(seed)
    logits = -rng.uniform(1, 3, (8, 1)) * np.log(np.arange(1, 61)) + rng.normal(0, 0.6, (8, 60))
    p, q = softmax(logits), softmax(logits + rng.normal(0, 1, (8, 60)) * rng.uniform(0.05, 0.8, (8, 1)))
    topk, sampled = np.argsort(-q, 1)[:, :k], rng.integers(0, 60, 8)
    lq, lp = np.log(q).astype(np.float32), np.log(p).astype(np.float32)
    rows = np.arange(8)
    inside = (topk == sampled[:, None]).any(1)
    arguments = (np.take_along_axis(lq, topk, 1), np.take_along_axis(lp, topk, 1), lq[rows, sampled], lp[rows, sampled])
    low, high = threshold_bounds(*arguments, inside, budget)
    true = -np.log(solve_newton(*Support.rows(np.log(q), np.log(p)), budget))
    assert low <= true + 1e-5 and true <= high + 1e-5
    if np.isfinite(low):
        assert np.minimum(q, p / np.exp(low)).sum(1).mean() >= budget - 1e-6
    assert np.minimum(q, p / np.exp(high)).sum(1).mean() <= budget + 1e-6
    # Naive: the known ids of every context, one by one.
    core_mass = sum(q[t, i] for t in rows for i in {*topk[t].tolist(), int(sampled[t])}) / 8
    assert np.isfinite(low) == (core_mass >= budget)


def test_bounds_meet_where_nothing_is_missing():
    lq, lp = (np.log(x[None]).astype(np.float32) for x in (Q, P))
    low, high = threshold_bounds(lq, lp, lq[:, 0], lp[:, 0], np.array([True]), 0.7)
    assert np.exp(low) == pytest.approx(1.25, rel=1e-5) and np.exp(high) == pytest.approx(1.25, rel=1e-5)


def test_controller_uses_a_batch_for_the_next_one_only():
    controller = BudgetController(0.7)
    used = []
    for seed in range(4):
        log_p, log_q = tokens(seed, 500, sd=0.2 + 0.3 * seed)
        used.append(controller.log_threshold)
        choice = controller.update(log_p, log_q)
        assert choice == solve_threshold(log_p, log_q, 0.7)
        assert controller.log_threshold == choice.log_threshold
    assert used[0] == 0.0
    assert used[1:] == [solve_threshold(*tokens(i, 500, sd=0.2 + 0.3 * i), 0.7).log_threshold for i in range(3)]


def test_controller_window_is_the_last_batches_together():
    controller = BudgetController(0.6, window=3)
    batches = [tokens(i, 100 + i) for i in range(6)]
    for i, batch in enumerate(batches):
        last = [np.concatenate(parts) for parts in zip(*batches[max(0, i - 2) : i + 1], strict=True)]
        assert controller.update(*batch) == solve_threshold(*last, 0.6)


@pytest.mark.parametrize("window", [1, 2, 4])
def test_controller_continues_bit_for_bit(window):
    batches = [tokens(i, 200) for i in range(10)]
    whole = BudgetController(0.8, window=window)
    expected = [whole.update(*batch) for batch in batches]
    first = BudgetController(0.8, window=window)
    for batch in batches[:5]:
        first.update(*batch)
    state = first.state()
    assert len(state["log_ratios"]) == window - 1
    state["log_ratios"] = [x.tolist() for x in state["log_ratios"]]  # as JSON would hold them
    second = BudgetController(0.8, window=window)
    second.restore(state)
    assert second.log_threshold == first.log_threshold
    assert [second.update(*batch) for batch in batches[5:]] == expected[5:]
    first.update(*batches[5])
    assert len(state["log_ratios"]) == window - 1  # a state is a snapshot


def test_controller_ignores_an_empty_batch_and_fits_a_foreign_state():
    controller = BudgetController(0.9, window=2, limit=0.5)
    none = np.zeros(0, np.float32)
    assert controller.update(none, none) is None
    assert controller.log_threshold == 0.0 and controller.state()["log_ratios"] == []
    ratios = [np.full(3, i, np.float32) for i in range(4)]
    controller.restore({"log_threshold": -1.2, "log_ratios": ratios})
    assert controller.log_threshold == -0.5
    assert [x.tolist() for x in controller.state()["log_ratios"]] == [[3, 3, 3]]
    for state in ({"log_threshold": np.nan, "log_ratios": []}, {"log_threshold": 0, "log_ratios": [[np.nan]]}):
        with pytest.raises(DataError, match="start afresh"):
            controller.restore(state)


def test_mistakes_are_named():
    log_p, log_q = tokens(0, 3)
    for budget in (0.0, 1.01, np.nan):
        with pytest.raises(DataError, match=r"must lie in \(0, 1\]"):
            solve_threshold(log_p, log_q, budget)
        with pytest.raises(DataError, match=r"must lie in \(0, 1\]"):
            BudgetController(budget)
    with pytest.raises(DataError, match="keep the last threshold"):
        solve_threshold(log_p[:0], log_q[:0], 0.5)
    with pytest.raises(DataError, match=r"log_q\[0\]=nan"):
        solve_threshold(log_p, log_q * np.float32(np.nan), 0.5)
    with pytest.raises(DataError, match=r"limit=-1\.0 must lie in"):
        solve_threshold(log_p, log_q, 0.5, limit=-1.0)
    with pytest.raises(DataError, match="window=0"):
        BudgetController(0.5, window=0)
    for solver in SOLVERS:
        with pytest.raises(DataError, match="flat and equally long"):
            solver(Q, P[:2], 1, 0.5)
        with pytest.raises(DataError, match="B must be finite and at least 0"):
            solver(Q, -P, 1, 0.5)
