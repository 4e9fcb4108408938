"""A fleet on two network hosts, the link between them cut and healed, or slow and lossy.

``make chaos`` runs it where there is root; elsewhere it is skipped.
"""

import time

import pytest

from tests.integration.fleet import Fleet
from tests.integration.netns import DEVICE, TwoHosts, missing
from tests.integration.test_chaos import QUICK, assert_nothing_lost_nothing_twice
from tools import keys

WHY = missing()
PLACES = {"broker": "a", "learner": "a", "replica-0": "a", "actor-0": "a", "actor-1": "b"}

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.skipif(bool(WHY), reason=WHY)]


def fleet_on(hosts, directory, model, *overrides):
    keys.make(directory / "keys", ["learner", "replica-0", "actor-0", "actor-1"])
    here = hosts.addresses[0]
    return Fleet(
        directory, model, *QUICK, f"broker.address=tcp://{here}:5555", f"broker.keys={directory / 'keys'}",
        f"weights.host={here}", *overrides, places={name: hosts.on(side) for name, side in PLACES.items()},
        extra={"GLOO_SOCKET_IFNAME": DEVICE},
    )  # fmt: skip


def test_a_cut_link_costs_the_far_actor_s_groups_and_heals(tmp_path, model):
    with TwoHosts() as hosts, fleet_on(hosts, tmp_path, model, "run.steps=200") as fleet:
        for name in PLACES:
            fleet.start(name)
        fleet.wait_for_step(5)
        fleet.wait_for_log("broker", "actor-1 joined")
        hosts.cut = True
        fleet.wait_for_log("broker", "actor actor-1 left: silent for")
        cut_at = fleet.steps()[-1]["step"]
        fleet.wait_for_step(cut_at + 5)  # the near actor goes on
        hosts.cut = False
        deadline = time.monotonic() + 60
        while fleet.log("broker").read_text().count("actor-1 joined") < 2:
            assert time.monotonic() < deadline, fleet.words()
            time.sleep(0.1)
        assert [fleet.wait(name, 90) for name in PLACES] == [0] * 5, fleet.words()
        assert_nothing_lost_nothing_twice(fleet)


@pytest.mark.timeout(240)
def test_two_hundred_milliseconds_and_five_percent_loss_are_borne(tmp_path, model):
    with (
        TwoHosts(delay_s=0.2, loss=0.05) as hosts,
        fleet_on(hosts, tmp_path, model, "run.steps=10", "broker.peer_timeout_s=20", "weights.deadline_s=20") as fleet,
    ):
        for name in ("broker", "actor-1", "replica-0"):
            fleet.start(name)
        fleet.wait_for_log("broker", "actor-1 joined")
        for name in ("learner", "actor-0"):
            fleet.start(name)
        assert [fleet.wait(name, 200) for name in PLACES] == [0] * 5, fleet.words()
        assert_nothing_lost_nothing_twice(fleet)
        assert hosts.lost > 0
        assert max(s["lag_max"] for s in fleet.steps()) > 0  # what came from afar was older
