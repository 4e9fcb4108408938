"""Evaluations beside training: a real broker, hand-written peers. Training must not notice them."""

import numpy as np
import pytest

from common import wire
from common.config import EvaluationSection, LearnerSection, RolloutSection, TaskEntry, TaskSection
from tests.integration.fleet import lines_of
from tests.integration.harness import STEPS, B, Peer, group


def answer(actor, grant, version, right, samples):
    """An evaluation in which ``right`` of all completions are correct, the first ones."""
    n = grant.evaluation_prompts * samples
    correct = (np.arange(n) < right).astype(np.float32)
    actor.link.send(
        wire.EvaluationResult(
            grant.evaluation, version, version, correct, np.ones(n, np.int32), samples, ["correct"], correct[:, None],
            np.ones(n, np.int64),
        )
    )  # fmt: skip


class Training:
    """One actor and a learner, driven step by step; grants of groups and of evaluations are told apart."""

    def __init__(self, broker):
        self.learner, self.actor = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
        self.granted, self.evaluations = [], []

    def take_grant(self):
        grant = self.actor.expect(wire.Grant)
        if grant.evaluation >= 0:
            self.evaluations.append(grant)
        self.granted += grant.groups.tolist()
        return grant

    def step(self, step):
        while len(self.granted) < B * (step + 1):
            self.take_grant()
        for number in self.granted[B * step : B * (step + 1)]:
            self.actor.link.send(group(self.actor.link.run_id, number, step))
        self.learner.link.send(wire.Fetch(step, 0, 1))
        self.learner.expect(wire.Shard)
        self.learner.link.send(wire.Commit(step, step + 1, {}))
        self.learner.publish(step + 1, [self.actor])

    def close(self):
        self.learner.link.close()
        self.actor.link.close()


def test_an_evaluation_that_never_ends_delays_no_step_and_takes_no_place_in_the_ledger(make):
    """Only the first one, of the starting model, is waited for."""
    broker = make("r", evaluation=EvaluationSection(prompts=3, every=1))
    run = Training(broker)
    first = run.take_grant()
    assert first.evaluation >= 0 and not len(first.groups)
    assert broker.service.pipeline.ledger.promised == 0
    run.actor.nothing(wire.Grant, 0.2)
    answer(run.actor, first, 0, 1, 1)
    for step in range(STEPS):
        run.step(step)
        assert len(run.granted) <= B * (step + 2)
    assert len(run.evaluations) == 2  # the second is under way all the time, and no other is asked for meanwhile
    assert broker.service.pipeline.counts["groups_granted"] == STEPS * B
    ledger = broker.service.pipeline.ledger
    assert (ledger.promised, ledger.queued, broker.service.pipeline.book.held) == (0, 0, 0)
    status = broker.service.status()
    assert status["lag_max"] == 0 and status["step"] == STEPS and status["phase"] == "evaluating"
    assert [e["version"] for e in status["evaluations"]] == [0]
    run.close()


def test_an_evaluation_of_an_actor_that_dies_is_asked_of_another_and_of_one_that_returns_again(make):
    broker = make("r", evaluation=EvaluationSection(prompts=2))
    learner, doomed = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
    first = doomed.expect(wire.Grant)
    doomed.link.send(doomed.link._hello)  # as one does that has not heard of the broker for a while
    again = doomed.expect(wire.Grant)
    assert again.evaluation == first.evaluation
    other = Peer(broker, "actor", "a1")
    doomed.link.close(None)
    grant = other.expect(wire.Grant)
    assert grant.evaluation > first.evaluation and not len(grant.groups)
    answer(other, first, 0, 2, 1)  # not its own
    other.link.send(wire.EvaluationResult(grant.evaluation, 0, 0, np.ones(1, np.float32), np.ones(1, np.int32)))
    third = other.expect(wire.Grant)  # a prompt is missing: refused, and asked again
    assert third.evaluation > grant.evaluation and broker.service.figures.errors["DataError"] == 1
    answer(other, third, 0, 1, 1)
    assert len(other.expect(wire.Grant).groups)
    assert [r.reward for r in broker.service.rollouts.schedule.results] == [0.5]
    for peer in (learner, other):
        peer.link.close()


def test_the_learner_is_told_what_to_keep_and_a_new_one_again(make):
    task = TaskSection(mix={"easy": TaskEntry("sort6", 1.0), "hard": TaskEntry("sort6", 1.0)})
    section = EvaluationSection(prompts=4, every=1, samples=2, pass_at=(1, 2), keep_best=True)
    broker = make("r", evaluation=section, task=task, learner=LearnerSection())
    run = Training(broker)
    for version, right in ((0, 2), (1, 6), (2, 4)):
        while not run.evaluations:
            run.take_grant()
        grant = run.evaluations.pop()
        assert (grant.evaluation_prompts, grant.evaluation_samples) == (4, 2)
        answer(run.actor, grant, version, right, 2)
        run.step(version)
    best = [m for m in run.learner.stash if isinstance(m, wire.KeepBest)]
    told = [(m.version, m.pending) for m in best]
    order = [told.index(said) for said in ((-1, 0), (0, -1), (0, 1), (1, -1), (1, 2))]
    assert order == sorted(order)
    assert all(m.decided <= 3 for m in best) and {m.reward for m in best if m.version == 1} == {0.75}
    run.learner.link.close(None)
    second = Peer(broker, "learner", "learner", session="two", version=3)
    message = second.expect(wire.KeepBest)
    assert (message.version, message.reward) == (1, 0.75)
    lines = lines_of(broker.config.run.path)
    line = next(x for x in lines if x["kind"] == "eval" and x["version"] == 1)
    assert (line["version_asked"], line["reward"], line["prompts"], line["samples"]) == (1, 0.75, 4, 2)
    assert line["pass_at"]["1"][0] == 0.75 and line["reward_low"] < 0.75 < line["reward_high"]
    assert line["tasks"]["easy"]["correct"] == 1.0 and line["tasks"]["hard"]["correct"] == 0.5
    assert broker.service.status()["best"] == {"version": 1, "reward": 0.75}
    second.link.close()
    run.actor.link.close()


@pytest.mark.slow
def test_a_broker_that_restarts_remembers_what_was_best(make, tmp_path):
    from tests.integration.harness import Broker

    broker = make("r", evaluation=EvaluationSection(prompts=2, every=1, keep_best=True))
    run = Training(broker)
    answer(run.actor, run.take_grant(), 0, 1, 1)
    run.step(0)
    while len(run.evaluations) < 2:
        run.take_grant()
    answer(run.actor, run.evaluations[-1], 1, 2, 1)
    while True:
        message = run.learner.expect(wire.KeepBest)
        if message.version == 1:
            break
    before = broker.service.rollouts.schedule.results
    broker.service.router.close = lambda: broker.service.router._stop(0)
    broker.service._farewell = lambda: None  # as if killed
    broker.end()
    run.learner.stash.clear()
    second = Broker(broker.config)
    try:
        assert second.service.rollouts.schedule.results == before
        assert run.learner.expect(wire.KeepBest, 10).version == 1
    finally:
        run.close()
        second.end()


def test_groups_go_to_the_actors_that_do_not_evaluate_as_long_as_they_have_room(make):
    rollout = RolloutSection(groups_per_step=4, group_size=2, max_prompt_tokens=2, max_tokens=2)
    broker = make("r", evaluation=EvaluationSection(prompts=2, every=1), rollout=rollout)
    actors = [Peer(broker, "actor", "a0", capacity=8), Peer(broker, "actor", "a1", capacity=3)]
    learner = Peer(broker, "learner", "learner")
    first = actors[0].expect(wire.Grant)
    assert not len(first.groups)
    actors[1].nothing(wire.Grant, 0.2)  # the starting model is evaluated before it changes
    answer(actors[0], first, 0, 1, 1)
    groups = [actor.expect(wire.Grant).groups.tolist() for actor in actors]
    assert [len(g) for g in groups] == [2, 2]
    for actor, mine in zip(actors, groups, strict=True):
        for number in mine:
            actor.link.send(group(actor.link.run_id, number, 0))
    learner.link.send(wire.Fetch(0, 0, 1))
    learner.expect(wire.Shard)
    learner.link.send(wire.Commit(0, 1, {}))
    learner.publish(1, actors)
    taken = [actor.expect(wire.Grant) for actor in actors]
    assert taken[0].evaluation >= 0 and taken[1].evaluation < 0
    assert [len(grant.groups) for grant in taken] == [1, 3]  # a1 is full, the rest is a0's
    for peer in (*actors, learner):
        peer.link.close()
