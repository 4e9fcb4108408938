"""What an actor keeps until the broker has it."""

import itertools

import numpy as np
import pytest

from actor.engine.base import Completion
from actor.outbox import FAILURES_KEPT, Finished, Outbox, in_messages, pack
from actor.rollout import Turn
from common import wire
from common.codec import encode
from common.frames import count_bytes


def finished(group: int, sibling: int, prompt: int = 3, tokens: int = 4, reason: str = "stop") -> Finished:
    base = 100 * group + 10 * sibling
    completion = Completion(
        request_id=0,
        sibling=sibling,
        token_ids=np.arange(base, base + tokens, dtype=np.int32),
        logprobs=-np.arange(tokens, dtype=np.float32) / 8,
        versions=np.full(tokens, group, np.int32),
        topk_ids=np.full((tokens, 2), base, np.int32),
        topk_logprobs=np.full((tokens, 2), -0.5, np.float32),
        experts=np.arange(base, base + 2 * (prompt + tokens), dtype=np.uint16).reshape(-1, 2),
        finish_reason=reason,
    )
    prompt_ids = np.arange(prompt, dtype=np.int32)
    channels = {"right": 1.0, "short": float(sibling)}
    return Finished(group, sibling, [Turn(prompt_ids, completion)], channels, float(sibling) / 2)


def ack(pairs: list[tuple[int, int]], reasons: list[str] | None = None) -> wire.Ack:
    groups, siblings = np.array(pairs, np.int64).reshape(-1, 2).T
    return wire.Ack(groups=groups, siblings=siblings.astype(np.int32), reasons=reasons or [""] * len(pairs))


def test_many_trajectories_travel_as_one_message() -> None:
    message = pack("r", ("right", "short"), [finished(7, 0), finished(7, 1, prompt=1, tokens=2, reason="length")])
    message.check()
    assert message.cu_seqlens.tolist() == [0, 7, 10]
    assert message.token_ids.tolist() == [0, 1, 2, 700, 701, 702, 703, 0, 710, 711]
    assert message.trainable.tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 1, 1]
    assert message.versions.tolist() == [-1, -1, -1, 7, 7, 7, 7, -1, 7, 7]
    assert message.log_q.tolist() == pytest.approx([0, 0, 0, 0, -1 / 8, -2 / 8, -3 / 8, 0, 0, -1 / 8])
    assert message.topk_ids[:, 0].tolist() == [0, 0, 0, 700, 700, 700, 700, 0, 710, 710]
    assert message.experts[:, 1].tolist() == [701, 703, 705, 707, 709, 711, 713, 711, 713, 715]
    assert message.channels.tolist() == [[1.0, 0.0], [1.0, 1.0]]
    assert message.rewards.tolist() == [0.0, 0.5]
    assert [wire.FINISH_REASONS[i] for i in message.finish] == ["stop", "length"]
    assert message.faults(1000, 7) == {}


@pytest.mark.parametrize("most_bytes", [1, 500, 2000, 1 << 20])
def test_messages_are_bounded_in_bytes(most_bytes: int) -> None:
    given = [finished(1, sibling, tokens=20 + sibling) for sibling in range(20)]
    parts = list(in_messages(given, most_bytes))
    assert [one for part in parts for one in part] == given
    for part in parts:
        _, *payload = encode(pack("r", ("right", "short"), part))
        assert len(part) == 1 or count_bytes(payload) <= most_bytes
    for one, following in itertools.pairwise(parts):
        together = pack("r", ("right", "short"), [*one, following[0]])
        assert count_bytes(encode(together)[1:]) > 0.9 * most_bytes, "no message is needed that has room elsewhere"


def test_messages_are_bounded_in_members() -> None:
    one = finished(1, 0)
    assert [len(part) for part in in_messages([one] * (wire.MAX_MEMBERS + 1), 1 << 30)] == [wire.MAX_MEMBERS, 1]


def test_a_message_stays_until_each_of_its_trajectories_is_acknowledged() -> None:
    outbox = Outbox()
    first = pack("r", ("right", "short"), [finished(1, 0), finished(1, 1)])
    second = pack("r", ("right", "short"), [finished(2, 0)])
    outbox.add(first)
    outbox.add(second)
    assert len(outbox) == 3
    assert outbox.nbytes > 0
    assert outbox.acknowledge(ack([(1, 1)])) == []
    assert outbox.unacknowledged() == [first, second]
    assert outbox.acknowledge(ack([(1, 0), (1, 0), (9, 9)])) == []  # repeated and unknown acks are harmless
    assert outbox.unacknowledged() == [second]
    assert outbox.acknowledge(ack([(2, 0)], ["log_q is NaN or infinite"])) == [(2, 0, "log_q is NaN or infinite")]
    assert outbox.unacknowledged() == []
    assert len(outbox) == outbox.nbytes == 0


def test_failures_are_sent_again_too_and_only_so_many_are_kept():
    outbox = Outbox()
    for number in range(FAILURES_KEPT + 5):
        outbox.failed(wire.GroupFailed(number, "x", 1))
    again = outbox.unacknowledged()
    assert [message.group for message in again] == list(range(5, FAILURES_KEPT + 5))
    assert len(outbox) == 0 and outbox.groups() == set()
