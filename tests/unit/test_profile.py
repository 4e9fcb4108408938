"""The verdict on runs that are made so that it is known: who waits for what, what bounds the rate, what helps."""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import (
    ActorSection,
    LearnerSection,
    ReplicaSection,
    RunConfig,
    RunSection,
    StalenessSection,
    to_yaml,
)
from common.objective import LossSection
from common.trace import MILESTONES, STATES, Tracer, trace_path
from tests.unit.timeline import MS, life, step_lines, timelines
from tools.profile.__main__ import main
from tools.profile.advice import Candidate, candidates, judge
from tools.profile.causes import ACTOR_AT, LEARNER_AT, UNKNOWN, WORDS, Causes, plain, split_wait
from tools.profile.drift import Drift, fit
from tools.profile.figures import filled_of, rates_of, staleness_of, waste_of
from tools.profile.picture import draw
from tools.profile.predict import Bounds, Prediction
from tools.profile.simulated import Simulated, simulated
from tools.profile.spent import Window, apportion, choose_window, course_of, processes_of
from tools.profile.verdict import bounds_of, verdict
from tools.profile.words import bar, legend, lines_of
from tools.runs import Run, read_run
from tools.simulate.settings import ActorPart, LearnerPart, MachinePart, RolloutPart, Setup

STEPS = 12


def loop(role, process, moves, **options):
    """``moves`` once a step; a move of "step" takes the step's number."""
    return life(process, role, [(s, ms, step) for step in range(STEPS) for s, ms in moves], **options)


def marks(step_ms, **at):
    """Each milestone once a step, so many milliseconds after the step's beginning."""
    return [(what, step, step * step_ms + ms) for step in range(STEPS) for what, ms in at.items()]


def run_of(*lives, step_ms, config=None, **more):
    config = config or RunConfig(run=RunSection(name="x"))
    return Run(Path("runs/x"), config, {}, step_lines(STEPS, step_ms, **more), timelines(*lives))


def share(found, name, cause):
    process = next(p for p in found.processes if p.name == name)
    return process.causes.get(cause, 0.0) / found.seconds


def starved_learner(**more):
    """400 ms a step: the learner trains for 100 and waits for 300, of which 250 for groups; two actors never rest."""
    moments = {"asked": 2, "ready": 250, "assembled": 255, "scored": 290, "decided": 294, "served": 298}
    return run_of(
        loop("learner", "learner", [("idle.shard", 300), ("forward", 60), ("send", 40)]),
        loop("actor", "actor-0", [("sample", 400)]),
        loop("actor", "actor-1", [("sample", 390), ("swap", 10)]),
        loop("replica", "replica-0", [("idle.requests", 255), ("score", 30), ("receive", 5), ("idle.requests", 110)]),
        loop("broker", "broker", [("idle.messages", 294), ("journal", 3), ("pack", 3), ("idle.messages", 100)],
             instants=marks(400, **moments, committed=400)),
        step_ms=400, **more,
    )  # fmt: skip


def test_a_starved_learner_waits_for_rollouts_and_an_actor_more_is_what_helps():
    found = verdict(starved_learner())
    assert (found.first, found.last) == (3, STEPS - 1) and found.seconds == pytest.approx(0.4 * 8)
    expected = {
        "transport": (2 + 2) / 400, "rollouts.sampling": 248 / 400, "version": 5 / 400, "scoring": 30 / 400,
        "scoring.transport": 5 / 400, "thinning": 4 / 400, "journal": 3 / 400, "packing": 1 / 400,
    }  # fmt: skip
    for cause, part in expected.items():
        assert share(found, "learner", cause) == pytest.approx(part), cause
    assert found.bottleneck.resource == "actors" and found.bottleneck.share == pytest.approx(248 / 400)
    best = found.recommendation.best
    assert best.changes == {"actor.count": 3}
    assert best.bound and best.speedup == pytest.approx(400 / (400 - 248 / 3))
    assert found.rates.steps_s == pytest.approx(2.5) and found.rates.generated_s == pytest.approx(2500)
    assert found.rates.fleet_s == pytest.approx(2500) and found.rates.learner_s == pytest.approx(10000)
    assert found.rates.ratio == pytest.approx(0.25)
    assert found.waste.dropped == pytest.approx(0.005) and found.waste.rejected == pytest.approx(0.01)
    assert found.publishes.mean_s == found.publishes.p95_s == pytest.approx(0.04)
    assert found.publishes.parts == {"gather": 0.0, "readiness": 0.0, "wire": pytest.approx(0.04)}


def test_on_a_machine_whose_cores_are_spent_nothing_is_to_be_gained():
    lives = starved_learner().timelines.lives
    for one in lives:
        one.header["cores"] = 2
        for _, totals in one.totals:
            for total in totals.values():
                total[1] //= 2
    found = verdict(run_of(*lives, step_ms=400))
    assert found.recommendation.best is None and "its cores are used up" in found.recommendation.words
    assert found.bottleneck.resource == "cores"
    assert set(found.machines[0].starved) == {"learner", "actor-0", "actor-1", "replica-0"}
    assert "2 cores" in found.bottleneck.why and "4 of them wait for one" in found.bottleneck.why


def test_starved_actors_wait_for_credits_of_a_learner_that_is_busy():
    moves = [("idle.shard", 2), ("forward", 60), ("backward", 100), ("gather", 10), ("idle.receivers", 8), ("send", 20)]
    moments = {"asked": 0, "ready": -100, "assembled": -90, "scored": -50, "decided": -40, "served": 1}
    found = verdict(run_of(
        loop("learner", "learner", moves),
        loop("actor", "actor-0", [("idle.credits", 120), ("sample", 80)]),
        loop("broker", "broker", [("idle.messages", 200)], instants=marks(200, **moments, committed=200)),
        step_ms=200, config=RunConfig(actor=ActorSection(count=2)),
    ))  # fmt: skip
    assert found.bottleneck.resource == "learner" and found.bottleneck.share == pytest.approx(198 / 200)
    assert share(found, "actor-0", "credits.training") == pytest.approx(118 / 200)  # the learner's first 120 ms
    assert share(found, "actor-0", "credits.waiting") == pytest.approx(2 / 200)
    assert share(found, "learner", "receivers") == pytest.approx(8 / 200)
    assert found.rates.ratio == pytest.approx((1000 / 0.08) / (1000 / 0.19))
    assert found.publishes.parts == {
        n: pytest.approx(s) for n, s in {"gather": 0.01, "readiness": 0.008, "wire": 0.02}.items()
    }
    assert found.recommendation.best.changes == {"learner.dp_replicate": 2}


def test_a_slow_replica_is_named_and_rejection_is_kept_where_it_buys_something():
    moments = {"asked": 0, "ready": -50, "assembled": 1, "scored": 181, "decided": 182, "served": 183}
    lives = (
        loop("learner", "learner", [("idle.shard", 184), ("forward", 66)]),
        loop("actor", "actor-0", [("sample", 100), ("idle.credits", 150)]),
        loop("replica", "replica-0", [
            ("idle.requests", 1), ("idle.weights", 20), ("swap", 10), ("score", 150), ("idle.requests", 69),
        ]),
        loop("broker", "broker", [("idle.messages", 250)], instants=marks(250, **moments, committed=250)),
    )  # fmt: skip
    found = verdict(run_of(*lives, step_ms=250))
    assert share(found, "learner", "scoring") == pytest.approx(150 / 250)
    assert share(found, "learner", "scoring.weights") == pytest.approx(30 / 250)
    assert found.bottleneck.resource == "replica"
    judged = {tuple(j.changes): j for j in (found.recommendation.best, *found.recommendation.others) if j}
    assert judged[("obrs.mode",)].speedup > 2 and "before rejection" in judged[("obrs.mode",)].refused
    kept = verdict(run_of(*lives, step_ms=250, kl_before=5e-4))
    assert kept.recommendation.best.changes == {"obrs.mode": "off"} and kept.recommendation.best.kl == (1e-3, 5e-4)


def test_a_slow_publish_is_named_at_both_ends():
    moments = {"asked": 0, "ready": 98, "assembled": 99, "scored": 99, "decided": 99, "served": 99}
    found = verdict(run_of(
        loop("learner", "learner", [
            ("idle.shard", 100), ("forward", 20), ("gather", 10), ("idle.receivers", 100), ("send", 170),
        ]),
        loop("actor", "actor-0", [("idle.weights", 60), ("swap", 30), ("sample", 310)]),
        loop("broker", "broker", [("idle.messages", 400)], instants=marks(400, **moments, committed=400)),
        step_ms=400,
    ))  # fmt: skip
    assert share(found, "learner", "rollouts.weights") == pytest.approx(90 / 400)
    assert share(found, "learner", "rollouts.sampling") == pytest.approx(8 / 400)
    assert share(found, "actor-0", "weights") == pytest.approx(60 / 400)
    assert found.bottleneck.resource == "publish"
    assert found.publishes.mean_s == pytest.approx(0.28)


def test_a_second_thinning_counts_as_scoring_once_more():
    moments = {"asked": [0], "ready": [-9], "assembled": [-8], "scored": [10, 40], "decided": [12, 43], "served": [50]}
    assert split_wait(1, 60, moments) == [
        ("scoring", 1, 10), ("thinning", 10, 12), ("scoring", 12, 40), ("thinning", 40, 43), ("packing", 43, 50),
        ("transport", 50, 60),
    ]  # fmt: skip


def test_what_was_marked_last_tells_what_is_waited_for_and_a_gap_is_unknown():
    assert split_wait(0, 9, {}) == [(UNKNOWN, 0, 9)]
    assert split_wait(0, 9, {"asked": [2]}) == [("transport", 0, 2), ("rollouts", 2, 9)]
    assert split_wait(0, 9, {"asked": [2], "assembled": [4]})[1:] == [(UNKNOWN, 2, 4), ("scoring", 4, 9)]


@given(st.integers(-50, 50), st.integers(1, 100), st.dictionaries(
    st.sampled_from(MILESTONES), st.lists(st.integers(-100, 200), min_size=1, max_size=2).map(sorted)
))  # fmt: skip
def test_every_wait_is_cut_without_gaps(start, lasts, moments):
    parts = split_wait(start, start + lasts, moments)
    assert parts[0][1] == start and parts[-1][2] == start + lasts
    assert all(one[2] == other[1] for one, other in itertools.pairwise(parts))
    assert all(until > since for _, since, until in parts)


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(1, 10**9), min_size=1), st.integers(0, 10**12))
def test_shares_add_up_exactly(parts, whole):
    found = apportion(Counter(parts), whole)
    assert sum(found.values()) == whole
    total = sum(parts.values())
    assert all(abs(found[name] - whole * part / total) <= 1 + 1e-6 * whole for name, part in parts.items())


def moves_of(role):
    return st.lists(st.tuples(st.sampled_from(list(STATES[role])), st.integers(1, 400), st.integers(0, 3)), max_size=12)


@settings(max_examples=30)
@given(st.data())
def test_causes_add_up_to_the_idle_time_of_every_process(data):
    """Whatever the processes did and whichever marks are missing: to the nanosecond on the slices, and in seconds."""
    starts = st.integers(0, 500)
    moments = data.draw(
        st.lists(st.tuples(st.sampled_from(MILESTONES), st.integers(0, 3), st.integers(0, 3000)), max_size=16)
    )
    lives = [
        life(f"{role}-{n}", role, data.draw(moves_of(role)), moments if role == "broker" else (), data.draw(starts))
        for role, most in (("learner", 2), ("actor", 3), ("replica", 2), ("broker", 1))
        for n in range(data.draw(st.integers(0, most)))
    ]  # fmt: skip
    found = timelines(*lives)
    window = Window(data.draw(st.integers(0, 900)) * MS, data.draw(st.integers(1000, 4000)) * MS)
    causes = Causes(found)
    for process in processes_of(found, window):
        (mine,) = [one for one in lives if one.process == process.name]
        drawn = causes.of_process(process.role, process.name, window)
        for state, parts in drawn.items():
            clipped = (min(s.end, window.end) - max(s.start, window.start) for s in mine.slices if s.state == state)
            assert sum(parts.values()) == sum(ns for ns in clipped if ns > 0)
            assert all(ns > 0 and cause in WORDS for cause, ns in parts.items())
        causes.name(process, window)
        assert sum(process.causes.values()) == pytest.approx(process.idle_s)
        assert process.there_s + process.absent_s == pytest.approx(window.ns / 1e9)


def test_every_cause_that_can_be_named_is_explained():
    plainly = {plain(role, state) for role, states in STATES.items() for state in states if state.startswith("idle.")}
    assert (plainly - {"shard"}) | set(ACTOR_AT.values()) | set(LEARNER_AT.values()) <= set(WORDS)
    assert not {"", "sample", "score"} & set(WORDS)
    assert all(len(meaning) <= 46 and len(remedy) <= 38 for meaning, remedy in WORDS.values())  # a line of the table


def test_many_actors_share_a_wait_equally():
    found = verdict(run_of(
        loop("learner", "learner", [("idle.shard", 100)]),
        loop("actor", "actor-0", [("sample", 100)]),
        loop("actor", "actor-1", [("idle.credits", 100)]),
        loop("broker", "broker", [("idle.messages", 100)], instants=marks(100, asked=0, ready=100, committed=100)),
        step_ms=100,
    ))  # fmt: skip
    assert share(found, "learner", "rollouts.sampling") == share(found, "learner", "rollouts.credits") == 0.5


# ---- windows and lives --------------------------------------------------------------------------


def test_the_window_leaves_out_the_start_and_what_comes_after_the_last_step():
    found = timelines(loop("broker", "broker", [("idle.messages", 100)], instants=marks(100, committed=100)))
    assert choose_window(found)[0] == Window(400 * MS, 1200 * MS, 3, 11)
    assert choose_window(found, skip_s=0.65)[0] == Window(700 * MS, 1200 * MS, 6, 11)
    whole, word = choose_window(timelines(life("actor-0", "actor", [("sample", 50)])))
    assert whole == Window(0, 50 * MS) and "fewer than two steps" in word
    assert choose_window(timelines()) == (None, "")


def resumed():
    """Two starts of the broker, five minutes apart: steps 0 to 5, then 6 to 11, of 400 ms each."""
    moments = {"asked": 2, "ready": 250, "assembled": 255, "scored": 290, "decided": 294, "served": 298}
    lives = []
    for first, start in ((0, 0), (6, 302_400)):
        steps = range(first, first + 6)
        milestones = [
            (what, step, start + (step - first) * 400 + ms)
            for step in steps
            for what, ms in {**moments, "committed": 400}.items()
        ]
        learner = [(s, ms, step) for step in steps for s, ms in (("idle.shard", 300), ("forward", 100))]
        lives += [
            life("learner", "learner", learner, start=start),
            life("actor-0", "actor", [("sample", 2400)], start=start),
            life("broker", "broker", [("idle.messages", 2400)], milestones, start=start),
        ]
    records = step_lines(STEPS, 400)
    for record in records:
        since = 0.4 * (record["step"] % 6 + 1)
        record["time_s"] = since + (302.4 if record["step"] >= 6 else 0.0)
        record["states"] = {"broker": {"idle.messages": since}, "learner": {"forward": since / 4}}
    return Run(Path("runs/x"), RunConfig(run=RunSection(name="x")), {}, records, timelines(*lives))


def test_of_a_resumed_run_the_last_start_is_judged_without_the_pause():
    run = resumed()
    found = verdict(run)
    assert (found.first, found.last, found.seconds) == (9, 11, pytest.approx(0.8))
    assert found.rates.steps_s == pytest.approx(2.5) and found.rates.generated_s == pytest.approx(2500)
    assert [(p.name, p.absent_s) for p in found.processes] == [(name, 0.0) for name in ("learner", "actor-0", "broker")]
    assert share(found, "learner", "rollouts.sampling") == pytest.approx(248 / 400)
    word = "the broker started 2 times: start 2 alone is judged, without the pauses between them"
    assert word in found.notes and len(run.timelines.lives) == 6
    run.timelines = timelines(
        *run.timelines.lives[:3], life("broker", "broker", [("idle.messages", 50)], start=900_000)
    )
    assert (verdict(run).first, verdict(run).last) == (3, 5)  # nothing was committed after the last start
    run.timelines = timelines()
    found = verdict(run)
    assert (found.first, found.last, found.seconds) == (9, 11, pytest.approx(0.8)) and word in found.notes
    assert found.processes[0].busy_s == pytest.approx(0.2)


def test_seconds_to_leave_out_that_leave_nothing_are_named():
    for run in (starved_learner(), without_timelines(RunConfig(), actors=2, ranks=1)):
        found = verdict(run, skip_s=60)
        length = run.records[-1]["time_s"]
        assert not found.seconds
        assert found.notes[-1] == (
            f"nothing to judge: --skip-s 60 leaves fewer than two steps of a run of {length:.1f} s"
        )


def test_absence_is_told_from_work_without_colours():
    run = starved_learner()
    run.timelines.lives[1] = loop("actor", "actor-0", [("sample", 400)], start=2400)
    found = verdict(run)
    drawn = {process.name: bar(process).plain for process in found.processes}
    assert drawn["actor-0"] == "█" * 38 + "·" * 12 and "·" not in drawn["actor-1"]
    assert legend(found).plain.endswith("░ idle  · absent")
    assert legend(verdict(starved_learner())).plain.endswith("░ idle")


def test_a_process_that_was_killed_and_started_again_is_one_with_a_hole():
    lives = life("actor-0", "actor", [("sample", 100)]), life("actor-0", "actor", [("sample", 100)], start=150)
    (process,) = processes_of(timelines(*lives), Window(50 * MS, 250 * MS))
    assert process.states["sample"][0] == pytest.approx(0.15) and process.absent_s == pytest.approx(0.05)
    pieces = list(course_of(lives).between(90 * MS, 160 * MS))
    assert pieces == [("sample", 90 * MS, 100 * MS), ("", 100 * MS, 150 * MS), ("sample", 150 * MS, 160 * MS)]


def test_seconds_between_two_totals_are_those_that_are_drawn_or_else_in_proportion():
    one = life("actor-0", "actor", [("sample", 1000), ("idle.credits", 1000)], every=2000)
    (process,) = processes_of(timelines(one), Window(1250 * MS, 1750 * MS))
    assert process.states == {"idle.credits": (pytest.approx(0.5), 0.0)}
    one.slices.clear()
    (process,) = processes_of(timelines(one), Window(1250 * MS, 1750 * MS))
    assert process.states == {
        "sample": (pytest.approx(0.25), pytest.approx(0.25)),
        "idle.credits": (pytest.approx(0.25), 0.0),
    }


# ---- advice -------------------------------------------------------------------------------------


class Oracle:
    def __init__(self, **speedups):
        self.speedups = speedups

    def predict(self, changes):
        ((key, value),) = changes.items()
        found = self.speedups.get(f"{key.replace('.', '_')}_{value}", 1.0)
        return Prediction(found, None, False, "the oracle")


def advised(oracle, config=None, **more):
    steps = [one for lag in range(1, 5) for one in step_lines(4, 100, lag=lag / 2, kl_after=1e-3 * lag, **more)]
    run = starved_learner(config=config)
    run.records = [{**one, "step": n, "lag_histogram": {"2": 100}} for n, one in enumerate(steps)][:STEPS]
    return verdict(run, ask=lambda *_: (oracle, "")).recommendation


def test_the_best_prediction_is_recommended_with_what_it_does_to_kl():
    found = advised(Oracle(staleness_budget_4=1.12, actor_count_3=1.05))
    assert found.best.changes == {"staleness.budget": 4} and found.best.by == "the oracle"
    now, then = found.best.kl
    assert then == pytest.approx(2 * now, rel=0.01)  # the fit's power is 1
    assert found.words.startswith("raise staleness.budget from 2 to 4: 1.12× predicted, KL after rejection 0.00")
    assert "fitted over" in found.basis and "r² 1.00" in found.basis


def test_of_changes_that_are_worth_the_same_the_cheaper_one_is_taken():
    found = advised(Oracle(staleness_budget_4=1.30, actor_count_3=1.31))
    assert found.best.changes == {"staleness.budget": 4}
    assert found.others[0].changes == {"actor.count": 3}
    found = advised(Oracle(staleness_budget_4=1.10, actor_count_1=1.09))  # of actors on too few cores one is too many
    assert found.best.changes == {"actor.count": 1}


def test_what_costs_no_speed_and_saves_something_comes_before_nothing():
    found = advised(Oracle(staleness_budget_1=0.5, actor_count_1=0.995))
    assert found.best.changes == {"actor.count": 1} and "costs no speed" in found.why
    found = advised(Oracle(staleness_budget_1=0.5, actor_count_1=0.9))
    assert found.best is None and found.words == "change nothing: the learner is busy 25% of the time"


def test_to_no_lag_at_all_there_is_no_kl_and_lowering_is_never_refused():
    config = RunConfig(staleness=StalenessSection(budget=1))
    now = staleness_of(step_lines(3, 100), config.staleness)
    lower = Candidate({"staleness.budget": 0}, "lower staleness.budget from 1 to 0", 0, True)
    drift = Drift(1e-3, 1.0, 20, 0.9, 2.0)
    assert drift.at(0.0) == 0.0
    synchronous = judge(lower, Prediction(1.0, 0.0, False, "x"), config, now, drift)
    assert not synchronous.refused and synchronous.kl == (pytest.approx(1e-3), 0.0)
    unfitted = judge(lower, Prediction(1.0, 0.0, False, "x"), config, now, None)
    assert not unfitted.refused and unfitted.kl is None
    assert advised(Oracle(staleness_budget_0=1.0), config).best.changes == {"staleness.budget": 0}


def test_a_synchronous_run_is_told_what_asynchrony_would_gain():
    config = RunConfig(staleness=StalenessSection(budget=0))
    run = starved_learner(config=config, lag_mean=0.0, lag_histogram={"0": 1000})
    found = verdict(run, ask=lambda *_: (Oracle(staleness_budget_1=1.5), "")).recommendation
    assert found.best.changes == {"staleness.budget": 1} and found.best.kl is None
    assert "1.50× predicted; what it does to KL is not known from this run: tools.sweep measures it" in found.words
    assert verdict(run).recommendation.others[0].lag in (None, (0.0, 1.0))  # nor do the bounds refuse it
    assert not any(one.refused for one in verdict(run).recommendation.others if one.changes == {"staleness.budget": 1})


def test_a_bound_is_taken_only_where_no_estimate_is_worth_it():
    class Some(Oracle):
        def predict(self, changes):
            return None if changes == {"actor.count": 3} else super().predict(changes)

    found = advised(Some(staleness_budget_4=1.04))
    assert found.best.changes == {"staleness.budget": 4} and not found.best.bound
    bound = next(one for one in found.others if one.changes == {"actor.count": 3})
    assert bound.bound and bound.speedup > 1.2
    assert advised(Some(actor_count_1=0.995)).best.changes == {"actor.count": 3}


def test_the_fit_refuses_to_go_beyond_twice_the_largest_lag():
    assert Drift(1e-3, 1.0, 20, 0.9, 2.0).at(4.0) == pytest.approx(4e-3)
    assert Drift(1e-3, 1.0, 20, 0.9, 2.0).at(4.1) is None
    candidate = Candidate({"staleness.budget": 16}, "raise", 0)
    now = staleness_of(step_lines(3, 100), StalenessSection())
    judged = judge(candidate, Prediction(1.5, 9.0, False, "x"), RunConfig(), now, Drift(1e-3, 1.0, 20, 0.9, 2.0))
    assert judged.kl is None and "more than 2× the largest lag" in judged.refused


def test_the_fit_finds_the_power_that_made_the_data():
    steps = [{"step": n, "lag_mean": lag, "kl_after": 3e-4 * lag**1.5} for n, lag in enumerate([0.5, 1, 1.5, 2, 3] * 3)]
    found = fit(steps)
    assert (found.c, found.k, found.steps, found.r2) == (pytest.approx(3e-4), pytest.approx(1.5), 15, pytest.approx(1))
    alike = fit([{"lag_mean": 2.0 + n / 1000, "kl_after": 1e-3} for n in range(20)])
    assert alike.k == 1.0 and alike.r2 is None and "too little" in alike.basis
    assert fit(steps[:7]) is None


def test_a_prediction_that_would_break_the_alert_is_not_recommended():
    found = advised(Oracle(staleness_budget_4=1.5), kl_before=0.4)
    assert found.best.changes == {"staleness.budget": 4}
    limited = RunConfig(alerts=type(RunConfig().alerts)(kl_above=1e-3))
    assert "alerts.kl_above=0.001" in advised(Oracle(staleness_budget_4=1.5), limited).others[0].refused


def test_a_budget_that_moves_itself_is_left_alone():
    found = advised(Oracle(), RunConfig(staleness=StalenessSection(budget="auto")))
    assert all("staleness.budget" not in j.changes for j in found.others)


def test_the_simulator_sees_what_the_bounds_do_not():
    """Two slow actors and a quick learner, each with a core: an actor more is worth 3:2; the lag is the run's own."""
    setup = Setup(
        rollout=RolloutPart(groups_per_step=12, group_size=4, max_tokens=16), actor=ActorPart(row_s=0.01),
        learner=LearnerPart(step_s=1e-3, token_s=1e-6), machine=MachinePart(shared=False),
    )  # fmt: skip
    simulator = Simulated(setup, 1.0, 4.0)
    more, same = simulator.predict({"actor.count": 3}), simulator.predict({"actor.count": 2})
    assert more.speedup == pytest.approx(1.5, rel=0.02) and not more.bound
    assert (same.speedup, same.lag_mean) == (1.0, pytest.approx(4.0))
    assert simulator.predict({"learner.dp_replicate": 2}) is None  # it knows no ranks: the bounds are asked
    assert "off on this run itself" in simulator.by
    assert Simulated(setup, simulator._now.steps_per_s, None).by == "the simulator"


def test_a_run_that_the_simulator_cannot_be_fed_from_is_left_to_the_bounds(tmp_path):
    run = starved_learner()
    run.path = tmp_path
    found = verdict(run, ask=simulated)
    assert any("only bounds" in note for note in found.notes) and found.recommendation.best.bound


# ---- the command --------------------------------------------------------------------------------


def written(run_dir, spans=True):
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(to_yaml(RunConfig(run=RunSection(name="x"))))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in step_lines(8, 100)))
    if spans:
        with Tracer(trace_path(run_dir, "broker"), "broker", "broker") as tracer:
            for step in range(8):
                tracer.instant("step", step=step, what="committed")
                tracer.state("receive" if step % 2 else "idle.messages")
    return run_dir


def test_the_command_prints_and_gives_everything_as_json(tmp_path, capsys):
    run_dir = written(tmp_path / "x")
    assert main([str(run_dir)]) == 0
    shown = capsys.readouterr().out
    assert "broker" in shown and "note: status.json: missing" in shown and "tokens/s" in shown
    assert main([str(run_dir), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["first"] == 3 and [p["name"] for p in found["processes"]] == ["broker"]
    assert main([str(tmp_path / "nowhere")]) == 2


def test_what_is_missing_is_said_and_the_rest_is_judged(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 2
    assert "no run directory" in capsys.readouterr().out
    seconds = {"seconds_fetch": 0.02, "seconds_train": 0.07, "seconds_publish": 0.01}
    run_dir = written(tmp_path / "x", spans=False)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in step_lines(8, 100, **seconds)))
    found = verdict(read_run(run_dir))
    (learner,) = found.processes
    assert learner.busy_s == pytest.approx(0.08 * 4) and learner.idle_s == pytest.approx(0.02 * 4)
    assert any("without timelines" in note for note in found.notes)


def test_sums_of_heartbeats_stand_in_for_timelines():
    def line(step):
        states = {
            "learner": {"forward": 0.06 * step, "idle.shard": 0.04 * step},
            "actor": {"sample": 0.1 * step, "idle.credits": 0.1 * step},
        }
        return {"states": states, "parked": {"rollouts": 0.03 * step, "scoring": 0.01 * step}}

    run = run_of(step_ms=100)
    run.records = [one | line(one["step"]) for one in run.records]
    found = verdict(run)
    assert share(found, "learner", "rollouts.sampling") == pytest.approx(0.3)
    assert share(found, "learner", "scoring") == pytest.approx(0.1)
    assert share(found, "2 × actor", "credits") == pytest.approx(0.5)
    assert found.bottleneck.resource == "actors"


def without_timelines(config, actors, ranks):
    """Each of the actors busy for 50 ms of 100 and without credits for the rest; the learner's first rank trains for
    40, publishes for 20 and waits for 40, the others wait for it while it publishes."""
    others = ranks - 1

    def states(step):
        learner = {"forward": 0.04 * ranks, "gather": 0.01, "send": 0.01, "idle.shard": 0.04 * ranks}
        learner["idle.ranks"] = 0.02 * others
        seconds = {
            "actor": {"sample": 0.05 * actors, "idle.credits": 0.05 * actors},
            "learner": learner, "replica": {"score": 0.06, "idle.requests": 0.14}, "broker": {"idle.messages": 0.1},
        }  # fmt: skip
        return {role: {state: step * s for state, s in own.items()} for role, own in seconds.items()}

    run = run_of(step_ms=100, config=config)
    run.records = [
        one | {"states": states(one["step"]), "parked": {"rollouts": one["step"] * 0.04}} for one in run.records
    ]
    return run


def test_without_timelines_a_role_is_one_process_however_many_there_are():
    """rollout:train and the bounds are those of the same run with its timelines."""
    config = RunConfig(
        actor=ActorSection(count=4), learner=LearnerSection(dp_replicate=2), replica=ReplicaSection(count=2)
    )
    run = without_timelines(config, actors=4, ranks=2)
    found = verdict(run)
    assert [(p.name, p.count) for p in found.processes] == [
        ("learner", 1), ("4 × actor", 4), ("2 × replica", 2), ("broker", 1),
    ]  # fmt: skip
    assert found.rates.fleet_s == pytest.approx(10_000 / 0.5) and found.rates.learner_s == pytest.approx(1000 / 0.06)
    learner = found.processes[0]
    assert learner.states["forward"][0] == pytest.approx(0.04 * 8) and learner.there_s == pytest.approx(0.1 * 8)
    assert "idle.ranks" not in learner.states or learner.states["idle.ranks"][0] == pytest.approx(0, abs=1e-9)
    assert learner.causes["rollouts.sampling"] == pytest.approx(0.04 * 8)
    bounds = bounds_of(found, run)
    assert (bounds.actors, bounds.replicas, bounds.ranks) == (4, 2, 2)
    assert bounds.actors_s == pytest.approx(0.2) and bounds.credits_s == pytest.approx(0.05)
    assert bounds.learner_s == pytest.approx(0.06) and bounds.train_s == pytest.approx(0.04)
    assert bounds.replica_s == pytest.approx(0.06)
    run.config = None
    assert verdict(run).rates.ratio == pytest.approx(found.rates.ratio)


def test_figures_of_the_wrong_kind_are_left_out(tmp_path, capsys):
    odd = [
        {"dropped": [1, 2]}, {"lag_histogram": [1, 2]}, {"lag_histogram": {"²": 3, "1": "x"}}, {"parked": "x"},
        {"states": {"actor": 5, "learner": {"forward": "x"}}}, {"states": {"judge": {"work": 1.0}}},
        {"staleness_budget": "x"}, {"tokens_proposed": [1]},
    ]  # fmt: skip
    for number, more in enumerate(odd):
        run_dir = written(tmp_path / str(number), spans=False)
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in step_lines(8, 100, **more)))
        assert main([str(run_dir)]) == 0, more
        assert ("figures are none" in capsys.readouterr().out) == (number not in (4, 5)), more
        assert verdict(read_run(run_dir)).seconds, more  # whoever asks from Python


def test_a_budget_that_moves_is_shown_as_what_it_was():
    run = starved_learner(config=RunConfig(staleness=StalenessSection(budget="auto")))
    run.records = [{**one, "staleness_budget": 1 + (one["step"] > 6)} for one in run.records]
    assert any("budget auto (1 to 2)." in line for line in lines_of(verdict(run)))
    run = starved_learner(config=RunConfig(staleness=StalenessSection(budget="auto")), staleness_budget=3)
    assert any("budget auto (3)." in line for line in lines_of(verdict(run)))


def test_a_picture_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys):
    run_dir = written(tmp_path / "x")
    for path, words in (("x.foo", ".png or .svg"), ("none/x.png", "make it first"), ("x", "must end in")):
        assert main([str(run_dir), "--picture", str(tmp_path / path)]) == 2
        shown = capsys.readouterr().out
        assert words in shown and "tokens/s" not in shown


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1"])
def test_seconds_to_leave_out_are_a_number(tmp_path, capsys, seconds):
    (tmp_path / "status.json").write_text("{}")
    assert main([str(tmp_path), f"--skip-s={seconds}"]) == 2
    assert f"--skip-s {seconds}: must be a finite number of seconds, 0 or more" in capsys.readouterr().out


def test_the_picture_and_the_lines_tell_the_same(tmp_path):
    found = verdict(starved_learner())
    assert draw(found, tmp_path / "bars.png") and (tmp_path / "bars.png").stat().st_size > 5000
    lines = "\n".join(lines_of(found))
    assert "Bottleneck: actors" in lines
    assert "learner: forward 15 %, send 10 %; idle 75 %: rollouts.sampling 62 %" in lines
    assert not draw(verdict(run_of(step_ms=100)), tmp_path / "none.png")


def test_how_full_engines_are_while_they_sample():
    actor, idle = life("actor-0", "actor", [("sample", 4000)]), life("actor-1", "actor", [("idle.credits", 4000)])
    rows = [(0, {"rows": 8.0}), (1000, {"grants": 1.0}), (2000, {"rows": 2.0}), (3000, {"rows": 0.0})]
    actor.levels = [(at * MS, values) for at, values in rows]
    idle.levels = [(0, {"rows": 0.0})]
    whole = timelines(actor, idle)
    assert filled_of(whole, Window(0, 4000 * MS), 8) == pytest.approx((2 * 1.0 + 1 * 0.25) / 3)
    assert filled_of(whole, Window(1500 * MS, 2500 * MS), 4) == pytest.approx((1.0 + 0.5) / 2)
    assert filled_of(whole, Window(3000 * MS, 4000 * MS), 8) is None
    assert filled_of(timelines(), Window(0, 1), 8) is None


@pytest.mark.parametrize("replicates", [1, 2, 4])
def test_twice_the_data_ranks_are_twice_whatever_they_were(replicates):
    bounds = Bounds(
        step_s=1.0, learner_s=1.0, train_s=1.0, actors_s=0.01, replica_s=0.0, cpu_s=0.0, cores=None, full=False,
        waits={}, credits_s=0.0, actors=2, replicas=1, ranks=2 * replicates, replicates=replicates, budget=2,
    )  # fmt: skip
    (change,) = [c.changes for c in candidates(RunConfig(learner=LearnerSection(dp_replicate=replicates)))
                 if "learner.dp_replicate" in c.changes]  # fmt: skip
    assert bounds.predict(change).speedup == pytest.approx(2.0)


def test_nobody_says_what_a_run_without_rejection_would_gain_where_frozen_models_score_too():
    def keys(config):
        return {key for candidate in candidates(config) for key in candidate.changes}

    assert "obrs.mode" in keys(RunConfig())
    assert "obrs.mode" not in keys(RunConfig(loss=LossSection(kl=0.1)))
    scored = [("idle.requests", 300), ("score", 100)]
    lives = [one for one in starved_learner().timelines.lives if one.role != "replica"]
    both = [loop("replica", "replica-0", scored), loop("replica", "reference-0", scored)]
    found = verdict(run_of(*lives, *both, step_ms=400, config=RunConfig(loss=LossSection(kl=0.1))))
    assert bounds_of(found, run_of(step_ms=400, config=RunConfig(loss=LossSection(kl=0.1)))).replica_s == pytest.approx(
        0.1
    )


def test_a_timeline_that_was_full_early_is_told():
    run = starved_learner()
    run.records.extend(step_lines(STEPS + 30, 400)[STEPS:])
    assert any("timelines end with step 11: the 30 behind it are not judged" in note for note in verdict(run).notes)
    assert not any("timelines end" in note for note in verdict(starved_learner()).notes)


def test_a_step_that_does_not_tell_a_sum_is_not_where_it_began():
    steps = [
        {"step": s, "tokens_generated": 1000 * (s + 50) if s else None, "tokens_dropped": 10 * s} for s in range(5)
    ]
    assert rates_of(steps, 2.0, []).generated_s == pytest.approx(1500)
    assert waste_of(steps).dropped == pytest.approx(40 / 3000)


def test_no_bound_is_told_of_fewer_actors_where_the_cores_are_spent():
    bounds = Bounds(
        step_s=1.0, learner_s=0.3, train_s=0.2, actors_s=1.2, replica_s=0.0, cpu_s=2.0, cores=2, full=True, waits={},
        credits_s=0.0, actors=2, replicas=1, ranks=1, replicates=1, budget=2,
    )  # fmt: skip
    assert bounds.predict({"actor.count": 1}) is None and bounds.predict({"actor.count": 3}).speedup == 1
