"""Until when a group is waited for."""

from broker.overdue import SPARE, Overdue


def test_each_group_is_told_once_and_only_if_something_of_it_may_still_come():
    overdue, awaited = Overdue(10.0), {1, 2, 3, 4}
    overdue.granted([1, 2], 0.0)
    overdue.granted([3, 4], 5.0)
    assert overdue.take(9.9, awaited.__contains__) == []
    awaited -= {1, 3}
    assert overdue.take(10.0, awaited.__contains__) == [2]
    assert overdue.take(14.9, awaited.__contains__) == []
    assert overdue.take(15.0, awaited.__contains__) == [4]
    assert overdue.take(99.0, awaited.__contains__) == []


def test_groups_that_are_done_are_not_remembered_behind_one_that_is_not():
    overdue, last = Overdue(1e6), 100 * SPARE
    overdue.granted([0], 0.0)
    for group in range(1, last):
        overdue.granted([group], float(group))
        assert overdue.take(float(group), lambda one, newest=group: one in (0, newest)) == []
    assert len(overdue._until) <= SPARE + 4
    assert overdue.take(2e6, {0, last - 1}.__contains__) == [0, last - 1]
