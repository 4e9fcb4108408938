"""Student's t and the two-way fit against numbers worked out by hand and naive oracles."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.intervals import half_width, pooled, t_95, two_way

TABLE = {1: 12.706, 4: 2.776, 10: 2.228, 11: 2.201, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000, 120: 1.980}


@pytest.mark.parametrize(("freedom", "quantile"), TABLE.items())
def test_t_is_that_of_the_tables(freedom, quantile):
    assert abs(t_95(freedom) - quantile) < 0.003


def test_t_falls_towards_the_normal_and_is_infinite_without_degrees_of_freedom():
    values = [t_95(n) for n in range(1, 400)]
    assert all(before > after > 1.95996 for before, after in pairwise(values))
    assert t_95(0) == math.inf


def test_pooled_by_hand():
    deviation, freedom = pooled([[1.0, 3.0], [5.0, 5.0, 8.0], [2.0]])
    assert freedom == 3
    assert deviation == pytest.approx(math.sqrt((2.0 + 6.0) / 3))  # squares within: 1+1, 1+1+4
    assert half_width(deviation, freedom, 3) == pytest.approx(3.182 * deviation / math.sqrt(3))
    assert math.isnan(pooled([[1.0], [2.0]])[0])
    assert half_width(math.nan, 0, 1) == math.inf


def test_two_groups_give_the_paired_t_test():
    a, b = [0.50, 0.70, 0.60], [0.40, 0.62, 0.54]
    fit = two_way({(g, s): v for g, values in (("a", a), ("b", b)) for s, v in enumerate(values)})
    mean, half = fit.difference("a", "b")
    d = np.array(a) - np.array(b)  # .10 .08 .06
    assert fit.freedom == 2
    assert mean == pytest.approx(0.08)
    assert half == pytest.approx(4.303 * d.std(ddof=1) / math.sqrt(3), rel=1e-6)  # 4.303 x .02 / 1.732
    assert fit.level("a") == pytest.approx(0.6)


def test_three_groups_share_their_noise_by_hand():
    table = {"a": [1.0, 2.0], "b": [2.0, 4.0], "c": [3.0, 3.0]}
    fit = two_way({(g, s): v for g, values in table.items() for s, v in enumerate(values)})
    # means 1.5, 3, 3 and seeds 2, 3 about 2.5: residuals 0 0 / -.5 .5 / .5 -.5, squares 1 over 2 degrees of freedom
    assert fit.freedom == 2
    assert fit.deviation == pytest.approx(math.sqrt(0.5))
    mean, half = fit.difference("b", "a")
    assert mean == pytest.approx(1.5)
    assert half == pytest.approx(4.303 * math.sqrt(0.5) * math.sqrt(2 / 2))


def test_a_missing_run_is_made_up_for_by_its_seed():
    """Seed 1 is worth 10 more; c lacks it and is not taken for worse."""
    noise = {("a", 0): 0.1, ("a", 1): -0.1, ("b", 0): -0.1, ("b", 1): 0.1, ("c", 0): 0.0}
    values = {(g, s): {"a": 1.0, "b": 2.0, "c": 2.0}[g] + 10.0 * s + n for (g, s), n in noise.items()}
    fit = two_way(values)
    assert fit.level("b") - fit.level("c") == pytest.approx(0.0, abs=0.11)
    assert fit.difference("b", "c")[1] > fit.difference("b", "a")[1] > 0


def test_groups_that_share_no_block_are_not_told_apart():
    fit = two_way({("a", 0): 1.0, ("b", 0): 2.0, ("a", 1): 1.1, ("b", 1): 2.2, ("c", 2): 5.0, ("d", 2): 6.0})
    assert fit.difference("a", "c")[1] == math.inf
    assert math.isfinite(fit.difference("a", "b")[1])


def test_one_block_tells_no_interval():
    fit = two_way({("a", 0): 1.0, ("b", 0): 2.0})
    assert fit.difference("b", "a") == (1.0, math.inf)
    assert fit.difference("a", "a") == (0.0, 0.0)
    with pytest.raises(ValueError, match="no values"):
        two_way({})


@settings(max_examples=30)
@given(st.integers(2, 5), st.integers(2, 5), st.integers(0, 2**31))
def test_a_whole_table_has_the_means_of_its_groups(groups, blocks, seed):
    table = np.random.default_rng(seed).normal(size=(groups, blocks))
    fit = two_way({(str(g), b): float(table[g, b]) for g in range(groups) for b in range(blocks)})
    assert np.allclose(fit.levels, table.mean(axis=1))
    residual = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    freedom = (groups - 1) * (blocks - 1)
    assert fit.freedom == freedom
    expected = t_95(freedom) * math.sqrt((residual**2).sum() / freedom) * math.sqrt(2 / blocks)
    assert fit.difference("0", "1")[1] == pytest.approx(expected)
