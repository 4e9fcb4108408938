"""The broker's timeline: what it tells of groups and steps is so, and telling it changes nothing."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.recorder import Recorder
from common.trace import MILESTONES, Tracer, silent, trace_path
from tests.unit.test_recovery import drive, fingerprint, pipeline_of
from tools.perfetto import milestones
from tools.timelines import read_timelines


def lived(name, seed, turns, tracer):
    recorder = Recorder(pipeline_of(name), None, dict, tracer)
    recorder.begin(0)
    recorder.questions([4])
    drive(recorder, np.random.default_rng(seed), [0], turns, [])
    return recorder.pipeline


@pytest.mark.parametrize("name", ["threshold", "off", "rethin"])
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 30), turns=st.integers(20, 250))
def test_every_group_and_step_is_told_of_and_nothing_else_changes(tmp_path, name, seed, turns):
    directory = tmp_path / f"{seed}-{turns}"
    ticks = itertools.count(10**9)
    with Tracer(
        trace_path(directory, "broker"), "broker", "broker", follow_every=2, clock=lambda: next(ticks) * 1000
    ) as tracer:
        pipeline = lived(name, seed, turns, tracer)
    assert fingerprint(pipeline) == fingerprint(lived(name, seed, turns, silent()))
    (life,) = read_timelines(directory).lives
    ends = [span.args["group"] for span in life.spans if span.name in ("group", "given up")]
    queued = [span.args["group"] for span in life.spans if span.name == "queued"]
    assert len(set(ends)) == len(ends) and len(set(queued)) == len(queued)
    assert all(group % 2 == 0 for group in ends) and set(queued) <= set(ends)
    waiting = {group for group in ends if pipeline.ledger.is_complete(group)}
    given_up = {span.args["group"] for span in life.spans if span.name == "given up"}
    assert set(ends) == set(queued) | waiting | given_up
    on_their_way = {g for g in range(0, pipeline.counts["groups_granted"], 2) if g not in ends}
    assert all(g in pipeline.book and not pipeline.ledger.is_complete(g) for g in on_their_way)
    marks = milestones(life.instants)
    steps = range(pipeline.committed_step + 1)
    assert all(set(MILESTONES) - {"asked", "served"} <= set(marks[step]) for step in steps)
    for moments in marks.values():
        known = [moments[what] for what in MILESTONES if what in moments]
        assert known == sorted(known)
    told = [(one.args["step"], one.args["what"]) for one in life.instants if not one.args.get("again")]
    assert len(set(told)) == len(told)
    followed = {group for one in life.instants for group in one.args.get("groups", ())}
    assert followed == set(queued)
    if steps:
        assert life.tallies["collate"] and life.tallies["pack"]
