"""A run as one trace: one clock, tracks without overlaps, arrows that hold together, and whatever can be read."""

import gzip
import itertools
import json

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.trace import MILESTONES, Tracer, trace_path
from tests.chrome import check_trace, load_trace
from tools.clocks import DRIFT, ClockMap, Exchange
from tools.perfetto import lanes
from tools.timelines import Span, read_timelines
from tools.trace import main

MS = 1_000_000
HOUR = 3600 * 1000 * MS


class Clock:
    """A process's own, ``off`` from the run's."""

    def __init__(self, off=0):
        self.off, self.run = off, 0

    def __call__(self):
        return self.run + 10**13 + self.off


class Made:
    """A run of two steps, written by hand: group 8 is followed, group 9 is not."""

    def __init__(self, directory, actor_off=0):
        self.directory, self.clocks, self.tracers = directory, {}, {}
        for name, role, rank in (
            ("broker", "broker", 0), ("learner", "learner", 0), ("learner.1", "learner", 1),
            ("replica-0", "replica", 0), ("actor-10", "actor", 0), ("actor-9", "actor", 0),
        ):  # fmt: skip
            clock = self.clocks[name] = Clock(actor_off if role == "actor" else 0)
            path = trace_path(directory, name)
            self.tracers[name] = Tracer(path, name, role, rank, clock=clock, cpu_clock=clock)

    def at(self, name, ms):
        """``name``'s tracer, at that moment of the run."""
        self.clocks[name].run = round(ms * MS)
        return self.tracers[name]

    def play(self):
        own = self.clocks["actor-9"]
        for sibling, (began, ended) in enumerate(((1, 9), (1, 12))):
            self.at("actor-9", ended).span(
                "rollouts", "rollout", 10**13 + own.off + began * MS, own(), group=8, sibling=sibling, tokens=4
            )
        base = 10**13
        broker = self.tracers["broker"]
        broker.span("groups", "group", base, base + 13 * MS, group=8, actor="actor-9")
        broker.span("groups", "queued", base + 13 * MS, base + 15 * MS, group=8, step=0)
        for step in (0, 1):
            for number, what in enumerate(MILESTONES):
                args = {"groups": [8] if step == 0 else []} if what == "assembled" else {}
                self.at("broker", 14 + 30 * step + 2 * number).instant("step", step=step, what=what, **args)
        for state, ms in (("idle.requests", 1), ("score", 19), ("idle.requests", 20), ("score", 49), ("end", 51)):
            self.at("replica-0", ms).state(state)
        for rank in ("learner", "learner.1"):
            for step in (0, 1):
                for number, state in enumerate(("idle.shard", "load", "forward", "backward", "optimizer")):
                    self.at(rank, 30 * step + (23 + number if number else 0)).state(state, step)
            self.at(rank, 59).state("idle.end")
        for ms in range(0, 40, 4):
            self.at("actor-9", ms).state("sample" if ms % 8 else "idle.credits")
            self.at("actor-9", ms).levels(rows=ms)
        return self

    def end(self):
        for name, tracer in self.tracers.items():
            self.at(name, 60)
            tracer.close()
        return self.directory


def drawn(directory, *arguments):
    assert main([str(directory), *arguments]) == 0
    return load_trace(directory / "trace.json.gz")


def hops_of(trace, name):
    where = {
        (e["pid"], e["tid"]): e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"
    }  # fmt: skip
    process = {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    flow = [e for e in trace["traceEvents"] if e["ph"] in "stf" and e["name"] == name]
    return [(process[e["pid"]], where[e["pid"], e["tid"]]) for e in flow]


def test_a_run_is_drawn_from_the_broker_down_and_followed_through(tmp_path, capsys):
    trace = drawn(Made(tmp_path).play().end())
    rows = check_trace(trace)
    names = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"]
    assert names == ["broker", "learner", "learner.1", "replica-0", "actor-9", "actor-10"]
    for sibling in (0, 1):
        assert hops_of(trace, f"trajectory 8.{sibling}") == [
            ("broker", "groups"), ("actor-9", f"rollouts {sibling + 1}"), ("broker", "groups"), ("broker", "steps"),
            ("replica-0", "main thread"), ("broker", "steps"), ("learner", "main thread"),
        ]  # fmt: skip
    stages = [name for _, _, name in rows["broker", "steps"]]
    assert stages[:2] == ["step 0", "waits for the version that scores it"] and stages.count("is thinned") == 2
    idle = [e for e in trace["traceEvents"] if e["ph"] == "X" and e["cat"] == "idle"]
    assert {e["name"] for e in idle} >= {"idle: shard", "idle: credits", "idle: requests", "idle: end"}
    assert all(e["cname"] == "grey" and e["args"]["what"] for e in idle)
    curve = [e["args"][""] for e in trace["traceEvents"] if e["ph"] == "C"]
    assert curve and curve == sorted(curve)
    told = capsys.readouterr().out
    assert "2 trajectories followed" in told and "ui.perfetto.dev" in told


@pytest.mark.parametrize("off", [HOUR, -HOUR])
def test_a_clock_that_is_off_by_an_hour_changes_nothing(tmp_path, off, capsys):
    right = check_trace(drawn(Made(tmp_path / "right").play().end()))
    made = Made(tmp_path / "wrong", actor_off=off).play()
    for name in ("actor-9", "actor-10"):
        tracer, now = made.at(name, 50), 10**13 + 50 * MS
        tracer.offset.observe(now + off, now + 2 * MS, now + 3 * MS, now + off + 5 * MS)  # 2 ms there and back
    wrong = check_trace(drawn(made.end()))
    assert wrong == right
    told = capsys.readouterr().out
    assert f"{-off / MS:+,.2f} ms" in told and "2.00 ms" in told


def test_only_the_steps_asked_for_are_drawn_with_what_led_to_them(tmp_path):
    directory = Made(tmp_path).play().end()
    whole = drawn(directory)
    first, second = (drawn(directory, "--from-step", s, "--to-step", s) for s in "01")
    for trace in (first, second):
        check_trace(trace)
        assert len(trace["traceEvents"]) < len(whole["traceEvents"])
    assert hops_of(first, "trajectory 8.0") == hops_of(whole, "trajectory 8.0")
    assert not hops_of(second, "trajectory 8.0")
    assert main([str(directory), "--from-step", "7"]) == 2


def test_a_plain_file_where_it_is_not_to_be_compressed(tmp_path):
    directory = Made(tmp_path / "run").play().end()
    assert main([str(directory), "--out", str(tmp_path / "there" / "trace.json")]) == 0
    check_trace(json.loads((tmp_path / "there" / "trace.json").read_text()))


# ---- bad input --------------------------------------------------------------------------------------


def test_every_cut_of_every_timeline_is_drawn(tmp_path, capsys):
    directory = Made(tmp_path).play().end()
    files = sorted((directory / "trace").glob("*.trace"))
    whole = {path: path.read_bytes() for path in files}
    for share in (0.97, 0.8, 0.5, 0.3):
        for path, content in whole.items():
            path.write_bytes(content[: int(len(content) * share)])
        check_trace(drawn(directory))
    assert "cut short, or still running" in capsys.readouterr().out


def test_a_run_that_goes_on_is_drawn_up_to_its_last_second(tmp_path):
    made = Made(tmp_path).play()
    for tracer in made.tracers.values():
        tracer.write()
    rows = check_trace(drawn(tmp_path))
    assert rows["learner", "main thread"][-1][2] == "optimizer"  # idle.end has only begun
    for tracer in made.tracers.values():
        tracer.close()


def test_what_cannot_be_read_is_named_beside_what_can(tmp_path, capsys):
    directory = Made(tmp_path).play().end()
    header = {"format": 99, "process": "actor-7", "role": "actor", "clock_ns": 5}
    (directory / "trace" / "actor-7.trace").write_bytes(msgpack.packb(["h", header]))
    (directory / "trace" / "learner.step3.torch.json.gz").write_bytes(gzip.compress(b'{"traceEvents": [')[:-4])
    check_trace(drawn(directory))
    told = " ".join(capsys.readouterr().out.split())
    assert "format 99, this croupier reads 1" in told and "learner.step3.torch.json.gz: cannot be read" in told


@pytest.mark.parametrize("content", [None, b"", b"not a timeline"])
def test_nothing_at_all_is_said_and_fails(tmp_path, content, capsys):
    (tmp_path / "logs").mkdir()
    if content is not None:
        (tmp_path / "trace").mkdir()
        (tmp_path / "trace" / "actor-0.trace").write_bytes(content)
    assert main([str(tmp_path)]) == 2
    assert "nothing to draw" in capsys.readouterr().out
    assert not (tmp_path / "trace.json.gz").exists()


# ---- the parts --------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)), max_size=40))
def test_lanes_hold_everything_without_overlap_and_are_as_few_as_can_be(times):
    spans = [Span("t", "n", start, start + lasts, {}) for start, lasts in times]
    rows = lanes(spans)
    assert sorted(id(s) for row in rows for s in row) == sorted(map(id, spans))
    assert all(a.end <= b.start for row in rows for a, b in itertools.pairwise(row))
    moments = [s.start for s in spans if s.end > s.start]
    assert len(rows) >= max((sum(s.start <= at < s.end for s in spans) for at in moments), default=0)
    solid = [s for s in spans if s.end > s.start]
    assert len(lanes(solid)) == max((sum(s.start <= at < s.end for s in solid) for at in moments), default=0)


@settings(max_examples=60)
@given(
    st.floats(-DRIFT, DRIFT).map(lambda drift: drift * 0.9),
    st.integers(-HOUR, HOUR),
    st.lists(st.tuples(st.integers(1, 3 * HOUR), st.integers(2, 4 * MS), st.floats(0, 1)), min_size=1, max_size=60),
)
def test_a_drifting_clock_is_followed_to_within_what_the_exchanges_know(drift, off, exchanges):
    def broker(own):
        return own + off + round(own * drift)

    known = []
    for at, delay, there in exchanges:  # the offset is wrong by up to half the delay
        known.append(Exchange(at, broker(at) - at + round((there - 0.5) * delay), delay))
    clock = ClockMap(known)
    for at, _, _ in exchanges:
        near = min(e.delay / 2 + DRIFT * abs(e.at - at) for e in known)
        assert abs(clock(at) - broker(at)) <= 3 * near + 2
    moments = sorted(at for at, _, _ in exchanges)
    if len(known) > 1 and moments[-1] - moments[0] > 1000 * max(e.delay for e in known):
        assert clock(moments[0]) < clock(moments[-1])


def test_clocks_without_exchanges_are_the_same_and_the_surest_is_named():
    assert ClockMap()(5) == 5 and ClockMap().best is None
    clock = ClockMap([Exchange(0, 100, 50), Exchange(10, 90, 8), Exchange(20, 300, 400)])
    assert clock.best.offset == 90 and not clock.bends and clock(15) == 105


def record_of_torch(directory):
    """Of the learner's step 0, as torch.profiler writes it, by a clock of its own."""
    own = 10**13  # the learner's clock at the run's beginning, nanoseconds
    profiler = 5 * 10**15 - own  # what its clock is ahead

    def event(ms, lasts, name, category="cpu_op", tid=4242, pid=4241):
        return {"ph": "X", "ts": (own + ms * MS + profiler) / 1000, "dur": lasts * 1000, "name": name, "cat": category,
                "pid": pid, "tid": tid, "args": {"Ev Idx": 1, "Input Dims": [[2, 3]]}}  # fmt: skip

    marks = [event(13 + lag, 0.01, f"croupier.clock {own + 13 * MS}", "user_annotation") for lag in (0.5, 0.2, 0.0)]
    events = [
        *marks, event(14, 2, "aten::mm"), event(14.5, 1.5004, "aten::inner"),
        event(15, 3, "gemm", "kernel", 7, 0), event(13, 40, "whole", "Trace", "PyTorch Profiler", "Spans"),
        {**event(14.5, 0, "ac2g"), "ph": "s", "id": 3, "cat": "ac2g"},
        {**event(15, 0, "ac2g", tid=7, pid=0), "ph": "f", "bp": "e", "id": 3, "cat": "ac2g"},
        {**event(15, 0, "ac2g"), "ph": "s", "id": 4, "cat": "ac2g"},  # its kernel was not recorded
    ]  # fmt: skip
    path = directory / "trace" / "learner.step0.torch.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))


def test_records_of_torch_lie_within_the_step_that_they_are_of(tmp_path, capsys):
    directory = Made(tmp_path).play().end()
    record_of_torch(directory)
    rows = check_trace(drawn(directory))
    (mm, inner), (kernel,) = rows["learner", "torch thread 4242"], rows["learner", "GPU 0 stream 7"]
    assert mm == (14 * MS, 16 * MS, "aten::mm") and inner == (14_500_000, 16 * MS, "aten::inner")
    assert kernel == (15 * MS, 18 * MS, "gemm")
    assert "3 operations of torch.profiler" in capsys.readouterr().out


def test_steps_that_were_thinned_again_are_drawn_by_their_last_thinning(tmp_path):
    with Tracer(
        trace_path(tmp_path, "broker"), "broker", "broker", clock=(clock := Clock()), cpu_clock=clock
    ) as broker:
        for ms, what, again in (
            (1, "ready", {}), (2, "assembled", {}), (4, "scored", {}), (5, "decided", {}),
            (8, "scored", {"again": True}), (9, "decided", {"again": True}), (10, "served", {}), (12, "committed", {}),
        ):  # fmt: skip
            clock.run = ms * MS
            broker.instant("step", step=0, what=what, **again)
    assert len(read_timelines(tmp_path).lives) == 1
    rows = check_trace(drawn(tmp_path))
    scored = next(s for s in rows["broker", "steps"] if s[2] == "is scored")
    assert scored[1] - scored[0] == 6 * MS


def test_a_file_that_cannot_be_written_is_said_before_anything_is_drawn(tmp_path, capsys):
    made = Made(tmp_path / "run")
    made.play()
    made.end()
    (tmp_path / "file").write_text("in the way")
    for out, words in (("run", "is a directory"), ("file/trace.json", "cannot be made")):
        assert main([str(tmp_path / "run"), "--out", str(tmp_path / out)]) == 2
        shown = capsys.readouterr().out
        assert words in shown and "clock off by" not in shown


def test_what_json_does_not_know_is_drawn_as_words(tmp_path):
    with Tracer(trace_path(tmp_path, "actor-0"), "actor-0", "actor") as tracer:
        tracer.span("weights", "load", tracer.now(), tracer.now() + 20, digest=b"x")
    assert main([str(tmp_path), "--out", str(tmp_path / "x.json")]) == 0
    drawn = json.loads((tmp_path / "x.json").read_text())["traceEvents"]
    assert [event["args"]["digest"] for event in drawn if event["name"] == "load"] == ["b'x'"]
