"""Routing and pacing: pure rules of the SGLang engine."""

import collections

from hypothesis import given
from hypothesis import strategies as st

from actor.engine.pacing import DECREASE, LEAST, Load, Pace
from actor.engine.probe import check_frequencies, read_identity
from actor.engine.routing import BALANCE, Router, weight


def test_a_key_stays_at_its_home_whatever_the_loads():
    router = Router()
    homes = {key: router.place(key, {"a": 0, "b": 0, "c": 0}) for key in range(50)}
    assert set(homes.values()) == {"a", "b", "c"}
    for key, home in homes.items():
        assert router.place(key, {name: 1000 * (name == home) for name in "abc"}) == home
    assert router.moved == 0


def test_only_the_keys_of_a_lost_target_move_and_those_of_a_new_one():
    router = Router()
    homes = {key: router.place(key, dict.fromkeys("abcd", 0)) for key in range(400)}
    after = {key: router.place(key, dict.fromkeys("abc", 0)) for key in range(400)}
    assert all(after[key] == home for key, home in homes.items() if home != "d")
    assert router.moved == sum(home == "d" for home in homes.values()) > 50
    first_choice = {key: max("abcd", key=lambda target: weight(key, target)) for key in range(400)}
    assert homes == first_choice  # without load nothing is displaced
    assert Router().place(7, dict.fromkeys("abcde", 0)) in (homes[7], "e")


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(1, 200))
def test_no_target_gets_more_than_its_share(targets, keys):
    loads = collections.Counter({f"t{i}": load for i, load in enumerate(targets)})
    router = Router()
    for key in range(keys):
        before = dict(loads)
        chosen = router.place(key, before)
        assert before[chosen] < BALANCE * (sum(before.values()) + 1) / len(before) + 1
        loads[chosen] += 1


def test_the_limit_grows_while_all_runs_and_shrinks_when_requests_wait():
    pace = Pace(most=500)
    limits = []
    for _ in range(5):
        pace.observe(Load(pace.limit, 0, 0.2, 0), pace.limit)
        limits.append(pace.limit)
    assert limits == [32, 64, 128, 256, 500]
    pace.observe(Load(200, 300, 0.2, 0), 500)
    assert pace.limit == int(DECREASE * 500)
    pace.observe(Load(400, 0, 0.2, 0), 400)
    assert pace.limit == 420  # additive from the first decrease on
    for load in (Load(400, 0, 0.99, 0), Load(400, 0, 0.2, 3)):
        before = pace.limit
        pace.observe(load, before)
        assert pace.limit < before
    for _ in range(100):
        pace.observe(Load(1, 50, 0.2, 0), 60)
    assert pace.limit == LEAST


def test_the_limit_settles_near_what_a_server_runs_at_once():
    """A server of 32 slots whose queue is what does not fit."""
    pace, seen = Pace(most=1000), []
    for _ in range(300):
        in_flight = pace.limit
        pace.observe(Load(min(32, in_flight), max(0, in_flight - 32), 0.5, 0), in_flight)
        seen.append(pace.limit)
    assert all(24 <= limit <= 44 for limit in seen[50:])


def test_an_idle_server_does_not_raise_its_limit_and_a_fixed_one_never_moves():
    pace = Pace()
    before = pace.limit
    pace.observe(Load(2, 0, 0.1, 0), 2)
    assert pace.limit == before
    fixed = Pace(7)
    fixed.observe(Load(7, 50, 1.0, 5), 7)
    assert fixed.limit == 7


@given(st.integers(0, 2**31))
def test_an_honest_sampler_passes_the_frequency_test(seed):
    import numpy as np

    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(40) * rng.uniform(0.05, 3))
    top = np.argsort(-p)[:7]
    check_frequencies("s", rng.choice(40, 512, p=p), top, np.log(p[top]))


def test_a_release_candidate_and_a_later_patch_are_understood():
    assert read_identity({"version": "0.5.22.post1", "tp_size": 4, "pp_size": 2}, "s", "retract").ranks == 8
    assert read_identity({"version": "0.5.24"}, "s", "retract").flat_top
    assert not read_identity({"version": "0.5.22"}, "s", "retract").flat_top
