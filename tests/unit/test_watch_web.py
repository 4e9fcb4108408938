"""The page's server: what it answers, what it refuses, and that what it sends stays small."""

import errno
import http.client
import io
import json
import math
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from common.errors import ConfigError
from common.process import StopFlag
from common.trace import STATES
from tests.made_run import HOSTILE, MadeRun
from tools.watch import feed
from tools.watch.follow import Follower
from tools.watch.history import History
from tools.watch.web import CONNECTIONS, Server, is_loopback, serve


@pytest.fixture
def run(tmp_path):
    made = MadeRun(tmp_path / "run", actors=["actor-0", HOSTILE])
    made.advance(30)
    return made


@pytest.fixture
def server(run):
    found = Server(Follower(run.directory))
    yield found
    found.close()


def ask(server, path, method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def test_the_page_is_one_document_and_may_load_nothing_else(server):
    status, headers, body = ask(server, "/")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert (
        "default-src 'none'" in headers["Content-Security-Policy"]
        and "unsafe" not in headers["Content-Security-Policy"]
    )
    text = body.decode()
    assert "/*SCRIPT*/" not in text and "/*STYLE*/" not in text and "class Chart" in text
    assert (
        not re.search(r"(src|href)=\"(?!data:|#)", text)
        and "innerHTML" not in text
        and "http://" not in text.replace("http://www.w3.org", "")
    )
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"


def test_the_state_is_the_view(server, run):
    status, headers, body = ask(server, "/api/state")
    state = json.loads(body)
    assert status == 200 and headers["Content-Type"] == "application/json"
    assert (state["step"], state["steps"], state["phase"]) == (30, 200, "running")
    assert state["words"] == "" and state["says"] == "running"
    assert HOSTILE in [peer["peer"] for peer in state["peers"]]
    assert set(state["colours"]) >= {"sample", "idle.credits", "idle.shard:rollouts"}
    assert state["meanings"]["actor idle.credits"] == STATES["actor"]["idle.credits"]
    assert state["meanings"]["learner idle.shard:rollouts"] == "waits for a shard, which waits for rollouts"
    run.advance(5)
    deadline = time.monotonic() + 10
    while json.loads(ask(server, "/api/state")[2])["step"] != 35:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_disk_that_fails_for_a_moment_is_told_and_the_run_followed_on(server, run, monkeypatch):
    def fails(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    def wait_for(holds):
        deadline = time.monotonic() + 10
        while not holds(json.loads(ask(server, "/api/state")[2])):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    with monkeypatch.context() as patch:
        patch.setattr("tools.watch.follow.make_view", fails)
        wait_for(lambda state: any("Stale file handle" in note for note in state["notes"]))
        run.advance(5)
    wait_for(lambda state: state["step"] == 35)


def test_metrics_are_sent_once_and_then_only_what_is_new(server):
    whole = json.loads(ask(server, "/api/metrics")[2])
    assert whole["whole"] and whole["first"] == list(range(30)) and len(whole["means"]["reward"]["mean"]) == 30
    more = json.loads(ask(server, f"/api/metrics?since=28&key={whole['key']}")[2])
    assert not more["whole"] and more["first"] == [28, 29]
    assert json.loads(ask(server, "/api/metrics?since=28&key=another")[2])["whole"]


@pytest.mark.parametrize(
    "path",
    [
        "/status.json", "/../status.json", "/%2e%2e/config.yaml", "/page/page.js", "//etc/passwd", "//[", "/api",
        "/api/state/", "/api/metrics/../../run",
    ],
)  # fmt: skip
def test_nothing_else_is_there(server, path):
    status, _, body = ask(server, path)
    assert status == 404 and "error" in json.loads(body)


@pytest.mark.parametrize("since", ["-1", "x", "1e9", "9" * 40, "%00", "٣"])
def test_a_step_that_is_none_is_refused(server, since):
    assert ask(server, f"/api/metrics?since={urllib.request.quote(since)}")[0] == 400


def test_nothing_can_be_changed(server):
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        status, headers, _ = ask(server, "/api/state", method)
        assert status == 405 and headers["Allow"] == "GET, HEAD"
    status, headers, body = ask(server, "/", "HEAD")
    assert status == 200 and not body and int(headers["Content-Length"]) > 1000


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:1", 200), ("LOCALHOST", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("evil.example", 421),
        ("127.0.0.1.evil.example", 421), ("[", 421), ("", 421),
    ],
)  # fmt: skip
def test_a_name_from_elsewhere_reads_nothing(server, host, status):
    assert ask(server, "/api/state", Host=host)[0] == status


def test_garbage_and_many_connections_leave_it_alive(server):
    with socket.create_connection(("127.0.0.1", server.server_port), 5) as link:
        link.sendall(b"\x00\xff garbage\r\n\r\n")
        link.settimeout(5)
        assert link.recv(100)
    held = [socket.create_connection(("127.0.0.1", server.server_port), 5) for _ in range(CONNECTIONS + 8)]
    for link in held:
        link.close()
    deadline = time.monotonic() + 10
    while True:
        try:
            assert ask(server, "/api/state")[0] == 200
            break
        except (ConnectionError, http.client.HTTPException):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_answers_are_packed_where_that_is_understood(server):
    plain, packed = ask(server, "/"), ask(server, "/", **{"Accept-Encoding": "gzip"})
    assert packed[1]["Content-Encoding"] == "gzip" and len(packed[2]) < len(plain[2]) / 2


def test_an_address_in_use_is_named(server, run):
    with pytest.raises(ConfigError, match=rf"--port {server.server_port}: cannot be listened on"):
        Server(Follower(run.directory), port=server.server_port)
    assert [is_loopback(h) for h in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "example.org")] == [True] * 3 + [
        False
    ] * 2


def test_an_open_address_is_warned_of(run):
    said, stop = io.StringIO(), StopFlag()
    stop.set("test")
    assert serve(Follower(run.directory), "0.0.0.0", 0, Console(file=said, width=200), stop) == 0
    assert "is shown at http://0.0.0.0:" in said.getvalue() and "warning: everybody who reaches" in said.getvalue()


def test_a_long_run_is_sent_small_and_keeps_its_spikes():
    history = History()
    for step in range(20_000):
        history.steps.add(
            step, {"reward": 5.0 if step == 17_777 else 0.5}, levels={"time_s": float(step)}, lags={1: 10}
        )
    sent = feed.metrics(history, "e")
    assert len(json.dumps(sent)) < 200_000 and max(sent["means"]["reward"]["high"]) == 5.0
    assert sum(n for lags in sent["lags"] for _, n in lags) == 200_000
    again = feed.metrics(history, "e", sent["first"][-1], sent["key"])
    assert len(json.dumps(again)) < 3000 and len(again["first"]) == 1


@settings(max_examples=15)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(4, 32))
def test_a_client_that_joins_the_pieces_has_the_whole(grown, limit):
    """The rule of page/panels.js, followed here: cut where the first sent bin begins, then append."""
    history, step, first, means, key = History(), 0, [], [], ""
    history.steps.limit = limit
    for count in grown:
        for _ in range(count):
            history.steps.add(step, {"reward": math.sin(step)})
            step += 1
        sent = feed.metrics(history, "e", first[-1] if first else 0, key)
        if sent["whole"]:
            first, means = [], []
        keep = next((i for i, v in enumerate(first) if sent["first"] and v >= sent["first"][0]), len(first))
        first, means, key = first[:keep] + sent["first"], means[:keep] + sent["means"]["reward"]["mean"], sent["key"]
        whole = feed.metrics(history, "e")
        assert (first, means) == (whole["first"], whole["means"]["reward"]["mean"])


def test_the_command_serves_until_it_is_told_to_stop(run):
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.watch", str(run.directory), "--web"], stdout=subprocess.PIPE, text=True
    )
    try:
        url = re.search(r"http://\S+", process.stdout.readline()).group()
        with urllib.request.urlopen(url + "api/state", timeout=10) as answer:
            assert json.load(answer)["step"] == 30
        process.terminate()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_pages_files_are_installed_with_the_package():
    text = (Path(__file__).parents[2] / "setup.cfg").read_text()
    assert "tools.watch = page/*" in text
