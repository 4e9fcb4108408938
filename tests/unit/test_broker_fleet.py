"""What the broker tells of the peers' time."""

import pytest

from broker.fleet import PEERS_SHOWN, Fleet
from broker.peers import Peer, Roster
from common.wire import Hello


def peer(name="a0", role="actor", heard=0.0, version=0):
    hello = Hello(role, name, "", "s", 0, 1, version, 8, "host", 1)
    return Peer(name.encode(), hello, heard, version)


def test_seconds_are_added_up_by_role_and_a_first_heartbeat_is_only_a_mark():
    fleet, one, two = Fleet(), peer("a0"), peer("a1")
    fleet.heard(one, {"sample": 10.0, "idle.credits": 5.0})
    fleet.heard(two, {"sample": 1.0})
    assert fleet.line()["states"] == {"actor": {}}
    fleet.heard(one, {"sample": 11.0, "idle.credits": 5.5})
    fleet.heard(two, {"sample": 1.25})
    assert fleet.line()["states"] == {"actor": {"sample": 1.25, "idle.credits": 0.5}}
    again = peer("a0")  # the same process, welcomed again by a broker that had given it up
    fleet.heard(again, {"sample": 12.0})
    assert fleet.line()["states"]["actor"]["sample"] == 1.25


@pytest.mark.parametrize("seconds", [{"nonsense": 1.0}, {"sample": float("nan")}, {"sample": -1.0}, {"forward": 2.0}])
def test_what_is_no_state_of_the_role_or_no_time_is_left_out(seconds):
    fleet, one = Fleet(), peer()
    fleet.heard(one, {"play": 1.0})
    fleet.heard(one, {"play": 2.0, **seconds})
    assert one.seconds == {"play": 2.0} and fleet.line()["states"]["actor"] == {"play": 1.0}


def test_time_spent_decoding_is_each_actors_own_growth_whoever_comes_and_goes():
    fleet, one, two = Fleet(), peer("a0"), peer("a1")
    for seconds in (100.0, 101.0):
        for each in (one, two):
            fleet.heard(each, {"sample": seconds}, {"seconds_decode": seconds})
    assert fleet.decoding_s == 2.0
    again = peer("a1")  # welcomed again, with all its past
    for seconds in (150.0, 150.5):
        fleet.heard(again, {"sample": seconds}, {"seconds_decode": seconds})
    fleet.heard(one, {"sample": 101.0}, {"seconds_decode": float("nan")})
    assert fleet.decoding_s == 2.5


def test_frozen_models_are_no_replicas_of_the_policy():
    fleet, policy, teacher = Fleet(), peer("r0", "replica"), peer("t0", "replica")
    teacher.hello.serves = "teacher"
    for seconds in (1.0, 3.0):
        fleet.heard(policy, {"score": seconds})
        fleet.heard(teacher, {"idle.requests": 10 * seconds})
    assert fleet.policy_seconds == {"score": 2.0}
    assert fleet.line()["states"]["replica"] == {"score": 2.0, "idle.requests": 20.0}


def test_a_parked_learners_seconds_go_to_what_it_waited_for():
    fleet = Fleet()
    for cause, now in (("", 0.0), ("rollouts", 1.0), ("rollouts", 2.0), ("scoring", 4.0), ("", 4.5), ("", 9.0)):
        fleet.waits(cause, now)
    assert fleet.line()["parked"] == {"rollouts": 3.0, "scoring": 0.5}


def test_the_broker_tells_of_itself():
    assert Fleet(lambda: {"pack": 1.234, "odd": 2.0}).line()["states"] == {"broker": {"pack": 1.23}}
    assert Fleet().line()["states"] == {}


def test_a_big_fleet_is_shown_in_part_and_summed_up_whole():
    fleet, roster = Fleet(), Roster()
    for number in range(2000):
        roster.add(peer(f"actor-{number:04d}", heard=0.0 if number == 1500 else 100.0, version=number % 3))
    roster.add(peer("replica-0", "replica", heard=100.0))
    status = fleet.status(roster, 101.0)
    assert len(status["peers"]) == PEERS_SHOWN + 1
    assert status["fleet"]["actor"] == {
        "count": 2000, "oldest_version": 0, "newest_version": 2, "silent": 1, "silent_names": ["actor-1500"],
    }  # fmt: skip
    assert status["fleet"]["replica"]["count"] == 1
