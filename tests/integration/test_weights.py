"""Weights over a real gloo group: publisher and receivers in threads, the broker's coordinator between them."""

import queue
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from actor.weights import GroupCollective, bucket_tensors
from broker.publishing import LEARNER, PublishCoordinator
from common import wire
from common.config import MEGABYTE
from common.errors import WeightsError
from common.weights import WeightDigest, WeightReceiver, block_sums, host_sum, plan_buckets
from learner.weights import group as weight_group
from learner.weights.group import tensor_sums
from learner.weights.pack import as_one, flatten
from learner.weights.publish import WeightPublisher

CPU = torch.device("cpu")
DEADLINE_S = 3.0


class Relay:
    """Carries messages between the ends and the coordinator, as the broker's loop does."""

    def __init__(self):
        self.coordinator = PublishCoordinator(DEADLINE_S)
        self.incoming = queue.Queue()
        self.to_learner = queue.Queue()
        self.receivers = {}
        self.mute = set()
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        while not self.closed.is_set():
            self.deliver(self.coordinator.on_tick(sorted(self.receivers), time.monotonic()))
            try:
                sender, message = self.incoming.get(timeout=0.02)
            except queue.Empty:
                continue
            self.deliver(self.answer(sender, message))

    def answer(self, sender, message):
        c, names, now = self.coordinator, sorted(self.receivers), time.monotonic()
        return {
            wire.Publish: lambda: c.on_publish(message, names, now),
            wire.Ready: lambda: c.on_ready(message, sender, names, now),
            wire.Published: lambda: c.on_published(message),
            wire.PublishFailed: lambda: c.on_publish_failed(message, names, now),
            wire.Applied: lambda: c.on_applied(message, sender),
            wire.ReceiveFailed: lambda: c.on_receive_failed(message, sender),
        }[type(message)]()

    def deliver(self, outgoing):
        for name, message in outgoing:
            if name == LEARNER:
                self.to_learner.put(message)
            elif name not in self.mute:
                receiver = self.receivers[name]
                (receiver.on_prepare if isinstance(message, wire.Prepare) else receiver.on_go)(message)

    def publisher(self):
        def receive(timeout):
            try:
                return self.to_learner.get(timeout=timeout)
            except queue.Empty:
                return None

        return WeightPublisher(
            lambda m: self.incoming.put((LEARNER, m)), receive, "127.0.0.1", 1000 / MEGABYTE, DEADLINE_S, CPU
        )

    def add(self, name, join=None):
        join = join or (lambda p: GroupCollective(p, DEADLINE_S, CPU))
        self.receivers[name] = WeightReceiver(lambda m: self.incoming.put((name, m)), join, DEADLINE_S)
        return self.receivers[name]


@pytest.fixture
def relay():
    made = Relay()
    yield made
    made.closed.set()
    made.thread.join(5)
    for receiver in made.receivers.values():
        receiver.close()


def tensors(version):
    generator = torch.Generator().manual_seed(version)
    return [
        ("a.weight", torch.randn(17, 9, generator=generator)),
        ("b.weight", torch.randn(400, generator=generator)),
        ("c.half", torch.randn(3, 5, generator=generator).bfloat16()),
    ]


class Held:
    """A snapshot of tensors at hand."""

    def __init__(self, named, bucket_bytes):
        self.listing = [[n, str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in named]
        self.buckets, self.named = plan_buckets(self.listing, bucket_bytes), dict(named)

    def tensors(self, index, device):
        return {slot.name: self.named[slot.name] for slot in self.buckets[index].slots}


def take(receiver, seconds=10.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (staged := receiver.staged()) is not None:
            return staged
        time.sleep(0.005)
    raise AssertionError("nothing arrived")


def publish(publisher, version):
    return publisher.publish(version, Held(tensors(version), 1000), lambda m: None, lambda: False)


def assert_holds(staged, version, unpack=bucket_tensors):
    assert staged.version == version
    got = dict(unpack(staged.buckets))
    assert list(got) == ["a.weight", "b.weight", "c.half"]
    for name, tensor in tensors(version):
        assert torch.equal(got[name], tensor) and got[name].dtype == tensor.dtype


def test_every_receiver_gets_the_same_bytes_and_the_group_is_kept_over_versions(relay):
    a = relay.add("actor-0")
    r = relay.add("replica-0", lambda p: weight_group.join(p, DEADLINE_S, CPU))
    publisher = relay.publisher()
    for version in (1, 2, 3):
        publish(publisher, version)
        for receiver, unpack in ((a, bucket_tensors), (r, weight_group.unpack)):
            staged = take(receiver)
            assert_holds(staged, version, unpack)
            receiver.applied(staged)
    deadline = time.monotonic() + 5
    while relay.coordinator.published < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert relay.coordinator.history == [1, 2, 3] and relay.coordinator.epoch == 1


def test_memory_is_used_again_once_its_version_is_copied_or_replaced(relay):
    receiver = relay.add("actor-0")
    publisher = relay.publisher()
    homes, adopted = [], (True, True, True, False, False)
    for version, keeps in enumerate(adopted, 1):
        publish(publisher, version)
        staged = take(receiver)
        assert_holds(staged, version)
        homes.append(staged.arena.data_ptr())
        receiver.applied(staged, adopted=keeps, copied=not keeps)
        assert_holds(staged, version)  # untouched until the next one comes
    assert homes[0] != homes[1] and homes[2] == homes[0]  # the first was free when the second took its place
    assert len(set(homes)) == 2


def test_a_receiver_that_never_says_ready_is_dropped_and_the_other_is_served(relay):
    a = relay.add("actor-0")
    relay.add("silent")
    relay.mute.add("silent")
    publish(relay.publisher(), 1)
    assert_holds(take(a), 1)
    assert relay.coordinator.late == {"silent": 1}


def test_a_receiver_that_dies_inside_the_collective_does_not_end_the_run(relay):
    a = relay.add("actor-0")

    def die(prepare):
        raise WeightsError("killed")

    relay.add("doomed", die)
    publisher = relay.publisher()
    thread = threading.Thread(target=publish, args=(publisher, 1))
    thread.start()
    time.sleep(1.0)
    del relay.receivers["doomed"]  # the broker notices that it is gone
    thread.join(30)
    assert not thread.is_alive()
    staged = take(a)
    assert_holds(staged, 1)


def test_who_had_everything_when_the_collective_broke_is_told_at_once_and_served_again(relay, monkeypatch):
    a, publisher, reasons = relay.add("actor-0"), relay.publisher(), []
    failed, broadcast = relay.coordinator.on_receive_failed, publisher._broadcast

    def broken(*arguments):
        broadcast(*arguments)
        monkeypatch.setattr(publisher, "_broadcast", broadcast)
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(publisher, "_broadcast", broken)
    monkeypatch.setattr(
        relay.coordinator, "on_receive_failed", lambda m, sender: reasons.append(m.reason) or failed(m, sender)
    )
    publish(publisher, 1)
    assert_holds(take(a), 1)
    assert len(reasons) == 1 and "the learner's broadcast broke" in reasons[0]
    assert relay.coordinator.epoch == 2 and relay.coordinator.late == {}


def test_without_receivers_publishing_returns_at_once(relay):
    assert publish(relay.publisher(), 1) < 2.0


def test_buckets_respect_the_bound_and_large_tensors_get_their_own():
    sizes = {"a": [4], "b": [1000], "d": [3], "e": []}
    listing = [[name, "float32", shape] for name, shape in sizes.items()]
    plan = plan_buckets([*listing[:2], ["c", "bfloat16", [8]], *listing[2:]], 64)
    assert [[s.name for s in b.slots] for b in plan] == [["a"], ["b"], ["c", "d"], ["e"]]
    assert all(slot.offset % 16 == 0 for bucket in plan for slot in bucket.slots)  # and nothing lies between them
    assert [b.nbytes for b in plan] == [sum(s.nbytes for s in b.slots) for b in plan] == [16, 4000, 28, 4]
    with pytest.raises(WeightsError, match="int3"):
        plan_buckets([["x", "int3", [1]]], 64)


@pytest.mark.parametrize("sums_of", [block_sums, host_sum])
@pytest.mark.parametrize("nbytes", [8, 4096, 3 * 2**20, 2**20 + 16])
def test_sums_notice_a_changed_bit_and_words_that_changed_places(nbytes, sums_of):
    generator = np.random.default_rng(nbytes)
    data = generator.integers(0, 256, nbytes, np.uint8)
    sums = sums_of(data)
    assert sums == sums_of(data.copy()) and tensor_sums(torch.from_numpy(data)) == host_sum(data)
    changed = data.copy()
    changed[nbytes // 2] ^= 1
    assert sums_of(changed) != sums
    if nbytes > 8:
        words = data.copy().view(np.uint64)
        words[[0, len(words) // 3]] = words[[len(words) // 3, 0]]
        assert sums_of(words.view(np.uint8)) != sums


def test_a_bucket_that_is_one_piece_of_memory_is_not_copied():
    flat = torch.arange(64, dtype=torch.float32)
    named = [("a", flat[:16].view(4, 4)), ("b", flat[16:24]), ("c", flat[24:])]
    held = Held(named, 1 << 20)
    one = as_one(held.buckets[0], held.tensors(0, CPU), CPU)
    assert one.data_ptr() == flat.data_ptr() and one.nbytes == 256
    copied = flatten(held.buckets[0], held.tensors(0, CPU), torch.empty(256, dtype=torch.uint8))
    assert torch.equal(one, copied)
    gap = Held([named[0], named[2]], 1 << 20)
    assert as_one(gap.buckets[0], gap.tensors(0, CPU), CPU) is None
    odd = Held([("x", flat[:3]), ("y", flat[3:7])], 1 << 20)  # no gap may be left for alignment
    assert [bucket.nbytes for bucket in odd.buckets] == [12, 16]


def test_a_wrong_digest_is_refused():
    class Lying:
        def allocate(self, nbytes):
            return torch.zeros(nbytes, dtype=torch.uint8)

        def start(self, tensor):
            return SimpleNamespace(wait=lambda: None)

        def sums(self, tensor):
            return block_sums(tensor.numpy())

        def receive_digest(self, version):
            return WeightDigest().hex()

        def close(self):
            pass

    sent = queue.Queue()
    receiver = WeightReceiver(sent.put, lambda p: Lying(), DEADLINE_S)
    offer = wire.Publish(1, "h", 1, "gloo", 64, [["a", "float32", [4]]])
    receiver.on_prepare(wire.Prepare(1, 1, 1, 2, offer.__dict__))
    assert isinstance(sent.get(timeout=2), wire.Ready)
    receiver.on_go(wire.Go(1, 1, ["x"], 2))
    assert "digest" in sent.get(timeout=2).reason
    receiver.on_go(wire.Go(9, 1, ["x"], 2))
    assert "without a matching Prepare" in sent.get(timeout=2).reason
    receiver.close()


STORE = """
import time, torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(60)
"""


def test_a_learner_that_stands_still_is_not_waited_for_without_end():
    """Its kernel still takes connections; torch's store would wait for the answer for ever."""
    with subprocess.Popen([sys.executable, "-c", STORE], stdout=subprocess.PIPE, text=True) as process:
        port = int(process.stdout.readline())
        process.send_signal(signal.SIGSTOP)
        offer = {"version": 1, "host": "127.0.0.1", "port": port, "backend": "gloo", "bucket_bytes": 64, "tensors": [],
                 "seconds": 0.0}  # fmt: skip
        try:
            for join in (GroupCollective, weight_group.join):
                sent = queue.Queue()
                receiver = WeightReceiver(sent.put, lambda p, join=join: join(p, 0.5, CPU), 0.5)
                receiver.on_prepare(wire.Prepare(1, 1, 1, 2, offer))
                assert sent.get(timeout=1) == wire.Ready(1, 1)
                receiver.on_go(wire.Go(1, 1, ["x"], 2))
                failed = sent.get(timeout=5)
                assert isinstance(failed, wire.ReceiveFailed) and re.search("not answered|timed out", failed.reason)
        finally:
            process.kill()


def test_a_receiver_that_is_stuck_in_a_broken_group_says_ready_once_it_is_free():
    sent, gate = queue.Queue(), threading.Event()

    def join(_):
        gate.wait(5)
        raise RuntimeError("connection refused")

    receiver = WeightReceiver(sent.put, join, DEADLINE_S)
    offer = {"version": 1, "host": "h", "port": 1, "backend": "gloo", "bucket_bytes": 64, "tensors": []}
    receiver.on_prepare(wire.Prepare(1, 1, 1, 2, offer))
    assert sent.get(timeout=1) == wire.Ready(1, 1)
    receiver.on_go(wire.Go(1, 1, ["a"], 2))
    receiver.on_prepare(wire.Prepare(2, 1, 1, 2, offer))
    with pytest.raises(queue.Empty):
        sent.get(timeout=0.2)
    gate.set()
    assert isinstance(sent.get(timeout=5), wire.ReceiveFailed)
    assert sent.get(timeout=1) == wire.Ready(2, 1)
    receiver.close()
