"""What both ends of a weights group ask of NCCL, with one that needs no GPU: real stores, real handshake."""

import os
import queue
import threading

import pytest
import torch
import torch.distributed as dist

from actor.weights import GroupCollective
from common import wire
from common.config import MEGABYTE
from common.deadlines import NO_WATCHDOG
from common.errors import DeadlineError
from common.weights import plan_buckets
from learner.weights import group as weight_group
from learner.weights.publish import WeightPublisher

CPU = torch.device("cpu")
DEADLINE_S = 0.25  # a wait for a process that stands still takes a second more


class Nccl:
    """A group whose communicator is made once ``gate`` is open; a broadcast then works, or breaks as NCCL's do."""

    made = ()
    gate = threading.Event()
    broken = None

    class Options:
        """Takes a timeout."""

    def __init__(self, store, rank, world, options):
        self.rank, self.world, self.timeout_s = rank, world, options._timeout.total_seconds()
        self.environment = {name: os.environ.get(name) for name in NO_WATCHDOG}
        self.device, self.aborted = None, False
        self.made.append(self)

    def eager_connect_single_device(self, device):
        self.gate.wait(10)
        self.device = device

    def broadcast(self, tensors):
        assert self.device is not None, "a first broadcast would make the communicator, without a deadline"
        return self

    def is_completed(self):
        return True

    def exception(self):
        return self.broken

    def wait(self):
        return True

    def abort(self):
        self.aborted = True


@pytest.fixture
def nccl(monkeypatch):
    """Stands where torch has NCCL; builds for CPUs have none."""

    class Fresh(Nccl):
        made, gate = [], threading.Event()

    monkeypatch.setattr(dist, "ProcessGroupNCCL", Fresh, raising=False)
    Fresh.gate.set()
    yield Fresh
    Fresh.gate.set()


class Held:
    """A snapshot of one tensor."""

    def __init__(self):
        self.listing = [["a", "float32", [4]]]
        self.buckets = plan_buckets(self.listing, 64)

    def tensors(self, index, device):
        return {"a": torch.arange(4.0)}


def publish():
    """Offer a version, say Go at once, and PublishDone after whatever comes of it; all that the learner sent."""
    sent, said = [], queue.Queue()

    def send(message):
        sent.append(message)
        said.put(wire.Go(1, 1, ["replica-0"], 2) if isinstance(message, wire.Publish) else wire.PublishDone(1, [], []))

    publisher = WeightPublisher(
        send, lambda timeout: said.get(timeout=5), "127.0.0.1", 1000 / MEGABYTE, DEADLINE_S, CPU, "nccl"
    )
    publisher.publish(1, Held(), lambda m: None, lambda: False)
    return sent


def test_both_ends_make_groups_without_a_watchdog_and_connect_them_before_the_first_broadcast(nccl):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    offer = {"host": "127.0.0.1", "port": store.port, "backend": "nccl", "seconds": 2.0}
    prepare = wire.Prepare(1, 1, 1, 2, offer)
    for joined in (weight_group.join(prepare, 3.0, CPU), GroupCollective(prepare, 3.0, CPU)):
        joined.start(torch.zeros(4)).wait()
    assert [group.environment for group in nccl.made] == [NO_WATCHDOG] * 2
    assert [(g.rank, g.world, g.timeout_s, g.device) for g in nccl.made] == [(1, 2, 5.0, CPU)] * 2
    assert not any(name in os.environ for name in NO_WATCHDOG)


def test_a_learner_whose_receiver_died_before_it_connected_says_so_and_goes_on(nccl):
    nccl.gate.clear()
    offer, failed = publish()
    assert isinstance(offer, wire.Publish) and isinstance(failed, wire.PublishFailed)
    assert f"communicator of weights/{offer.port}/1 has not answered" in failed.reason
    assert "weights.deadline_s" in failed.reason


def test_a_learner_whose_receiver_died_in_a_broadcast_sends_no_digest(nccl):
    assert [type(message) for message in publish()] == [wire.Publish, wire.Published]
    nccl.broken = RuntimeError("NCCL error: remote process exited or there was a network error")
    _, failed = publish()
    assert isinstance(failed, wire.PublishFailed) and "broadcast broke: NCCL error: remote" in failed.reason
    assert nccl.made[-1].aborted


def test_a_receiver_gives_up_where_the_others_do_not_connect(nccl):
    nccl.gate.clear()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    offer = {"host": "127.0.0.1", "port": store.port, "backend": "nccl", "seconds": 0.0}
    with pytest.raises(DeadlineError, match="NCCL communicator"):
        GroupCollective(wire.Prepare(1, 1, 1, 2, offer), DEADLINE_S, CPU)
