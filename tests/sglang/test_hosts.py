"""A fleet on three network hosts with keys: two actors, each with an SGLang server of its own beside it."""

import contextlib
import os
import select
from collections import defaultdict

import pytest

from broker.journal import Journal
from common import wire
from common.codec import decode
from common.config import load, to_yaml
from tests.integration.fleet import ROOT, Fleet
from tests.integration.netns import DEVICE, TwoHosts, missing
from tests.integration.test_chaos import assert_nothing_lost_nothing_twice
from tools import keys

WHY = missing()
PLACES = {"broker": "a", "learner": "a", "replica-0": "a", "actor-0": "b", "actor-1": "c"}
ACTORS = ("actor-0", "actor-1")

pytestmark = [pytest.mark.sglang, pytest.mark.skipif(bool(WHY), reason=WHY)]


class ThreeHosts(TwoHosts):
    """Hosts ``a``, ``b`` and ``c`` on one sound link: a packet goes to the host that it is addressed to."""

    addresses = ("10.77.0.1", "10.77.0.2", "10.77.0.3")

    def __init__(self):
        super().__init__()
        self.names = tuple(f"croupier-{side}-{os.getpid()}" for side in "abc")

    def on(self, side):
        return ["ip", "netns", "exec", self.names["abc".index(side)]]

    def _carry(self):
        homes = {bytes(map(int, a.split("."))): fd for a, fd in zip(self.addresses, self._fds, strict=True)}
        while not self._closing.is_set():
            for fd in select.select(self._fds, [], [], 0.2)[0]:
                with contextlib.suppress(BlockingIOError):
                    for _ in range(100):
                        packet = os.read(fd, 65536)
                        to = homes.get(packet[16:20])  # the destination of an IPv4 packet
                        if to is not None:
                            with contextlib.suppress(OSError):  # the device's queue is full: lost
                                os.write(to, packet)
                            self.carried += 1


def fleet_on(hosts, directory, model, python):
    """``configs/sglang.yaml``, short, with an actor and its server on each of two hosts."""
    keys.make(directory / "keys", ["learner", "replica-0", *ACTORS])
    here = hosts.addresses[0]
    fleet = Fleet(
        directory, model, places={name: hosts.on(side) for name, side in PLACES.items()},
        extra={"GLOO_SOCKET_IFNAME": DEVICE},
    )  # fmt: skip
    fleet.config = load(
        ROOT / "configs/sglang.yaml",
        [
            f"run.dir={directory}", "run.steps=12", f"model.path={model}", "warmstart.target_reward=0.0",
            "rollout.groups_per_step=8", "rollout.group_size=4", "actor.count=2", "actor.max_sequences=16",
            f"engine.python={python}", f"broker.address=tcp://{here}:5555", f"broker.keys={directory / 'keys'}",
            f"weights.host={here}", "evaluation.prompts=16", "evaluation.every=6",
        ],
    )  # fmt: skip
    fleet.run = fleet.config.run.path
    fleet.file.write_text(to_yaml(fleet.config))
    return fleet


def sampled_versions(fleet):
    """By actor, the weight versions that it sampled tokens of admitted trajectories from."""
    found = defaultdict(set)
    journal = Journal(fleet.run / "journal", "", 64, read_only=True)
    for event in journal.events():
        if event.kind == "admit":
            message = decode(event.frames, wire.TO_BROKER)
            found[event.head["actor"]] |= set(message.versions[message.versions >= 0].tolist())
    journal.close()
    return dict(found)


@pytest.mark.timeout(240)
def test_actors_with_servers_of_their_own_on_two_hosts_train_one_policy(tmp_path, model, sglang_python):
    with ThreeHosts() as hosts, fleet_on(hosts, tmp_path, model, sglang_python) as fleet:
        for name in PLACES:
            fleet.start(name)
        for name in ACTORS:
            fleet.wait_for_log(name, "SYNCED -> SERVING", 150)
        assert [fleet.wait(name, 60) for name in PLACES] == [0] * 5, fleet.words()
        assert_nothing_lost_nothing_twice(fleet)  # nothing above the staleness budget either
        versions = sampled_versions(fleet)
        assert sorted(versions) == list(ACTORS)
        assert all(max(versions[name]) >= 6 for name in ACTORS), versions
        assert fleet.status()["receivers_late"] == {}
