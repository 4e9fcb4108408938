"""Real processes, from one command: the loop runs, its books balance, and it ends when told to."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.trace import MILESTONES, STATES
from tests.chrome import check_trace, load_trace
from tests.integration.fleet import BRIEF, ROOT, Fleet, environment, free_address, lines_of
from tools.perfetto import milestones
from tools.profile.causes import WORDS
from tools.profile.verdict import verdict
from tools.runs import read_run
from tools.timelines import read_timelines
from tools.trace import main as trace_main

SOON = ("broker.heartbeat_s=0.3", "broker.peer_timeout_s=4")  # how soon a dead peer is noticed
REPORT = ("summary.json", "report.html", "report.md", "logs/launch.log", "metrics.jsonl", "status.json", "config.yaml")


def command(tmp_path, model, *overrides):
    base = [f"run.dir={tmp_path}", f"model.path={model}", f"broker.address={free_address()}", *BRIEF]
    return [sys.executable, "-m", "tools.launch", "configs/smoke.yaml", *base, *overrides]


def launch(tmp_path, model, *overrides, timeout=100):
    done = subprocess.run(
        command(tmp_path, model, *overrides),
        cwd=ROOT,
        env=environment(),
        timeout=timeout,
        capture_output=True,
        text=True,
    )
    return done, tmp_path / "smoke"


def explain(done, run):
    logs = "\n".join(f"== {p.name}\n{p.read_text()[-1500:]}" for p in sorted((run / "logs").glob("*.log")))
    return f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}\n{logs}"


def processes_of(run):
    """Live processes that were given this run's configuration."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if any(str(run) in w for w in words) and "-m" in words:
                found.append((int(entry.name), words))
    return found


def assert_books_balance(run):
    summary = json.loads((run / "summary.json").read_text())
    status = json.loads((run / "status.json").read_text())
    dropped = sum(summary["trajectories_dropped"].values())
    assert summary["trajectories_acked"] == summary["trajectories_trained"] + dropped + status["trajectories_queued"]
    assert summary["lag_max"] <= summary["staleness_budget"]
    assert summary["tokens_accepted"] <= summary["tokens_proposed"]
    versions = status["versions_published"]
    assert versions == list(range(1, len(versions) + 1))
    return summary


def assert_timelines_tell_everything(run, steps):
    """Every process has one, its states partition its life, and each step passed every milestone in order."""
    found = read_timelines(run)
    assert not found.notes
    assert {life.process for life in found.lives} == {"broker", "learner", "replica-0", "actor-0"}
    for life in found.lives:
        assert life.ended == "closed"
        total = life.totals[-1][1]
        lived = life.totals[-1][0] - life.start  # by the broker's clock, which is known to within milliseconds
        assert sum(wall for wall, _, _ in total.values()) == pytest.approx(lived, rel=0.01)
        assert set(total) <= set(STATES[life.role])
        assert life.role == "broker" or life.delay_ns is not None  # its clock was measured
        assert all(a.end == b.start for a, b in itertools.pairwise(life.slices))
    (broker,), (learner,) = found.of("broker"), found.of("learner")
    marks = milestones(broker.instants)
    assert sorted(marks) == list(range(steps))
    for moments in marks.values():
        assert set(moments) == set(MILESTONES)
        in_order = [moments[what] for what in MILESTONES if what != "asked"]
        assert in_order == sorted(in_order) and moments["asked"] <= moments["served"]
    assert {s.step for s in learner.slices if s.state in ("forward", "backward")} == set(range(steps))
    assert [s.args["version"] for s in learner.spans if s.name == "publish"] == list(range(1, steps + 1))
    assert sum(amount for _, _, _, amount in learner.tallies["train"].values()) > 0
    sampled = [life.tallies["decode"] for life in found.of("actor")]
    assert sum(amount for by_rows in sampled for _, _, _, amount in by_rows.values()) > 0
    followed = {group for one in broker.instants for group in one.args.get("groups", ())}
    assert followed and all(group % 8 == 0 for group in followed)
    assert trace_main([str(run)]) == 0
    trace = load_trace(run / "trace.json.gz")
    rows = check_trace(trace)
    assert {process for process, _ in rows} == {life.process for life in found.lives}
    arrived = {e["name"] for e in trace["traceEvents"] if e["ph"] == "f" and e["cat"] == "trajectory"}
    whole = {f"trajectory {group}.{sibling}" for group in followed for sibling in range(4)}
    assert whole <= arrived
    assert any(thread.startswith("torch thread") for process, thread in rows if process == "learner")


def test_a_whole_run_keeps_its_promises(tmp_path, model):
    done, run = launch(tmp_path, model, "trace.torch_steps=[5]", "actor.count=1")  # two are in test_chaos.py
    assert done.returncode == 0, explain(done, run)
    summary = assert_books_balance(run)
    assert summary["status"] == "finished"
    assert summary["steps"] == summary["final_version"] == 12
    assert summary["trajectories_trained"] == 12 * 8 * 4
    assert 0 < summary["acceptance"] <= 1
    assert summary["eval_first"] is not None and summary["eval_last"] is not None
    assert all((run / name).exists() for name in REPORT) and list(run.glob("*.png"))
    steps = lines_of(run, "step")
    assert [s["step"] for s in steps] == list(range(12))
    assert all(s["lag_max"] <= 2 and s["kl_after"] <= s["kl_before"] + 1e-6 for s in steps)
    assert max(s["lag_max"] for s in steps) > 0  # it was asynchronous
    assert [p["version"] for p in lines_of(run, "publish")] == list(range(1, 13))
    assert (run / "model" / "model.safetensors").exists()
    assert json.loads((run / "tensorboard" / "place.json").read_text())["lines"] == len(lines_of(run))
    assert not processes_of(run)
    assert_timelines_tell_everything(run, 12)
    assert_time_is_accounted_for(run)


def assert_time_is_accounted_for(run):
    """The verdict of a whole run: nothing unread, every process there, every wait named."""
    found = read_run(run)
    judged = verdict(found)
    assert not judged.notes and (judged.first, judged.last) == (3, 11)
    assert {p.name for p in judged.processes} == {"learner", "actor-0", "replica-0", "broker"}
    for process in judged.processes:
        assert process.there_s == pytest.approx(judged.seconds, rel=0.05), process  # a clock's offset, no more
        assert sum(process.causes.values()) == pytest.approx(process.idle_s)
        assert set(process.causes) <= set(WORDS) and process.causes.get("unknown", 0.0) < 0.02 * judged.seconds
    assert judged.rates.steps_s > 0 and judged.rates.ratio > 0 and judged.publishes.count >= 7
    assert judged.bottleneck is not None and judged.recommendation is not None


@pytest.mark.slow
def test_synchronous_runs_of_one_actor_repeat_their_reward_curve(tmp_path, model):
    overrides = ("run.steps=6", "staleness.budget=0", "actor.count=1", "evaluation.every=3")
    parts = ("broker", "learner", "replica-0", "actor-0")
    curves, evaluations = [], []
    with contextlib.ExitStack() as stack:
        fleets = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            fleets.append(stack.enter_context(Fleet(tmp_path / name, model, *overrides)))
            for part in parts:
                fleets[-1].start(part)
        for fleet in fleets:
            assert [fleet.wait(part) for part in parts] == [0] * 4, fleet.words()
            assert fleet.status()["lag_max"] == 0
            curves.append([(s["reward"], s["loss"], s["tokens_accepted"]) for s in fleet.steps()])
            curves[-1] += [x["digest"] for x in fleet.metrics() if x["kind"] == "publish"]
            lines = [x for x in fleet.metrics() if x["kind"] == "eval" and x["version"] == x["version_max"]]
            evaluations.append({(x["version_asked"], x["version"]): x["reward"] for x in lines})
    assert curves[0] == curves[1]
    both = evaluations[0].keys() & evaluations[1].keys()  # weights may change under any but the first, by the clock
    assert (0, 0) in both and all(evaluations[0][key] == evaluations[1][key] for key in both)
    assert all(0 < reward < 0.5 for reward, _, _ in curves[0][:6])  # there was something to repeat


@pytest.mark.slow
def test_ctrl_c_ends_everything_within_ten_seconds_and_leaves_what_a_resume_goes_on_from(tmp_path, model):
    running = subprocess.Popen(
        command(tmp_path, model, "run.steps=100000"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    run = tmp_path / "smoke"
    try:
        deadline = time.monotonic() + 60
        while not lines_of(run, "step"):
            assert time.monotonic() < deadline and running.poll() is None
            time.sleep(0.2)
        began = time.monotonic()
        running.send_signal(signal.SIGINT)
        running.wait(timeout=10)
        assert time.monotonic() - began < 10
    finally:
        running.kill()
        running.stdout.close()
    assert running.returncode == 130
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
    assert (run / "report.md").exists()
    assert not processes_of(run)
    (saved,) = (run / "checkpoints").iterdir()
    steps = int(saved.name.removeprefix("step-"))
    last = lines_of(run, "step")[-1]
    assert last["step"] == steps - 1 and last["loss"] is not None, "the step under way was heard of"
    assert json.loads((run / "summary.json").read_text())["steps"] == steps
    said = (run / "logs" / "launch.log").read_text()
    assert said.endswith(f"the same command with learner.resume=true goes on from step {steps}\n")
    more = command(tmp_path, model, f"run.steps={steps + 20}", "learner.resume=true")  # a few are assembled already
    done = subprocess.run(more, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    assert [line["step"] for line in lines_of(run, "step")] == list(range(steps + 20))
    assert f"step-{steps + 20:08d}" in {path.name for path in (run / "checkpoints").iterdir()}
    assert (run / "model").is_dir() and "resumed from" in (run / "logs" / "learner.log").read_text()


@pytest.mark.slow  # with `make chaos`; what it proves is proved there under random kills too
@pytest.mark.chaos
def test_killed_actor_and_replica_are_replaced_and_the_run_finishes(tmp_path, model):
    running = subprocess.Popen(
        command(tmp_path, model, "run.steps=10", "weights.deadline_s=2", *SOON),
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    run = tmp_path / "smoke"
    try:
        deadline = time.monotonic() + 60
        while len(lines_of(run, "step")) <= 3:
            assert time.monotonic() < deadline and running.poll() is None
            time.sleep(0.05)
        for victim in ("actor-0", "replica-0"):
            victims = [pid for pid, words in processes_of(run) if victim in words]
            assert victims, (victim, processes_of(run))
            os.kill(victims[0], signal.SIGKILL)
        output, _ = running.communicate(timeout=90)
    finally:
        running.kill()
    assert running.returncode == 0, output[-3000:]
    summary = assert_books_balance(run)
    assert summary["steps"] == summary["final_version"] == 10
    padded = sum(step["groups_padded"] for step in lines_of(run, "step"))  # 3 of 4 siblings: trained, not given up
    assert summary["trajectories_trained"] == 10 * 8 * 4 - padded
    assert not processes_of(run)
