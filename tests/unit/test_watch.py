"""tools.watch without a browser: what it reads, how it stays small, and that every frame fits."""

import fcntl
import io
import itertools
import json
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import termios
import time
from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from rich.cells import cell_len
from rich.console import Console

from common.config import MEGABYTE
from common.process import StopFlag
from common.trace import IDLE, STATES
from tests.made_run import HOSTILE, MadeRun
from tools.watch.__main__ import main
from tools.watch.bins import LAGS, Bins
from tools.watch.curves import bar, short, sparkline, stacked
from tools.watch.follow import Follower
from tools.watch.history import History
from tools.watch.palette import GREY, WAITING, WORK, colour
from tools.watch.screen import frame
from tools.watch.shares import Window, split_shard
from tools.watch.tail import Tail
from tools.watch.terminal import watch_lines
from tools.watch.view import make_view


def test_the_queue_and_its_bound_are_told_in_the_megabytes_of_broker_queue_mb(tmp_path):
    run = MadeRun(tmp_path / "run")
    status = run.status() | {"queue_bytes": 64 << 20, "queue_limit_bytes": int(256.0 * MEGABYTE)}
    view = make_view("x", status, History(), Window())
    assert (view.queue_mb, view.queue_limit_mb) == (64.0, 256.0)


# ---- the tail -----------------------------------------------------------------------------------


def drain(tail, limit=1 << 20):
    found = tail.read(limit)
    while tail.behind:
        found += tail.read(limit)
    return found


@settings(max_examples=25)
@given(
    st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"")), max_size=12),
    st.lists(st.integers(0, 300), max_size=6),
    st.integers(1, 64),
)
def test_every_whole_line_is_read_once_however_it_is_written(tmp_path_factory, lines, cuts, limit):
    path = tmp_path_factory.mktemp("tail") / "metrics.jsonl"
    data, tail, found = b"".join(line + b"\n" for line in lines), Tail(path), []
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for start, end in itertools.pairwise(edges):
        with path.open("ab") as file:
            file.write(data[start:end])
        found += drain(tail, limit)
        written = data[:end]
        assert found == written[: written.rfind(b"\n") + 1].split(b"\n")[:-1]  # a torn line waits
    assert tail.restarts == 0


@settings(max_examples=25)
@given(st.integers(0, 60), st.binary(min_size=1, max_size=50), st.booleans())
def test_a_file_that_was_cut_or_replaced_is_read_from_its_start(tmp_path_factory, kept, new, replaced):
    path = tmp_path_factory.mktemp("tail") / "metrics.jsonl"
    path.write_bytes(b"old 1\nold 2\n" * 10)
    tail = Tail(path)
    drain(tail)
    fresh = b"\x00" + new.replace(b"\n", b"") + b"\n"  # begins unlike the old
    if replaced:
        path.unlink()
    path.write_bytes(fresh + b"x\n" * kept)
    assert drain(tail) == [fresh[:-1], *[b"x"] * kept]
    assert tail.restarts == 1


def test_lines_far_too_long_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.watch.tail.LINE_LIMIT", 100)
    path = tmp_path / "m"
    path.write_bytes(b"a\n" + b"x" * 1000)
    tail = Tail(path)
    assert drain(tail, 50) == [b"a"]
    with path.open("ab") as file:
        file.write(b"x" * 500 + b"\nb\n")
    assert drain(tail, 50) == [b"b"] and tail.too_long == 1


# ---- bins ---------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(2, 9), st.integers(1, 30))
def test_bins_keep_extremes_means_sums_and_the_last_level(values, limit, stride):
    bins = Bins(limit)
    for place, value in enumerate(values):
        bins.add(place * stride, {"v": value}, {"n": 1.0}, {"time": float(place)}, {place % 3: 2})
    assert len(bins.bins) <= limit
    assert max(one.means["v"].high for one in bins.bins) == max(values)
    assert min(one.means["v"].low for one in bins.bins) == min(values)
    assert sum(one.means["v"].count for one in bins.bins) == sum(one.sums["n"] for one in bins.bins) == len(values)
    for one in bins.bins:
        own = values[one.first // stride : one.last // stride + 1]
        assert one.means["v"].mean == pytest.approx(sum(own) / len(own), abs=1e-6)
        assert one.levels["time"] == one.last // stride and one.first // bins.width == one.index
    lags = sum((one.lags for one in bins.bins), Counter())
    assert sum(lags.values()) == 2 * len(values)


def test_a_resumed_run_takes_back_what_came_after(tmp_path):
    bins = Bins()
    for step in [*range(10), *range(4, 7)]:
        bins.add(step, {"v": float(step)})
    assert [x for x, _ in bins.mean("v")] == list(range(7)) and bins.rewound == 1
    bins.add(7, {}, lags={3000: 5})
    assert bins.bins[-1].lags == {LAGS: 5}


def test_many_steps_stay_small():
    bins = Bins(512)
    for step in range(30_000):
        bins.add(step, {"v": 100.0 if step == 23_456 else 0.0})
    assert 256 <= len(bins.bins) <= 512
    assert max(one.means["v"].high for one in bins.bins) == 100.0


# ---- what lines say -----------------------------------------------------------------------------


def test_receipts_moves_and_alerts(tmp_path):
    run = MadeRun(tmp_path / "r")
    run.advance(61)
    run.alert("too little entropy")
    view = Follower(run.directory).look()
    assert view.step == 61 and view.budget == 3 and view.budget_auto
    assert [(m.step, m.before, m.budget) for m in view.moves] == [(60, 2, 3)]
    assert view.receipts[0].step == 60 and len(view.receipts) == 50
    assert next(r for r in view.receipts if r.step == 40).dropped == {"stale": 1}
    assert view.raised == ["too little entropy"] and view.alerts[0].sign == "entropy"
    assert view.eta_s == pytest.approx(0.25 * (200 - 61))
    shard = [
        s for role in view.roles if role.role == "learner" for s in role.shares if s.state.startswith("idle.shard")
    ]
    assert {s.state for s in shard} == {"idle.shard:rollouts", "idle.shard:scoring"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from([
    "phase", "step", "steps", "version", "time", "started_at", "evaluations", "reward", "lag_mean", "peers", "fleet",
    "states", "parked", "alerts", "actors", "queue_groups", "queue_bytes", "queue_limit_bytes", "best",
    "trajectories_dropped", "staleness_budget", "kind", "lag_histogram", "acceptance", "dropped", "value", "text",
])  # fmt: skip


@settings(max_examples=25)
@given(
    st.dictionaries(KEYS, JSON, max_size=12),
    st.lists(
        st.tuples(st.sampled_from(["step", "eval", "budget", "alert", "odd"]), st.dictionaries(KEYS, JSON)), max_size=4
    ),
    st.integers(60, 200),
    st.integers(1, 70),
)
def test_whatever_a_run_of_another_version_says_there_is_a_frame_that_fits(status, lines, width, height):
    history = History()
    history.take([json.dumps({**line, "kind": kind}, default=str).encode() for kind, line in lines])
    view = make_view("other", status, history, Window())
    for line in (drawn := frame(view, history, width, height, "q quits", filling=True)):
        assert line.cell_len == width and "\n" not in line.plain and "\x1b" not in line.plain
    assert len(drawn) <= height


@pytest.mark.parametrize("width", [60, 61, 79, 80, 103, 104, 150, 200])
@pytest.mark.parametrize("height", [5, 24, 60])
def test_a_huge_run_fits_any_terminal(huge, width, height):
    view, history = huge
    drawn = frame(view, history, width, height, "q quits", filling=True)
    assert len(drawn) == height and {line.cell_len for line in drawn} == {width}
    if height >= 24:
        said = "\n".join(line.plain for line in drawn)
        assert "Reward" in said and "credits" in said and "Alerts" in said


@pytest.fixture(scope="module")
def huge(tmp_path_factory):
    run = MadeRun(
        tmp_path_factory.mktemp("huge") / ("長い名前" * 20), 10**9, [HOSTILE, "a\x1b[31m", *map(str, range(3000))]
    )
    run.advance(700, status=False)
    run.alert("x" * 3000)
    follower = Follower(run.directory)
    view = follower.look()
    while not follower.caught_up:
        view = follower.look()
    assert view.hidden == 3002 + 2 - 64
    return view, follower.history


def test_a_wide_name_is_cut_by_its_cells():
    view = make_view("長" * 200, {"phase": "運行" * 100}, History(), Window())
    assert {line.cell_len for line in frame(view, History(), 60, 10)} == {60}


# ---- shares -------------------------------------------------------------------------------------


def test_shares_are_of_the_last_seconds_and_survive_a_restart():
    window = Window(10.0)
    for t in range(30):
        busy = min(t, 20)
        window.add(float(t), {"a": {"sample": float(busy), "idle.credits": float(t - busy), "tokens": 100.0 * t}})
    assert window.of("a") == {"sample": 1.0, "idle.credits": 9.0, "tokens": 1000.0}
    assert window.rate("a", "tokens") == 100.0
    window.add(30.0, {"a": {"sample": 0.5}})  # began anew
    assert window.of("a") == {"sample": 0.5} and window.rate("a", "tokens") is None and window.of("none") == {}


def test_the_wait_for_a_shard_is_split_by_its_causes():
    split = split_shard({"forward": 3.0, "idle.shard": 2.0}, {"rollouts": 3.0, "scoring": 1.0})
    assert split == {"forward": 3.0, "idle.shard:rollouts": 1.5, "idle.shard:scoring": 0.5}
    assert split_shard({"idle.shard": 2.0}, {}) == {"idle.shard": 2.0}


# ---- characters ---------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.lists(st.floats(0, 1), max_size=6), st.integers(1, 40))
def test_stacked_bars_are_as_wide_as_asked(shares, width):
    total = sum(shares) or 1.0
    assert stacked([(share / total, "red", "█") for share in shares], width).cell_len == width
    assert all(cell_len(bar(share, width)) <= width for share in shares)


def test_small_drawings():
    assert sparkline([0.0, 0.5, 1.0], 40) == "▁▅█" and sparkline([2.0, 2.0], 3) == "▁▁" and sparkline([], 3) == ""
    assert bar(0.5, 3) == "█▌"
    assert [short(v) for v in (None, 0.0, 0.5, 12.34, 1234.0, 3e-7, 2.5e9)] == [
        "–", "0.000", "0.500", "12.3", "1,234", "3e-07", "2e+09",
    ]  # fmt: skip


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("role", STATES)
def test_no_two_kinds_of_work_of_a_role_look_alike(role):
    work = [colour(state) for state in STATES[role] if not state.startswith(IDLE) and state not in ("start", "end")]
    assert len(set(work)) == len(work) and GREY not in work


@pytest.mark.parametrize("ink", sorted({*WORK, *WAITING.values(), GREY}))
@pytest.mark.parametrize("ground", ["#ffffff", "#0f151d"])
def test_states_stand_out_from_light_and_dark(ink, ground):
    high, low = sorted((luminance(ink), luminance(ground)), reverse=True)
    assert (high + 0.05) / (low + 0.05) >= 3


# ---- the life of a directory --------------------------------------------------------------------


def test_nothing_yet_is_said_and_once_exits_with_two(tmp_path, capsys):
    assert main([str(tmp_path / "none"), "--once"]) == 2
    assert "waiting for the run directory" in capsys.readouterr().out
    (tmp_path / "nine").mkdir()
    (tmp_path / "nine" / "config.yaml").touch()
    assert main([str(tmp_path / "none"), "--once"]) == 2
    assert "there are others, such as" in capsys.readouterr().out.replace("\n", "")
    assert main([str(tmp_path), "--once"]) == 2
    assert "status.json, which the broker writes" in capsys.readouterr().out.replace("\n", "")


def test_a_finished_run_shows_its_end(tmp_path, capsys):
    run = MadeRun(tmp_path / "r", 30)
    run.advance(30)
    run.write_status("finished")
    assert main([str(run.directory)]) == 0  # no terminal: plain lines, until the end
    assert capsys.readouterr().out.startswith("finished  step 30/30")
    assert main([str(run.directory), "--once"]) == 0
    assert "Time since the broker's start" in capsys.readouterr().out


def test_a_run_that_is_deleted_and_one_that_takes_its_name(tmp_path):
    run = MadeRun(tmp_path / "r")
    run.advance(20)
    follower = Follower(run.directory)
    assert follower.look().step == 20
    shutil.rmtree(run.directory)
    gone = follower.look()
    assert (gone.phase, gone.step) == ("gone", 20) and "was removed" in gone.words
    epoch, other = follower.epoch, MadeRun(tmp_path / "r", run_id="other")
    other.advance(3)
    view = follower.look()
    assert (view.step, len(follower.history.steps.bins)) == (3, 3) and follower.epoch > epoch


def test_damage_is_counted_and_the_rest_goes_on(tmp_path):
    run = MadeRun(tmp_path / "r")
    run.advance(5)
    with (run.directory / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st{"kind": "step"}\n\x00\x00\n[]\n')
    (run.directory / "status.json").write_text("{torn")
    run.advance(5, status=False)
    follower = Follower(run.directory)
    view = follower.look()
    assert len(follower.history.receipts) == 10 and follower.history.damaged == 3
    assert any("status.json" in note for note in view.notes) and any("3 damaged" in note for note in view.notes)


def test_a_broker_that_fell_silent_is_told(tmp_path):
    run = MadeRun(tmp_path / "r")
    run.advance(5)
    os.utime(run.directory / "status.json", (time.time() - 100, time.time() - 100))
    view = Follower(run.directory).look()
    assert view.lost and re.search(r"no word from the broker for 1:4\d", frame(view, History(), 80)[0].plain)


class Writing(Follower):
    """A run that makes a step whenever it is looked at, until its ``last``."""

    def __init__(self, run, last, end):
        super().__init__(run.directory)
        self.run, self.last, self.end = run, last, end

    def look(self, seconds=0.3):
        if self.run.step < self.last:
            self.run.advance(1)
        elif self.end:
            self.run.write_status(self.end)
        return super().look(seconds)


@pytest.mark.parametrize(("end", "code"), [("finished", 0), ("", 1)])
def test_plain_lines_end_with_the_run_or_once_nobody_writes(tmp_path, end, code):
    said, run = io.StringIO(), MadeRun(tmp_path / "r", 4)
    assert watch_lines(Writing(run, 4, end), Console(file=said, width=200), StopFlag(), silence_s=0.1) == code
    lines = said.getvalue().splitlines()
    assert [line.split()[1] for line in lines[:4]] == ["1/4", "2/4", "3/4", "4/4"]
    assert ("given up: nobody wrote status.json or metrics.jsonl" in lines[-1]) == (code == 1)


def test_a_run_that_was_killed_or_never_began_does_not_hold_a_pipe(tmp_path, capsys):
    MadeRun(tmp_path / "r").advance(3)
    os.utime(tmp_path / "r" / "status.json", (time.time() - 900, time.time() - 900))
    assert main([str(tmp_path / "r"), "--silence-s", "0.1"]) == 1
    assert re.search(r"no word from the broker for 15:0\d", capsys.readouterr().out)
    assert main([str(tmp_path / "none"), "--silence-s", "0.1"]) == 1
    assert "for 0.1 s (--silence-s)" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["other"], "one run is watched at a time, not 2: give other a terminal"),
        (["--silence-s", "nan"], "nan: must"),
        (["--once", "--web"], "--once --web: a page is served until Ctrl-C"),
    ],
)
def test_what_is_not_meant_is_refused_in_words(tmp_path, capsys, words, said):
    assert main([str(tmp_path), *words]) == 2
    assert said in capsys.readouterr().out.replace("\n", " ")


# ---- a real terminal ----------------------------------------------------------------------------


STYLE = re.compile(r"\x1b\[[0-9;]*m")


class Terminal:
    """``tools.watch`` on a pseudo-terminal."""

    def __init__(self, *arguments, size=(24, 80)):
        self.master, slave = pty.openpty()
        self.resize(*size)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tools.watch", *map(str, arguments)],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env={k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm-256color"},
        )  # fmt: skip
        os.close(slave)
        self.said = ""

    def resize(self, rows, columns):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def until(self, what, seconds=60.0):
        deadline = time.monotonic() + seconds
        while what not in STYLE.sub("", self.said):
            assert time.monotonic() < deadline, self.said[-2000:]
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.said += os.read(self.master, 65536).decode(errors="replace")
                except OSError:
                    break
        assert what in STYLE.sub("", self.said)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def test_a_screen_follows_survives_a_resize_and_quits_by_key(tmp_path, request):
    run = MadeRun(tmp_path / "r")
    run.advance(10)
    terminal = Terminal(run.directory)
    request.addfinalizer(terminal.close)
    terminal.until("step 10/200")
    run.advance(10)
    terminal.until("step 20/200")
    terminal.said = ""
    terminal.resize(40, 140)
    terminal.until("─   ")  # two columns beside each other
    os.write(terminal.master, b"q")
    terminal.until("\x1b[?1049l")  # the screen of before is back
    assert terminal.process.wait(10) == 0
    assert "\x1b[2J" not in terminal.said  # never cleared between frames: nothing flickers


def test_figures_of_the_last_step_are_those_of_the_last_step():
    history = History()
    lines = [{"kind": "step", "step": s, "acceptance": s / 5000, "reward": s / 5000} for s in range(4001)]
    history.take([json.dumps(line).encode() for line in lines])
    view = make_view("x", {}, history, Window())
    assert view.figures["acceptance"] == view.reward == 0.8
