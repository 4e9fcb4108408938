"""What the budget means, by hand."""

import numpy as np
import pytest

from broker.ledger import StalenessLedger
from common.errors import DataError
from common.versions import lag, spans_from_versions, versions_from_spans


def test_lag_is_zero_on_policy_and_refuses_the_future():
    assert lag(3, 3) == 0 and lag(5, 3) == 2
    with pytest.raises(DataError, match="future"):
        lag(2, 3)


def test_budget_zero_is_synchronous():
    ledger = StalenessLedger(0, 2, 10)
    assert ledger.grantable(0) == 2
    for g in (0, 1):
        ledger.grant(g, 0)
    assert ledger.grantable(0) == 0
    ledger.complete(0, 0)
    assert ledger.select() is None
    ledger.complete(1, 0)
    ledger.assembled(ledger.select())
    assert ledger.grantable(0) == 0  # version 1 is not there yet
    assert ledger.grantable(1) == 2


@pytest.mark.parametrize("budget", [1, 2, 16])
def test_budget_is_how_many_steps_ahead_the_fleet_may_sample(budget):
    assert StalenessLedger(budget, 4, 100).grantable(0) == (budget + 1) * 4


def test_nothing_is_granted_beyond_the_last_step():
    assert StalenessLedger(16, 4, 3).grantable(0) == 12


def test_a_due_straggler_holds_the_step_and_a_fresh_group_may_not_overtake_it():
    ledger = StalenessLedger(1, 1, 10)
    ledger.grant(0, 0)
    ledger.grant(1, 0)
    ledger.complete(1, 0)
    assert ledger.select() == [1]  # group 0 still fits into step 1
    ledger.assembled([1])
    ledger.grant(2, 1)
    ledger.complete(2, 1)
    assert ledger.select() is None and "staleness budget" in ledger.waiting_for()
    ledger.complete(0, 0)
    assert ledger.select() == [0]


def test_granting_without_room_and_twice_is_refused():
    ledger = StalenessLedger(0, 1, 10)
    ledger.grant(0, 0)
    with pytest.raises(DataError, match="no room"):
        ledger.grant(1, 0)
    with pytest.raises(DataError, match="already"):
        ledger.grant(0, 0)


def test_version_spans_round_trip():
    for versions in ([], [3], [3, 3, 4, 4, 4, 7]):
        v = np.array(versions, np.int32)
        assert versions_from_spans(spans_from_versions(v), len(v)).tolist() == versions
    assert spans_from_versions(np.array([3, 3, 4], np.int32)).tolist() == [[0, 3], [2, 4]]


def ledger_of(budget, groups, version=0):
    ledger = StalenessLedger(budget, 1, 100)
    for g in range(groups):
        ledger.grant(g, version)
        ledger.complete(g, version)
    return ledger


def test_a_lower_budget_grants_nothing_until_the_queue_is_as_short_as_it_would_have_kept_it():
    ledger = ledger_of(4, 5)
    ledger.set_budget(1)
    for version in range(1, 4):
        ledger.assembled(ledger.select())
        assert ledger.grantable(version) == 0, version
    ledger.assembled(ledger.select())
    assert ledger.grantable(4) == 1  # one is left, and a budget of 1 keeps two
    ledger.grant(5, 4)
    ledger.complete(5, 4)
    assert ledger.select() == [4], "the older one first, though the fresh one is due as soon"


def test_the_oldest_go_first_unless_a_fresher_one_would_be_late_for_it():
    ledger = StalenessLedger(9, 1, 100, next_step=3)
    ledger.grant(0, 0)  # due at step 9
    ledger.set_budget(1)
    ledger.grant(1, 3)  # due at step 4
    ledger.set_budget(9)
    ledger.grant(2, 3)
    ledger.complete(2, 3)
    ledger.assembled(ledger.select())  # step 3: nothing else is complete, and nobody is late for it
    for group, version in ((0, 0), (1, 3)):
        ledger.complete(group, version)
    assert ledger.select() == [1], "0 is older, but may wait"
    ledger.release(1)
    ledger.grant(3, 4)
    ledger.complete(3, 4)
    assert ledger.select() == [0]


def test_a_raised_budget_grants_at_once_and_a_negative_one_is_refused():
    ledger = ledger_of(0, 1)
    assert ledger.grantable(0) == 0
    ledger.set_budget(3)
    assert ledger.grantable(0) == 3
    with pytest.raises(DataError, match="-1"):
        ledger.set_budget(-1)
