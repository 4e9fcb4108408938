"""Actors whose groups do nothing but fail are granted seldom, and a run that never had a whole group ends."""

import pytest

from broker.setbacks import GIVE_UP_S, LONGEST_S, PAUSE_S, STEPS_IN_A_ROW, Setbacks
from common.errors import TaskError

ENOUGH = STEPS_IN_A_ROW * 4


def test_pauses_grow_while_nothing_succeeds_and_end_with_the_first_success():
    setbacks, now, pauses = Setbacks(4), 0.0, []
    setbacks.note("a0", "no such program")
    assert setbacks.look("a0", ENOUGH - 1, 5, now) == ""
    setbacks.granted("a0", now)
    assert not setbacks.lasting and not setbacks.holds_back("a0", now)
    for turn in range(8):
        assert setbacks.look("a0", ENOUGH + turn, 5 + turn, now) == ("" if turn else "raised")
        setbacks.granted("a0", now)
        setbacks.granted("a1", now)
        began = now
        while setbacks.holds_back("a0", now):
            assert not setbacks.holds_back("a1", now)  # where things work
            now += 0.5
        pauses.append(now - began)
    assert pauses == [PAUSE_S, 2, 4, 8, 16, LONGEST_S, LONGEST_S, LONGEST_S]
    assert setbacks.words("a0") == f"the last {ENOUGH + 7} groups of a0 all failed, the last one so: no such program"
    assert setbacks.lasting == {"a0": 5}
    setbacks.granted("a0", now)
    assert setbacks.look("a0", 0, 9, now) == "cleared"
    setbacks.forget("a0")
    assert not setbacks.lasting and not setbacks.holds_back("a0", now)


def test_a_run_ends_once_all_actors_have_gone_on_failing_for_long_enough():
    setbacks = Setbacks(4)
    setbacks.check([])
    for actor, since in (("a0", 0.0), ("a1", 10.0)):
        setbacks.look(actor, ENOUGH, 0, since)
        setbacks.look(actor, ENOUGH, 0, 10 * GIVE_UP_S)  # nothing more has failed
    setbacks.check(["a0", "a1"])
    setbacks.look("a0", ENOUGH + 1, 0, GIVE_UP_S + 1)
    setbacks.check(["a0", "a1"])
    setbacks.look("a1", ENOUGH + 1, 0, GIVE_UP_S + 11)
    setbacks.check(["a0", "a1", "a2"])  # a2 may still succeed
    with pytest.raises(TaskError, match=r"not one group of this run .* the last 9 groups of a0 all failed"):
        setbacks.check(["a0", "a1"])
    setbacks.forget("a0")  # and another process of that name comes
    setbacks.look("a0", ENOUGH, 0, GIVE_UP_S)
    setbacks.check(["a0", "a1"])
