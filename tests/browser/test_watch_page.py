"""The page of ``tools.watch --web`` in a real headless Chromium, on a run that grows while it is open."""

import time

import pytest

from tests.browser.chromium import Browser, find_chromium
from tests.made_run import HOSTILE, MadeRun
from tools.watch.follow import Follower
from tools.watch.terminal import read_all
from tools.watch.web import Server

pytestmark = pytest.mark.browser

DRAWN = "[...document.querySelectorAll('figure')].filter(f => !f.hidden && f.querySelector('path[d*=L]')).length"
TEXT = "(document.getElementById({!r})?.textContent ?? '')"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    program = find_chromium()
    assert program, "no chromium: apt-get install -y chromium"
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium):
    chromium.problems.clear()
    chromium.failed.clear()
    chromium.look(1440, 1000)
    yield chromium
    chromium.open("about:blank")


@pytest.fixture
def run(tmp_path):
    made = MadeRun(tmp_path / "run", 600, ["actor-0", "actor-1", HOSTILE])
    made.advance(100)
    return made


@pytest.fixture
def server(run):
    found = Server(Follower(run.directory))
    yield found
    found.close()


def opened(browser, server):
    browser.open(server.url)
    browser.until(f"{DRAWN} >= 10")


def test_curves_are_drawn_and_grow_with_the_run(browser, server, run):
    opened(browser, server)
    assert browser.ask(TEXT.format("step")) == "100 of 600 (16 %)"
    before = browser.ask("document.querySelector('figure path[d*=L]').getAttribute('d').length")
    tall = browser.ask("document.documentElement.scrollHeight")
    browser.ask("window.scrollTo(0, 700)")
    for _ in range(3):
        run.advance(20)
        time.sleep(0.6)
    browser.until(TEXT.format("step") + ".startsWith('160 of')")
    browser.until(f"document.querySelector('figure path[d*=L]').getAttribute('d').length > {before}")
    assert browser.ask("scrollY") == 700  # nothing jumped
    assert abs(browser.ask("document.documentElement.scrollHeight") - tall) < 60  # but for rows of tables
    assert browser.ask("document.title").startswith("26% · run")
    heat = "document.querySelector('canvas').getContext('2d').getImageData(0, 0, 400, 180).data.some(v => v)"
    assert browser.ask(heat)
    assert browser.problems == [] and browser.failed == []


def test_every_panel_has_its_curves(browser, server):
    opened(browser, server)
    shown = browser.ask(
        "[...document.querySelectorAll('figure')].filter(f => !f.hidden).map(f => f.querySelector('h2').textContent)"
    )
    assert shown[:6] == [
        "Reward", "Lag of trained tokens", "Acceptance", "KL to the learner, nats a token",
        "Effective sample size and λ", "Tokens a second",
    ]  # fmt: skip
    assert {"Learner's time", "Actors' time", "Replica's time"} <= set(shown)
    assert browser.ask(DRAWN) == len(shown)
    legends = browser.ask("document.querySelector('main').textContent")
    assert "idle.shard:rollouts" in legends and "idle.credits" in legends


@pytest.mark.parametrize(("width", "height"), [(390, 844), (320, 640), (768, 1024)])
def test_a_phone_scrolls_only_down(browser, server, run, width, height):
    run.alert("a-word-without-any-place-to-break-" * 12)
    browser.look(width, height, phone=True)
    opened(browser, server)
    browser.until("document.querySelectorAll('tbody tr').length > 10")
    assert browser.ask("document.documentElement.scrollWidth") <= width
    columns = browser.ask("getComputedStyle(document.querySelector('main')).gridTemplateColumns.split(' ').length")
    assert columns == (1 if width < 600 else columns)


def test_a_peer_named_like_markup_stays_text(browser, server):
    opened(browser, server)
    names = browser.until(
        "(n => n.length > 3 && n)([...document.querySelectorAll('td.name')].map(td => td.textContent))"
    )
    assert HOSTILE in names
    assert browser.ask("document.querySelectorAll('table img').length") == 0 and browser.ask("document.title") != "1"


def test_a_lost_connection_is_said_and_mends_itself(browser, server, run):
    opened(browser, server)
    assert browser.ask("document.getElementById('lost').hidden")
    port = server.server_port
    server.close()
    browser.until("!document.getElementById('lost').hidden")
    assert "Connection lost" in browser.ask(TEXT.format("lost"))
    assert browser.ask(DRAWN) >= 10  # what was known stays
    run.advance(40)
    again = Server(Follower(run.directory), port=port)
    try:
        browser.until("document.getElementById('lost').hidden")
        browser.until(TEXT.format("step") + ".startsWith('140 of')")
    finally:
        again.close()
    assert browser.problems == []


def test_a_run_that_begins_while_the_page_is_open(browser, tmp_path):
    server = Server(Follower(tmp_path / "later"))
    try:
        browser.open(server.url)
        browser.until(TEXT.format("phase") + " === 'waiting'")
        assert "run directory" in browser.until(TEXT.format("waits"))
        run = MadeRun(tmp_path / "later", 50)
        run.advance(30)
        browser.until(f"{DRAWN} >= 10")
        run.advance(20)
        run.write_status("finished")
        browser.until(TEXT.format("phase") + " === 'finished'")
        assert browser.ask(TEXT.format("eta")) == "over"
        assert browser.problems == []
    finally:
        server.close()


def test_pointing_and_keys_read_a_curve_out(browser, server):
    opened(browser, server)
    x, y = browser.ask(
        "(r => [r.left + r.width / 2, r.top + 80])(document.querySelector('.plot').getBoundingClientRect())"
    )
    browser.move(x, y)
    readout = "document.querySelector('.readout')"
    browser.until(f"!{readout}.hidden")
    said = browser.ask(f"{readout}.textContent")
    assert said.startswith("step ") and "batches" in said and "held-out" in said
    browser.ask("document.querySelector('.plot').focus()")
    browser.press("ArrowLeft")
    assert browser.ask(f"{readout}.textContent") != said
    assert browser.ask("document.querySelector('.plot').getAttribute('aria-label')").startswith("Reward. Batches 0.")


def test_dark_and_light_and_still(browser, server):
    opened(browser, server)
    ground = "getComputedStyle(document.body).backgroundColor"
    light = browser.ask(ground)
    browser.look(1440, 1000, dark=True, still=True)
    assert browser.ask(ground) != light
    assert browser.ask("getComputedStyle(document.getElementById('bar')).transitionDuration") == "0s"


CONTRAST = """
(() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const bad = [];
  for (const node of document.querySelectorAll('h1, h2, p, dt, dd, th, td, .legend span, .unit, .plot text')) {
    if (!node.textContent.trim() || !node.getClientRects().length) continue;
    const style = getComputedStyle(node), ink = parse(node.tagName === 'text' ? style.fill : style.color);
    let under = node, ground = [0, 0, 0, 0];
    while (under && ground.length === 4 && ground[3] === 0) {
      ground = parse(getComputedStyle(under).backgroundColor);
      under = under.parentElement;
    }
    const [a, b] = [light(ink), light(ground)].sort((p, q) => q - p);
    if ((a + 0.05) / (b + 0.05) < 4.5) bad.push([node.textContent.slice(0, 30), style.color, ground.join()]);
  }
  return bad;
})()
"""


@pytest.mark.parametrize("dark", [False, True])
def test_every_word_stands_out_from_its_ground(browser, server, run, dark):
    run.alert()
    browser.look(1440, 1000, dark=dark)
    opened(browser, server)
    browser.until("document.querySelectorAll('tbody tr').length > 10")
    assert browser.ask(CONTRAST) == []


def test_a_hundred_thousand_steps_open_at_once(browser, tmp_path):
    run = MadeRun(tmp_path / "long", 120_000)
    run.advance(3000, status=False)
    follower = Follower(run.directory)
    read_all(follower)
    for step in range(3000, 100_000):
        follower.history.steps.add(step, {"reward": 3.0 if step == 54_321 else 0.9}, levels={"time_s": 0.25 * step})
    server = Server(follower)
    try:
        browser.open(server.url)
        browser.until(f"{DRAWN} >= 5")
        assert browser.ask("columns.first.length") <= 512
        assert browser.ask("Math.max(...columns.means.reward.high)") == 3
        assert browser.problems == []
    finally:
        server.close()
