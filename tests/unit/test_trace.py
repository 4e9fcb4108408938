"""Timelines: complete, cheap to draw, readable wherever they are cut."""

import itertools
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import RunConfig, RunSection
from common.observe import TraceSection
from common.trace import (
    IDLE,
    LEVELS_EVERY_NS,
    RESOLUTION_NS,
    STATES,
    ClockOffset,
    Tracer,
    open_tracer,
    trace_path,
)
from tools.timelines import MOST_KEPT, Series, read_timelines

MOVES = ("sample", "play", "idle.credits")


class Clock:
    def __init__(self):
        self.now = 10

    def __call__(self):
        return self.now


def traced(tmp_path, moves, **options):
    clock = Clock()
    tracer = Tracer(trace_path(tmp_path, "actor-0"), "actor-0", "actor", clock=clock, cpu_clock=clock, **options)
    for state, lasts in moves:
        tracer.state(state)
        clock.now += lasts
    return tracer


@given(st.lists(st.tuples(st.sampled_from(MOVES), st.integers(1, 3 * RESOLUTION_NS)), min_size=1, max_size=60))
def test_totals_partition_the_time_and_slices_leave_no_gap(tmp_path_factory, moves):
    tmp_path = tmp_path_factory.mktemp("run")
    tracer = traced(tmp_path, moves)
    tracer.close()
    (life,) = read_timelines(tmp_path).lives
    spent = {state: sum(lasts for s, lasts in moves if s == state) for state in {s for s, _ in moves}}
    total = life.totals[-1][1]
    assert {state: total[state][0] for state in spent} == spent
    assert all(wall == cpu for wall, cpu, _ in total.values())
    assert life.slices[0].start == 10 and life.slices[-1].end == 10 + sum(lasts for _, lasts in moves)
    for one, other in itertools.pairwise(life.slices):
        assert one.end == other.start
        assert other.end - other.start >= RESOLUTION_NS  # shorter ones are part of the one before
        assert (one.state, one.step) != (other.state, other.step)


def test_every_cut_of_a_file_is_readable(tmp_path):
    tracer = traced(tmp_path, [("sample", RESOLUTION_NS), ("play", RESOLUTION_NS)] * 4)
    tracer.span("rollouts", "rollout", 10, 20, group=8)
    tracer.levels(rows=3)
    tracer.tally("decode", 4, 100, 90, 4)
    tracer.close()
    path = trace_path(tmp_path, "actor-0")
    whole = path.read_bytes()
    counts = []
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        found = read_timelines(tmp_path)
        counts.append(sum(len(life.slices) + len(life.spans) for life in found.lives))
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 9


def test_what_is_no_timeline_is_named_and_the_others_are_read(tmp_path):
    traced(tmp_path, [("sample", RESOLUTION_NS)]).close()
    (tmp_path / "trace" / "broker.trace").write_bytes(b"\x93\x01\x02\x03 not a timeline")
    found = read_timelines(tmp_path)
    assert [life.process for life in found.lives] == ["actor-0"]
    assert len(found.notes) == 1 and found.notes[0].startswith("broker.trace: damaged")
    assert "no timelines" in read_timelines(tmp_path / "nowhere").notes[0]


def test_lives_of_a_process_follow_each_other_in_one_file(tmp_path):
    for _ in range(2):
        traced(tmp_path, [("sample", RESOLUTION_NS)]).close()
    assert [life.ended for life in read_timelines(tmp_path).lives] == ["closed", "closed"]


def test_a_full_file_ends_with_a_word_and_totals_go_on(tmp_path):
    tracer = traced(tmp_path, [("sample", RESOLUTION_NS), ("play", RESOLUTION_NS)] * 100, limit_bytes=200)
    tracer.write()
    tracer.write()
    size = trace_path(tmp_path, "actor-0").stat().st_size
    for _ in range(1000):
        tracer.span("rollouts", "rollout", 1, 2)
    tracer.write()
    (life,) = read_timelines(tmp_path).lives
    assert "full: trace.limit_mb" in life.ended
    assert trace_path(tmp_path, "actor-0").stat().st_size < size + 500
    tracer.close()
    assert tracer.seconds()["sample"] > 0


@given(
    st.integers(-(10**12), 10**12),
    st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)), min_size=1, max_size=80),
)
def test_offset_is_within_half_the_least_delay(true, trips):
    offset = ClockOffset()
    for number, (there, back) in enumerate(trips):
        sent = 10**13 + number * 10**9
        offset.observe(sent, sent + there + true, sent + there + true + 500, sent + there + 500 + back)
    _, found, delay = offset.best
    assert delay == min(sum(trip) for trip in trips[-64:])
    assert abs(found - true) <= delay // 2 + 1


def test_offset_ignores_what_was_never_echoed():
    offset = ClockOffset()
    offset.observe(0, 5, 6, 7)
    assert offset.best is None


def test_code_that_knows_no_tracer_names_its_phases_and_waits_leave_no_trace_behind(tmp_path):
    tracer = traced(tmp_path, [("load", RESOLUTION_NS)])
    phase = tracer.phases(3)
    clock = tracer._clock
    phase("forward")
    clock.now += RESOLUTION_NS
    with pytest.raises(ValueError), tracer.within("send", 2):
        clock.now += RESOLUTION_NS
        raise ValueError
    clock.now += RESOLUTION_NS
    tracer.close()
    (life,) = read_timelines(tmp_path).lives
    drawn = [(s.state, s.step) for s in life.slices]
    assert drawn == [("load", -1), ("forward", 3), ("send", 2), ("forward", 3)]


def test_curves_are_kept_where_they_change_and_not_too_often(tmp_path):
    tracer = traced(tmp_path, [("sample", 1)])
    assert tracer.wants_levels
    tracer.levels(rows=3, grants=0)
    assert not tracer.wants_levels
    tracer._clock.now += LEVELS_EVERY_NS
    assert tracer.wants_levels
    tracer.levels(rows=4, grants=0)
    tracer.close()
    (life,) = read_timelines(tmp_path).lives
    assert [values for _, values in life.levels] == [{"rows": 3, "grants": 0}, {"rows": 4}]


def test_spans_from_threads_that_are_written_meanwhile_all_arrive(tmp_path):
    tracer = traced(tmp_path, [("sample", 1)])
    each = 2000

    def speak(number):
        for index in range(each):
            tracer.span("weights", "receive", index, index + 1, version=number)

    threads = [threading.Thread(target=speak, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        tracer.write()
    for thread in threads:
        thread.join()
    tracer.close()
    (life,) = read_timelines(tmp_path).lives
    assert len(life.spans) + tracer.dropped == 4 * each


def test_a_killed_process_leaves_the_state_that_it_was_in(tmp_path):
    tracer = traced(tmp_path, [("sample", RESOLUTION_NS), ("idle.credits", 10 * RESOLUTION_NS)])
    tracer.write()  # and then nothing more
    (life,) = read_timelines(tmp_path).lives
    assert life.ended == "" and life.slices[-1].state == "idle.credits"
    assert life.slices[-1].end - life.slices[-1].start == 10 * RESOLUTION_NS
    assert life.seconds()["idle.credits"][0] == 10 * RESOLUTION_NS / 1e9
    tracer.close()


def test_a_run_without_files_or_room_for_them_goes_on(tmp_path, caplog):
    run = RunSection(name="run", dir=str(tmp_path))
    with open_tracer(RunConfig(run=run, trace=TraceSection(spans=False)), "actor-0", "actor") as tracer:
        tracer.state("sample")
    assert not (tmp_path / "run").exists() and not tracer.on and "sample" in tracer.seconds()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trace").write_text("in the way")
    with open_tracer(RunConfig(run=run), "actor-0", "actor") as tracer:
        tracer.state("sample")
    assert not tracer.on and "no timeline of this process" in caplog.text
    (tmp_path / "run" / "trace").unlink()
    with pytest.raises(ValueError), open_tracer(RunConfig(run=run), "actor-0", "actor") as tracer:
        raise ValueError("of its own")
    assert read_timelines(tmp_path / "run").lives[0].ended == "ValueError: of its own"


def test_every_state_is_named_once_and_explained():
    for states in STATES.values():
        assert {"start", "end"} <= set(states) and all(states.values())
        assert any(name.startswith(IDLE) for name in states)


def test_a_full_file_is_told_the_totals_once_a_minute_and_at_the_end(tmp_path):
    tracer = traced(tmp_path, [("sample", RESOLUTION_NS), ("play", RESOLUTION_NS)] * 100, limit_bytes=200)
    tracer.write()
    size = trace_path(tmp_path, "actor-0").stat().st_size
    for _ in range(59):
        tracer._clock.now += 10**9
        tracer.write()
    assert trace_path(tmp_path, "actor-0").stat().st_size == size
    tracer._clock.now += 10**9
    tracer.write()
    assert trace_path(tmp_path, "actor-0").stat().st_size > size
    tracer._clock.now += 10**9
    tracer.close()
    (life,) = read_timelines(tmp_path).lives
    assert life.totals[-1][1]["play"][0] == 100 * RESOLUTION_NS + 61 * 10**9


STRANGE = [
    ["s", 5, 1, 2, "x"], ["x", "weights", "load", 1, 2, 7], ["x", "groups", "group", 1, 2, {"group": [1]}],
    ["i", "step", 3, ["step", 3]], ["i", "step", 3, {"step": "x", "what": "committed"}],
    ["i", "step", 3, {"step": 1, "groups": [[]]}], ["n", 3, 9], ["n", 3, {"rows": "x"}],
    ["t", 3, {"sample": "x"}, []], ["t", 3, {}, [["s"]]], ["y", 3, 5], ["y", 3, {"decode": {"4": [1, 2]}}],
    ["p", "x", 3], ["c", 1, 2], ["e", 3], ["i", "step", 3, {7: 1}],
]  # fmt: skip


def test_strange_records_are_counted_and_cost_nothing_else(tmp_path):
    tracer = traced(tmp_path, [("sample", RESOLUTION_NS), ("play", RESOLUTION_NS)])
    tracer.instant("step", step=3, what="committed", groups=[8])
    tracer.levels(rows=3.5)
    tracer.tally("decode", 4, 100, 90, 4)
    tracer.offset.observe(10, 15, 16, 12)
    tracer._held += STRANGE
    tracer._hold(["z", "of a later croupier"])
    tracer.close()
    found = read_timelines(tmp_path)
    (life,) = found.lives
    assert [s.state for s in life.slices] == ["sample", "play"] and life.levels[0][1] == {"rows": 3.5}
    assert [one.args for one in life.instants] == [{"step": 3, "what": "committed", "groups": [8]}]
    assert life.tallies == {"decode": {4: [1, 100, 90, 4]}} and life.ended == "closed"
    (note,) = found.notes
    assert f"{len(STRANGE)} of " in note and "records of a life are not as they should be" in note


def test_a_header_that_names_nobody_costs_its_life_alone(tmp_path):
    for _ in range(2):
        traced(tmp_path, [("sample", RESOLUTION_NS)]).close()
    path = trace_path(tmp_path, "actor-0")
    path.write_bytes(path.read_bytes().replace(b"\xa4role\xa5actor", b"\xa4role\x95\x01\x01\x01\x01\x01", 1))
    found = read_timelines(tmp_path)
    assert len(found.lives) == 1 and "does not say whose it is" in found.notes[0]


def test_a_day_of_totals_takes_no_more_room_than_an_hour():
    day = Series()
    for second in range(86_400):
        day.add(second * 10**9, second)
    kept = [second for _, second in day.rows]
    assert MOST_KEPT // 2 < len(kept) <= MOST_KEPT and kept[-1] == 86_399
    assert max(b - a for a, b in itertools.pairwise(kept)) <= 2 * 86_400 // MOST_KEPT * 2
    short = Series()
    for at in range(MOST_KEPT):
        short.add(at, at)
    assert len(short.rows) == MOST_KEPT
