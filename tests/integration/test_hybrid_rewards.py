"""A whole run rewarded by a rule and by a judge of uneven temper, with answers by people in its groups."""

import itertools
import json
import subprocess
import sys
from collections import Counter

import pytest
from aiohttp import web

from actor.tasks.sort6 import Sort6, decode
from tests.integration.fleet import ROOT, environment
from tests.integration.test_end_to_end import assert_books_balance, explain, launch, lines_of, processes_of
from tests.unit.reward_server import RewardServer, chat

ANSWERED = 40  # training questions that somebody has answered

pytestmark = pytest.mark.slow
CALLS = itertools.count()


def moody(request, body):
    """Likes long answers; babbles, fails and shouts now and then."""
    if "messages" not in (body or {}):
        return web.Response(status=404)  # the launcher looks whether somebody is there
    number = next(CALLS)
    if number % 17 == 3:
        return web.Response(status=500)
    if number % 7 == 5:
        return chat("How lovely! 10 out of 10!")
    answer = body["messages"][1]["content"].rpartition("BEGIN ANSWER")[2].split("\n")[1]
    return chat(f"It is {len(answer)} long.\nScore: {min(10, len(answer) + 1)}")


def exemplars(directory):
    task = Sort6(0, {})
    file = directory / "answers.jsonl"
    with file.open("w") as out:
        for n in range(ANSWERED):
            item = task.prompt(n, "train")
            line = {"question": decode(item.prompt_ids), "answer": item.reference.removesuffix("$")}
            out.write(json.dumps(line) + "\n")
    return file


def test_a_rule_a_judge_and_people_together(tmp_path, model):
    server = RewardServer(moody)
    judge = f"{{kind: grm, url: '{server.url}/v1', model: m, rubric: Be long., retries: 0, on_failure: neutral}}"
    try:
        done, run = launch(
            tmp_path, model, "task.reward_weights={correct: 1.0, prefix: 0.5, style: 0.3}",
            f"reward.models={{style: {judge}}}", "reward.normalise_by={style: task_running}",
            "reward.gate={style: {where: prefix, at_least: 0.1}}", f"reward.exemplars={exemplars(tmp_path)}",
            "rollout.exemplars=1",
        )  # fmt: skip
    finally:
        server.close()
    assert done.returncode == 0, explain(done, run)
    summary = assert_books_balance(run)
    assert summary["status"] == "finished" and summary["steps"] == 12
    steps = lines_of(run, "step")
    assert sum(s["exemplars"] for s in steps) > 10 and all(s["channels_gated"]["style"] > 0 for s in steps)
    assert sum(s["channels_missing"]["style"] for s in steps) > 0  # counted, and no zero
    assert any(s["reward_mixed"] != s["reward"] for s in steps)
    counted = Counter()  # what each actor says at its end
    for log in (run / "logs").glob("actor-*.log"):
        words = log.read_text().rpartition("ends: ")[2].splitlines()[0]
        counted.update({name: float(value) for name, value in (one.split(" ") for one in words.split(", "))})
    assert counted["reward_style_judged"] > 50 and counted["judge_neutral"] > 0 and counted["scoring"] == 0
    assert counted["judge_neutral"] == counted["judge_failures"] <= counted["reward_style_failures"]
    assert counted["reward_style_requests"] <= len(server.asked) - 1  # the launcher looked first
    again = subprocess.run(
        [sys.executable, "-m", "tools.replay", str(run)], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert again.returncode == 0 and "bit for bit" in again.stdout, again.stdout + again.stderr
    shown = subprocess.run(
        [sys.executable, "-m", "tools.receipt", str(run)], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert shown.returncode == 0 and "reward as mixed" in shown.stdout, shown.stdout + shown.stderr
    assert not processes_of(run)
