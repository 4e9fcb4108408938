"""Offences and quarantine against a plain reading of the rule."""

from hypothesis import given
from hypothesis import strategies as st

from broker import conduct
from broker.conduct import Conduct


def test_the_one_after_the_limit_quarantines_and_time_ends_it():
    found = Conduct(limit=3, window_s=10, quarantine_s=5)
    assert [found.offence("a", "nan", t) for t in (0, 1, 2, 3)] == [False, False, False, True]
    assert found.is_quarantined("a", 7.9) and not found.is_quarantined("a", 8.0)
    assert not found.is_quarantined("b", 3)
    assert found.counts == {"a": {"nan": 4}}
    assert not found.offence("a", "nan", 8.0)  # what came before is forgiven


def test_offences_far_apart_are_no_habit():
    found = Conduct(limit=2, window_s=10)
    assert not any(found.offence("a", "nan", 5.0 * t) for t in range(100))


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 4)), max_size=60), st.integers(1, 4))
def test_it_does_what_the_rule_says(offences, limit):
    found, now, past, until = Conduct(limit, 3.0, 2.0), 0.0, {"a": [], "b": []}, {"a": 0.0, "b": 0.0}
    for name, wait in offences:
        now += wait
        expected = False
        if now >= until[name]:
            past[name] = [t for t in past[name] if t > now - 3.0] + [now]
            if expected := len(past[name]) > limit:
                past[name], until[name] = [], now + 2.0
        assert found.offence(name, "x", now) is expected
        assert found.is_quarantined(name, now) is (now < until[name])


def test_it_remembers_a_bounded_number_of_names_and_kinds(monkeypatch):
    monkeypatch.setattr(conduct, "MAX_NAMES", 5)
    found = Conduct()
    for n in range(50):
        found.offence("one", f"kind {n}", 0)
        found.offence(f"name {n}", "x", 0)
    assert len(found.counts) == 5
    assert len(found.counts["one"]) == conduct.MAX_KINDS + 1
    assert sum(found.counts["one"].values()) == 50
