"""Two models in one run: whose weights go to whom, over real sockets and with real processes that are killed."""

import threading

import numpy as np
import pytest
import torch
from safetensors import safe_open

from actor.weights import GroupCollective, bucket_tensors
from broker.journal import Journal
from broker.service import BrokerService
from common import wire
from common.config import ModelSection, ObrsSection, RunConfig, load
from common.errors import DeadlineError, ModelError
from common.identity import model_identity
from common.joint import JointSection
from common.link import connect
from common.process import StopFlag
from common.weights import WeightReceiver
from tests.integration.fleet import Fleet, lines_of, make_model
from tests.integration.harness import Peer, group, until
from tests.integration.test_chaos import QUICK
from tools.evaluate import held_out, models_of
from tools.export import export
from tools.replay import verify

STEPS = 12
PARTS = ("broker", "learner", "replica-0", "actor-0", "actor-1")
PLAIN = ("obrs.rethin_below=0", "evaluation.prompts=0")
SMALL = ("warmstart.hidden=32", "warmstart.experts=4", "warmstart.expert_width=16", "warmstart.layers=1")


# ---- the broker between hand-written peers ------------------------------------------------------


@pytest.fixture
def make(make, tmp_path):
    """A broker with a joint model."""

    def build(**joint):
        small = tmp_path / "small"
        small.mkdir()
        (small / "config.json").write_text('{"vocab_size": 16, "model_type": "tiny"}')
        return make(joint=JointSection(path=str(small), **joint), obrs=ObrsSection())

    return build


def offer(learner, version, stream):
    learner.link.send(wire.Publish(version, "127.0.0.1", 1, "gloo", 1 << 20, [["w", "float32", [1]]], stream=stream))


def publish(learner, version, stream, receivers):
    """One version of one stream, to those who ought to get it."""
    offer(learner, version, stream)
    for receiver in receivers:
        prepare = receiver.expect(wire.Prepare)
        assert prepare.publish["stream"] == stream
        receiver.link.send(wire.Ready(prepare.epoch, version))
    go = learner.expect(wire.Go)
    assert go.stream == stream and go.members == [receiver.link._hello.name for receiver in receivers]
    learner.link.send(wire.Published(go.epoch, version, "d", 0.01))
    for receiver in receivers:
        receiver.expect(wire.Go)
        receiver.link.set_version(version)
        receiver.link.send(wire.Applied(go.epoch, version, "d"))
    assert learner.expect(wire.PublishDone).stream == stream


def first_step(actor, replica, learner):
    """The rollouts of step 0, their scores, the shard and its commit."""
    for g in actor.expect(wire.Grant).groups:
        actor.link.send(group(actor.link.run_id, int(g)))
        assert actor.expect(wire.Ack).reasons == ["", ""]
    request = replica.expect(wire.ScoreRequest)
    scores = np.full(len(request.token_ids), -0.5, np.float32), np.zeros((len(request.token_ids), 0), np.float32)
    replica.link.send(wire.ScoreResult(request.request, 0, 0.1, *scores))
    learner.link.send(wire.Fetch(0, 0, 1))
    learner.expect(wire.Shard)
    learner.link.send(wire.Commit(0, 1, {}))


def test_each_stream_goes_to_its_own_receivers_and_who_comes_late_is_served_from_it(make):
    broker = make()
    learner, actor, replica = (Peer(broker, role, role) for role in ("learner", "actor", "replica"))
    first_step(actor, replica, learner)
    publish(learner, 1, "rollout", [actor])
    assert actor.expect(wire.Grant).min_version == 1  # grants wait for the actors' weights alone
    replica.nothing(wire.Prepare, 0.1)
    assert broker.service.status()["version"] == 0
    publish(learner, 1, "policy", [replica])
    actor.nothing(wire.Prepare, 0.1)
    assert broker.service.status()["versions_published"] == [1]
    late = Peer(broker, "replica", "replica-1")
    asked = learner.expect(wire.Resync)
    assert (asked.stream, asked.reason) == ("policy", "replica-1 lack version 1")
    publish(learner, 1, "policy", [late])
    other = Peer(broker, "actor", "actor-1")
    assert learner.expect(wire.Resync).stream == "rollout"
    publish(learner, 1, "rollout", [other])
    offer(learner, 2, "critic")
    offer(learner, 3, "rollout")
    until(lambda: broker.service.figures.errors["ProtocolError"] == 2)  # what is not read when it ends is dropped
    for peer in (learner, actor, replica, late, other):
        peer.link.close()
    broker.end()
    assert broker.status()["bad_messages"] == {"ProtocolError": 2}
    published = lines_of(broker.config.run.path, "publish")
    assert [x["stream"] for x in published] == ["rollout", "policy", "policy", "rollout"]


def test_a_rollout_model_that_stays_gets_nothing_and_is_granted_every_version(make):
    broker = make(train=False)
    learner, actor, replica = (Peer(broker, role, role) for role in ("learner", "actor", "replica"))
    first_step(actor, replica, learner)
    publish(learner, 1, "policy", [replica])
    grant = actor.expect(wire.Grant)
    assert grant.min_version == 1
    actor.nothing(wire.Prepare, 0.1)
    actor.link.send(wire.Ready(7, 1))
    actor.link.send(group(actor.link.run_id, int(grant.groups[0]), version=1))  # dated by its grant
    assert actor.expect(wire.Ack).reasons == ["", ""]
    learner.nothing(wire.Resync, 0.2)
    for peer in (learner, actor, replica):
        peer.link.close()
    broker.end()
    assert broker.status()["bad_messages"] == {"ProtocolError": 1}


def test_actors_must_have_the_rollout_model_and_the_others_the_policy(make):
    broker = make()
    ours = model_identity(broker.config.joint.path)
    other = {**ours, "architecture": "huge"}
    objection = broker.service.door.identities.objection

    def hello(role, identity):
        return wire.Hello(role, role, "", "s", 0, 1, 0, 1, "host", 1, identity)

    assert objection(hello("actor", ours)) == ""
    assert "its joint.path holds another model: architecture huge" in objection(hello("actor", other))
    policy = {"architecture": "tiny", "shape": "other"}
    broker.service.door.identities.policy = policy
    assert objection(hello("replica", policy)) == objection(hello("learner", policy)) == ""
    assert "its model.path holds another" in objection(hello("replica", {**policy, "shape": "small"}))


def test_a_rollout_model_with_other_tokens_is_refused_at_the_start(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    (small / "config.json").write_text('{"vocab_size": 24, "model_type": "tiny"}')
    policy = tmp_path / "model"
    policy.mkdir()
    (policy / "config.json").write_text('{"vocab_size": 16, "model_type": "tiny"}')
    config = RunConfig(model=ModelSection(path=str(policy)), joint=JointSection(path=str(small)))
    with pytest.raises(ModelError, match=r"joint\.path=.*vocabulary 24 where this run has 16.*smaller model of the"):
        BrokerService(config, StopFlag())
    (small / "config.json").write_text('{"vocab_size": 16, "model_type": "tiny"}')
    (small / "tokenizer.json").write_text("{}")
    (policy / "tokenizer.json").write_text("{ }")
    with pytest.raises(ModelError, match="tokenizer"):
        BrokerService(config, StopFlag())


# ---- whole runs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("small") / "small", *SMALL)


class Watcher(threading.Thread):
    """A receiver of the actors' stream that samples nothing and keeps the newest version that arrived."""

    def __init__(self, config):
        super().__init__()
        self.config, self.tensors, self.version = config, {}, 0
        self.start()

    def run(self):
        config = self.config
        identity = model_identity(config.rollout_path)
        hello = wire.Hello("actor", "watcher", "", "s", 0, 1, 0, 0, "host", 1, identity)
        link = connect(config.broker, hello)
        deadline, cpu = config.weights.deadline_s, torch.device("cpu")
        receiver = WeightReceiver(link.send, lambda prepare: GroupCollective(prepare, deadline, cpu), deadline)
        try:
            link.wait_welcome(60)
            while not isinstance(message := link.receive(0.05), wire.Stop):
                if isinstance(message, wire.Prepare):
                    receiver.on_prepare(message)
                elif isinstance(message, wire.Go):
                    receiver.on_go(message)
                while (staged := receiver.staged()) is not None:
                    self.version = staged.version
                    self.tensors = {name: tensor.clone() for name, tensor in bucket_tensors(staged.buckets)}
                    link.set_version(staged.version)
                    receiver.applied(staged)
        finally:
            receiver.close()
            link.close("stopped")


def holds(watcher, directory):
    """Whether the newest version that arrived is, tensor by tensor, what lies there."""
    with safe_open(directory / "model.safetensors", "pt") as file:
        expected = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert set(watcher.tensors) == set(expected)
    return all(torch.equal(watcher.tensors[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(180)
@pytest.mark.parametrize("train", [True, False])
def test_a_run_of_two_models_whose_broker_is_killed_ends_with_both_where_they_belong(tmp_path, model, small, train):
    joint = (f"joint.path={small}", f"joint.train={str(train).lower()}", "joint.lr=0.001", "joint.top_k=4")
    with Fleet(tmp_path, model, f"run.steps={STEPS}", *QUICK, *PLAIN, *joint) as fleet:
        for name in PARTS:
            fleet.start(name)
        watcher = Watcher(fleet.config)
        fleet.wait_for_step(4)
        fleet.kill("broker")
        fleet.start("broker")
        assert [fleet.wait(name) for name in PARTS] == [0] * len(PARTS), fleet.words()
        watcher.join(10)
        status, steps, run = fleet.status(), fleet.steps(), fleet.run
        assert [s["step"] for s in steps] == list(range(STEPS)) and status["versions_published"][-1] == STEPS
        assert 0 < max(s["lag_max"] for s in steps) <= fleet.config.staleness.limit
        assert min(s["kl_before"] for s in steps) > 0.01  # they are two models
        last = {x.get("stream"): x["version"] for x in fleet.metrics() if x["kind"] == "publish"}
        assert last == ({"rollout": STEPS, "policy": STEPS} if train else {None: STEPS})
        assert watcher.version == (STEPS if train else 0) and (run / "rollout_model").exists() == train
        words = fleet.words()
        assert "cannot be used" not in words and "did not take" not in words  # names and shapes were each one's own
        if train:
            assert holds(watcher, run / "rollout_model") and sum(s.get("joint_kl", 0) > 0 for s in steps) >= STEPS - 1
            (run / "config.yaml").write_text(fleet.file.read_text())  # as tools.launch does
            exported = export(run, None, tmp_path / "exported", torch.float32, rollout=True)
            assert holds(watcher, exported) and (exported / "tokenizer.json").exists()
            config = load(fleet.file, ["evaluation.prompts=8"])
            found = [held_out(config, path, 60.0) for _, path in models_of(config, run, (), (), tmp_path)]
            assert [f["prompts"] for f in found] == [8] * 4  # each of both at the start and at the end
            with pytest.raises(DeadlineError, match="--limit-s"):
                held_out(config, exported, 0.0)
        journal = Journal(run / "journal", "", 64, read_only=True)
        verdict = verify(load(fleet.file), journal)
        journal.close()
        assert verdict.difference == "" and verdict.decisions >= STEPS


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(180)
def test_a_learner_of_two_models_that_is_killed_goes_on_with_both(tmp_path, model, small):
    with Fleet(tmp_path, model, f"run.steps={STEPS}", *QUICK, *PLAIN, f"joint.path={small}") as fleet:
        for name in PARTS:
            fleet.start(name)
        watcher = Watcher(fleet.config)
        fleet.wait_for_step(5)
        fleet.kill("learner")
        fleet.start("learner", "learner.resume=true")
        assert [fleet.wait(name) for name in PARTS] == [0] * len(PARTS), fleet.words()
        watcher.join(10)
        assert "resumed from" in fleet.log("learner").read_text()
        assert [s["step"] for s in fleet.steps()] == list(range(STEPS))
        assert watcher.version == STEPS and holds(watcher, fleet.run / "rollout_model")
