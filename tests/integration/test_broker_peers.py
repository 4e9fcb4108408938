"""What peers may claim, lose and repeat: a real broker over real sockets, driven by hand-written peers."""

import dataclasses
import os
import select
import socket
import struct
import threading

import numpy as np
import pytest

from broker.runfiles import RunFiles
from broker.service import BrokerService
from common import wire
from common.config import EvaluationSection, StalenessSection
from common.errors import JournalError, ProtocolError
from common.process import StopFlag
from tests.integration.fleet import lines_of
from tests.integration.harness import B, Broker, Peer, group, until


def served(broker):
    """Learner and actor; the learner has the first step's shard."""
    learner, actor, granted = staffed(broker)
    for number in granted:
        actor.link.send(group(actor.link.run_id, number))
    learner.link.send(wire.Fetch(0, 0, 1))
    learner.expect(wire.Shard)
    return learner, actor


def staffed(broker):
    """A learner, an actor and the groups that a budget of 2 grants it."""
    learner, actor, granted = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0"), []
    while len(granted) < 3 * B:
        granted += actor.expect(wire.Grant).groups.tolist()
    return learner, actor, granted


def killed(broker):
    """End ``broker`` without a farewell."""
    broker.service._farewell = lambda: None
    broker.end()


def refused(broker, peer, message, words):
    """``message`` is counted as the offence that it is, and changes nothing of the pipeline."""
    before, errors = broker.service.pipeline.state(), broker.service.figures.errors["ProtocolError"]
    peer.link.send(message)
    until(lambda: broker.service.figures.errors["ProtocolError"] > errors)
    assert broker.service.pipeline.state() == before, words


def test_a_learner_may_not_be_ahead_of_the_run(make):
    broker = make(broker={"heartbeat_s": 0.1, "peer_timeout_s": 2.0})
    for version, words in (
        (10**12, r"holds version 1000000000000, this run ends with 4 \(run\.steps\)"),
        (-1, "version -1"),
    ):
        with pytest.raises(ProtocolError, match=words):
            Peer(broker, "learner", "learner", version=version)
    first = Peer(broker, "learner", "learner")
    first.link.close()
    until(lambda: not broker.service.door.roster.all())
    with pytest.raises(ProtocolError, match="holds version 3, and no step after -1 was made here"):
        Peer(broker, "learner", "learner", version=3)


def test_commits_and_checkpoints_of_what_was_not_trained_are_refused(make):
    broker = make(staleness=StalenessSection(2))
    learner, actor, granted = staffed(broker)
    for number in granted:
        actor.link.send(group(actor.link.run_id, number))
        actor.expect(wire.Ack)
    learner.link.send(wire.Fetch(0, 0, 1))
    learner.expect(wire.Shard)
    refused(broker, learner, wire.Commit(1, 2, {}), "never served")
    refused(broker, learner, wire.Commit(0, 7, {}), "another version")
    refused(broker, learner, wire.Checkpointed(0), "not trained")
    learner.link.send(wire.Commit(0, 1, {"step": float("nan"), "acceptance": 7.0, "loss": 1.5}))
    until(lambda: broker.service.pipeline.committed_step == 0)
    refused(broker, learner, wire.Checkpointed(1), "not trained")
    pipeline = broker.service.pipeline  # its thread may be in the middle of an assembly
    until(lambda: pipeline.held() == pipeline.queued == 2 * 4)
    until(lambda: lines_of(broker.config.run.path))  # a little after the step is committed
    for peer in (actor, learner):
        peer.link.close()
    killed(broker)
    (line,) = lines_of(broker.config.run.path)
    assert (line["step"], line["loss"]) == (0, 1.5) and line["acceptance"] != 7.0, "figures of the broker are its own"
    Broker(broker.config).end()


def test_a_commit_that_was_lost_is_inferred_from_the_next(make):
    broker = make(staleness=StalenessSection(2))
    learner, actor, granted = staffed(broker)
    for number in granted:
        actor.link.send(group(actor.link.run_id, number))
    for step in (0, 1):
        learner.link.send(wire.Fetch(step, 0, 1))
        learner.expect(wire.Shard)
    learner.link.send(wire.Commit(1, 2, {"loss": 2.0}))
    until(lambda: broker.service.pipeline.committed_step == 1)
    assert broker.service.pipeline.counts["trajectories_trained"] == 8
    for peer in (actor, learner):
        peer.link.close()


class Proxy:
    """A connection that is reset, and with it what was on it."""

    def __init__(self, address):
        self.to = ("127.0.0.1", int(address.rpartition(":")[2]))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self.listener.getsockname()[1]}"
        self.swallow = b""  # the first bytes that hold this are lost, and the connection with them
        self.resets = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self.listener.accept()
                far = socket.create_connection(self.to)
            except OSError:  # the end of the test
                return
            threading.Thread(target=self._carry, args=(near, far), daemon=True).start()

    def _carry(self, near, far):
        while True:
            for side in select.select([near, far], [], [], 0.05)[0]:
                data = side.recv(1 << 16)
                if not data:
                    near.close()
                    far.close()
                    return
                if side is near and self.swallow and self.swallow in data:
                    self.swallow, self.resets = b"", self.resets + 1
                    for end in (near, far):
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        end.close()
                    return
                (far if side is near else near).sendall(data)


def test_what_a_reset_connection_lost_is_asked_for_again_at_once(make):
    broker = make(
        broker={"heartbeat_s": 2.0, "peer_timeout_s": 6.0}
    )  # nothing is sent to it while it is away: then it would be given up
    proxy = Proxy(broker.config.broker.address)
    learner = Peer(broker, "learner", "learner")
    actor = Peer(broker, "actor", "a0", section=dataclasses.replace(broker.config.broker, address=proxy.address))
    granted = actor.expect(wire.Grant).groups.tolist()
    proxy.swallow = b"trajectories"
    lost = group(actor.link.run_id, granted[0])
    actor.link.send(lost)
    actor.expect(wire.Welcome)  # whereupon an actor sends again what was not acknowledged
    assert proxy.resets == 1 and broker.service.pipeline.counts["trajectories_acked"] == 0
    assert "(a0 2)" in broker.service.waiting_for()
    assert actor.expect(wire.Grant).groups.tolist() == granted, "it may not have heard of them"
    actor.link.send(lost)
    assert actor.expect(wire.Ack).reasons == ["", ""]
    for peer in (learner, actor):
        peer.link.close()
    proxy.listener.close()


def test_a_version_whose_end_a_reset_connection_lost_keeps_no_later_one_back(make):
    broker = make(broker={"heartbeat_s": 2.0, "peer_timeout_s": 6.0}, staleness=StalenessSection(2))
    proxy = Proxy(broker.config.broker.address)
    learner = Peer(
        broker, "learner", "learner", section=dataclasses.replace(broker.config.broker, address=proxy.address)
    )
    actor = Peer(broker, "actor", "a0")
    learner.link.set_version(1)  # as a learner does when it begins to offer it
    learner.link.send(wire.Publish(1, "127.0.0.1", 1, "gloo", 1 << 20, [["w", "float32", [1]]]))
    prepare = actor.expect(wire.Prepare)
    actor.link.send(wire.Ready(prepare.epoch, 1))
    go = learner.expect(wire.Go)
    actor.expect(wire.Go)
    proxy.swallow = b"published"
    learner.link.send(wire.Published(go.epoch, 1, "d", 0.01))
    actor.link.set_version(1)
    actor.link.send(wire.Applied(go.epoch, 1, "d"))
    learner.expect(wire.Welcome)
    assert proxy.resets == 1
    learner.link.set_version(2)
    learner.publish(2, [actor])
    assert broker.service.distribution.streams.published == 2
    for peer in (learner, actor):
        peer.link.close()
    proxy.listener.close()


def test_an_actor_whose_servers_lost_their_weights_is_sent_them_again(make):
    broker = make(staleness=StalenessSection(2))
    learner, actor = served(broker)
    learner.link.send(wire.Commit(0, 1, {}))
    learner.publish(1, [actor])
    later = actor.expect(wire.Grant).groups.tolist()
    learner.nothing(wire.Resync, 0.3)
    actor.link.set_version(0)  # one came back with the starting model
    assert learner.expect(wire.Resync).reason == "a0 lack version 1"
    actor.link.send(wire.GroupFailed(later[0], "gone"))
    assert actor.expect(wire.Grant).min_version == 1  # the others serve on
    learner.publish(1, [actor])
    learner.nothing(wire.Resync, 0.3)
    for peer in (learner, actor):
        peer.link.close()


@pytest.mark.parametrize("sends", ["commit", "fetch", "checkpointed", "nothing"])
def test_a_step_that_a_learner_came_back_with_is_committed_with_its_metrics_or_without(make, sends):
    broker = make(staleness=StalenessSection(2))
    learner, actor = served(broker)
    learner.link.close(None)
    again = Peer(broker, "learner", "learner", version=1)  # the same one: word of its commit is on its way, or lost
    assert broker.service.pipeline.committed_step == -1
    if sends == "commit":
        again.link.send(wire.Commit(0, 1, {"loss": 2.5}))
    elif sends == "fetch":
        again.link.send(wire.Fetch(1, 0, 1))
    elif sends == "checkpointed":
        again.link.send(wire.Checkpointed(0))
    else:
        again.link.close()
    until(lambda: broker.service.pipeline.committed_step == 0)
    until(lambda: lines_of(broker.config.run.path))
    (line,) = lines_of(broker.config.run.path)
    assert line.get("loss") == (2.5 if sends == "commit" else None)
    for peer in (actor, again):
        peer.link.close()


def test_groups_that_nobody_granted_fill_no_journal(make, caplog):
    broker = make(broker={"journal_mb": 1.0})
    learner, actor = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
    granted = actor.expect(wire.Grant).groups.tolist()
    before = broker.service.recorder.journal.last
    for number in range(300):
        actor.link.send(wire.GroupFailed(10**6 + number, "x" * 20_000))
        actor.link.send(group(actor.link.run_id, 10**6 + number))
    until(lambda: broker.service.pipeline.turned_away["unknown_group"] == 600)
    assert broker.service.recorder.journal.last == before
    failures = [record.message for record in caplog.records if "failed at" in record.message]
    assert len(failures) == 1 and len(failures[0]) < 1000
    actor.link.send(group(actor.link.run_id, granted[0]))
    actor.expect(wire.Ack)
    until(lambda: broker.service.recorder.journal.last == before + 1)
    for peer in (learner, actor):
        peer.link.close()


@pytest.mark.parametrize("at", ["eval", "step"])
def test_a_kill_before_a_line_of_the_metrics_is_written_loses_no_line(make, monkeypatch, at):
    monkeypatch.setattr("broker.recorder.SNAPSHOT_STEPS", 1)
    broker = make(evaluation=EvaluationSection(prompts=2, every=1))
    learner, actor = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
    write = RunFiles.metric

    def dies(self, kind, *more):
        if kind == at:
            raise SystemExit
        write(self, kind, *more)

    monkeypatch.setattr(RunFiles, "metric", dies)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    granted = []
    while len(granted) < 2 and broker.thread.is_alive():
        grant = actor.expect(wire.Grant)
        granted += grant.groups.tolist()
        if grant.evaluation >= 0:
            ones = np.ones(2, np.float32)
            actor.link.send(wire.EvaluationResult(grant.evaluation, 0, 0, ones, ones.astype(np.int32)))
            broker.thread.join(1)
    if at == "step":
        for number in granted:
            actor.link.send(group(actor.link.run_id, number))
        learner.link.send(wire.Fetch(0, 0, 1))
        learner.expect(wire.Shard)
        learner.link.send(wire.Commit(0, 1, {"loss": 1.0}))
    broker.thread.join(10)
    assert not broker.thread.is_alive()
    for peer in (learner, actor):
        peer.link.close(None)
    monkeypatch.undo()
    for _ in range(2):
        Broker(broker.config).end()
    lines = lines_of(broker.config.run.path)
    assert sorted(line["kind"] for line in lines) == (["eval"] if at == "eval" else ["eval", "step"])


def test_a_full_disk_ends_the_broker_with_the_remedy_and_nothing_left_open(make, monkeypatch):
    broker = make()
    broker.may_fail = True
    learner = Peer(broker, "learner", "learner")

    def full(*arguments):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("broker.runfiles.os.replace", full)
    broker.thread.join(10)
    assert not broker.thread.is_alive()
    assert isinstance(broker.failure, JournalError)
    words = "status.json: cannot be written ([Errno 28] No space left on device); make room on the disk"
    assert words in str(broker.failure)
    assert broker.service.router._context.closed and not broker.service.recorder.journal._thread.is_alive()
    learner.link.close()


def test_a_changed_budget_is_in_force_after_a_restart_and_written_down(make):
    broker = make(staleness=StalenessSection(2))
    learner, actor, _ = staffed(broker)
    killed(broker)  # before they are gone: it would give up what they owe
    for peer in (learner, actor):
        peer.link.close(None)
    changed = dataclasses.replace(broker.config, staleness=StalenessSection(0))
    service = BrokerService(changed, StopFlag())
    assert service.pipeline.ledger.budget == 0 and service.pipeline.ledger.promised == 6
    assert service.recorder.journal.latest("budget") is None  # on its way
    service.stop.set("test")
    service.run()
    again = BrokerService(changed, StopFlag())
    assert again.pipeline.ledger.budget == 0 and again.figures.budget_move["reason"] == "the configuration was changed"
    again.stop.set("test")
    again.run()
    lines = lines_of(broker.config.run.path)
    assert [(line["old"], line["value"]) for line in lines if line["kind"] == "budget"] == [(2, 0)]
