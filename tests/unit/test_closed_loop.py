"""What the study of closed loops makes of runs: which versions are judged, who is best, what is written."""

import json

import pytest

from common.errors import EngineError
from tools.bench.closed_loop import runs
from tools.bench.closed_loop.report import lines
from tools.bench.closed_loop.runs import (
    AUTO,
    BUDGETS,
    RATIOS,
    TIME_S,
    Cell,
    Done,
    at_the_end,
    finished,
    needed,
    of_lines,
    of_rollouts,
)
from tools.bench.closed_loop.study import HELD_OUT, ROLLOUTS, Options, chosen, rows, run_study

STEPS = round(TIME_S) + 4


def done(cell=None):
    cell = cell or Cell("even", "2", 0)
    at = [float(i) for i in range(STEPS)]
    return Done(
        cell.overrides(), at, [min(1.0, t / 60) for t in at], [2] * STEPS, [1.5] * STEPS, {"rollouts": 0.1}, 0.4
    )


def test_settings_are_those_of_a_run():
    for ratio, budget in zip(RATIOS, ("0", "16", AUTO), strict=True):
        config = Cell(ratio, budget, 3).config(runs.Path("x"))
        assert config.staleness.auto == (budget == AUTO) and config.optim.schedule == "constant"
        assert config.run.seed == 3 and config.run.path.parts[:2] == ("x", f"{ratio}-{budget}-3")
        assert config.actor.pace_s > 0 and config.learner.pace_s > 0


def test_a_run_is_timed_from_its_first_step():
    def line(second, budget):
        parked = {"rollouts": (second - 7) / 2} if second > 7 else {}
        return {"time_s": second, "reward": 0.5, "staleness_budget": budget, "lag_mean": 1.0, "parked": parked}

    found = of_lines(Cell("even", AUTO, 0), [line(7.0, 1), line(9.0, 1), line(11.0, 2)], 0.4)
    assert found.at_s == [0.0, 2.0, 4.0] and found.budgets == [1, 1, 2] and found.lag_mean == 1.0
    assert found.idle == {"rollouts": 0.5} and chosen(found) == "1×2 2×1"


def test_versions_around_the_last_part_are_judged():
    # version v is there when step v - 1 is done, a second each; the last part begins at BEGIN
    end, begin = round(TIME_S), round((1 - runs.LAST) * TIME_S)
    assert needed([10, begin - 3, begin, begin + 2, end - 3, end + 2, end + 3], done()) == [
        begin, begin + 2, end - 3, end + 2
    ]  # fmt: skip
    assert needed([10, end - 3], done()) == [10, end - 3], "none after the end: the last one stands for it"
    with pytest.raises(EngineError, match="do not enclose"):
        needed([begin + 2, end], done())
    with pytest.raises(EngineError, match="do not enclose"):
        needed([1, 2], done())


def test_the_reward_is_the_mean_of_lines_over_the_last_part():
    last = len(done().at_s)
    rewards = {1: 0.0, last: 1.0}  # a straight line from the first step to the last
    assert at_the_end(done(), rewards) == pytest.approx((1 - runs.LAST / 2) * TIME_S / (last - 1), abs=1e-6)
    assert at_the_end(done(), {30: 0.5, last: 0.5}) == pytest.approx(0.5)


def test_rollouts_are_those_of_their_version_at_the_moment_it_was_made():
    # step i ends at i seconds; a lag of 3: its answers are by version i - 3, made when step i - 4 was done
    at = [float(i) for i in range(STEPS + 4)]
    made_at = [max(0.0, t - 4) for t in at]
    late = Done([], at, [t / TIME_S for t in made_at], [3] * len(at), [3.0] * len(at), {}, 0.0)
    fresh = Done([], at, [max(0.0, t - 1) / TIME_S for t in at], [0] * len(at), [0.0] * len(at), {}, 0.0)
    for one in (late, fresh):  # reward = the version's time over the clock
        assert of_rollouts(one) == pytest.approx((1 + runs.HALF) / 2, abs=1e-6)


def test_only_the_same_settings_are_reused(tmp_path):
    cell = Cell("even", "2", 0)
    assert finished(cell, tmp_path) is None
    (tmp_path / cell.name).mkdir()
    file = tmp_path / cell.name / runs.DONE
    file.write_text(json.dumps(vars(done())))
    assert finished(cell, tmp_path) == done()
    file.write_text(json.dumps({**vars(done()), "overrides": ["other"]}))
    assert finished(cell, tmp_path) is None
    file.write_text('{"overrides": [')
    assert finished(cell, tmp_path) is None


def kept_study(root, seeds=(0, 1)):
    """A study whose runs were all made and judged before."""
    for ratio in RATIOS:
        for budget in BUDGETS:
            for seed in seeds:
                cell = Cell(ratio, budget, seed)
                (root / cell.name).mkdir(parents=True)
                (root / cell.name / runs.DONE).write_text(json.dumps(vars(done(cell))))
                reward = 0.5 if budget == AUTO else 0.4 + 0.01 * int(budget) * (1 + seed)
                (root / cell.name / runs.REWARDS).write_text(json.dumps({"1": reward, "30": reward}))
    return run_study(Options(tuple(seeds), directory=root, docs=root / "docs"))


def test_a_study_that_is_done_is_only_written(tmp_path):
    found = kept_study(tmp_path)
    assert [found.best(HELD_OUT, ratio) for ratio in RATIOS] == ["16"] * 3
    assert found.over_best(ROLLOUTS, "even") == [1.0, 1.0]
    assert found.over_best(HELD_OUT, "even") == pytest.approx([0.5 / 0.56, 0.5 / 0.72])
    first = next(row for row in rows(found) if row.name.startswith(HELD_OUT))
    assert (first.reference, first.reps) == ("budget 16, the best", 2)
    assert first.ratio == pytest.approx(0.5 / 0.64)
    text = (tmp_path / "docs" / "results" / "closed-loop.md").read_text()
    assert "| equally fast | held-out reward | 0.500 | 16 | 0.640 | 0.893, 0.694 | **0.781** |" in text
    assert f"- equally fast, seed 1: 2×{STEPS}" in text and text == "\n".join(lines(found)) + "\n"
    assert (tmp_path / "docs" / "results" / "closed-loop.png").stat().st_size > 10_000


def test_a_fresh_study_forgets_its_own_runs_alone(tmp_path):
    cell = Cell("even", AUTO, 0)
    for name in (cell.name, cell.model, "docs", "mine"):
        (tmp_path / name).mkdir()
    run_study(Options((), directory=tmp_path, docs=None, timed_only=True, fresh=True))
    assert {path.name for path in tmp_path.iterdir()} == {"docs", "mine"}
