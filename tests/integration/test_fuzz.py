"""Mutated messages by the hundred thousand: refused by name, never a crash, a hang or growth."""

import copy
import dataclasses
import random
import resource
import threading
import time
from pathlib import Path

import msgpack
import numpy as np
import pytest
import zmq

from common import wire
from common.codec import decode, encode
from common.errors import DataError, WireError
from tests.integration.harness import G, Peer, group, make_broker

DECODED = 100_000
SENT = 20_000


def specimens():
    """A valid message of every kind that the broker takes, as frames."""
    floats = np.zeros(4, np.float32)
    metas = [["w", "float32", [2, 2]], ["v", "float32", [3]]]
    messages = [
        wire.Hello("actor", "a", "", "s", 0, 1, 0, 8, "host", 1),
        wire.Heartbeat(3, {"seconds_decode": 1.5}),
        wire.Bye("done"),
        group("run", 0),
        dataclasses.replace(
            group("run", 0), blocks=np.array([[0, 0, 0, 2, 4]], np.int32), block_rewards=np.ones(1, np.float32)
        ),
        wire.GroupFailed(3, "ran out", 1),
        wire.EvaluationResult(1, 0, 0, floats, np.full(4, 7, np.int32)),
        wire.ScoreResult(1, 0, 0.5, floats, np.zeros((4, 2), np.float32)),
        wire.ScoreFailed(1, "why"),
        wire.Fetch(0, 0, 1),
        wire.Commit(0, 1, {"loss": 1.0}),
        wire.Checkpointed(0),
        wire.Publish(1, "127.0.0.1", 1, "gloo", 1 << 20, metas),
        wire.Published(1, 1, "d", 0.1),
        wire.PublishFailed(1, 1, "why"),
        wire.Ready(1, 1),
        wire.Applied(1, 1, "d"),
        wire.ReceiveFailed(1, 1, "why"),
    ]
    assert {m.TAG for m in messages} == set(wire.TO_BROKER), set(wire.TO_BROKER) ^ {m.TAG for m in messages}
    return [[bytes(f) for f in encode(m)] for m in messages]


HOSTILE = (
    None, True, -1, 0, 1, 3, 4, 5, 16, 2**31, 2**63 - 1, -(2**63), 2**64 - 1, 0.5, float("nan"), float("inf"), 1e308,
    "", "a", "x" * 5000, b"", b"\x00" * 9, [], [0], [-1], [2**40, 2**40], [[]], [0] * 300, {}, {"a": 1}, {1: 2}, "<f4",
    "|O", "<i4", "<i8", "|u1", "hello", "trajectories",
)  # fmt: skip


def mutate(rng, frames):
    """Half of the time other values in the header, half of the time other bytes."""
    return mutate_values(rng, frames) if rng.random() < 0.5 else mutate_bytes(rng, frames)


def mutate_values(rng, frames):
    """A valid header of invalid content."""
    head = msgpack.unpackb(frames[0])
    for _ in range(rng.randint(1, 2)):
        inner = head.get(rng.choice(("h", "h", "a", ""))) if isinstance(head, dict) else None
        place = inner if isinstance(inner, dict | list) else head
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.85:
                place = place[key]
                continue
            if rng.random() < 0.1:
                del place[key]
            elif rng.random() < 0.1 and isinstance(place, dict):
                place[rng.choice("abcwth")] = place.pop(key)
            else:
                place[key] = copy.deepcopy(rng.choice(HOSTILE))
            break
        if not isinstance(head, dict) or not head:
            break
    rest = [rng.randbytes(len(f)) if rng.random() < 0.2 else f for f in frames[1:]]
    return [msgpack.packb(head), *rest]


def mutate_bytes(rng, frames):
    """One to four changes: bits, bytes, lengths, frames; what msgpack gives meaning to more often than others."""
    frames = [bytearray(f) for f in frames]
    for _ in range(rng.randint(1, 4)):
        if not frames:
            frames = [bytearray(rng.randbytes(rng.randint(0, 40)))]
        which = rng.randrange(len(frames)) if rng.random() < 0.3 else 0
        frame = frames[which]
        at = rng.randrange(len(frame)) if frame else 0
        kind = rng.randrange(10)
        if kind == 0 and frame:
            frame[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and frame:
            frame[at] = rng.choice((0xC0, 0xC1, 0xC6, 0xC9, 0xDB, 0xDD, 0xDF, 0xFF, 0x90, 0x80, 0xCB))
        elif kind == 2:
            frame[at : at + rng.randint(1, 9)] = b""
        elif kind == 3:
            frame[at:at] = rng.randbytes(rng.randint(1, 9))
        elif kind == 4:
            frames[which] = frame[:at]
        elif kind == 5:
            frame[at:at] = rng.choice((b"\xdd\xff\xff\xff\xff", b"\xdf\x7f\xff\xff\xff", b"\xc6\xff\xff\xff\xff"))
        elif kind == 6:
            frames.append(bytearray(rng.randbytes(rng.randint(0, 64))))
        elif kind == 7:
            del frames[which]
        elif kind == 8:
            frame[at:at] = b"\x91" * rng.randint(1, 3000)  # depth
        elif frame:
            frame += frame * rng.randint(1, 3)
    return [bytes(f) for f in frames]


def is_hello(frames):
    try:
        return isinstance(decode(frames, wire.TO_BROKER), wire.Hello)
    except (WireError, DataError):
        return False


def held_mb():
    """Memory of this process at present; its peak is that of whatever test came before."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


@pytest.mark.slow  # with all of CI; a live broker is fuzzed by default
def test_the_decoder_refuses_by_name_and_nothing_grows():
    rng, whole = random.Random(0), specimens()
    refused, taken = 0, 0
    for n in range(DECODED):
        if n == DECODED // 10:
            before = held_mb()
        try:
            decode(mutate(rng, whole[n % len(whole)]), wire.TO_BROKER)
            taken += 1
        except (WireError, DataError) as error:
            refused += 1
            assert 0 < len(str(error)) < 1000
    assert refused > DECODED // 2 and taken > 100  # some changes leave a valid message
    assert held_mb() - before < 32


def test_a_live_broker_shrugs_and_honest_actors_are_served(tmp_path):
    broker = make_broker(tmp_path, broker={"quarantine_after": 1_000_000})
    learner, actor = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
    rng, whole = random.Random(1), specimens()
    before, done = held_mb(), threading.Event()

    def flood():
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.IDENTITY, b"flood/s/0")
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(broker.config.broker.address)
            for n in range(SENT):
                frames = mutate(rng, whole[n % len(whole)]) or [b""]
                if not is_hello(frames):  # it would be an actor then, and a slow one
                    socket.send_multipart(frames)
            done.set()

    thread = threading.Thread(target=flood, daemon=True)
    thread.start()
    served = 0
    deadline = time.monotonic() + 60
    for step in range(broker.config.run.steps):
        groups = []
        while len(groups) < 2:
            groups += actor.expect(wire.Grant, 20).groups.tolist()
        for number in groups:
            actor.link.send(group(actor.link.run_id, number, version=step))
        learner.link.send(wire.Fetch(step, 0, 1))
        assert len(learner.expect(wire.Shard, 20).token_ids) == 2 * G * 4
        served += 1
        learner.link.send(wire.Commit(step, step + 1, {}))
        learner.publish(step + 1, [actor])
    assert served == broker.config.run.steps and time.monotonic() < deadline
    assert done.wait(30)
    thread.join(5)
    assert held_mb() - before < 64
    for peer in (learner, actor):
        peer.link.close()
    broker.end()
    assert broker.status()["bad_messages"]["WireError"] > 0


def test_a_repeat_offender_is_quarantined_and_the_others_are_not(tmp_path):
    broker = make_broker(tmp_path, broker={"quarantine_after": 5, "quarantine_s": 1.0})
    learner = Peer(broker, "learner", "learner")
    bad, good = (Peer(broker, "actor", name, capacity=1) for name in ("bad", "good"))
    try:
        first = good.expect(wire.Grant).groups[0]
        for n in range(8):
            bad.link.send(group("another run", n))
        deadline = time.monotonic() + 5
        while [p.name for p in broker.service.door.roster.role("actor")] != ["good"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert broker.service.status()["offences"]["bad/s/0"]["ProtocolError"] >= 6
        good.link.send(group(good.link.run_id, int(first)))
        assert set(good.expect(wire.Ack).reasons) == {""}
        good.expect(wire.Grant)  # what the other owed
        bad.expect(wire.Welcome, 8)  # its time is over: it says Hello again, and is let in
    finally:
        for peer in (learner, bad, good):
            peer.link.close()
        broker.end()
