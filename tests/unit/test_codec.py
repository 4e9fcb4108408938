"""Round trips, golden bytes and hostile bytes."""

import dataclasses
from pathlib import Path

import msgpack
import numpy as np
import pytest

from common import wire
from common.codec import JOIN_BELOW_BYTES, WIRE_VERSION, decode, encode
from common.errors import DataError, WireError

GOLDEN = Path(__file__).parent.parent / "golden"


def sample_trajectories(tokens=6, siblings=2, k=0, group=7, routed=0):
    n = tokens * siblings
    trainable = np.tile(np.arange(tokens) >= tokens // 2, siblings).astype(np.uint8)
    return wire.Trajectories(
        run_id="run",
        channel_names=["correct"],
        groups=np.full(siblings, group, np.int64),
        siblings=np.arange(siblings, dtype=np.int32),
        rewards=np.linspace(0, 1, siblings).astype(np.float32),
        channels=np.zeros((siblings, 1), np.float32),
        finish=np.zeros(siblings, np.uint8),
        cu_seqlens=np.arange(0, n + 1, tokens, dtype=np.int32),
        token_ids=(np.arange(n) % 10).astype(np.int32),
        trainable=trainable,
        log_q=np.where(trainable, -0.5, 0).astype(np.float32),
        versions=np.where(trainable, 3, -1).astype(np.int32),
        topk_ids=np.zeros((n, k), np.int32),
        topk_log_q=np.full((n, k), -1, np.float32),
        experts=sample_experts(n, routed, last=np.arange(n) % tokens == tokens - 1),
    )


def sample_experts(n, routed, last):
    experts = (np.arange(n * routed) % 8).astype(np.uint16).reshape(n, routed)
    experts[last] = wire.UNROUTED
    return experts


def same(a, b):
    for f in dataclasses.fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if isinstance(x, np.ndarray):
            np.testing.assert_array_equal(x, y)
            assert x.dtype == y.dtype
        else:
            assert x == y


@pytest.mark.parametrize("tokens", [6, JOIN_BELOW_BYTES // 8])
@pytest.mark.parametrize(("k", "routed"), [(0, 0), (3, 0), (3, 4)])
def test_round_trip(tokens, k, routed):
    message = sample_trajectories(tokens=tokens, k=k, routed=routed)
    frames = [bytes(f) for f in encode(message)]
    assert (len(frames) == 2) == (tokens == 6)  # small messages share one payload frame
    same(message, decode(frames, wire.TO_BROKER))


def test_what_utf8_cannot_say_travels_escaped():
    frames = encode(wire.GroupFailed(7, "no tool \ud83d: caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{SNOWMAN}", 1))
    assert decode(frames, wire.TO_BROKER).reason == "no tool \\ud83d: caf\u00e9 \u2603"


def test_an_expert_record_travels_in_requests_and_shards_too():
    sent = sample_trajectories(routed=4)
    request = wire.ScoreRequest(
        1, 0, 1.0, sent.cu_seqlens, sent.token_ids, sent.trainable, np.zeros((12, 0), np.int32), sent.experts
    )
    shard = shard_of(sent.experts[:3])
    for message in (request, shard):
        same(message, decode([bytes(f) for f in encode(message)], wire.FROM_BROKER))
        message.experts = message.experts[1:]
        with pytest.raises(DataError, match=f"experts {len(message.experts)}"):
            message.check()
    sent.experts = sent.experts[1:]
    with pytest.raises(DataError, match="experts 11"):
        sent.check()


def test_messages_made_without_an_expert_record_have_an_empty_one():
    shard = shard_of(None)
    assert shard.experts.shape == (3, 0)
    assert shard.experts.dtype == np.uint16
    same(shard, decode([bytes(f) for f in encode(shard)], wire.FROM_BROKER))


def test_decoding_copies_nothing():
    frames = encode(sample_trajectories(tokens=JOIN_BELOW_BYTES))
    received = [bytearray(bytes(f)) for f in frames]
    message = decode(received, wire.TO_BROKER)
    assert not message.log_q.flags.writeable and not message.log_q.flags.owndata


def test_every_message_kind_has_one_direction_and_its_own_tag():
    assert not set(wire.TO_BROKER) & set(wire.FROM_BROKER)


def shard_of(experts):
    return wire.Shard(
        step=1, rank=0, world=1, tokens_global=3, temperature=1.0,
        groups=np.array([4], np.int64), siblings=np.array([0], np.int32),
        spans=np.array([0, 2, 3], np.int32), advantages=np.array([0.5, -1], np.float32),
        weights=np.array([0.5, 0.25], np.float32),
        cu_seqlens=np.array([0, 3], np.int32), token_ids=np.array([1, 2, 3], np.int32),
        trainable=np.array([0, 1, 1], np.uint8), accept=np.array([0, 1, 0], np.uint8),
        log_q=np.array([0, -1, -2], np.float32), log_m=np.array([0, -1.5, 0], np.float32),
        log_p=np.array([0, -1.5, 0], np.float32), experts=experts,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["trajectories", "grant", "shard"])
def test_golden_bytes(name):
    message = {
        "trajectories": sample_trajectories(k=2, routed=4),
        "grant": wire.Grant(3, -1, 0, np.array([1, 2], np.int64), np.array([5, 6], np.int64)),
        "shard": shard_of(sample_experts(3, 4, last=[False, False, True])),
    }[name]
    frames = [bytes(f) for f in encode(message)]
    golden = GOLDEN / f"wire_v{WIRE_VERSION}_{name}.bin"
    assert golden.exists(), f"{golden} is missing: run `python tests/golden/make.py` after raising WIRE_VERSION"
    assert msgpack.packb(frames) == golden.read_bytes(), "the bytes changed: raise WIRE_VERSION"


def header(**changes):
    base = {"w": WIRE_VERSION, "t": "bye", "h": {"reason": "x"}, "a": []}
    return msgpack.packb({**base, **changes})


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        ([], "empty"),
        ([b"\xc1"], "not msgpack"),
        ([msgpack.packb([1])], "must be a map"),
        ([header(w=99)], "wire version 99"),
        ([header(t="nonsense")], "not expected here"),
        ([header(t="grant")], "not expected here"),
        ([header(h={})], "missing or unknown"),
        ([header(h={"reason": 3})], "is not"),
        ([header(a=[["x", "<f4", [1], 0, 0]])], "exactly none"),
    ],
)
def test_malformed_headers_are_named(frames, says):
    with pytest.raises(WireError, match=says):
        decode(frames, wire.TO_BROKER)


def test_truncated_payload_wrong_dtype_and_negative_shapes_are_named():
    good = [bytes(f) for f in encode(sample_trajectories())]
    with pytest.raises(WireError, match="needs"):
        decode([good[0], good[1][:-8]], wire.TO_BROKER)
    with pytest.raises(WireError, match="not in the message"):
        decode(good[:1], wire.TO_BROKER)
    head = msgpack.unpackb(good[0])
    for entry, says in ((["groups", "<f8", [2], 0, 0], "dtype"), (["groups", "<i8", [-2], 0, 0], "shape")):
        bad = {**head, "a": [entry, *head["a"][1:]]}
        with pytest.raises(WireError, match=says):
            decode([msgpack.packb(bad), good[1]], wire.TO_BROKER)


def test_lengths_that_disagree_are_named():
    message = sample_trajectories()
    message.log_q = message.log_q[:-1]
    with pytest.raises(DataError, match="log_q 11"):
        decode([bytes(f) for f in encode(message)], wire.TO_BROKER)


def test_blocks_without_columns_and_more_trajectories_than_an_ack_can_name_are_refused():
    message = sample_trajectories()
    message.blocks, message.block_rewards = np.zeros((3, 0), np.int32), np.zeros(3, np.float32)
    with pytest.raises(DataError, match=r"blocks \(3, 0\) must have five columns"):
        decode([bytes(f) for f in encode(message)], wire.TO_BROKER)
    many, none = 8193, np.zeros(0, np.int32)
    message = wire.Trajectories(
        "r", [], np.zeros(many, np.int64), np.zeros(many, np.int32), np.zeros(many, np.float32),
        np.zeros((many, 0), np.float32), np.zeros(many, np.uint8), np.zeros(many + 1, np.int32), none,
        none.astype(np.uint8), none.astype(np.float32), none, np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32),
    )  # fmt: skip
    with pytest.raises(DataError, match="8193 in one message, at most 8192"):
        decode([bytes(f) for f in encode(message)], wire.TO_BROKER)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.log_q.__setitem__(4, np.nan), "NaN"),
        (lambda m: m.log_q.__setitem__(4, 0.1), "positive"),
        (lambda m: m.versions.__setitem__(4, 99), "future"),
        (lambda m: m.versions.__setitem__(4, -1), "no version"),
        (lambda m: m.token_ids.__setitem__(4, 10**6), "vocabulary"),
        (lambda m: m.rewards.__setitem__(0, np.inf), "reward"),
        (lambda m: m.trainable.__setitem__(slice(0, 6), 0), "no sampled"),
        (lambda m: m.trainable.__setitem__(slice(0, 6), 1), "first token"),
        (lambda m: m.experts.__setitem__((2, 1), wire.UNROUTED), "torn"),
        (lambda m: m.experts.__setitem__((5, 0), 3), "torn"),
        (lambda m: m.experts.__setitem__((2, 1), 8), "expert outside the 8"),
        (lambda m: m.experts.__setitem__((2, 1), m.experts[2, 0]), "same expert twice"),
        (lambda m: m.block_rewards.__setitem__(0, np.nan), "a block's reward"),
    ],
)
def test_faulty_trajectories_are_found_and_their_siblings_are_not_blamed(change, says):
    message = sample_trajectories(routed=4)
    message.blocks, message.block_rewards = np.array([[0, 0, 0, 3, 5]], np.int32), np.zeros(1, np.float32)
    change(message)
    if says == "first token":
        message.versions[:] = 3
    faults = message.faults(vocab_size=16, newest_version=5, expert_count=8, experts_per_token=2)
    assert list(faults) == [0] and says in faults[0]
    assert sample_trajectories().faults(16, 5) == {}
    assert sample_trajectories(routed=4).faults(16, 5, 8, 2) == {}
