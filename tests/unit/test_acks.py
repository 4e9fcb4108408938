"""What arrives together is acknowledged together, each trajectory once and in order."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from broker.acks import TOGETHER, Acks
from common.wire import Ack


def ack(first, count):
    numbers = np.arange(first, first + count)
    return Ack([f"r{n}" if n % 3 else "" for n in numbers], numbers, numbers.astype(np.int32) % 7)


@given(st.lists(st.tuples(st.sampled_from([b"a", b"b"]), st.integers(1, 4)), max_size=60), st.integers(1, 20))
def test_every_sender_hears_of_each_of_its_trajectories_once_and_in_order(arrived, look):
    sent, wanted, first = [], {b"a": [], b"b": []}, 0
    acks = Acks(lambda identity, one: sent.append((identity, one)))
    for index, (identity, count) in enumerate(arrived, 1):
        one = ack(first, count)
        first += count
        wanted[identity] += zip(one.groups.tolist(), one.siblings.tolist(), one.reasons, strict=True)
        acks.add(identity, one)
        if index % look == 0:
            acks.flush()
    acks.flush()
    heard = {b"a": [], b"b": []}
    for identity, one in sent:
        one.check()
        heard[identity] += zip(one.groups.tolist(), one.siblings.tolist(), one.reasons, strict=True)
    assert heard == wanted
    acks.flush()
    assert sum(len(of) for of in heard.values()) == first, "a second flush says nothing"


def test_a_burst_is_answered_in_few_messages_and_before_it_is_over():
    sent = []
    acks = Acks(lambda identity, one: sent.append(len(one.reasons)))
    for index in range(2 * TOGETHER + 3):
        acks.add(b"a", ack(index, 1))
    assert sent == [TOGETHER, TOGETHER]
    acks.flush()
    assert sent[-1] == 3
