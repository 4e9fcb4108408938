"""Evaluation figures against naive oracles: enumeration, pairs, hand counts."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.calibration import BINS, auroc, calibrate, reliability
from broker.heldout import evaluate, mean_of, pass_at, vote
from common.mixture import mixture
from common.obrs import wilson_interval
from common.wire import EvaluationResult

# algorithms.md 2.5
CONFIDENCE = np.array([0.9, 0.8, 0.95, 0.6, 0.7, 0.3, 0.8, 0.1])
RIGHT = np.array([1, 1, 1, 1, 1, 0, 0, 0], bool)
unit = st.floats(0, 1, allow_nan=False)
flags = st.lists(st.booleans(), min_size=1, max_size=12)


# ---- calibration --------------------------------------------------------------------------------


def bin_by_text(confidence: float) -> int:
    """The bin of a number as it is written."""
    return int(Fraction(f"{confidence:.6f}") * 10)


def ece_by_hand(confidence: np.ndarray, right: np.ndarray) -> float:
    total = 0.0
    for b in range(BINS):
        inside = [i for i, c in enumerate(confidence) if bin_by_text(c) == b]
        if inside:
            accuracy = sum(bool(right[i]) for i in inside) / len(inside)
            total += len(inside) / len(right) * abs(accuracy - sum(confidence[i] for i in inside) / len(inside))
    return total


def auroc_by_pairs(confidence: np.ndarray, right: np.ndarray) -> float:
    pairs = [(a, b) for a in confidence[right] for b in confidence[~right]]
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


def test_the_worked_example() -> None:
    found = calibrate(CONFIDENCE, RIGHT)
    assert found is not None and (found.count, found.clipped) == (8, 0)
    assert found.brier == pytest.approx(0.1303, abs=5e-5) and found.ece == pytest.approx(0.2313, abs=5e-5)
    assert found.auroc == pytest.approx(auroc_by_pairs(CONFIDENCE, RIGHT)) == pytest.approx(12.5 / 15)
    assert found.bins[8] == [2, 0.8, 0.5] and found.bins[9][0] == 2 and found.bins[10] == [0, 0, 0]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_confidence_on_an_edge_lies_above_it_however_it_travelled(dtype: type) -> None:
    """In floats .3 / .1 < 3, and .7 in float32 is less than .7."""
    edges = (np.arange(BINS) / 10).astype(dtype).astype(np.float64)
    assert reliability(np.round(edges, 6), np.ones(BINS, bool))[:, 0].tolist() == [1] * BINS
    found = calibrate(edges, np.ones(BINS, bool))
    assert found is not None and [row[0] for row in found.bins] == [1] * BINS
    just_below = calibrate(np.array([0.299999, 0.699999, 0.999999]), np.ones(3, bool))
    assert just_below is not None and [i for i, row in enumerate(just_below.bins) if row[0]] == [2, 6, 9]


@settings(max_examples=80)
@given(st.lists(st.tuples(st.integers(0, 1000), st.booleans()), min_size=1, max_size=40))
def test_calibration_is_what_hand_counts_say(drawn) -> None:
    confidence = np.array([c / 1000 for c, _ in drawn])
    right = np.array([r for _, r in drawn])
    found = calibrate(confidence, right)
    assert found is not None
    assert found.ece == pytest.approx(ece_by_hand(confidence, right), abs=1e-12)
    assert found.brier == pytest.approx(sum((c - r) ** 2 for c, r in zip(confidence, right, strict=True)) / len(right))
    if right.all() or not right.any():
        assert found.auroc is None
    else:
        assert found.auroc == pytest.approx(auroc_by_pairs(confidence, right), abs=1e-12)
    assert sum(row[0] for row in found.bins) == len(right)
    assert 0 <= found.ece <= 1 and found.ece**2 <= found.brier + 1e-12  # Jensen: the bias of a bin squared
    order = np.random.default_rng(0).permutation(len(right))
    again = calibrate(confidence[order], right[order])
    assert again is not None and again.ece == pytest.approx(found.ece) and again.auroc == found.auroc


@settings(max_examples=60)
@given(st.lists(st.tuples(unit, st.booleans()), min_size=2, max_size=20))
def test_auroc_knows_only_the_order(drawn) -> None:
    confidence, right = np.array([c for c, _ in drawn]), np.array([r for _, r in drawn])
    found = auroc(confidence, right)
    assert found == auroc(np.searchsorted(np.unique(confidence), confidence).astype(float), right)
    if found is not None:
        assert auroc(confidence, ~right) == pytest.approx(1 - found)


def test_unknown_confidences_are_left_out_and_odd_ones_clipped_and_counted() -> None:
    assert calibrate(np.array([np.nan, np.nan]), np.array([True, False])) is None
    found = calibrate(np.array([np.nan, 1.5, -1.0, 0.5]), np.array([True, True, False, True]))
    assert found is not None and (found.count, found.clipped, found.brier) == (3, 2, 0.25 / 3)
    assert found.bins[10] == [1, 1, 1] and found.bins[0] == [1, 0, 0] and found.auroc == 1.0


# ---- pass@k -------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(flags, st.data())
def test_pass_at_k_is_the_share_of_all_subsets(right, data) -> None:
    k = data.draw(st.integers(1, len(right)))
    subsets = list(itertools.combinations(right, k))
    expected = sum(any(s) for s in subsets) / len(subsets)
    assert pass_at(np.array([right]), k)[0] == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_of_many_samples_neither_overflows_nor_cancels() -> None:
    right = np.zeros((1, 4000), bool)
    right[0, 0] = True
    assert pass_at(right, 1)[0] == pytest.approx(1 / 4000, rel=1e-9)
    assert pass_at(right, 1000)[0] == pytest.approx(0.25, rel=1e-9)
    assert pass_at(~right, 1)[0] == pytest.approx(3999 / 4000) and pass_at(~right, 2)[0] == 1.0
    exact = 1 - Fraction(math.comb(3990, 500), math.comb(4000, 500))
    right[0, :10] = True
    assert pass_at(right, 500)[0] == pytest.approx(float(exact), rel=1e-12)


@settings(max_examples=40)
@given(st.lists(flags.map(lambda f: (f * 12)[:12]), min_size=1, max_size=5))
def test_pass_at_k_rises_with_k_from_the_mean_to_any(rows) -> None:
    right = np.array(rows)
    by_k = np.array([pass_at(right, k) for k in range(1, 13)])
    np.testing.assert_allclose(by_k[0], right.mean(axis=1))
    np.testing.assert_array_equal(by_k[-1], right.any(axis=1))
    assert (np.diff(by_k, axis=0) >= -1e-12).all()


# ---- votes --------------------------------------------------------------------------------------


def vote_by_hand(answers: list[int], right: list[bool], weights: list[int]) -> float:
    tally: Counter[int] = Counter()
    for answer, weight in zip(answers, weights, strict=True):
        if answer:
            tally[answer] += weight
    if not tally:
        return 0.0
    winners = [a for a, t in tally.items() if t == max(tally.values())]
    shares = [[r for a, r in zip(answers, right, strict=True) if a == winner] for winner in winners]
    return sum(sum(s) / len(s) for s in shares) / len(shares)


@settings(max_examples=80)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 4)), min_size=1, max_size=8))
def test_a_vote_is_what_hand_counts_say(drawn) -> None:
    answers, right, weights = (list(column) for column in zip(*drawn, strict=True))
    found = vote(np.array([answers]), np.array([right]), np.array([weights]) / 10)
    assert found.accuracy[0] == pytest.approx(vote_by_hand(answers, right, weights))
    assert found.voted[0] == any(answers)


def test_ties_are_drawn_by_lot_and_told() -> None:
    answers, right = np.array([[7, 7, 8, 8], [7, 7, 8, 0], [0, 0, 0, 0]]), np.array([[1, 1, 0, 0]] * 3, bool)
    found = vote(answers, right, np.ones((3, 4)))
    assert found.accuracy.tolist() == [0.5, 1.0, 0.0]
    assert found.tied.tolist() == [True, False, False] and found.voted.tolist() == [True, True, False]
    sure = vote(answers[:2], right[:2], np.array([[0.1, 0.1, 0.9, 0.9], [0.1, 0.2, 0.3, 0.0]]))
    assert sure.accuracy.tolist() == [0.0, 0.5] and sure.tied.tolist() == [False, True]  # .1 + .2 is .3 here


# ---- means and the whole ------------------------------------------------------------------------


def test_samples_of_one_prompt_are_not_independent_draws() -> None:
    rng = np.random.default_rng(0)
    ability = rng.random((400, 1))
    values = (rng.random((400, 1)) < ability).astype(float) * np.ones((1, 16))  # sixteen copies say no more than one
    sixteen, one = mean_of(values), mean_of(values[:, :1])
    assert (sixteen.value, sixteen.low, sixteen.high) == (one.value, one.low, one.high)
    assert sixteen.high is not None and sixteen.low is not None
    assert sixteen.high - sixteen.low == pytest.approx(2 * 1.96 * values[:, 0].std(ddof=1) / 20)


def test_the_interval_holds_its_mean_nineteen_times_in_twenty() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        ability = rng.beta(2, 3, (60, 1))
        found = mean_of((rng.random((60, 4)) < ability).astype(float), is_share=True)
        held += found.low <= 0.4 <= found.high  # type: ignore[operator]
    assert 0.92 <= held / 400 <= 0.98


def test_shares_of_single_samples_and_of_prompts_that_agree_take_wilsons_interval() -> None:
    values = np.array([1, 1, 0, 1, 0, 1, 1, 1], float)[:, None]
    found = mean_of(values, is_share=True)
    assert (found.low, found.high) == wilson_interval(6, 8)
    agreed = mean_of(np.ones((8, 5)), is_share=True)
    assert (agreed.value, agreed.low, agreed.high) == (1.0, *wilson_interval(8, 8))
    alone = mean_of(np.array([[0.5, 0.7]]))
    assert (alone.value, alone.low, alone.high) == (pytest.approx(0.6), None, None)
    low = mean_of(np.array([[0.0, 0.0]] * 9 + [[0.0, 1.0]]), is_share=True)
    assert low.low == 0.0 and low.high is not None and low.high < 0.2


def result(**changes) -> EvaluationResult:
    nan = np.nan
    base = {
        "evaluation": 0, "version_min": 3, "version_max": 4, "samples": 2,
        "rewards": np.array([1, 0, 1, 1, 0, 0, 0.5, 0.5], np.float32),
        "lengths": np.arange(1, 9, dtype=np.int32),
        "channel_names": ["correct", "confidence", "closeness"],
        "channels": np.array(
            [[1, 0.9, nan], [0, 0.8, nan], [1, 0.6, nan], [1, 0.7, nan], [0, 0.3, nan], [0, 0.1, nan],
             [nan, nan, 0.5], [nan, nan, 0.25]], np.float32,
        ),
        "answers": np.array([5, 6, 5, 5, 7, 8, 0, 0]),
    }  # fmt: skip
    return EvaluationResult(**{**base, **changes})


def test_a_result_of_mixed_tasks_is_told_as_a_whole_and_by_task() -> None:
    message = result()
    message.check()
    found = evaluate(message, (1, 2), ("sums", "game"), mixture((3.0, 1.0)))
    assert (found["prompts"], found["samples"], found["reward"]) == (4, 2, 0.5)
    assert found["channels"] == {
        "correct": 0.5, "confidence": pytest.approx(3.4 / 6), "closeness": 0.375,
    }  # fmt: skip
    assert found["correct"] == 0.5 and found["pass_at"]["1"][0] == 0.5 and found["pass_at"]["2"][0] == 2 / 3
    assert found["pass_at"]["2"][1:] == list(wilson_interval(2, 3))
    assert found["votes"]["majority"][0] == pytest.approx((0.5 + 1 + 0) / 3)
    assert found["votes"]["weighted"][0] == pytest.approx((1 + 1 + 0) / 3)
    assert found["votes"]["majority_tied"] == pytest.approx(2 / 3) and found["votes"]["weighted_tied"] == 0
    assert found["calibration"]["count"] == 6 and found["calibration"]["auroc"] == auroc_by_pairs(
        np.array([0.9, 0.8, 0.6, 0.7, 0.3, 0.1]), np.array([1, 0, 1, 1, 0, 0], bool)
    )
    sums, game = found["tasks"]["sums"], found["tasks"]["game"]
    assert (sums["prompts"], game["prompts"]) == (3, 1) and sums["pass_at"] == found["pass_at"]
    assert game["reward"] == 0.5 and game["channels"] == {"closeness": 0.375} and "correct" not in game
    assert (game["reward_low"], game["reward_high"]) == (None, None)


def test_without_answers_confidences_or_ks_nothing_is_made_up() -> None:
    found = evaluate(result(answers=None), (), ("all",), mixture((1.0,)))
    assert "votes" not in found and "pass_at" not in found and "tasks" not in found
    bare = EvaluationResult(0, 0, 0, np.array([1.0, 0.0], np.float32), np.ones(2, np.int32))
    found = evaluate(bare, (), ("all",), mixture((1.0,)))
    assert found["reward"] == 0.5 and found["channels"] == {} and "correct" not in found


def test_shares_that_are_alike_and_neither_0_nor_1_have_an_interval_too():
    for values in (np.full((50, 1), 0.5), np.tile([1.0, 0, 0, 0], (50, 1))):
        found = mean_of(values, is_share=True)
        assert 0 < found.low < found.value < found.high < 1
    assert mean_of(np.full((50, 1), 0.1), is_share=True).high == pytest.approx(wilson_interval(5, 50)[1])
    assert mean_of(np.full((1, 2), 0.5), is_share=True).low is None


@pytest.mark.parametrize(("row", "prompts"), [([1.0, 0.0], 3), ([1.0, 0, 0, 0], 5)])
def test_the_interval_of_prompts_that_are_alike_is_that_of_their_mean(row, prompts):
    found = mean_of(np.tile(row, (prompts, 1)), is_share=True)
    assert (found.low, found.high) == wilson_interval(found.value * prompts, prompts)
    assert mean_of(np.array([row]), is_share=True).low is None  # of one prompt
