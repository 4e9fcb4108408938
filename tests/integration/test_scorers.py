"""Frozen models beside the policy replica: over real sockets with hand-written peers, and as real processes."""

import time

import numpy as np
import pytest

from common import wire
from common.config import ObrsSection
from common.errors import ProtocolError
from common.frozen import TeacherEntry
from common.objective import LossSection
from tests.integration.harness import G, Peer, group, make_broker


@pytest.fixture
def make(tmp_path):
    brokers = []

    def build(**sections):
        brokers.append(make_broker(tmp_path, **sections))
        return brokers[-1]

    yield build
    for broker in brokers:
        broker.end()


def reply(peer, request, value):
    log_p = np.where(request.wanted, np.float32(value), np.float32(0))
    peer.link.send(wire.ScoreResult(request.request, 0, 0.1, log_p, np.zeros((len(log_p), 0), np.float32)))


def waits_for(learner, words, seconds=5.0):
    """The broker tells a parked learner so."""
    learner.link.send(wire.Fetch(0, 0, 1))
    deadline = time.monotonic() + seconds
    while words not in (told := learner.expect(wire.Waiting).detail):
        assert time.monotonic() < deadline, told


def test_all_scorers_are_asked_at_once_each_with_a_deadline_of_its_own(make):
    broker = make(
        obrs=ObrsSection(), loss=LossSection(kl=0.1, distill=1.0), teachers={"t": TeacherEntry("nowhere")},
        broker={"score_timeout_s": 0.5},
    )  # fmt: skip
    learner, actor = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
    waits_for(learner, "a policy replica (python -m learner.score RUN.yaml)")
    policy = Peer(broker, "replica", "replica-0")
    waits_for(learner, "a reference model (python -m learner.score RUN.yaml --serves reference)")
    reference = Peer(broker, "replica", "reference-0", serves="reference")
    waits_for(learner, "teacher t (python -m learner.score RUN.yaml --serves t)")
    late, quick = (Peer(broker, "replica", f"teacher-t-{n}", serves="t") for n in range(2))
    for g in actor.expect(wire.Grant).groups.tolist():
        actor.link.send(group(actor.link.run_id, g))
        assert actor.expect(wire.Ack).reasons == [""] * G
    asked = late.expect(wire.ScoreRequest)
    of_reference = reference.expect(wire.ScoreRequest)
    reply(policy, policy.expect(wire.ScoreRequest), -0.5)
    assert quick.expect(wire.ScoreRequest).request == asked.request  # the other process did not answer in time
    reply(policy, asked, -0.1)  # not its business
    soon = time.monotonic() + 5
    while not broker.service.figures.errors:
        assert time.monotonic() < soon
        time.sleep(0.01)
    reply(quick, asked, -0.25)
    waits_for(learner, "scores of step 0 from a reference model")
    reply(late, asked, -9.0)  # too late
    while not broker.service.pipeline.counts["late_scores"]:
        assert time.monotonic() < soon
        time.sleep(0.01)
    reply(reference, of_reference, -0.75)
    shard = learner.expect(wire.Shard)
    on = shard.trainable == 1
    assert (shard.log_reference[on] == -0.75).all() and (shard.log_teacher[on] == -0.25).all()
    assert np.isnan(shard.log_teacher[~on]).all()
    assert shard.log_p[shard.accept == 1] == pytest.approx(-0.5)
    learner.publish(1, [actor, policy])  # frozen models are no receivers
    assert broker.service.figures.errors == {"ProtocolError": 1}
    for frozen in (reference, late, quick):
        frozen.nothing(wire.Prepare, 0.05)
    with pytest.raises(ProtocolError, match="it serves 'u', and this run has reference, t"):
        Peer(broker, "replica", "teacher-u-0", serves="u")
    for peer in (learner, actor, policy, reference, late, quick):
        peer.link.close()


def test_without_rejection_a_step_waits_for_the_frozen_models_alone(make, tmp_path):
    broker = make(loss=LossSection(kl=0.1))
    learner, actor = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
    for g in actor.expect(wire.Grant).groups.tolist():
        actor.link.send(group(actor.link.run_id, g))
    waits_for(learner, "a reference model")
    first = Peer(broker, "replica", "reference-0", serves="reference")
    first.expect(wire.ScoreRequest)
    first.link.close(None)  # as if killed while it scores
    second = Peer(broker, "replica", "reference-0", session="again", serves="reference")
    reply(second, second.expect(wire.ScoreRequest), -0.5)
    shard = learner.expect(wire.Shard)
    assert (shard.accept == (shard.trainable == 1)).all()
    assert (shard.log_reference[shard.trainable == 1] == -0.5).all()
    assert not len(shard.log_teacher)
    for peer in (learner, actor, second):
        peer.link.close()
