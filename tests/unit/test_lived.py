"""How long a run was at work: a pause before a resume counts for nothing, whoever asks."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from tools.lived import Lived
from tools.outcomes import earlier
from tools.plots import pictures_of
from tools.watch.history import History


def line(step, time_s, alive_s):
    return {
        "kind": "step", "step": step, "time_s": time_s,
        "states": {"broker": {"receive": alive_s / 2, "pack": alive_s / 2}},
        "tokens_generated": 100 * step, "reward": 0.5,
    }  # fmt: skip


def paused(steps, pauses):
    """A step a second; ``pauses``: seconds that nobody worked before a step."""
    clock = alive = 0.0
    for step in range(steps):
        if step in pauses:
            clock, alive = clock + pauses[step], 0.0
        clock, alive = clock + 1, alive + 1
        yield line(step, clock, alive)


@given(st.integers(2, 60), st.dictionaries(st.integers(1, 59), st.floats(20, 1e6), max_size=5))
def test_pauses_count_for_nothing(steps, pauses):
    lived = Lived()
    for record in paused(steps, pauses):
        last = lived.take(record)
    assert last == lived.seconds == pytest.approx(steps)


def test_without_the_broker_s_seconds_time_is_what_passed():
    lived = Lived()
    assert [lived.take({"time_s": t}) for t in (5.0, 9.0, "x", None, 10.0)] == [5.0, 9.0, None, None, 10.0]


def test_what_is_left_of_a_resumed_run_is_told_by_its_pace():
    history = History()
    history.take([json.dumps(record).encode() for record in paused(520, {500: 36_000.0})])
    assert history.pace() == pytest.approx(1.0)


def test_a_resumed_run_s_throughput_has_no_dip():
    (picture,) = [p for p in pictures_of(list(paused(60, {30: 36_000.0})), 2) if p.stem == "throughput"]
    axes = Figure().add_subplot()
    picture.draw(axes)
    assert axes.lines[0].get_ydata() == pytest.approx(100.0)


def test_the_time_of_a_run_that_is_resumed_goes_on_where_it_was(tmp_path):
    written = list(paused(40, {30: 1e4}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in written))
    status = {
        "phase": "stopped",
        "step": 40,
        "started_at": 7.0,
        "time": 7.0 + 1e4 + 42,
        "states": {"broker": {"a": 12}},
    }
    (tmp_path / "status.json").write_text(json.dumps(status))
    assert earlier(tmp_path) == ("interrupted", pytest.approx(42))
    (tmp_path / "summary.json").write_text('{"status": "interrupted", "wall_s": 50.5, "steps": 40}')
    assert earlier(tmp_path) == ("interrupted", 50.5)
    (tmp_path / "summary.json").unlink()
    for odd in ({"time": None, "started_at": 5}, {"time": "x"}, {"started_at": 5.0}):
        (tmp_path / "status.json").write_text(json.dumps(odd))
        assert earlier(tmp_path) == ("interrupted", pytest.approx(40))


def test_a_record_that_does_not_say_how_long_its_broker_was_alive_is_no_new_start():
    lived = Lived()
    for record in (line(0, 10.0, 10.0), line(1, 20.0, 20.0), {"time_s": 30.0, "states": None}):
        lived.take(record)
    assert lived.seconds == 30.0
