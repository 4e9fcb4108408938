"""Costs fitted from runs whose costs are known, and the command line."""

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from common.config import ActorSection, LearnerSection, RolloutSection, RunConfig, RunSection, StalenessSection, to_yaml
from common.errors import ConfigError, DataError
from common.trace import Tracer, trace_path
from tests.unit.timeline import MS, life, step_lines, timelines
from tools.bench.predictions import Compared, Figures, rows_of
from tools.bench.simulate import CALIBRATION, CONFIGURATIONS, unfinished
from tools.profile.spent import Window
from tools.runs import Run
from tools.simulate.__main__ import main
from tools.simulate.costs import fit, least_squares, solve_cores
from tools.simulate.sample import Sample, read_sample
from tools.simulate.settings import ActorPart, Setup

STEP, ROW, CONTEXT = 5e-3, 3e-4, 2e-6  # seconds a decode step, row, row and token of context


def decoding(rows, contexts):
    """The tallies of one step at each (rows, longest context)."""
    tallies = {"decode": {}, "context": {}, "context_rows": {}}
    for live, longest in [(n, c) for n in rows for c in contexts]:
        cpu = (STEP + live * (ROW + longest * CONTEXT)) * 1e9
        for name, key, sums in (
            ("decode", live, [1, cpu, cpu, live]),
            ("context", longest // 32, [1, cpu, cpu, live * longest]),
            ("context_rows", longest // 32, [1, 0, 0, live]),
        ):
            there = tallies[name].setdefault(key, [0, 0, 0, 0])
            there[:] = [a + b for a, b in zip(there, sums, strict=True)]
    return tallies


def sample_of(steps=10, sequences=16, sampled=48, rows=(8, 16, 32), contexts=(40, 70, 100), **more):
    """A run whose learner takes 20 ms a step and 0.3 ms a token, and everybody else the like."""
    tokens = sequences * (sampled + 32)
    config = RunConfig(
        run=RunSection(name="x", steps=steps + 4),
        rollout=RolloutSection(groups_per_step=sequences // 4, group_size=4, max_tokens=sampled, ignore_eos=True),
        staleness=StalenessSection(budget=3),
        actor=ActorSection(count=2),
    )
    lines = step_lines(steps + 4, 1000, length_mean=sampled, trajectories=sequences, acceptance=0.99)
    marks = [
        (what, s, s * 1000 + ms) for s in range(14) for what, ms in (("decided", 1), ("asked", 100), ("served", 107))
    ]
    waits = [("forward", 100), ("idle.shard", 8), ("forward", 892)] * (steps + 4)
    moves = [(state, ms, number // 3) for number, (state, ms) in enumerate(waits)]
    lives = timelines(
        life("learner", "learner", moves, cores=2),
        life("broker", "broker", [("idle.messages", 14_000)], cores=2, instants=marks),
    )
    states = {
        "learner": Counter(optimizer=steps * 0.02, forward=steps * tokens * 1e-4, backward=steps * tokens * 2e-4),
        "actor": Counter(play=steps * sequences * 1e-4, send=steps * sequences * 2e-4),
        "replica": Counter(swap=steps * 1e-3),
        "broker": Counter(collate=steps * 2e-3, pack=steps * 1e-3, receive=steps * 0.01),
    }
    tallies = {
        **decoding(rows, contexts),
        "prefill": {128: [steps, 0, steps * 18e6, steps * 128]},
        "swap": {64: [2 * steps, 0, 2 * steps * 4e6, 0]},
        "score": {2048: [steps, 0, steps * tokens * 1e5, steps * tokens]},
        "admit": {16: [steps, 0, steps * sequences * 5e4, steps * sequences]},
    }
    window = Window(4000 * MS, 14_000 * MS, 3, 13)
    walls = {"broker": Counter(pack=steps * 2e-3)}
    run = Run(Path("runs/x"), config, {}, lines, lives)
    return Sample(
        run, config, window, steps, tokens, sequences, sampled, states, walls,
        Counter(actor=steps * 0.02, learner=steps * 0.01), {**tallies, **more},
    )  # fmt: skip


def test_decoding_is_told_apart_by_rows_and_contexts():
    actor = fit([sample_of()], []).actor
    played = 10 * 16 * 1e-4 / 9  # of each step that is tallied: no run tells it from a cost of completions
    assert actor.step_s == pytest.approx(STEP + played, rel=1e-6)
    assert actor.row_s == pytest.approx(ROW, rel=1e-6)
    assert actor.context_s == pytest.approx(CONTEXT, rel=1e-6)


def test_two_sizes_tell_what_a_step_costs_and_what_a_token():
    found = fit([sample_of(), sample_of(sequences=32, sampled=96)], [])
    assert found.learner.step_s == pytest.approx(0.02) and found.learner.token_s == pytest.approx(3e-4)
    assert found.replica.score_s == pytest.approx(0) and found.replica.score_token_s == pytest.approx(1e-4)
    assert found.rollout.groups_per_step == 4 and found.rollout.max_tokens == 48  # settings are the first's


def test_one_size_takes_the_optimizer_for_what_looks_at_no_token():
    found = fit([sample_of()], [])
    assert found.learner.step_s == pytest.approx(0.02) and found.learner.token_s == pytest.approx(3e-4)
    assert found.rollout.prompt_tokens == 32 and found.length.kind == "longest"
    assert found.staleness.budget == 3 and found.actor.count == 2
    assert found.actor.sequence_s == pytest.approx(2e-4) and found.actor.swap_s == pytest.approx(4e-3)
    assert found.weights.receiver_s * 3 == pytest.approx(0.01) and found.weights.receive_s == pytest.approx(0.02 / 3)
    assert found.broker.assemble_s == pytest.approx(2e-3) and found.broker.trajectory_s == pytest.approx(5e-5)
    assert found.broker.hold_s == pytest.approx(7e-3 - 2e-3) and found.broker.link_s == pytest.approx(1e-3)
    assert found.obrs.rejected_per_lag == pytest.approx(0.01)


def ranks_of(sample, ranks):
    """The same run by so many ranks, each as busy; the first alone gathers and sends."""
    own = sample.states["learner"]
    sample.states["learner"] = Counter({state: ranks * s for state, s in own.items()} | {"gather": 0.05, "send": 0.01})
    sample.config = dataclasses.replace(sample.config, learner=LearnerSection(dp_replicate=ranks, checkpoint_every=5))
    sample.states["learner"]["checkpoint"] = ranks * 0.02
    return sample


def test_several_ranks_of_a_learner_cost_what_one_of_them_does():
    alone, four = fit([ranks_of(sample_of(), 1)], []), fit([ranks_of(sample_of(), 4)], [])
    assert four.learner.threads == 4 * alone.learner.threads
    assert four.learner.step_s == pytest.approx(alone.learner.step_s) == pytest.approx(0.02)
    assert four.learner.token_s == pytest.approx(alone.learner.token_s) == pytest.approx(3e-4)
    assert four.learner.checkpoint_s == pytest.approx(alone.learner.checkpoint_s) == pytest.approx(0.01)
    assert four.weights == alone.weights and four.weights.gather_s == pytest.approx(0.005)
    pair = [ranks_of(sample_of(), 4), ranks_of(sample_of(sequences=32, sampled=96), 4)]
    assert fit(pair, []).learner.token_s == pytest.approx(3e-4)


def test_on_machines_of_their_own_costs_are_the_time_that_passed():
    """Everything waits for its GPU half of the time, so that it lasts twice as long as it has a core."""
    sample = sample_of()
    sample.states["learner"]["send"] = 0.01
    sample.walls = {role: Counter({k: 2 * s for k, s in own.items()}) for role, own in sample.states.items()}
    for by_key in sample.tallies.values():
        for sums in by_key.values():
            sums[1] = 2 * sums[2]
    shared = fit([sample], [])
    sample.run.timelines.lives[0].header["host"] = "elsewhere"
    apart = fit([sample], [])
    assert shared.machine.shared and not apart.machine.shared
    for section, names in {
        "actor": ("step_s", "row_s", "context_s", "prefill_token_s", "sequence_s", "swap_s"),
        "replica": ("score_token_s", "swap_s"), "learner": ("step_s", "token_s"),
        "broker": ("message_s", "trajectory_s", "assemble_s", "pack_s"),
    }.items():  # fmt: skip
        for name in names:
            one, other = getattr(getattr(shared, section), name), getattr(getattr(apart, section), name)
            assert other == pytest.approx(2 * one) and one > 0, (section, name)
    assert apart.weights.receiver_s * 3 == pytest.approx(0.002) and apart.weights.receive_s == pytest.approx(0.002)
    slowed = dataclasses.replace(sample.config, learner=LearnerSection(slowdown=3.0))
    sample.config = slowed  # its time is mostly sleep, which the simulator adds itself
    assert fit([sample], []).learner.token_s == pytest.approx(shared.learner.token_s)


def test_a_budget_that_moves_is_simulated_at_its_median():
    sample = sample_of()
    sample.config = dataclasses.replace(sample.config, staleness=StalenessSection(budget="auto", start=1))
    assert fit([sample], []).staleness.budget == 1
    for step in sample.run.steps:
        step["staleness_budget"] = {4: 2, 5: 2}.get(step["step"], 5) if step["step"] > 3 else 9
    assert fit([sample], []).staleness.budget == 5


def test_lengths_and_lags_of_the_wrong_kind_are_passed_over():
    for odd in (5, {"trained": 5}, {"trained": {"abc": 1, "x": 2}}, {"trained": {"-4": 1, "0": 3, "8": -1}}):
        sample = sample_of()
        rollout = dataclasses.replace(sample.config.rollout, ignore_eos=False)
        sample.config = dataclasses.replace(sample.config, rollout=rollout)
        sample.run.status = {"trajectories_by_length": odd}
        for step in sample.run.steps:
            step["lag_mean"] = "x"
        found = fit([sample], [])
        assert found.length.values == (48,) and found.obrs.rejected_per_lag == 0
    sample.run.status = {"trajectories_by_length": {"trained": {"8": 1, "64": 3, "x": 2}}}
    assert len(fit([sample], []).length.values) == 2


def traced_run(run_dir, **more):
    """A run directory of ten steps; what metrics.jsonl says of each may be anything."""
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(to_yaml(RunConfig(run=RunSection(name="x", steps=10))))
    sizes = {"tokens": 100, "trajectories": 4, "length_mean": 8}
    lines = [line | sizes | more for line in step_lines(10, 100)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    clock, moves = itertools.count(10**9, 10**6), {"learner": "forward", "actor": "sample", "broker": "collate"}
    tracers = {name: Tracer(trace_path(run_dir, name), name, name, clock=lambda: next(clock)) for name in moves}
    for step in range(10):
        for name, state in moves.items():
            tracers[name].state("idle.shard" if name == "learner" else "start", step)
            tracers[name].state(state, step)
            tracers[name].write()
        tracers["broker"].instant("step", step=step, what="committed")
    for tracer in tracers.values():
        tracer.close()
    return run_dir


def test_a_run_is_read_whatever_its_figures_are(tmp_path, capsys):
    for number, more in enumerate(({"lag_mean": None}, {"lag_mean": "x"}, {"lag_mean": [1]})):
        run_dir = traced_run(tmp_path / str(number), **more)
        assert main(["--from", str(run_dir), *SMALL, "actor.step_s=0.001"]) == 0
        assert "a mean lag of unknown size" in capsys.readouterr().out
    for number, more in enumerate(({"tokens": "x"}, {"trajectories": 0}, {"length_mean": True})):
        with pytest.raises(DataError, match="tells tokens, trajectories, length_mean of none"):
            read_sample(traced_run(tmp_path / f"none-{number}", **more))


def test_a_run_directory_may_be_named_by_a_string(tmp_path):
    run_dir = traced_run(tmp_path / "x")
    setup = Setup.from_run(str(run_dir), ["actor.count=4"])
    assert setup == Setup.from_run(run_dir, ["actor.count=4"]) and setup.actor.count == 4


def test_a_run_whose_learner_nobody_can_read_is_not_simulated_as_one_that_costs_nothing(tmp_path):
    run_dir = traced_run(tmp_path / "x")
    trace_path(run_dir, "learner").unlink()
    with pytest.raises(DataError, match="no timeline of learner"):
        read_sample(run_dir)


def test_engines_without_tallies_are_said_to_be_unknown():
    notes = []
    fit([sample_of(decode={}, context={})], notes)
    assert any("SGLang" in note for note in notes)


def test_columns_that_nothing_varies_are_left_out():
    assert least_squares([[1, 2], [2, 4], [3, 6]], [4, 8, 12]).tolist() == pytest.approx([0, 2])
    assert least_squares([[1, 1], [1, 2], [1, 3]], [3, 2, 1]).min() >= 0  # no negative cost
    random = np.random.default_rng(0)
    rows = random.uniform(1, 2, (20, 3))
    assert least_squares(rows, rows @ [1, 2, 3]).tolist() == pytest.approx([1, 2, 3])


def test_cores_are_what_made_the_difference():
    wanted = {1: 2.0, 3: 4.0}  # seconds with so many threads
    assert solve_cores(wanted, 2 * 1 + 4 * 1.5) == pytest.approx(1.5)
    assert solve_cores(wanted, 100.0) == pytest.approx(3.0)


def test_a_run_that_tells_too_little_is_refused_by_what_it_lacks(tmp_path):
    with pytest.raises(DataError, match=r"no config\.yaml"):
        read_sample(tmp_path)
    (tmp_path / "config.yaml").write_text("run: {name: x}\n")
    with pytest.raises(DataError, match=r"fewer than .* trace\.spans=true"):
        read_sample(tmp_path)


# ---- the command line ---------------------------------------------------------------------------

SMALL = ["run.steps=6", "rollout.groups_per_step=2", "rollout.max_tokens=8"]


def test_values_that_are_listed_become_rows_and_a_picture(tmp_path, capsys):
    picture = tmp_path / "sweep.svg"
    given = [*SMALL, "staleness.budget=0,2", "obrs.mode=off,threshold", "--plot", str(picture)]
    assert main(given) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("0", "2")) for line in lines) == 4
    assert picture.stat().st_size > 10_000
    assert main([*SMALL, "--plot", str(tmp_path / "one.svg")]) == 0
    assert (tmp_path / "one.svg").exists()


def test_everything_is_json_where_asked(capsys):
    assert main([*SMALL, "actor.count=1,2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["set"] for one in found] == [{"actor.count": "1"}, {"actor.count": "2"}]
    assert all(one["steps_per_s"] > 0 and one["lag_max"] <= 2 for one in found)


def test_a_setup_is_printed_and_read_again(tmp_path, capsys):
    assert main([*SMALL, "--setup"]) == 0
    (tmp_path / "setup.yaml").write_text(capsys.readouterr().out)
    assert main([str(tmp_path / "setup.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["trained"] == 6 * 2 * 8 * 8


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["actor.count=0"], "actor.count=0"),
        (["actor.cuont=2"], "did you mean 'count'"),
        (["staleness.budget=0,-1"], "staleness.budget=-1"),
        (["none.yaml"], "no such file"),
        (["--from", "nowhere"], "no such directory"),
        (["actor.step_s=-1"], "actor.step_s=-1"),
        (["replica.count=-1", "obrs.mode=off"], "replica.count=-1"),
        (["length.kind=histogram", "length.values=[4,8]", "length.weights=[.inf,1]"], "length.weights"),
        (["--plot", "x.foo"], ".png or .svg"),
        (["--plot", "nowhere/x.png"], "make it first"),
        ([f"run.seed={','.join(map(str, range(1001)))}"], "1,001 combinations"),
    ],
)
def test_what_cannot_be_simulated_is_said_in_a_line(given, words, capsys):
    assert main(given) == 2
    assert words in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk here")
def test_the_table_is_shown_also_where_its_picture_cannot_be_written(tmp_path, capsys):
    (tmp_path / "x.png").symlink_to("/dev/full")
    assert main([*SMALL, "--plot", str(tmp_path / "x.png")]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert said.index("steps/s") < said.index("cannot be written (No space left on device); name a file elsewhere")


def test_whole_numbers_are_checked_as_others_are():
    with pytest.raises(ConfigError, match=r"actor\.step_s=-1"):
        Setup(actor=ActorPart(step_s=-1))


def test_costs_come_from_one_place(capsys):
    with pytest.raises(SystemExit):
        main(["setup.yaml", "--from", "runs/x"])
    assert "not from setup.yaml too" in capsys.readouterr().err


# ---- the benchmark ------------------------------------------------------------------------------


def test_errors_are_relative_and_lags_that_cannot_be_are_left_out():
    found = [
        Compared("a", Figures(2.0, 1.0), Figures(1.8, 1.2)),
        Compared("b", Figures(1.0, 0.0), Figures(1.3, 0.0)),
        Compared("c", Figures(4.0, 2.0), Figures(4.0, 1.8)),
    ]
    rows = {row.name: row for row in rows_of(found)}
    assert rows["median error of throughput, 3 configurations"].value == pytest.approx(0.1)
    assert rows["median error of mean lag, 2 configurations"].value == pytest.approx(0.15)
    assert rows["largest error of throughput"].value == pytest.approx(0.3)
    assert "b: mean lag" not in rows and rows["a: steps/s"].ratio == pytest.approx(0.9)


def test_the_comparison_runs_again_what_did_not_come_to_its_end(tmp_path):
    for name, status in (("budget-0", "finished"), ("budget-1", "interrupted"), ("budget-4", "failed")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "summary.json").write_text(json.dumps({"status": status}))
    assert unfinished(tmp_path).keys() == (CALIBRATION | CONFIGURATIONS).keys() - {"budget-0"}
