"""What artificial slowness may not do: outlive a stop, or leave messages lying."""

from types import SimpleNamespace

import pytest

from actor.service import ActorService
from common import wire
from common.config import ActorSection, EngineSection, LearnerSection, RunConfig
from common.errors import ConfigError
from common.process import StopFlag
from common.slowness import Slowness
from learner.train import Learner

AN_HOUR = 3600.0


class Link:
    """Hands out what it was given, then nothing; says how long it was waited for."""

    def __init__(self, *messages):
        self.messages, self.waits = list(messages), []

    def receive(self, timeout_s):
        self.waits.append(timeout_s)
        return self.messages.pop(0) if self.messages else None


@pytest.mark.parametrize("process", [ActorService, Learner])
def test_a_pause_takes_messages_and_ends_with_the_run(process):
    stop, link = StopFlag(), Link(wire.Pong(1), None, wire.Stop("done"), wire.Pong(2))
    this = SimpleNamespace(stop=stop, link=link)
    for name in ("_handle", "_note", "_attempt"):
        if hasattr(process, name):
            setattr(this, name, getattr(process, name).__get__(this))
    process._slow_down(this, AN_HOUR)
    assert stop.reason == "the broker said stop: done"
    assert len(link.waits) == 3 and max(link.waits) <= 0.2


@pytest.mark.parametrize("process", [ActorService, Learner])
def test_there_is_no_pause_without_slowdown(process):
    link = Link()
    process._slow_down(SimpleNamespace(stop=StopFlag(), link=link), 0.0)
    assert link.waits == []


def test_a_pause_is_of_the_least_that_such_work_took():
    slowness = Slowness(4.0)
    assert slowness.pause_s(100, 0.5) == 1.5
    assert slowness.pause_s(120, 0.25) == 0.75
    assert slowness.pause_s(70, 9.0) == 0.75, "somebody else was on the machine"
    assert slowness.pause_s(200, 1.0) == 3.0 and slowness.pause_s(0, 0.0) == 0.0
    assert Slowness(1.0).pause_s(100, 0.5) == 0.0


def test_a_pace_is_kept_whatever_the_work_took():
    slowness = Slowness(2.0, pace_s=1.0)
    assert slowness.pause_s(100, 0.25) == 0.75
    assert slowness.pause_s(100, 0.75) == 0.25 and slowness.pause_s(100, 3.0) == 0.25
    assert slowness.pause_s(4000, 2.0) == 2.0 and Slowness(1.0, 1.0).pause_s(1, 1.5) == 0.0


def test_slowness_is_checked():
    RunConfig(actor=ActorSection(slowdown=4.0), learner=LearnerSection(slowdown=1.5))
    with pytest.raises(ConfigError, match=r"actor.pace_s=-1.*\[0, 3600\]"):
        RunConfig(actor=ActorSection(pace_s=-1))
    with pytest.raises(ConfigError, match=r"learner.slowdown=0.5.*\[1, 1000\]"):
        RunConfig(learner=LearnerSection(slowdown=0.5))
    with pytest.raises(ConfigError, match=r"actor.slowdown=2.*pace.*actor.engine=local"):
        RunConfig(actor=ActorSection(slowdown=2.0, engine="sglang"), engine=EngineSection())
