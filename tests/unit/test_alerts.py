"""Signs of a collapse: a real run gives no alert, a collapse one of each kind, a restart changes nothing."""

import csv
import json
import math
import random
from pathlib import Path

import pytest

from broker.alerts import REPEAT_STEPS, REWARD_WINDOW, Alerts
from common.observe import AlertSection

QUICKSTART = Path(__file__).parents[1] / "golden" / "quickstart_signs.csv"  # configs/quickstart.yaml, 600 steps
SOUND = {
    "entropy": 0.5, "kl_after": 0.001, "weight_ess": 0.97, "truncated": 0.05, "reward": 0.6, "skipped_updates": 0.0,
}  # fmt: skip


def quickstart() -> list[dict[str, float]]:
    with QUICKSTART.open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def said(alerts: Alerts, lines: list[dict[str, float]]) -> list[tuple[str, str, int, int]]:
    found = [alert for line in lines for alert in alerts.step(line)]
    return [(alert.sign, alert.state, alert.step, alert.since) for alert in found]


def series(*parts: tuple[int, dict[str, float]]) -> list[dict[str, float]]:
    """So many steps with so changed figures, one after the other."""
    changes = [change for count, change in parts for _ in range(count)]
    return [{"step": step, **SOUND, **change} for step, change in enumerate(changes)]


def test_the_quick_start_gives_no_alert() -> None:
    lines = quickstart()
    assert len(lines) == 600 and lines[-1]["entropy"] < 0.05 < lines[0]["entropy"]
    assert said(Alerts(AlertSection()), lines) == []


def test_the_quick_start_collapsing_at_step_300_gives_an_alert_of_every_sign() -> None:
    lines, rng = quickstart(), random.Random(0)
    for line in lines[300:]:
        fallen = 0.85 ** (line["step"] - 300)
        line["entropy"] *= fallen
        line["kl_after"] = 2.0 * (1 - fallen)
        line["weight_ess"] *= 0.05 + 0.95 * fallen
        line["truncated"] = 1 - fallen
        line["reward"] = line["reward"] * fallen + 0.1 * rng.random()
    found = said(Alerts(AlertSection()), lines)
    assert sorted((sign, state) for sign, state, *_ in found if state == "raised") == [
        ("entropy", "raised"), ("ess", "raised"), ("kl", "raised"), ("reward", "raised"), ("truncated", "raised"),
    ]  # fmt: skip
    assert all(300 <= since <= step - 4 and step < 340 for _, state, step, since in found if state == "raised")


@pytest.mark.parametrize(
    ("sign", "change", "words"),
    [
        ("entropy", {"entropy": 0.001}, "entropy is 0.001 nats a token, below alerts.entropy_below=0.005"),
        ("kl", {"kl_after": 0.75}, "0.75 nats a token away from the policy (kl_after), above alerts.kl_above=0.5"),
        ("kl", {"kl_after": None, "kl_to_behaviour": 0.9}, "(kl_to_behaviour), above"),
        ("ess", {"weight_ess": 0.1}, "0.1 of the batch (weight_ess), below alerts.ess_below=0.3"),
        ("truncated", {"truncated": 0.8}, "0.8 of the trajectories are cut at their length limit, above"),
    ],
)
def test_a_sign_is_said_once_it_lasts_and_taken_back_once_it_is_gone(sign, change, words) -> None:
    alerts = Alerts(AlertSection(patience=3))
    lines = series((10, {}), (2, change), (4, {}), (6, change), (5, {}))
    found = [alert for line in lines[:22] for alert in alerts.step(line)]
    assert [(a.sign, a.state, a.step, a.since) for a in found] == [(sign, "raised", 18, 16)]
    assert words in found[0].text and "since step 16; " in found[0].text
    assert alerts.raised == [{"sign": sign, "since": 16, "text": found[0].text}]
    assert said(alerts, lines[22:]) == [(sign, "cleared", 24, 16)]
    assert alerts.raised == []
    assert json.loads(json.dumps(found[0].line()))["state"] == "raised"


def test_what_lasts_is_said_again_much_later_and_what_flickers_only_once() -> None:
    low = {"entropy": 0.0}
    assert said(Alerts(AlertSection()), series((REPEAT_STEPS + 10, low))) == [
        ("entropy", "raised", 4, 0), ("entropy", "again", 4 + REPEAT_STEPS, 0),
    ]  # fmt: skip
    flickering = series((6, low), *[(3, {}), (3, low)] * 10)
    assert said(Alerts(AlertSection()), flickering) == [("entropy", "raised", 4, 0)]


def test_figures_that_are_missing_or_no_numbers_say_nothing() -> None:
    nothing = dict.fromkeys(("kl_after", "weight_ess", "entropy", "truncated"))
    assert said(Alerts(AlertSection(patience=1)), series((5, nothing))) == []
    assert said(Alerts(AlertSection(patience=1)), [{"step": step} for step in range(5)]) == []
    assert said(Alerts(AlertSection(patience=1)), series((5, {"entropy": math.nan, "kl_after": math.inf}))) == []


def test_a_bound_of_zero_switches_its_sign_off() -> None:
    off = AlertSection(entropy_below=0, kl_above=0, ess_below=0, truncated_above=0, reward_lost=0)
    bad = {"entropy": 0.0, "kl_after": 9.0, "weight_ess": 0.0, "truncated": 1.0, "reward": -1.0}
    assert said(Alerts(off), series((50, {}), (50, bad))) == []


def test_updates_that_are_all_skipped_are_told_and_a_few_are_not() -> None:
    growing = [{"step": step, "skipped_updates": float(max(0, step - 9))} for step in range(20)]
    assert said(Alerts(AlertSection()), growing) == [("updates", "raised", 14, 10)]
    now_and_then = [{"step": step, "skipped_updates": float(step // 2)} for step in range(40)]
    assert said(Alerts(AlertSection()), now_and_then) == []


def test_a_reward_that_is_only_noise_has_not_fallen() -> None:
    rng = random.Random(1)
    noise = [{"step": step, "reward": rng.gauss(0.3, 0.1)} for step in range(2000)]
    assert said(Alerts(AlertSection()), noise) == []


def test_half_of_the_gain_lost_is_an_alert() -> None:
    rng = random.Random(2)
    means = [0.2 + 0.006 * min(step, 100) for step in range(200)] + [0.4] * 60
    lines = [{"step": step, "reward": rng.gauss(mean, 0.03)} for step, mean in enumerate(means)]
    (found,) = said(Alerts(AlertSection()), lines)
    assert found[:2] == ("reward", "raised") and 205 < found[2] < 200 + 2 * REWARD_WINDOW


def test_a_broker_that_comes_back_goes_on_counting() -> None:
    lines = series((10, {}), (30, {"entropy": 0.0, "reward": 0.0}), (30, {}))
    whole = said(Alerts(AlertSection()), lines)
    assert len(whole) == 2
    for cut in range(len(lines)):
        before, after = Alerts(AlertSection()), Alerts(AlertSection())
        first = said(before, lines[:cut])
        after.restore(json.loads(json.dumps(before.state())))
        assert first + said(after, lines[cut:]) == whole
