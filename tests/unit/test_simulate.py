"""The simulator: processor sharing by hand, runs with closed forms, what must hold in every run."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.ledger import StalenessLedger
from common.errors import ConfigError
from tools.simulate import Setup, simulate
from tools.simulate.clock import Clock
from tools.simulate.ledger import CountingLedger
from tools.simulate.model import Simulation
from tools.simulate.receiver import IDLE_LOOK_S
from tools.simulate.settings import override, read_setup, to_yaml, variants, varied

# One actor and a learner that wait for nobody but each other: a batch takes 40 steps of .01 s, a step .1 s a version.
BARE = [
    "machine.shared=false", "obrs.mode=off", "actor.count=1", "rollout.groups_per_step=4", "rollout.group_size=2",
    "rollout.max_tokens=40", "actor.max_sequences=8", "actor.step_s=0.01", "actor.row_s=0", "actor.prefill_s=0",
    "actor.prefill_token_s=0", "actor.sequence_s=0", "actor.swap_s=0", "weights.gather_s=0", "weights.send_s=0",
    "weights.receive_s=0", "broker.message_s=0", "broker.trajectory_s=0", "broker.assemble_s=0", "broker.decide_s=0",
    "broker.pack_s=0", "broker.commit_s=0", "broker.hold_s=0", "broker.link_s=0", "learner.step_s=0",
]  # fmt: skip
DECODING = 0.4 - 0.01  # a batch's first tokens come with its prefill, which is free


def bare(*overrides):
    return override(Setup(), [*BARE, *overrides])


def learner_takes(seconds):
    return f"learner.token_s={seconds / (8 * (40 + 32)):.17g}"


# ---- processors ---------------------------------------------------------------------------------


def run_tasks(cores, costs, crowded=1.0):
    clock, ends = Clock(cores, crowded), {}
    for cost, threads in costs:
        clock.shared.start(cost, lambda cost: ends.update({cost: clock.now}), cost, threads=threads)
    clock.run(100)
    return ends


def test_threads_share_cores_evenly():
    assert run_tasks(2, [(1, 1), (2, 1), (3, 1)]) == pytest.approx({1: 1.5, 2: 2.5, 3: 3.5})
    assert run_tasks(1, [(1, 1), (2, 1)]) == pytest.approx({1: 2.0, 2: 3.0})
    assert run_tasks(2, [(1, 2), (2, 1)]) == pytest.approx({1: 1.5, 2: 2.5})  # two threads beside one
    assert run_tasks(4, [(1, 1), (2, 1)], crowded=0.5) == pytest.approx({1: 2.0, 2: 3.0})  # alone at full speed


def test_an_abandoned_task_frees_its_core():
    clock, ends = Clock(1), []
    first = clock.shared.start(1.0, ends.append, "first")
    clock.shared.start(1.0, ends.append, "second")
    clock.after(0.5, clock.shared.stop, first)  # each has done a quarter
    clock.run(100)
    assert ends == ["second"] and clock.now == pytest.approx(0.5 + 0.75)


# ---- closed forms -------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [0.1, 0.25, 1.0])
def test_with_budget_the_slower_side_sets_the_pace(training):
    found = simulate(bare(learner_takes(training), "staleness.budget=4", "run.steps=40"))
    assert found.steps_per_s == pytest.approx(1 / max(DECODING, training), rel=1e-6)
    assert found.learner_idle == pytest.approx(max(0.0, 1 - training / DECODING), abs=1e-6)


@pytest.mark.parametrize("training", [0.1, 1.0])
def test_without_budget_they_take_turns(training):
    found = simulate(bare(learner_takes(training), "staleness.budget=0"))
    turn = DECODING + training + IDLE_LOOK_S
    assert found.steps_per_s == pytest.approx(1 / turn, rel=1e-6)
    assert found.lags == {0: found.trained // 100 * 96}
    assert found.idle["actor"] == pytest.approx(1 - DECODING / turn, rel=1e-6)


@pytest.mark.parametrize("budget", [1, 2, 5])
def test_actors_that_are_fast_enough_are_as_stale_as_they_may_be(budget):
    found = simulate(bare(learner_takes(4.0), f"staleness.budget={budget}", "actor.max_sequences=64"))
    assert found.lag_max == budget
    assert found.lag_mean == pytest.approx(budget, rel=0.01)  # the very last steps' groups were all granted early


def test_slowdown_is_time_and_no_work():
    shared = ["machine.shared=true", "machine.cores=1", "staleness.budget=0"]
    for training, decoding in ((3.0, 1.0), (1.0, 2.0)):
        slow = [f"learner.slowdown={training}", f"actor.slowdown={decoding}"]
        found = simulate(bare(learner_takes(0.1), *shared, *slow))
        assert found.steps_per_s == pytest.approx(1 / (decoding * DECODING + training * 0.1 + IDLE_LOOK_S), rel=1e-6)


def test_two_actors_on_one_core_are_worth_one():
    one, two = (
        simulate(bare("machine.shared=true", "machine.cores=1", learner_takes(0.1), f"actor.count={n}", "run.steps=60"))
        for n in (1, 2)
    )
    assert two.steps_per_s == pytest.approx(one.steps_per_s, rel=0.08)


def test_a_context_that_grows_costs_its_sum():
    found = simulate(bare("actor.step_s=0", "actor.context_s=0.001", learner_takes(0.1), "staleness.budget=0"))
    decoding = 8 * 0.001 * sum(32 + done for done in range(1, 40))
    assert found.steps_per_s == pytest.approx(1 / (decoding + 0.1 + IDLE_LOOK_S), rel=1e-6)


def test_servers_share_a_fleet_of_requests():
    one = simulate(bare("actor.servers=1", learner_takes(0.1), "staleness.budget=8", "run.steps=60"))
    four = simulate(bare("actor.servers=4", learner_takes(0.01), "staleness.budget=8", "run.steps=60"))
    assert four.steps_per_s == pytest.approx(4 * one.steps_per_s, rel=0.05)


# ---- what holds always --------------------------------------------------------------------------


@st.composite
def setups(draw):
    numbers = {
        "run.steps": draw(st.integers(3, 8)), "staleness.budget": draw(st.integers(0, 4)),
        "actor.count": draw(st.integers(1, 4)), "rollout.groups_per_step": draw(st.integers(1, 6)),
        "rollout.group_size": draw(st.integers(1, 4)), "rollout.oversample": draw(st.sampled_from([1, 1.5])),
        "actor.max_sequences": draw(st.integers(6, 40)), "actor.servers": draw(st.sampled_from([0, 0, 2])),
        "actor.slowdown": draw(st.sampled_from([1, 2])), "learner.slowdown": draw(st.sampled_from([1, 3])),
        "obrs.mode": draw(st.sampled_from(["off", "threshold"])), "replica.count": draw(st.integers(1, 2)),
        "machine.shared": draw(st.booleans()), "machine.cores": draw(st.sampled_from([1, 2, 3.5])),
        "evaluation.prompts": draw(st.sampled_from([0, 5])), "evaluation.every": 2,
        "length.kind": draw(st.sampled_from(["longest", "uniform", "lognormal"])), "length.mean": 8,
        "learner.token_s": draw(st.sampled_from([1e-5, 1e-3])), "weights.send_s": draw(st.sampled_from([0.0, 0.3])),
        "actor.context_s": draw(st.sampled_from([0, 1e-5])), "learner.spread": draw(st.sampled_from([0, 0.4])),
        "broker.assemble_ahead": draw(st.integers(0, 2)), "run.seed": draw(st.integers(0, 5)),
        "rollout.max_tokens": 24,
    }  # fmt: skip
    return override(Setup(), [f"{key}={value}" for key, value in numbers.items()])


@settings(max_examples=15)
@given(setups())
def test_no_lag_exceeds_the_budget_and_nothing_is_lost(setup):
    found = simulate(setup)
    assert found.lag_max <= setup.staleness.budget
    assert found.trained == found.generated - found.cancelled  # a run that ends has trained all that it granted
    assert sum(found.lags.values()) <= found.trained
    assert all(0 <= share <= 1 + 1e-9 for share in found.idle.values())
    assert found.commits == sorted(found.commits) and len(found.commits) == setup.run.steps


@settings(max_examples=10)
@given(setups(), st.integers(0, 2000))
def test_every_token_is_somewhere_at_any_moment(setup, events):
    simulation = Simulation(setup)
    simulation.broker.begin()
    simulation.learner.begin()
    simulation.world.clock.run(events)
    for actor in simulation.broker.actors:
        sampled = sum(seat.engine.tokens for seat in actor.seats)
        live = sum(seat.engine.tokens_live for seat in actor.seats)
        assert sampled == live + actor.sent + actor.cancelled + actor.held_out


@settings(max_examples=5)
@given(setups())
def test_the_same_setup_has_the_same_outcome(setup):
    assert simulate(setup) == simulate(setup)


@settings(max_examples=15)
@given(st.integers(0, 4), st.integers(1, 4), st.randoms(use_true_random=False))
def test_the_counting_ledger_decides_as_the_brokers_does(budget, size, pick):
    ours, theirs = CountingLedger(budget, size, 12), StalenessLedger(budget, size, 12)
    version, group, flying, trained = 0, 0, {}, []
    for _ in range(100):
        what = pick.random()
        assert ours.grantable(version) == theirs.grantable(version)
        assert (ours.promised, ours.queued) == (theirs.promised, theirs.queued)
        if what < 0.35 and theirs.grantable(version):
            ours.grant(group, version)
            theirs.grant(group, version)
            flying[group], group = version, group + 1
        elif what < 0.7 and flying:
            done = pick.choice(sorted(flying))
            oldest = pick.randint(flying.pop(done), version)
            ours.complete(done, oldest)
            theirs.complete(done, oldest)
        elif what < 0.85:
            chosen = theirs.select()
            if chosen is not None:
                theirs.assembled(chosen)
                trained.append(theirs.next_step)
            assert ours.take() == chosen and ours.next_step == theirs.next_step
        elif trained:
            version = trained.pop(0)


def test_ten_thousand_actors_cost_events_by_the_completion_and_not_by_the_token():
    setup = override(
        Setup(),
        [
            "machine.shared=false", "actor.count=10000", "actor.max_sequences=4", "rollout.groups_per_step=500",
            "rollout.group_size=4", "rollout.max_tokens=2000", "run.steps=2", "obrs.mode=off", "staleness.budget=0",
        ],
    )  # fmt: skip
    found = simulate(setup)
    assert found.generated == 2 * 500 * 4 * 2000
    receivers, completions = 2 * 10_000, 2 * 500
    assert found.events < 8 * receivers + 12 * completions


# ---- what is asked for --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ("actor.count=0", r"actor\.count=0"),
        ("actor.step_s=-1", r"actor\.step_s=-1.*must not be negative"),
        ("learner.spread=-0.1", r"learner\.spread"),
        ("learner.token_s=nan", r"learner\.token_s=nan.*finite"),
        ("length.kind=histogram", r"length\.values=.*empty"),
        ("length.knid=fixed", r"length\.knid; did you mean 'kind'"),
        ("actr.count=2", r"unknown section actr; did you mean 'actor'"),
        ("actor.max_sequences=4", r"actor\.max_sequences=4"),
        ("rollout.group_size=0", r"rollout\.group_size=0"),
        ("machine.background=2", r"machine\.background=2"),
        ("staleness.budget=-1", r"staleness\.budget=-1"),
        ("actor.slowdown=0.5", r"actor\.slowdown=0\.5"),
        ("actor.count=many", r"actor\.count"),
        ("actor.count", r"must read section\.key=value"),
        ("replica.count=0", r"replica\.count=0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(given_, words):
    with pytest.raises(ConfigError, match=words):
        override(Setup(), [given_])


def test_a_histogram_needs_sound_weights(tmp_path):
    file = tmp_path / "setup.yaml"
    for weights, words in (("[1]", "as many"), ("[1, -1]", "negative"), ("[0, 0]", "negative")):
        file.write_text(f"length: {{kind: histogram, values: [3, 9], weights: {weights}}}\n")
        with pytest.raises(ConfigError, match=rf"length\.weights.*{words}"):
            read_setup(file)
    file.write_text("length: {kind: histogram, values: [3, 9], weights: [1, 3]}\nrun: {steps: 40}\n")
    found = simulate(read_setup(file, ["rollout.groups_per_step=50", "staleness.budget=0"]))
    assert found.trained / (40 * 50 * 8) == pytest.approx(7.5, rel=0.02)


def test_a_setup_survives_its_file(tmp_path):
    setup = override(Setup(), ["staleness.budget=7", "obrs.mode=off"])
    (tmp_path / "setup.yaml").write_text(to_yaml(setup))
    assert read_setup(tmp_path / "setup.yaml") == setup
    with pytest.raises(ConfigError, match="no such file"):
        read_setup(tmp_path / "none.yaml")


def test_lists_are_every_combination():
    given_ = ["actor.count=4", "staleness.budget=0,1,2", "length.values=[1,2]", "obrs.mode=off,threshold"]
    assert len(variants(given_)) == 6
    assert variants(given_)[1] == ["actor.count=4", "staleness.budget=0", "length.values=[1,2]", "obrs.mode=threshold"]
    assert varied(given_) == ["staleness.budget", "obrs.mode"]
    assert math.prod(len(variants([one])) for one in given_) == 6
