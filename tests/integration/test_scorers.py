"""Frozen models beside the policy replica: over real sockets with hand-written peers, and as real processes."""

import dataclasses
import shutil
import threading
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from broker.training import REFUSALS
from common import wire
from common.config import ObrsSection
from common.errors import ProtocolError
from common.frozen import POLICY, TeacherEntry
from common.objective import LossSection
from common.process import StopFlag
from common.trace import silent
from learner.model.decoder import Decoder
from learner.score import PolicyScorer, ReplicaService
from tests.integration.fleet import Fleet
from tests.integration.harness import B, G, Peer, group, until
from tests.unit.test_step import CONFIG
from tools import replay

STEPS = 16
MIXED = """
run: {{name: mixed, steps: {steps}}}
task:
  mix:
    one: {{name: sort6}}
    two: {{name: sort6, reward_weights: {{prefix: 1.0}}}}
teachers:
  same: {{path: {same}, tasks: [one]}}
  sharp: {{path: {other}, tasks: [two]}}
loss: {{kl: 0.05, distill: 1.0}}
rollout: {{groups_per_step: 8, group_size: 4}}
obrs: {{rethin_below: 1.0}}
evaluation: {{prompts: 0}}
broker: {{heartbeat_s: 0.3, peer_timeout_s: 4}}
weights: {{deadline_s: 4}}
"""  # configs/smoke.yaml names one task, and a mixture has its own


def reply(peer, request, value):
    log_p = np.where(request.wanted, np.float32(value), np.float32(0))
    peer.link.send(wire.ScoreResult(request.request, 0, 0.1, log_p, np.zeros((len(log_p), 0), np.float32)))


def waits_for(learner, words, seconds=5.0):
    """The broker tells a parked learner so, and names nothing beyond it: else a reply is still on its way."""
    learner.link.send(wire.Fetch(0, 0, 1))
    deadline = time.monotonic() + seconds
    while not (told := learner.expect(wire.Waiting).detail).endswith(words):
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
    until(lambda: broker.service.figures.errors)
    reply(quick, asked, -0.25)
    waits_for(learner, "scores of step 0 from a reference model")
    reply(late, asked, -9.0)  # too late
    until(lambda: broker.service.pipeline.counts["late_scores"])
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


def test_a_replica_that_cannot_score_says_why_and_the_next_one_is_asked_at_once(make, caplog):
    broker = make(obrs=ObrsSection(), broker={"score_timeout_s": 60.0})
    learner, actor = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
    small = Decoder(dataclasses.replace(CONFIG, vocab_size=8))
    stop = StopFlag()
    replica = ReplicaService(broker.config, "replica-0", stop, PolicyScorer(small, 8.0), silent("replica-0", "replica"))
    thread = threading.Thread(target=replica.run)
    thread.start()
    until(lambda: broker.service.door.roster.scorers(POLICY))
    able = Peer(broker, "replica", "replica-1")
    for g in actor.expect(wire.Grant).groups.tolist():
        sent = group(actor.link.run_id, g)
        actor.link.send(dataclasses.replace(sent, token_ids=sent.token_ids + np.int32(9)))
    asked = able.expect(wire.ScoreRequest)
    assert f"replica-0 cannot score request {asked.request}: " in caplog.text
    assert "outside the vocabulary of 8" in caplog.text
    assert broker.service.figures.errors == {"score_failed": 1}
    reply(able, asked, -0.5)
    learner.link.send(wire.Fetch(0, 0, 1))
    assert learner.expect(wire.Shard).log_p.min() == pytest.approx(-0.5)
    stop.set("test")
    thread.join(5)
    assert not thread.is_alive()
    for peer in (learner, actor, able):
        peer.link.close()


def test_what_no_replica_can_score_is_asked_again_as_seldom_as_of_one_that_is_late(make):
    broker = make(obrs=ObrsSection(), broker={"score_timeout_s": 1.0})
    learner, actor = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
    replicas = [Peer(broker, "replica", f"replica-{n}") for n in range(2)]
    for g in actor.expect(wire.Grant).groups.tolist():
        actor.link.send(group(actor.link.run_id, g))
    for replica in replicas:
        asked = replica.expect(wire.ScoreRequest)
        replica.link.send(wire.ScoreFailed(asked.request, "odd"))
    for replica in replicas:
        replica.nothing(wire.ScoreRequest, 0.2)
    again = replicas[0].expect(wire.ScoreRequest)
    assert again.request == asked.request
    actor.link.send(wire.ScoreFailed(asked.request, "not an actor's business"))
    until(lambda: broker.service.figures.errors["ProtocolError"] == 1)
    reply(replicas[0], again, -0.5)
    learner.link.send(wire.Fetch(0, 0, 1))
    learner.expect(wire.Shard)
    replicas[1].link.send(wire.ScoreFailed(asked.request, "too late to count"))
    replicas[1].link.close("done")
    until(lambda: len(broker.service.door.roster.scorers(POLICY)) == 1)
    assert broker.service.figures.errors == {"score_failed": 2, "ProtocolError": 1}
    for peer in (learner, actor, replicas[0]):
        peer.link.close()


def test_what_nobody_can_score_ends_the_broker_with_the_reason_and_loses_nothing(make):
    broker = make("r", obrs=ObrsSection(), broker={"score_timeout_s": 0.1})
    broker.may_fail = True
    learner, actor, replica = (Peer(broker, role, role) for role in ("learner", "actor", "replica"))
    for g in actor.expect(wire.Grant).groups.tolist():
        actor.link.send(group(actor.link.run_id, g))
        actor.expect(wire.Ack)
    for _ in range(REFUSALS):
        replica.link.send(wire.ScoreFailed(replica.expect(wire.ScoreRequest).request, "out of memory"))
    broker.thread.join(5)
    told = "step 0 cannot be scored by a policy replica, asked 5 times: out of memory; does it have"
    assert told in str(broker.failure)
    again = make("r", obrs=ObrsSection())
    assert again.service.pipeline.queued == B * G
    for peer in (learner, actor, replica):
        peer.link.close(None)


def test_without_rejection_a_step_waits_for_the_frozen_models_alone(make, tmp_path):
    broker = make(loss=LossSection(kl=0.1))
    learner, actor = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
    for g in actor.expect(wire.Grant).groups.tolist():
        actor.link.send(group(actor.link.run_id, g))
    waits_for(learner, "a reference model (python -m learner.score RUN.yaml --serves reference)")
    first = Peer(broker, "replica", "reference-0", serves="reference")
    first.expect(wire.ScoreRequest)
    first.link.close(None)  # as if killed while it scores
    second = Peer(broker, "replica", "reference-0", session="again", serves="reference")
    asked = second.expect(wire.ScoreRequest)
    second.link.send(dataclasses.replace(second.hello))  # one of several that were said while the broker was away
    again = second.expect(wire.ScoreRequest)
    assert again.request == asked.request
    reply(second, again, -0.5)
    shard = learner.expect(wire.Shard)
    assert (shard.accept == (shard.trainable == 1)).all()
    assert (shard.log_reference[shard.trainable == 1] == -0.5).all()
    assert not len(shard.log_teacher)
    for peer in (learner, actor, second):
        peer.link.close()


def sharper(model, path):
    """A model that is surer of everything than ``model``, copied to ``path``."""
    shutil.copytree(model, path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(1.5)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.slow
def test_a_real_run_is_held_to_its_starting_model_without_any_replica(tmp_path, model):
    parts = ("broker", "learner", "reference-0", "actor-0")
    with Fleet(tmp_path, model, "run.steps=4", "evaluation.prompts=0", "loss.kl=0.1", "obrs.mode=off") as fleet:
        for part in parts:
            fleet.start(part)
        assert [fleet.wait(part) for part in parts] == [0] * len(parts), fleet.words()
        steps = fleet.steps()
        assert [s["step"] for s in steps] == [0, 1, 2, 3]
        assert steps[0]["kl_reference"] == pytest.approx(0, abs=1e-6)  # nothing was learnt yet
        assert steps[0]["kl_to_reference"] == pytest.approx(0, abs=1e-6)
        assert steps[3]["kl_to_reference"] > 1e-5
        assert all(s["reference_unscorable"] == 0 and "teachers" not in s for s in steps)
        assert "reference-0" not in str(fleet.status()["receivers_late"])


@pytest.mark.slow
def test_two_teachers_of_two_tasks_a_broker_and_a_teacher_killed_and_every_decision_again(tmp_path, model):
    other = sharper(model, tmp_path / "other")
    parts = ("broker", "learner", "replica-0", "reference-0", "teacher-same-0", "teacher-sharp-0", "actor-0")
    (tmp_path / "base.yaml").write_text(MIXED.format(steps=STEPS, same=model, other=other))
    with Fleet(tmp_path, model, base=tmp_path / "base.yaml") as fleet:
        for part in parts:
            fleet.start(part)
        fleet.wait_for_step(2)
        for victim in ("broker", "teacher-sharp-0"):
            fleet.kill(victim)
            fleet.start(victim)
        assert [fleet.wait(part) for part in parts] == [0] * len(parts), fleet.words()
        steps = fleet.steps()
        assert [s["step"] for s in steps] == list(range(STEPS))
        said = [(s["step"], name, found) for s in steps for name, found in s["teachers"].items()]
        assert {name for _, name, _ in said} == {"same", "sharp"}
        assert all(found["tokens"] > 0 and found["unscorable"] == 0 for _, _, found in said)
        assert all(abs(found["gap"]) < 1e-5 for step, name, found in said if name == "same" and step == 0)
        assert all(abs(found["gap"]) > 1e-5 for _, name, found in said if name == "sharp")
        told = [s for s in steps if "loss" in s]  # a commit that was on its way to the killed broker has no metrics
        assert len(told) >= STEPS - 2
        assert all(np.isfinite(s["teacher_gap"]) and s["kl_to_reference"] > -1e-6 for s in told)
        assert any("rethinned_by_version" in s for s in steps)
        assert fleet.status()["versions_published"] == list(range(1, STEPS + 1))
        fleet.run.joinpath("config.yaml").write_text(fleet.file.read_text())
        assert replay.main([str(fleet.run)]) == 0
