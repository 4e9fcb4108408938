"""A real broker over real sockets, driven by hand-written peers without a model."""

import json
import time

import numpy as np
import pytest

from broker import farewell, setbacks
from broker.service import BrokerService
from broker.setbacks import STEPS_IN_A_ROW
from common import link, wire
from common.codec import encode
from common.config import (
    AdvantageSection,
    EvaluationSection,
    LearnerSection,
    ModelSection,
    ObrsSection,
    RolloutSection,
    RunConfig,
    StalenessSection,
    load,
)
from common.errors import ModelError, ProtocolError
from common.process import StopFlag
from tests.integration.fleet import lines_of
from tests.integration.harness import STEPS, B, Broker, G, Peer, group, until
from tests.routes import routes


def test_a_synchronous_run_from_the_first_grant_to_the_last_stop(make):
    broker = make(evaluation=EvaluationSection(prompts=3, every=2))
    learner, actor = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
    evaluated = []
    for step in range(STEPS + 1):
        grants = []
        while sum(len(g.groups) for g in grants) < (B if step < STEPS else 0) or (
            step in (0, 4) and evaluated[-1:] != [step]
        ):
            grant = actor.expect(wire.Grant)
            grants.append(grant)
            assert grant.min_version == step
            if grant.evaluation >= 0:
                evaluated.append(step)
                rewards = np.full(3, step / 10, np.float32)
                actor.link.send(wire.EvaluationResult(grant.evaluation, step, step, rewards, np.ones(3, np.int32)))
        if step == STEPS:
            break
        learner.link.send(wire.Fetch(step, 0, 1))
        for g in np.concatenate([g.groups for g in grants]):
            actor.link.send(group(actor.link.run_id, int(g), step))
            assert actor.expect(wire.Ack).reasons == ["", ""]
        first = learner.expect(wire.Shard)
        learner.link.send(wire.Fetch(step, 0, 1))
        again = learner.expect(wire.Shard)
        assert [bytes(f) for f in encode(first)] == [bytes(f) for f in encode(again)]
        actor.nothing(wire.Grant, 0.15)  # synchronous: nothing more before the next version
        learner.link.send(wire.Commit(step, step + 1, {"loss": 1.0}))
        learner.publish(step + 1, [actor])
    until(lambda: broker.status()["waiting_for"] == "the learner's last checkpoint")
    learner.link.send(wire.Checkpointed(STEPS - 1))
    actor.expect(wire.Stop)
    learner.expect(wire.Stop)
    for peer in (actor, learner):
        peer.link.close()
    broker.thread.join(10)
    status = broker.status()
    assert status["phase"] == "finished" and status["version"] == STEPS
    assert status["versions_published"] == [1, 2, 3, 4]
    assert status["trajectories_acked"] == status["trajectories_trained"] == STEPS * B * G
    assert status["lag_max"] == 0
    assert evaluated == [0, 2, 4]
    lines = lines_of(broker.config.run.path)
    assert [x["step"] for x in lines if x["kind"] == "step"] == [0, 1, 2, 3]
    assert [x["version"] for x in lines if x["kind"] == "eval"] == [0, 2, 4]


def test_expert_records_go_from_the_actor_to_the_replica_and_the_learner(make, tmp_path):
    model = tmp_path / "moe"
    model.mkdir()
    shape = {"num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 3}
    (model / "config.json").write_text(json.dumps({"vocab_size": 16, "model_type": "qwen3_moe", **shape}))
    rollout = RolloutSection(groups_per_step=B, group_size=G, max_prompt_tokens=2, max_tokens=2, routing_replay=True)
    broker = make(model=ModelSection(path=str(model)), rollout=rollout, obrs=ObrsSection())
    learner, actor = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
    replica = Peer(broker, "replica", "replica-0")
    rng, sent = np.random.default_rng(0), {}
    for g in actor.expect(wire.Grant).groups.tolist():
        message = group(actor.link.run_id, g)
        message.experts = routes(rng, 4 * G, 2, 8, 3)
        message.experts[3::4] = wire.UNROUTED
        sent[g] = message.experts
        actor.link.send(message)
        assert actor.expect(wire.Ack).reasons == [""] * G
    request = replica.expect(wire.ScoreRequest)
    rows = np.concatenate([sent[g] for g in sorted(sent)])
    np.testing.assert_array_equal(request.experts, rows)
    none = np.zeros((len(rows), 0), np.float32)
    replica.link.send(wire.ScoreResult(request.request, 0, 0.1, np.full(len(rows), -0.5, np.float32), none))
    learner.link.send(wire.Fetch(0, 0, 1))
    np.testing.assert_array_equal(learner.expect(wire.Shard).experts, rows)
    for peer in (actor, learner, replica):
        peer.link.close()


def test_a_broker_whose_model_has_no_experts_does_not_start_with_routing_replay(tmp_path):
    rollout = RolloutSection(groups_per_step=B, group_size=G, routing_replay=True)
    (tmp_path / "config.json").write_text('{"vocab_size": 16, "model_type": "llama"}')
    with pytest.raises(ModelError, match=r"has no experts; set rollout\.routing_replay=false"):
        BrokerService(RunConfig(model=ModelSection(path=str(tmp_path)), rollout=rollout), StopFlag())


def test_two_learners_on_one_broker_the_second_is_refused_until_the_first_is_gone(make):
    broker = make()
    first = Peer(broker, "learner", "learner", session="one")
    with pytest.raises(ProtocolError, match="a learner is named 'learner', not 'actor-0'"):  # whatever its key
        Peer(broker, "learner", "actor-0", session="two")
    with pytest.raises(ProtocolError, match="another learner is connected"):
        Peer(broker, "learner", "learner", session="two")
    Peer(broker, "learner", "learner", session="one", rank=1, world=2).link.close()  # another rank of the same
    first.link.close(None)  # as if killed: no Bye
    until(lambda: not broker.service.door.roster.role("learner"))
    Peer(broker, "learner", "learner", session="two").link.close()


def test_a_peer_of_another_run_and_a_second_actor_of_the_same_name_are_refused(make):
    broker = make()
    with pytest.raises(ProtocolError, match="belongs to run feed"):
        Peer(broker, "learner", "learner", run_id="feed")
    actor = Peer(broker, "actor", "a0", session="one")
    with pytest.raises(ProtocolError, match="another actor named 'a0'"):
        Peer(broker, "actor", "a0", session="two")
    with pytest.raises(ProtocolError, match=r"actor 'a0' is connected \(.*--name"):
        Peer(broker, "replica", "a0", session="two")
    actor.link.close()


def test_an_actor_with_other_questions_or_with_no_end_of_them_is_turned_away(make):
    broker = make(advantage=AdvantageSection(skip_passed=0.9))
    for questions in ([], [0]):
        with pytest.raises(ProtocolError, match="sort6 has no end; set it to 0"):
            Peer(broker, "actor", "a0", questions=questions)
    learner, actor = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a1", questions=[40])
    with pytest.raises(ProtocolError, match="task sort6 has 41 training questions, that of this run 40"):
        Peer(broker, "actor", "a2", questions=[41])
    actor.expect(wire.Grant)
    broker.service._farewell = lambda: None  # as if killed
    broker.end()
    second = Broker(broker.config)  # which knows it from the journal
    try:
        with pytest.raises(ProtocolError, match="that of this run 40"):
            Peer(second, "actor", "a3", questions=[41])
        second.service._farewell = lambda: None
    finally:
        for peer in (learner, actor):
            peer.link.close()
        second.end()


def test_bad_trajectories_are_nacked_by_name_and_the_run_goes_on(make):
    broker = make()
    learner, actor = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
    grant = actor.expect(wire.Grant)
    a, b = grant.groups.tolist()
    actor.link.send(group(actor.link.run_id, a, log_q=np.nan))
    assert all("NaN" in r or r == "refused_sibling" for r in actor.expect(wire.Ack).reasons)
    actor.link.send(group("another run", b))  # dropped whole, counted
    actor.link.send(group(actor.link.run_id, b))
    assert actor.expect(wire.Ack).reasons == ["", ""]
    again = actor.expect(wire.Grant)
    assert again.prompts.tolist() == [grant.prompts[0]]
    actor.link.send(group(actor.link.run_id, int(again.groups[0])))
    learner.link.send(wire.Fetch(0, 0, 1))
    assert learner.expect(wire.Shard).weights[0] == np.float32(1 / (2 * B * G))
    until(lambda: broker.status()["bad_messages"])  # it is written twice a second
    status = broker.status()
    assert status["bad_messages"] == {"ProtocolError": 1}
    assert sum(status["trajectories_refused"].values()) == G
    assert status["trajectories_acked"] == status["trajectories_trained"] + status["trajectories_queued"] + sum(
        status["trajectories_dropped"].values()
    )
    for peer in (learner, actor):
        peer.link.close()


def test_an_actor_that_vanishes_gives_its_groups_to_another(make):
    broker = make()
    learner, doomed = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
    granted = doomed.expect(wire.Grant)
    rescuer = Peer(broker, "actor", "a1")
    doomed.link.close(None)
    grants = []
    while sum(len(g.groups) for g in grants) < B:
        grants.append(rescuer.expect(wire.Grant))
    assert sorted(np.concatenate([g.prompts for g in grants]).tolist()) == sorted(granted.prompts.tolist())
    assert not set(granted.groups.tolist()) & set(np.concatenate([g.groups for g in grants]).tolist())
    for peer in (learner, rescuer):
        peer.link.close()


def test_a_late_actor_gets_the_current_weights_before_any_grant(make):
    broker = make()
    learner, actor = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
    for g in actor.expect(wire.Grant).groups:
        actor.link.send(group(actor.link.run_id, int(g)))
    learner.link.send(wire.Fetch(0, 0, 1))
    learner.expect(wire.Shard)
    learner.link.send(wire.Commit(0, 1, {}))
    learner.publish(1, [actor])
    late = Peer(broker, "actor", "a1")
    assert "a1" in learner.expect(wire.Resync).reason
    late.nothing(wire.Grant)
    learner.publish(1, [late])
    actor.nothing(wire.Prepare, 0.2)  # it has that version: only who lacks it receives it again
    for peer in (actor, late, learner):
        peer.link.close()


def test_the_learner_is_told_what_it_waits_for_and_wrong_ranks_are_refused(make):
    broker = make(learner=LearnerSection())
    learner = Peer(broker, "learner", "learner")
    learner.link.send(wire.Fetch(0, 0, 1))
    assert "an actor" in learner.expect(wire.Waiting).detail
    learner.link.send(wire.Fetch(0, 0, 2))
    with pytest.raises(ProtocolError, match=r"over 2 shards.*says 1 over 1"):
        learner.expect(wire.Shard)
    learner.link.close()


def test_a_broker_that_restarts_takes_its_peers_back_under_the_same_run(make):
    broker = make()
    kept = broker.config.run.path / "config.yaml"  # for the tools: no launcher wrote it
    assert load(kept) == broker.config
    kept.write_text("run: {}\n")
    learner, actor = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
    run_id, before = actor.link.run_id, actor.expect(wire.Grant)
    broker.service.router.close = lambda: broker.service.router._stop(0)
    broker.service._farewell = lambda: None  # as if killed
    broker.end()
    second = Broker(broker.config)
    try:
        assert actor.expect(wire.Welcome, 10).run_id == run_id and load(kept) == broker.config
        after = actor.expect(wire.Grant, 10)  # what it owes is granted again, in case it never heard of it
        assert (after.groups.tolist(), after.prompts.tolist()) == (before.groups.tolist(), before.prompts.tolist())
        actor.link.send(group(run_id, int(before.groups[0])))
        assert set(actor.expect(wire.Ack).reasons) == {""}
    finally:
        for peer in (learner, actor):
            peer.link.close()
        second.end()


def test_a_move_of_the_budget_is_told_and_outlives_a_restart(make):
    steps = 7  # two that fill the pipeline, then five whose median is believed
    broker = make(staleness=StalenessSection("auto", start=1, every=2, ess_target=0.8), run_steps=steps + 1)
    learner, actor = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
    granted = []
    for step in range(steps):
        while len(granted) < B:
            granted += [(int(g), grant.min_version) for grant in [actor.expect(wire.Grant)] for g in grant.groups]
        for number, version in granted[:B]:
            actor.link.send(group(actor.link.run_id, number, version))
            actor.expect(wire.Ack)
        granted = granted[B:]
        learner.link.send(wire.Fetch(step, 0, 1))
        learner.expect(wire.Shard)
        learner.link.send(wire.Commit(step, step + 1, {"weight_ess": 0.3}))
        learner.publish(step + 1, [actor])
    for peer in (learner, actor):
        peer.link.close()
    broker.service._farewell = lambda: None
    broker.end()
    metrics = broker.config.run.path / "metrics.jsonl"
    lines = lines_of(broker.config.run.path)
    (move,) = (line for line in lines if line["kind"] == "budget")
    assert (move["step"], move["old"], move["value"], move["ess"]) == (6, 1, 0, 0.3)
    assert move["reason"] == "ESS is 0.3, below staleness.ess_target=0.8"
    assert [line["staleness_budget"] for line in lines if line["kind"] == "step"] == [1] * steps
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines if line["kind"] != "budget"))
    second = Broker(broker.config)
    second.end()
    assert second.service.pipeline.ledger.budget == second.service.training.governor.budget == 0
    status = second.status()
    assert status["staleness_budget"] == 0 and status["staleness_move"]["reason"] == move["reason"]
    assert [line["value"] for line in lines_of(broker.config.run.path, "budget")] == [0], "written down once, if late"


def test_a_missing_model_directory_names_the_remedy(tmp_path):
    with pytest.raises(ModelError, match=r"tools\.warmstart"):
        BrokerService(RunConfig(model=ModelSection(path=str(tmp_path / "nowhere"))), StopFlag())


@pytest.mark.parametrize(
    ("fetch", "words"),
    [
        (wire.Fetch(0, 5, 1), "rank 0 of 1 asks for shard 5 of 1"),
        (wire.Fetch(STEPS, 0, 1), r"none of this run's 4 \(run\.steps\)"),
        (wire.Fetch(-1, 0, 1), "step -1"),
    ],
)
def test_a_fetch_beyond_the_mesh_or_the_run_is_refused_by_name(make, fetch, words):
    broker = make()
    learner = Peer(broker, "learner", "learner")
    learner.link.send(fetch)
    with pytest.raises(ProtocolError, match=words):
        learner.expect(wire.Shard)
    deadline = time.monotonic() + 5.0  # it is counted after it was said
    while not (counted := broker.service.figures.errors["ProtocolError"]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert counted == 1
    learner.link.close()


def test_a_sender_without_the_business_is_refused_and_counted(make):
    broker = make()
    learner, actor = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
    for message in (wire.Commit(0, 1, {}), wire.Fetch(0, 0, 1), wire.Published(0, 1, "d", 0.1), wire.Checkpointed(3)):
        actor.link.send(message)
    actor.expect(wire.Grant)
    deadline = time.monotonic() + 5
    while broker.service.figures.errors["ProtocolError"] < 4:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert broker.service.pipeline.committed_step == -1
    assert broker.service.status()["offences"] == {"a0/s/0": {"ProtocolError": 4}}
    for peer in (learner, actor):
        peer.link.close()


def test_full_queues_are_named_as_what_the_run_waits_for(make):
    broker = make()
    learner, actor = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
    actor.expect(wire.Grant)
    service = broker.service
    deadline = time.monotonic() + 5
    service.pipeline.groups_that_fit = lambda: 0
    service.pipeline.actor_lost("a0")  # its groups are given up and none can be granted again
    while "broker.queue_mb" not in service.waiting_for():
        assert time.monotonic() < deadline, service.waiting_for()
        time.sleep(0.02)
    for peer in (learner, actor):
        peer.link.close()


def test_what_an_actors_servers_are_about_is_in_the_status(make):
    broker = make()
    learner, actor = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
    actor.link.counters = {"servers": 2.0, "servers_serving": 0.0}
    deadline = time.monotonic() + 5.0
    while "SGLang" not in broker.service.waiting_for() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert broker.service.waiting_for() == "a0: none of 2 SGLang servers serves yet"
    assert broker.service.status()["actors"] == {"a0": {"version": 0, "servers": 2.0, "servers_serving": 0.0}}
    actor.link.counters = {"servers": 2.0, "servers_serving": 1.0}
    while "SGLang" in broker.service.waiting_for() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "groups complete" in broker.service.waiting_for()
    for peer in (learner, actor):
        peer.link.close()


def test_whoever_waits_for_an_answer_waits_for_the_disk_and_not_for_a_turn(make):
    broker = make()
    assert broker.service.recorder.journal.on_commit == broker.service.router.wake


def test_groups_that_all_fail_are_granted_seldom_said_aloud_and_at_last_end_the_run(make, monkeypatch):
    monkeypatch.setattr(setbacks, "GIVE_UP_S", 0.5)
    broker = make()
    broker.may_fail = True
    learner, actor = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
    grants = 0
    while broker.thread.is_alive():
        message = actor.link.receive(0.05)
        if isinstance(message, wire.Grant):
            grants += 1
            for g in message.groups.tolist():
                actor.link.send(wire.GroupFailed(g, "no such program"))
    assert grants <= 2 * STEPS_IN_A_ROW + 4  # after these at first, one a second, and fewer
    assert "groups of a0 all failed, the last one so: no such program; correct the task" in str(broker.failure)
    told, lines = broker.status(), lines_of(broker.config.run.path)
    assert told["alerts"][0]["sign"] == "rollouts:a0" and "no such program" in told["alerts"][0]["text"]
    assert "no such program" in told["waiting_for"]
    assert [x["state"] for x in lines] == ["raised"]
    for peer in (learner, actor):
        peer.link.close(None)


def test_slow_groups_behind_failures_are_waited_for_and_a_mended_actor_begins_anew(make, monkeypatch):
    monkeypatch.setattr(setbacks, "GIVE_UP_S", 0.2)
    broker = make()
    learner, actor = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
    failed = 0
    while failed < STEPS_IN_A_ROW * B:
        for g in actor.expect(wire.Grant).groups.tolist():
            actor.link.send(wire.GroupFailed(g, "not up yet"))
            failed += 1
    slow = actor.expect(wire.Grant).groups.tolist()
    time.sleep(0.6)  # nothing has failed since
    assert broker.thread.is_alive() and broker.service.rollouts.alerts()
    actor.link.close("to be mended")
    mended = Peer(broker, "actor", "a0", session="mended")
    until(lambda: not broker.service.rollouts.alerts())
    assert mended.expect(wire.Grant).groups.tolist() != slow
    lines = lines_of(broker.config.run.path)
    assert [(x["state"], x["sign"], x["since"]) for x in lines] == [
        (s, "rollouts:a0", 0) for s in ("raised", "cleared")
    ]
    for peer in (learner, actor, mended):
        peer.link.close(None)


def test_an_environment_that_comes_back_costs_no_more_than_time(make):
    broker = make(staleness=StalenessSection(STEPS))
    learner, actor = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
    down, taken = 2 * STEPS_IN_A_ROW * B, 0
    while taken < B:
        for g in actor.expect(wire.Grant).groups.tolist():
            down -= 1
            if down >= 0:
                actor.link.send(wire.GroupFailed(g, "the browser is gone"))
            else:
                actor.link.send(group(actor.link.run_id, g))
                taken += 1
    learner.link.send(wire.Fetch(0, 0, 1))
    learner.expect(wire.Shard)
    lines = lines_of(broker.config.run.path)
    assert [x["state"] for x in lines if x["kind"] == "alert"] == ["raised", "cleared"]
    assert not broker.service.rollouts.alerts()
    for peer in (learner, actor):
        peer.link.close()


def test_an_actor_where_nothing_works_takes_no_groups_from_one_where_everything_does(make):
    broker = make(staleness=StalenessSection(STEPS))
    learner, bad, good = Peer(broker, "learner", "learner"), Peer(broker, "actor", "bad"), Peer(broker, "actor", "good")
    failed, held, began, deadline = 0, [], time.monotonic(), time.monotonic() + 10
    while len(held) < STEPS * B:
        assert time.monotonic() < deadline
        for peer in (bad, good):
            message = peer.link.receive(0.01)
            groups = message.groups.tolist() if isinstance(message, wire.Grant) else []
            if peer is good:
                held += groups
            for g in groups if peer is bad else ():
                failed += 1
                peer.link.send(wire.GroupFailed(g, "no browser here"))
        assert failed < 40  # in a second, where it was hundreds
        if time.monotonic() - began < 1.0:
            continue
        for g in held:
            good.link.send(group(good.link.run_id, g))
    assert failed >= STEPS_IN_A_ROW * B
    for peer in (learner, bad, good):
        peer.link.close()


def test_a_group_that_never_comes_back_is_given_up_in_time_and_granted_again(make, caplog):
    broker = make(broker={"group_timeout_s": 1e4})
    learner, actor = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
    first = actor.expect(wire.Grant)
    actor.link.send(group(actor.link.run_id, int(first.groups[0])))
    actor.expect(wire.Ack)
    broker.service.rollouts._overdue._until[int(first.groups[1])] = 0.0  # hours later
    again = actor.expect(wire.Grant)  # the other one's prompt
    assert (again.groups.tolist(), again.prompts.tolist()) == ([2], [first.prompts[1]])
    assert "group 1 of a0: not back 10000 s after its grant (broker.group_timeout_s)" in caplog.text
    actor.link.send(group(actor.link.run_id, int(first.groups[1])))
    assert actor.expect(wire.Ack).reasons == ["overdue"] * G
    actor.link.send(group(actor.link.run_id, 2))
    learner.link.send(wire.Fetch(0, 0, 1))
    assert set(learner.expect(wire.Shard).groups.tolist()) == {0, 2}
    assert not broker.service.door.conduct.counts  # late is no offence
    for peer in (learner, actor):
        peer.link.close()


def test_an_evaluation_whose_result_cannot_be_read_is_asked_again(make):
    broker = make(evaluation=EvaluationSection(prompts=2))
    learner, actor = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
    first = actor.expect(wire.Grant)
    endless = np.array([np.inf, 1], np.float32)
    actor.link.send(wire.EvaluationResult(first.evaluation, 0, 0, endless, np.ones(2, np.int32)))
    again = actor.expect(wire.Grant)
    assert again.evaluation > first.evaluation and broker.service.figures.errors["DataError"] == 1
    actor.link.send(wire.EvaluationResult(again.evaluation, 0, 0, np.ones(2, np.float32), np.ones(2, np.int32)))
    assert len(actor.expect(wire.Grant).groups)  # rollouts begin
    for peer in (learner, actor):
        peer.link.close()


def train(broker, learner, actor):
    """Its only step."""
    learner.link.send(wire.Fetch(0, 0, 1))
    left = B
    while left:
        for number in actor.expect(wire.Grant).groups.tolist():
            actor.link.send(group(actor.link.run_id, number, 0))
            left -= 1
    learner.expect(wire.Shard)
    learner.link.send(wire.Commit(0, 1, {}))
    learner.publish(1, [actor])


def test_a_learner_that_was_killed_in_its_last_checkpoint_is_waited_for(make):
    def once_more(wait_s=60.0):
        return make("once", run_steps=1, broker={"peer_timeout_s": 1.0}, learner=LearnerSection(wait_s=wait_s))

    broker = once_more()
    learner, actor = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
    train(broker, learner, actor)
    learner.link.close(None)
    until(
        lambda: broker.status()["waiting_for"].startswith("a learner (python -m learner RUN.yaml learner.resume=true"),
        10,
    )
    actor.link.close()
    broker.end()

    broker = once_more()  # from the journal
    learner = Peer(broker, "learner", "learner", "later")  # from no checkpoint
    learner.link.send(wire.Fetch(0, 0, 1))
    assert len(learner.expect(wire.Shard).groups) == B * G, "it can still train what was not safe"
    learner.nothing(wire.Stop, 0.2)
    learner.link.send(wire.Checkpointed(0))
    learner.expect(wire.Stop)
    learner.link.close()
    broker.thread.join(10)
    assert broker.status()["phase"] == "finished"

    broker = once_more()  # it was killed again, while it wrote the model
    learner = Peer(broker, "learner", "learner", "last", version=1)
    learner.expect(wire.Stop)
    learner.link.close()
    broker.thread.join(10)
    assert broker.status()["phase"] == "finished"
    alone = once_more(wait_s=0.1)
    alone.thread.join(10)
    assert alone.status()["phase"] == "finished"


def test_a_broker_that_is_stopped_hears_the_commit_of_the_step_under_way(make, monkeypatch):
    monkeypatch.setattr(farewell, "FAREWELL_S", 1.5)  # heartbeats come every .1 s
    monkeypatch.setattr(link, "SILENT_BROKER_S", 1.2)
    broker = make(run_steps=2)
    learner, actor = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
    learner.link.send(wire.Fetch(0, 0, 1))
    sent = 0
    while sent < B:
        for number in actor.expect(wire.Grant).groups.tolist():
            actor.link.send(group(actor.link.run_id, number, 0))
            sent += 1
    learner.expect(wire.Shard)
    broker.stop.set("test")
    learner.expect(wire.Stop)
    actor.link.close()
    learner.link._welcomed.clear()  # as if its connection broke
    learner.expect(wire.Stop)
    time.sleep(farewell.FAREWELL_S + 0.5)  # a long step
    assert broker.thread.is_alive()
    until(lambda: learner.link.welcomed)
    learner.link.send(wire.Commit(0, 1, {"loss": 2.5}))
    until(lambda: lines_of(broker.config.run.path, "step"))
    learner.link.send(wire.Checkpointed(0))
    learner.link.close()
    broker.thread.join(3)
    assert not broker.thread.is_alive()
    lines = lines_of(broker.config.run.path)
    assert [(x["step"], x["loss"]) for x in lines if x["kind"] == "step"] == [(0, 2.5)]
    assert broker.service.pipeline.checkpointed_step == 0


@pytest.mark.parametrize("when", ["as it is told to stop", "before"])
def test_a_learner_that_is_cut_off_at_the_end_is_greeted_again(make, monkeypatch, when):
    broker = make(run_steps=2)
    learner, actor, refused = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0"), []  # one stays
    send, say = broker.service.router.send, farewell.Farewell.say

    def unreachable(identity, message):
        if isinstance(message, wire.Stop) and not refused:
            refused.append(identity)
            return False
        return send(identity, message)

    def lost(self, reason):
        self._door.lose(*self._door.roster.role("learner"), "its connection closed")
        say(self, reason)

    if when == "before":
        monkeypatch.setattr(farewell.Farewell, "say", lost)
    else:
        monkeypatch.setattr(broker.service.router, "send", unreachable)
    broker.stop.set("test")
    until(lambda: broker.service.phase == "stopped" and (refused or when == "before"))
    learner.link._welcomed.clear()  # its connection is new: it says Hello
    learner.expect(wire.Stop)
    until(lambda: learner.link.welcomed)
    learner.link.close()
    actor.link.close()
    broker.end()


def test_a_learner_that_is_gone_is_named(make):
    broker = make()
    assert broker.service.waiting_for() == "a learner (python -m learner RUN.yaml)"
    learner, actor = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
    actor.expect(wire.Grant)
    learner.link.close()
    until(lambda: broker.status()["waiting_for"] == "a learner (python -m learner RUN.yaml learner.resume=true)")
    actor.link.close()
