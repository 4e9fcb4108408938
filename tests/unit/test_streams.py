"""Two streams of versions: who receives which, when a version counts as published, who is served again."""

import pytest

from broker.publishing import EPOCHS_A_GENERATION, LEARNER
from broker.streams import Streams
from common.errors import ProtocolError
from common.joint import POLICY_STREAM, ROLLOUT_STREAM, JointSection
from common.wire import Applied, Go, Prepare, Publish, PublishDone, Published, PublishFailed, Ready

TWO = JointSection(path="small")
ACTORS, REPLICAS = ["actor-0", "actor-1"], ["replica-0"]


def offer(version, stream):
    return Publish(version, "127.0.0.1", 1234, "gloo", 1 << 20, [["w", "float32", [2]]], stream=stream)


def sent(outgoing, kind):
    return {name: m for name, m in outgoing if isinstance(m, kind)}


def go(streams, stream, version, names, now=0.0):
    """Offer ``version`` and have everyone ready; the coordinator, and what the last Ready brought."""
    c = streams.named(stream)
    out = c.on_publish(offer(version, stream), names, now)
    for name, prepare in sent(out, Prepare).items():
        out = c.on_ready(Ready(prepare.epoch, version), name, names, now)
    return c, out


def settle(streams, stream, version, names):
    c, out = go(streams, stream, version, names)
    assert streams.of_epoch(c.epoch) is c
    c.on_published(Published(c.epoch, version, "d", 0.1))
    for name in names:
        out = c.on_applied(Applied(c.epoch, version, "d"), name)
    return out


def test_one_stream_without_a_rollout_model():
    streams = Streams(10, 0, JointSection())
    assert streams.policy is streams.rollout and len(streams.all) == 1
    assert streams.of_role("actor") is streams.of_role("replica") is streams.policy
    settle(streams, POLICY_STREAM, 1, ACTORS + REPLICAS)
    assert (streams.published, streams.history, streams.policy.epoch) == (1, [1], 1)
    with pytest.raises(ProtocolError, match="no stream of weights 'rollout', only policy"):
        streams.named(ROLLOUT_STREAM)


def test_a_version_is_published_once_both_streams_have_settled():
    streams = Streams(10, 0, TWO)
    assert (streams.of_role("actor"), streams.of_role("replica")) == (streams.rollout, streams.policy)
    assert streams.of_role("learner") is None
    settle(streams, ROLLOUT_STREAM, 1, ACTORS)
    assert (streams.rollout.published, streams.policy.published, streams.published) == (1, 0, 0)
    assert streams.history == [] and not streams.busy
    c, _ = go(streams, POLICY_STREAM, 1, REPLICAS)
    assert streams.busy and streams.waiting_for() == "replica-0 to apply version 1"
    c.on_published(Published(c.epoch, 1, "d", 0.1))
    done = sent(c.on_applied(Applied(c.epoch, 1, "d"), "replica-0"), PublishDone)[LEARNER]
    assert (done.stream, done.version) == (POLICY_STREAM, 1)
    assert (streams.published, streams.history) == (1, [1])


def test_both_are_under_way_at_once_and_messages_know_their_own():
    streams = Streams(10, 3, TWO)
    a, out = go(streams, ROLLOUT_STREAM, 1, ACTORS)
    assert sent(out, Go)[LEARNER].stream == ROLLOUT_STREAM
    b, out = go(streams, POLICY_STREAM, 1, REPLICAS)
    assert sent(out, Go)[LEARNER].stream == POLICY_STREAM
    assert a.epoch != b.epoch and min(a.epoch, b.epoch) > 3 * EPOCHS_A_GENERATION
    assert streams.of_epoch(a.epoch) is a and streams.of_epoch(b.epoch) is b and streams.of_epoch(999) is None
    assert a.on_published(Published(b.epoch, 1, "d", 0.1)) == []  # the other's is nothing to it
    b.on_applied(Applied(b.epoch, 1, "d"), "replica-0")
    assert sent(b.on_published(Published(b.epoch, 1, "d", 0.1)), PublishDone)
    assert a.busy and not b.busy and streams.published == 0
    again = a.on_publish_failed(PublishFailed(a.epoch, 1, "reset"), ACTORS, 0.0)
    assert set(sent(again, Prepare)) == set(ACTORS) and a.epoch not in (b.epoch, b.epoch - 1)


def test_a_receiver_that_is_lost_or_late_holds_up_its_own_stream_alone():
    streams = Streams(10, 0, TWO)
    a = streams.rollout
    prepares = sent(a.on_publish(offer(1, ROLLOUT_STREAM), ACTORS, 0.0), Prepare)
    settle(streams, POLICY_STREAM, 1, REPLICAS)
    again = sent(a.on_lost("actor-1", ACTORS[:1], 1.0), Prepare)
    assert set(again) == {"actor-0"} and again["actor-0"].epoch > prepares["actor-0"].epoch
    assert streams.policy.published == 1 and streams.published == 0
    assert sent(a.on_tick(ACTORS[:1], 20.0), PublishDone)[LEARNER].dropped == ["actor-1", "actor-0"]
    assert streams.late == {"actor-0": 1} and streams.published == 1  # settled without anybody
    assert a.is_suspended("actor-0") and not streams.policy.is_suspended("actor-0")


def test_what_a_restarted_broker_knows_and_what_the_learner_tells_it():
    streams = Streams(10, 1, TWO)
    streams.rollout.restore([1, 2, 3])
    streams.policy.restore([1, 2])
    assert (streams.published, streams.history) == (2, [1, 2])
    for one in streams.all:
        one.known(3)
    assert (streams.published, streams.policy.history) == (3, [1, 2, 3])
    c, _ = go(streams, POLICY_STREAM, 3, REPLICAS)  # the learner, whose offer nobody remembers, makes it again
    assert c.under_way == 3 and streams.busy


def test_a_rollout_model_that_stays_as_it_is_receives_nothing_and_has_every_version():
    streams = Streams(10, 0, JointSection(path="small", train=False))
    assert streams.all == [streams.policy] and streams.rollout is streams.policy
    assert streams.of_role("actor") is None and streams.roles(streams.policy) == ("replica",)
    settle(streams, POLICY_STREAM, 1, REPLICAS)
    assert streams.published == streams.rollout.published == 1
