"""A sweep's figures and its recommendation, on made-up runs with known answers."""

import itertools
import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError, DataError
from tests.unit.swept import STEP_S, eval_line, step_line, write_run
from tools.sweep.__main__ import main
from tools.sweep.advice import GIVE_UP
from tools.sweep.analysis import by_samples, by_time, compare, curves, front
from tools.sweep.measure import Measured, Point, at, generated, measure
from tools.sweep.report import judge, read_sweep

RISE = {0: 0.2, 10: 0.4, 20: 0.8}


def test_a_run_is_measured_as_by_hand(tmp_path):
    write_run(tmp_path / "r", RISE, pace=2.0, start=30.0, lag=3)
    run = measure(tmp_path / "r", 7)
    assert (run.seed, run.notes) == (7, ())
    # 200 tokens of 32 trajectories a step, 100 tokens ahead: 16 trajectories more than were trained
    assert [(p.version, p.time_s, p.samples, p.reward) for p in run.points] == [
        (0, 0.0, 0.0, 0.2),
        (10, STEP_S + 9 * 2.0, 10 * 32 + 16, 0.4),
        (20, STEP_S + 19 * 2.0, 20 * 32 + 16, 0.8),
    ]
    assert run.points[0].error == pytest.approx(0.02)
    assert run.figures == pytest.approx({
        "train_s": 38.5, "steps": 20, "samples": 656, "kl_before": 0.02, "kl_after": 0.005, "kl_learner": 0.01,
        "ess": 0.9, "acceptance": 0.95, "rejected": 200 / 4100, "unused": 100 / 4100, "lag_mean": 3, "lag_max": 3,
        "generated_per_s": 100.0, "trained_per_s": 100.0, "accepted_per_s": 95.0,
    })  # fmt: skip


def test_a_run_without_rejection_has_no_divergence_before_it(tmp_path):
    write_run(tmp_path / "r", RISE, kl_before=None, kl_after=None)
    assert "kl_after" not in measure(tmp_path / "r", 0).figures


def test_what_cannot_be_measured_is_told(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(DataError, match=r"metrics\.jsonl: 0 step"):
        measure(tmp_path, 0)
    lines = [step_line(s, time_s=float(s)) for s in range(3)]
    del lines[1]["lag_histogram"]
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match="lack 'lag_histogram'"):
        measure(tmp_path, 0)
    lines = [step_line(s, time_s=float(s)) for s in range(3)] + [eval_line(2, math.nan, 9.0), eval_line(3, 0.5, 9.0)]
    path.write_text("\n".join(map(json.dumps, lines)).replace('"step": 1', '"step" 1'))
    run = measure(tmp_path, 0)
    assert [point.version for point in run.points] == [3]
    assert any("torn" in note for note in run.notes)


ODD = ([1, 2], "x", {"a": []}, True, 1e300)


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_a_figure_of_the_wrong_kind_costs_a_figure_or_a_run_never_the_report(tmp_path, odd):
    """Every field of one line in turn: it is left out and said, or the run is, and why."""
    for name in step_line(0, time_s=0.0).keys() - {"kind"}:
        write_run(tmp_path / name, RISE)
        path = tmp_path / name / "metrics.jsonl"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[:7], json.dumps(json.loads(lines[7]) | {name: odd}), *lines[8:]]))
        try:
            found = measure(tmp_path / name, 0)
        except DataError as error:
            assert name in str(error) and name in ("time_s", "trajectories", "tokens_proposed", "tokens_accepted")
            continue
        assert found.figures["lag_mean"] == 1 and len(found.points) == 3
        assert found.notes or name == "reward" or odd is True


def test_samples_count_what_waits_at_the_mean_length():
    steps = [step_line(0, time_s=0.0, tokens=64, trajectories=32, ahead=20), step_line(1, time_s=1.0, tokens=64)]
    assert generated(steps) == [32 + 10, 64 + 50]


POINTS = (Point(0, 0.0, 0.0, 0.2, 0.03), Point(5, 10.0, 64.0, 0.4, 0.04), Point(9, 20.0, 96.0, 0.8, 0.0))


@pytest.mark.parametrize(
    ("where", "found"),
    [(0.0, (0.2, 0.03)), (10.0, (0.4, 0.04)), (15.0, (0.6, 0.02)), (20.0, (0.8, 0.0)), (20.1, None), (-1.0, None)],
)
def test_rewards_are_linear_between_evaluations(where, found):
    assert at(POINTS, where, by_time) == (None if found is None else pytest.approx(found))
    assert at((), where, by_time) is None


def runs_of(rewards, times=None):
    """``{cell: [reward at the end by seed]}`` as runs that begin at .2 and take 10 s, or as long as ``times`` says."""
    return {
        cell: [
            Measured(
                seed, (Point(0, 0.0, 0.0, 0.2, 0.02), Point(9, (times or {}).get(cell, 10.0), 90.0, end, 0.02)), {}
            )
            for seed, end in enumerate(ends)
        ]
        for cell, ends in rewards.items()
    }


def test_cells_are_compared_where_the_fastest_run_ended():
    found = compare(runs_of({"a": [0.8], "b": [0.8]}, {"a": 20.0}), by_time)
    assert found.where == 10.0
    assert found.rewards == {("a", 0): pytest.approx(0.5), ("b", 0): pytest.approx(0.8)}
    assert compare(runs_of({"a": [0.8], "b": [0.8]}, {"a": 20.0}), by_samples).rewards["a", 0] == pytest.approx(0.8)


def test_runs_that_were_not_evaluated_by_then_are_left_out_by_name():
    runs = runs_of({"a": [0.8], "b": [0.9]})
    late = Measured(0, (Point(50, 11.0, 1.0, 0.3, 0.02), Point(90, 12.0, 2.0, 0.4, 0.02)), {})
    once = Measured(1, (Point(50, 1.0, 1.0, 0.3, 0.02),), {})
    found = compare({**runs, "c": [late, once]}, by_time)
    assert found.where == 10.0 and found.cells() == ["a", "b"]
    assert found.left_out == ["c, seed 1: 1 evaluation(s), and a curve takes two", "c, seed 0: not evaluated before 10"]
    nothing = compare({"c": [once]}, by_time)
    assert math.isnan(nothing.where) and nothing.cells() == []


def test_bands_pool_the_seeds_over_the_cells_by_hand():
    found = curves(runs_of({"a": [0.6, 0.8], "b": [0.7, 0.7]}), by_time)
    end = found["a"].mean[-1], found["a"].half[-1]
    # squares within: a .01 + .01, b 0, over 2 degrees of freedom: deviation .1; t = 4.303, two seeds
    assert end == pytest.approx((0.7, 4.303 * 0.1 / math.sqrt(2)))
    assert found["b"].half[-1] == pytest.approx(end[1])
    comparison = compare(runs_of({"a": [0.6, 0.8], "b": [0.7, 0.7]}), by_time)
    assert comparison.half("b") == pytest.approx(end[1]) and comparison.knows_seeds


def test_there_is_no_band_with_one_seed():
    runs = runs_of({"a": [0.6], "b": [0.7]})
    assert all(math.isnan(half) for half in curves(runs, by_time)["a"].half)
    found = compare(runs, by_time)
    assert not found.knows_seeds
    assert found.half("a") == pytest.approx(1.96 * 0.02)
    assert found.difference("b", "a") == pytest.approx((0.1, 1.96 * 0.02 * math.sqrt(2)))


@settings(max_examples=50)
@given(st.dictionaries(st.text(max_size=3), st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=9))
def test_the_front_is_what_nothing_beats(places):
    def beaten(cell):
        cost, worth = places[cell]
        return any(c <= cost and w >= worth and (c, w) != (cost, worth) for c, w in places.values())

    found = front(places)
    assert set(found) == {cell for cell in places if not beaten(cell)}
    assert all(places[a][0] <= places[b][0] for a, b in itertools.pairwise(found))


# ---- the recommendation -------------------------------------------------------------------------


def sweep_of(directory, rewards, *, key="staleness.budget", seeds=3, **runs):
    """A sweep's directory: ``{value: [reward at the end by seed]}``; ``runs`` go to each :func:`write_run`."""
    cells = {f"{key}={value}": {"label": f"{key}={value}", "values": {key: value}} for value in rewards}
    state = {"sweep": 1, "config": "configs/x.yaml", "axes": {key: list(rewards)}, "seeds": list(range(seeds))}
    directory.mkdir(parents=True)
    (directory / "sweep.json").write_text(json.dumps({**state, "cells": cells, "runs": {}}))
    for value, ends in rewards.items():
        for seed, end in enumerate(ends):
            if end is not None:
                lag = int(value) if value.isdigit() else 3
                write_run(directory / f"{key}={value}" / f"seed-{seed}", {0: 0.2, 9: end}, lag=lag, **runs)
    return directory


def advised(directory):
    return judge(read_sweep(directory)).advice


def test_the_smallest_budget_that_is_as_good_as_the_best_is_recommended(tmp_path):
    ends = {"0": [0.50, 0.52, 0.51], "2": [0.79, 0.81, 0.81], "4": [0.80, 0.82, 0.80], "16": [0.60, 0.62, 0.60]}
    found = advised(sweep_of(tmp_path / "s", ends))
    assert (found.cell, found.best, found.separated) == ("staleness.budget=2", "staleness.budget=4", True)
    text = " ".join(found.reasons)
    assert "The greatest mean is that of staleness.budget=4: +0.003 ±" in text
    assert "mean lag 2.00 instead of 4.00" in text
    assert re.search(r"The means of smaller budgets are further below .*staleness\.budget=0 \(\+0\.297 ±", text)
    assert re.search(r"Separated below it, .*: staleness\.budget=16 \(\+0\.197 ±", text)
    assert re.search(r"Not separated from it, .*: staleness\.budget=4 \(-0\.003 ±", text)
    assert "Nothing separates" not in text


def test_noise_is_no_reason_to_give_up_reward(tmp_path):
    """Seeds differ so much that nothing is separated: the mean still counts, and the reader is told."""
    ends = {"0": [0.30, 0.70, 0.50], "4": [0.80, 0.50, 0.60]}
    found = advised(sweep_of(tmp_path / "s", ends))
    assert found.cell == found.best == "staleness.budget=4" and not found.separated
    assert "Nothing separates" in found.reasons[-1] and "about" in found.reasons[-1]


def test_what_a_smaller_budget_may_give_up_is_a_share_of_the_gain(tmp_path):
    gain = 0.6
    for give_up, expected in ((0.9 * GIVE_UP * gain, "0"), (1.1 * GIVE_UP * gain, "4")):
        noisy = [-0.1, 0.1, 0.0]
        ends = {"0": [0.8 - give_up + n for n in noisy], "4": [0.8 - n for n in noisy]}
        found = advised(sweep_of(tmp_path / expected, ends))
        assert found.cell == f"staleness.budget={expected}"


def test_a_separated_difference_counts_however_small(tmp_path):
    seeds = [0.00, 0.05, 0.10]
    ends = {"0": [0.690 + s for s in seeds], "4": [0.700 + s for s in seeds]}
    ends["0"][0] += 0.001
    assert advised(sweep_of(tmp_path / "s", ends)).cell == "staleness.budget=4"


def test_a_budget_that_moves_counts_as_its_oldest_token(tmp_path):
    same = [0.79, 0.80, 0.81]
    assert advised(sweep_of(tmp_path / "s", {"auto": same, "4": same, "8": same})).cell == "staleness.budget=auto"
    assert advised(sweep_of(tmp_path / "t", {"auto": same, "2": same})).cell == "staleness.budget=2"


def test_without_budgets_the_greatest_mean_is_recommended(tmp_path):
    ends = {"1e-3": [0.79, 0.80, 0.81], "3e-4": [0.80, 0.81, 0.82]}
    assert advised(sweep_of(tmp_path / "s", ends, key="optim.lr")).cell == "optim.lr=3e-4"


def test_one_seed_one_cell_and_no_evaluation_are_said(tmp_path):
    found = advised(sweep_of(tmp_path / "one", {"0": [0.5], "4": [0.8]}, seeds=1))
    assert found.cell == "staleness.budget=4" and "There is one seed" in " ".join(found.reasons)
    assert "only cell" in advised(sweep_of(tmp_path / "cell", {"4": [0.5, 0.6]}, seeds=2)).reasons[0]
    never = sweep_of(tmp_path / "never", {"0": [None], "4": [None]}, seeds=1)
    write_run(never / "staleness.budget=0" / "seed-0", {9: 0.5})
    assert advised(never).cell == "" and "No run was evaluated twice" in advised(never).reasons[0]


# ---- the report ---------------------------------------------------------------------------------


def test_the_report_says_it_all_and_needs_no_other_file(tmp_path, capsys):
    ends = {"0": [0.50, 0.52, 0.51], "2": [0.79, 0.81, 0.81], "16": [0.60, 0.62, None]}
    directory = sweep_of(tmp_path / "s", ends)
    (directory / "staleness.budget=16" / "seed-2").mkdir()
    (directory / "staleness.budget=2" / "seed-1" / "summary.json").write_text('{"status": "interrupted"}')
    (directory / "staleness.budget=0" / "seed-0" / "metrics.jsonl").write_text("nonsense\n")
    assert main(["--report-only", str(directory)]) == 0
    assert "recommended: staleness.budget=2" in capsys.readouterr().out
    text = (directory / "report.md").read_text()
    assert "6 of 9 runs are finished" in text
    assert "staleness.budget=16, seed 2: not finished: it has no readable summary" in text
    assert "staleness.budget=2, seed 1: not finished: interrupted" in text
    assert "staleness.budget=0, seed 0: metrics.jsonl: 0 step" in text
    assert re.search(r"\| staleness\.budget=2 ★ ◆? ?← recommended \| 2 \| 0\.8", text)
    for picture in re.findall(r"\]\(([\w-]+\.png)\)", text):
        assert (directory / picture).stat().st_size > 5_000, picture
    page = (directory / "report.html").read_text()
    assert page.count("<figure>") == len(list(directory.glob("*.png"))) == 9
    assert not re.search(r"""(src|href)="(?!#|data:)""", page)


def test_a_sweep_that_cannot_be_written_is_told_in_a_line(tmp_path, capsys):
    sweep_of(tmp_path / "s", {"0": [0.9]}, seeds=1)
    (tmp_path / "s" / "report.md").mkdir()
    assert main(["--report-only", str(tmp_path / "s")]) == 2
    assert "cannot be written (Is a directory); make it writable" in " ".join(capsys.readouterr().out.split())


def test_a_sweep_is_known_by_its_directories_where_its_state_is_damaged(tmp_path, capsys):
    directory = sweep_of(tmp_path / "s", {"0": [0.5, 0.52], "2": [0.8, 0.81]}, seeds=2)
    (directory / "sweep.json").write_text("{")
    sweep = read_sweep(directory)
    assert judge(sweep).advice.cell == "staleness.budget=2" and "sweep.json cannot be read" in sweep.problems[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="not a sweep's directory"):
        read_sweep(tmp_path / "empty")
    assert main(["--report-only", str(tmp_path / "none")]) == 2
    assert main(["--report-only", str(directory), "configs/smoke.yaml"]) == 2
    assert "no such directory" in capsys.readouterr().out
