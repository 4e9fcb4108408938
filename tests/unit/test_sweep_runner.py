"""A sweep goes on wherever it was cut short, repeats nothing that is finished, and is never ended by one run."""

import io
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from common.config import RunConfig, load, to_yaml
from common.errors import ConfigError, ModelError
from common.locks import try_lock
from tests.unit.swept import Clock, FakeLauncher, FakeRun, KilledError, Listener, moved, texts_of
from tools.stamp import STAMP, fingerprint
from tools.sweep.__main__ import main
from tools.sweep.child import Lock, free_address
from tools.sweep.grid import parse
from tools.sweep.plan import Found, check_directory, differences, look, make_plan, read_state, write_state
from tools.sweep.progress import eta_s, panel, plain_line
from tools.sweep.runner import Active, Runner
from tools.sweep.start import prepare_start, shared_start

WORDS = ["staleness.budget=0,4"]
SMOKE = "configs/smoke.yaml"


@pytest.fixture(scope="module")
def plan():
    return make_plan(SMOKE, parse(WORDS), 2, "swept")


@pytest.fixture(scope="module")
def texts(plan):
    """Of every config.yaml, with a mark where the directory's name stands."""
    return texts_of(moved(plan, Path("DIRECTORY")))


def written(texts, directory):
    return {key: text.replace("DIRECTORY", str(directory)) for key, text in texts.items()}


def runner(plan, launcher, clock=None, **more):
    def write(directory, record):
        clock.tick()
        write_state(directory, record)
        clock.tick()

    states = check_directory(plan)
    write = write if clock else write_state
    return Runner(plan, launcher, Listener(), lambda: False, states=states, write=write, sleep=lambda s: None, **more)


def carry_out(plan, texts, end=None, **more):
    clock = Clock(end)
    launcher = FakeLauncher(clock, texts)
    going = runner(plan, launcher, clock, **more)
    going.prepare()
    try:
        return going.run(), launcher, clock
    except KilledError:
        return None, launcher, clock


def test_all_cells_of_one_seed_come_before_the_next_in_turning_order(plan, texts, tmp_path):
    here = moved(plan, tmp_path / "s")
    whole, launcher, _ = carry_out(here, written(texts, tmp_path / "s"))
    assert whole
    assert launcher.started == [
        "staleness.budget=0/seed-0", "staleness.budget=4/seed-0", "staleness.budget=4/seed-1",
        "staleness.budget=0/seed-1",
    ]  # fmt: skip
    state = read_state(here.directory)
    assert {run["state"] for run in state["runs"].values()} == {"finished"}
    assert state["axes"] == {"staleness.budget": ["0", "4"]}
    again, launcher, _ = carry_out(here, {})
    assert again and launcher.started == []


@settings(max_examples=15)
@given(st.lists(st.integers(1, 45), max_size=3), st.integers(1, 3))
def test_a_sweep_that_is_killed_anywhere_goes_on(plan, texts, kills, jobs):
    """Whatever finished before a kill is not run again; in the end every run is finished once and whole."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "s"
        here, known = moved(plan, directory), written(texts, directory)
        finished: set[str] = set()
        for end in [*kills, None]:
            whole, launcher, _ = carry_out(here, known, end, jobs=jobs)
            assert not finished & set(launcher.started)
            if (directory / "sweep.json").exists():
                read_state(directory)
            finished = {job.key for job in here.jobs if look(job)[0] is Found.FINISHED}
            assert (whole is None) == (len(finished) < len(here.jobs)) or end is not None
        assert whole and len(finished) == 4
        assert {run["state"] for run in read_state(directory)["runs"].values()} == {"finished"}


def test_a_run_that_fails_is_told_and_tried_again_by_the_next_call(plan, texts, tmp_path):
    here, known = moved(plan, tmp_path / "s"), written(texts, tmp_path / "s")
    bad = "staleness.budget=4/seed-0"
    going = runner(here, FakeLauncher(Clock(), known, fails={bad}))
    going.prepare()
    assert not going.run()
    assert (going.count("finished"), going.count("failed")) == (3, 1)
    assert any(f"FAILED {bad}" in line and "exit code 1" in line for line in going.view.lines)
    assert f"  last words of {bad}" in going.view.lines
    assert "exit code 1; failed" in read_state(here.directory)["runs"][bad]["reason"]

    launcher = FakeLauncher(Clock(), known)
    going = runner(here, launcher)
    going.prepare()
    assert going.count("failed") == 1 and going.run()
    assert launcher.started == [bad]
    assert read_state(here.directory)["runs"][bad]["attempts"] == 2
    assert (here.directory / f"{bad}.1").is_dir()  # the attempt that failed


def test_a_stop_ends_what_runs_and_leaves_the_rest(plan, texts, tmp_path):
    here = moved(plan, tmp_path / "s")
    launcher = FakeLauncher(Clock(), written(texts, tmp_path / "s"))
    going = replace(runner(here, launcher), stopped=lambda: len(launcher.started) == 2)
    going.prepare()
    assert not going.run()
    assert launcher.children[1].stopped and launcher.started[2:] == []
    runs = read_state(here.directory)["runs"]
    assert [run["state"] for run in runs.values()] == ["finished", "waiting", "waiting", "waiting"]


def test_all_that_run_are_told_to_stop_before_one_is_waited_for(plan, texts, tmp_path):
    here = moved(plan, tmp_path / "s")
    launcher = FakeLauncher(Clock(), written(texts, tmp_path / "s"))
    going = replace(runner(here, launcher, jobs=3), stopped=lambda: len(launcher.started) == 3)
    going.prepare()
    first = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeRun, "stop", lambda child: first.append([other.asked for other in launcher.children]))
        assert not going.run()
    assert first == [[True] * 3] * 3


def test_a_directory_that_is_held_costs_its_run_alone(plan, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("tools.run_files.SETTLE_S", 0.1)
    here = moved(plan, tmp_path / "s")
    held = here.jobs[1]
    held.config.run.path.mkdir(parents=True)
    with (held.config.run.path / "metrics.jsonl").open("a") as broker:
        assert try_lock(broker)
        whole, launcher, _ = carry_out(here, written(texts, tmp_path / "s"))
    assert not whole and len(launcher.started) == 3
    runs = read_state(here.directory)["runs"]
    assert [run["state"] for run in runs.values()].count("finished") == 3
    assert "a run of this name is under way" in runs[held.key]["reason"]


def test_runs_at_a_time_do_not_share_servers(tmp_path, capsys, monkeypatch):
    servers = ["actor.engine=sglang", "actor.count=1", "engine.launch=0", "engine.addresses=[http://127.0.0.1:1]"]
    assert main([SMOKE, "staleness.budget=0,4", f"run.dir={tmp_path}", *servers, "--jobs", "2"]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "would sample on the same server http://127.0.0.1:1 (engine.addresses)" in said
    monkeypatch.setattr("tools.sweep.__main__._run", lambda *given: 0)
    apart = "engine.addresses=[http://127.0.0.1:1],[http://127.0.0.1:2]"
    assert main([SMOKE, f"run.dir={tmp_path}", *servers[:-1], apart, "--jobs", "2"]) == 0
    assert main([SMOKE, f"run.dir={tmp_path}", *servers, "--jobs", "2"]) == 0


def test_nothing_is_started_behind_a_stop_that_came_while_a_directory_was_waited_for(plan, texts, tmp_path):
    here = moved(plan, tmp_path / "s")
    held, said, stopped = here.jobs[0].config.run.path, [], []
    held.mkdir(parents=True)
    (held / "run.json").touch()
    (held / "status.json").write_text('{"phase": "stopped"}')
    launcher = FakeLauncher(Clock(), written(texts, tmp_path / "s"))
    going = replace(runner(here, launcher), stopped=lambda: bool(stopped))
    with (held / "learner.lock").open("a") as learner:
        assert try_lock(learner)
        going.view.say = lambda text, style="": (said.append(text), stopped.append(text))
        going.prepare()
        assert not going.run()
    assert len(said) == 1 and "waiting for the processes of an earlier attempt" in said[0]
    assert not launcher.started and {run["state"] for run in going.states.values()} == {"waiting"}


def test_a_run_that_makes_no_step_is_given_up(plan, texts, tmp_path):
    here = moved(plan, tmp_path / "s")
    launcher = FakeLauncher(Clock(), written(texts, tmp_path / "s"))
    going = runner(here, launcher, stall_s=-1.0)
    going.prepare()
    assert not going.run() and going.count("failed") == 4
    assert all(child.stopped for child in launcher.children)
    assert "no new step for -1 s (--stall-s)" in read_state(here.directory)["runs"][here.jobs[0].key]["reason"]


@pytest.mark.parametrize(
    ("stall", "said"), [("-1", "--stall-s -1: must"), ("nan", "--stall-s nan: must"), ("7.5", "no such file")]
)
def test_the_time_without_a_step_is_an_option(tmp_path, capsys, stall, said):
    assert main([str(tmp_path / "none.yaml"), "--stall-s", stall]) == 2
    assert said in capsys.readouterr().out.replace("\n", " ")


ODD_STATUS = {
    "step": "x", "steps": [1], "time": None, "phase": 5, "reward": "x", "lag_mean": {}, "tokens_per_s": "y",
    "evaluations": [7, {"reward": 0.5}],
}  # fmt: skip


@pytest.mark.parametrize("status", [ODD_STATUS, {"step": 3}, {"step": 1e300, "steps": -1, "time": "z"}, {"step": []}])
def test_no_status_of_a_run_ends_the_sweep(plan, texts, tmp_path, status):
    class Told(FakeRun):
        """Writes a status too."""

        def poll(self):
            code = super().poll()
            (self.path / "status.json").write_text(json.dumps(status))
            return code

    class Shown(Listener):
        """Draws what a person sees."""

        def show(self, runner):
            said.print(panel(runner, 1.0, eta_s(runner, 1.0)))
            said.print(plain_line(runner, None))

    said = Console(file=io.StringIO(), width=160)
    here, known = moved(plan, tmp_path / "s"), written(texts, tmp_path / "s")
    going = runner(here, lambda config, log: Told(config, known[f"{config.run.path.parent.name}/{config.run.name}"],
                                                  Clock(), False))  # fmt: skip
    going.view = Shown()
    going.prepare()
    assert going.run()


def test_settings_that_changed_are_told_and_run_again_only_when_asked(plan, texts, tmp_path):
    here, known = moved(plan, tmp_path / "s"), written(texts, tmp_path / "s")
    carry_out(here, known)
    job = here.jobs[0]
    other = replace(here, jobs=(replace(job, config=replace(job.config, optim=replace(job.config.optim, lr=1e-4))),))
    with pytest.raises(ConfigError, match=r"seed-0 \(optim\.lr: 0\.0003 there, 0\.0001 asked for\).*--redo"):
        runner(other, FakeLauncher(Clock(), known)).prepare()
    launcher = FakeLauncher(Clock(), known)
    again = runner(other, launcher, redo=True)
    again.prepare()
    again.run()
    assert launcher.started == [job.key]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"status": "failed"}', '{"status": null}', "\0\0\0"])
def test_a_run_is_finished_only_if_its_summary_says_so(plan, texts, tmp_path, damage):
    here = moved(plan, tmp_path / "s")
    job = here.jobs[0]
    assert look(job) == (Found.NOTHING, "")
    job.config.run.path.mkdir(parents=True)
    assert look(job)[0] is Found.HALF
    (job.config.run.path / "summary.json").write_text(damage)
    assert look(job)[0] is Found.HALF
    (job.config.run.path / "summary.json").write_text('{"status": "finished"}')
    assert look(job)[0] is Found.OTHER  # finished as what?
    (job.config.run.path / "config.yaml").write_text(written(texts, tmp_path / "s")[job.key])
    assert look(job)[0] is Found.FINISHED
    (job.config.run.path / "config.yaml").write_text("a: [")
    assert look(job)[0] is Found.OTHER


def test_differences_leave_out_the_port_and_know_defaults(plan):
    config = plan.jobs[0].config
    there = yaml.safe_load(to_yaml(config))
    moved_port = replace(config, broker=replace(config.broker, address="tcp://127.0.0.1:9"))
    assert differences(there, moved_port) == []
    del there["trace"], there["alerts"]["patience"]  # as an older croupier, which did not know them, left it
    assert differences(there, moved_port) == []
    assert differences(there, replace(config, optim=replace(config.optim, freeze=("a",), lr=1.0))) == [
        "optim.freeze: [] there, ['a'] asked for",
        f"optim.lr: {config.optim.lr} there, 1.0 asked for",
    ]
    assert len(differences({}, config)) == 5 and differences({}, config)[-1].endswith(" more")
    assert differences(None, RunConfig()) == []


# ---- whose directory ----------------------------------------------------------------------------


def test_a_directory_that_is_not_this_sweeps_is_refused(plan, tmp_path):
    here = moved(plan, tmp_path / "s")
    assert check_directory(here) == {}
    here.directory.mkdir()
    assert check_directory(here) == {}
    (here.directory / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"holds metrics\.jsonl and no sweep\.json.*--name"):
        check_directory(here)
    write_state(here.directory, here.to_record())
    assert check_directory(here) == {}
    other = replace(here, axes=tuple(parse(["optim.lr=1,2"])))
    with pytest.raises(ConfigError, match=r"belongs to the sweep of staleness\.budget over configs/smoke\.yaml"):
        check_directory(other)
    more = replace(here, axes=tuple(parse(["staleness.budget=0,4,8", "run.steps=9"])), seeds=(0, 1, 2))
    assert check_directory(more) == {}  # a sweep may grow; what was run under other settings is told run by run


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"sweep": 99}', '{"sweep": 1}', "\0"])
def test_a_damaged_state_is_told_with_the_remedy(plan, tmp_path, text):
    here = moved(plan, tmp_path)
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ConfigError, match=r"remove it and give|choose another --name"):
        check_directory(here)


@pytest.mark.parametrize(
    ("words", "seeds", "name", "said"),
    [
        (["staleness.bugdet=1,2"], 1, "", "cell staleness.bugdet=1.*did you mean 'budget'"),
        (["staleness.budget=1,-2"], 1, "", "cell staleness.budget=-2.*must be 0"),
        (["optim.lr=1e-3,0.001"], 1, "", "cells optim.lr=1e-3 and optim.lr=0.001 are the same run"),
        ([], 0, "", "--seeds 0"),
        ([], 1, "a/b", "--name 'a/b'"),
    ],
)
def test_nothing_runs_before_every_cell_is_sound(words, seeds, name, said):
    with pytest.raises(ConfigError, match=said):
        make_plan(SMOKE, parse(words), seeds, name)


def test_two_sweeps_do_not_share_a_directory(tmp_path, monkeypatch):
    said = []
    lock = Lock(tmp_path / "s", said.append)
    assert said == []
    monkeypatch.setattr("tools.sweep.child.LOCK_S", 0.0)
    with pytest.raises(ConfigError, match="another sweep is running there"):
        Lock(tmp_path / "s", said.append)
    beside = os.dup(lock.descriptor)  # as a launcher that outlives its sweep has it
    lock.release()
    with pytest.raises(ConfigError, match="another sweep"):
        Lock(tmp_path / "s", said.append)
    os.close(beside)
    assert len(said) == 2 and "waiting for what is left" in said[0]
    Lock(tmp_path / "s", said.append).release()
    assert free_address().startswith("tcp://127.0.0.1:")


def test_a_run_dir_that_cannot_be_written_is_told_in_a_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    for run_dir in (tmp_path / "file", tmp_path / "file" / "in"):
        assert main([SMOKE, "staleness.budget=1,2", f"run.dir={run_dir}"]) == 2
        said = " ".join(capsys.readouterr().out.split())
        assert "cannot be written (Not a directory); set run.dir to another directory" in said


# ---- the starting model -------------------------------------------------------------------------


def made_by_warmstart(path, config):
    path.mkdir(parents=True)
    (path / "weights").write_text(f"weights of seed {config.run.seed}")
    (path / STAMP).write_text(json.dumps({"fingerprint": fingerprint(config)}))


def test_all_seeds_start_from_one_model_and_the_original_is_left_alone(tmp_path):
    config = load(SMOKE, [f"model.path={tmp_path}/model"])
    made = []

    def make(one, log):
        made.append(one.model.path)
        made_by_warmstart(Path(one.model.path), one)

    placed = shared_start(config, tmp_path / "s")
    copy = Path(placed.model.path)
    assert copy == tmp_path / "s" / "start" / fingerprint(config)
    prepare_start([config, config], tmp_path / "s", make)
    assert made == [str(copy)] and not (copy / STAMP).exists()
    prepare_start([config], tmp_path / "s", make)
    assert len(made) == 1 and not (tmp_path / "model").exists()

    made_by_warmstart(tmp_path / "model", config)
    prepare_start([config], tmp_path / "t", make)  # copied, not made again
    assert len(made) == 1
    assert [file.name for file in (tmp_path / "t" / "start" / copy.name).iterdir()] == ["weights"]
    assert (tmp_path / "model" / STAMP).exists()


def test_a_model_that_the_warm_start_did_not_make_is_used_where_it_lies(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").touch()
    config = load(SMOKE, [f"model.path={tmp_path}/model"])
    assert shared_start(config, tmp_path / "s").model.path == str(tmp_path / "model")

    def make(one, log):
        raise ModelError("not to be made")

    prepare_start([config], tmp_path / "s", make)
    assert not (tmp_path / "s").exists()


# ---- what a person sees -------------------------------------------------------------------------


def test_the_screen_says_how_many_are_done_where_the_present_run_is_and_how_long_it_takes(plan, texts, tmp_path):
    here = moved(plan, tmp_path / "s")
    going = runner(here, FakeLauncher(Clock(), {}))
    going.prepare()
    job = going.waiting.popleft()
    going.states[job.key] = {"state": "finished"}
    failed, present = going.waiting.popleft(), going.waiting.popleft()
    going.states[failed.key] = {"state": "failed"}
    status = {"step": 30, "steps": 40, "time": 130.0, "reward": 0.5, "tokens_per_s": 1234.5, "lag_mean": 1.9}
    active = Active(present, FakeRun(present.config, "", Clock(), False), started=900.0, status=status)
    going.active.append(active)
    assert eta_s(going, 1000.0) is None  # no pace yet
    assert "ETA –" in plain_line(going, None)
    active.first = (100.0, 15)  # 15 steps took 30 s, so 10 take 20 s
    assert eta_s(going, 1000.0) == pytest.approx(20 + (100 + 20))  # and the one that waits as long as this one
    going.walls = [70.0, 90.0]
    assert eta_s(going, 1000.0) == pytest.approx(20 + 80)
    status["evaluations"] = [{"version": 25, "reward": 0.625}]
    line = plain_line(going, 100.0)
    assert line == (
        "1/4 runs done, 1 failed  staleness.budget=4/seed-1 step 30/40 reward 0.500 held-out 0.625@v25  ETA 1:40"
    )
    console = Console(width=110, record=True, markup=False, file=io.StringIO())
    console.print(panel(going, 200.0, 100.0))
    shown = console.export_text()
    for words in ("runs 1/4", "ETA 1:40", "30/40", "0.625@v25", "1,234", "1 run(s) failed"):
        assert words in shown
