"""The launcher's parts: addresses, models, processes and the display, each alone."""

import errno
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from broker.journal import Journal
from broker.pipeline import Pipeline
from broker.recorder import Recorder
from broker.runfiles import RunFiles
from common.cli import EXIT_LASTING
from common.config import (
    ActorSection,
    BrokerSection,
    EngineSection,
    LearnerSection,
    ModelSection,
    ObrsSection,
    ReplicaSection,
    RunConfig,
    RunSection,
    TaskSection,
    WeightsSection,
)
from common.errors import ConfigError, JournalError, ModelError
from common.locks import try_lock
from common.process import StopFlag, free_port
from tools.console import LastingConsole
from tools.launch import HEALTHY_S, LINE_S, Run, main, stop_on_hangup
from tools.preflight import check_address, check_engine, check_meshes, check_model, check_nccl
from tools.processes import Process, child_environment, descendants, processes_of, stop_all, wait_all
from tools.progress import duration, remaining_s
from tools.run_files import claim
from tools.stamp import ModelState, fingerprint, model_state, write_stamp

STATUS = {
    "time": 50.0, "started_at": 0.0, "phase": "running", "step": 30, "steps": 100, "version": 30, "reward": 0.42,
    "lag_mean": 0.8, "lag_max": 2, "acceptance": 0.97, "tokens_per_s": 5432.1, "queue_groups": 12, "queue_bytes": 3e6,
    "in_flight_groups": 64, "trajectories_trained": 7680, "trajectories_dropped": {"lag": 2, "invalid": 0},
    "evaluations": [{"version": 0, "reward": 0.21}],
    "peers": [{"peer": "actor-0", "role": "actor", "version": 30, "silent_s": 0.4}],
}  # fmt: skip


def test_a_free_address_passes_and_one_in_use_names_the_key_and_a_free_port() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"broker\.address=.*address in use.*pass broker\.address=tcp://127"):
            check_address(address)
    check_address(f"tcp://127.0.0.1:{free_port()}")
    with pytest.raises(ConfigError, match=r"its peers read this address too; give tcp://HOST:5555"):
        check_address("tcp://*:5555")


def test_ipc_addresses(tmp_path: Path) -> None:
    check_address(f"ipc://{tmp_path}/broker")
    with pytest.raises(ConfigError, match="no directory"):
        check_address(f"ipc://{tmp_path}/no/broker")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "taken"))
        other.listen()
        with pytest.raises(ConfigError, match="address in use"):
            check_address(f"ipc://{tmp_path}/taken")


@pytest.mark.parametrize("address", ["tcp://127.0.0.1", "tcp://127.0.0.1:0", "tcp://127.0.0.1:99999"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ConfigError, match="must read tcp://HOST:PORT"):
        check_address(address)


def test_an_address_of_another_machine_cannot_be_bound() -> None:
    with pytest.raises(ConfigError, match="cannot be bound on this machine"):
        check_address("tcp://192.0.2.1:5700")


def test_missing_and_half_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        check_model(tmp_path / "none")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"missing: model\.safetensors"):
        check_model(tmp_path)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").touch()
    with pytest.raises(ModelError, match=r"1 file\(s\) missing: model-2\.safetensors"):
        check_model(tmp_path)
    (tmp_path / "model-2.safetensors").touch()
    check_model(tmp_path)


def test_the_stamp_tells_ours_from_others(tmp_path: Path) -> None:
    config = RunConfig(model=ModelSection(path=str(tmp_path / "m")))
    assert model_state(config) is ModelState.MISSING
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").touch()
    assert model_state(config) is ModelState.FOREIGN
    write_stamp(tmp_path / "m", config, 10, 0.2)
    assert model_state(config) is ModelState.CURRENT
    other = RunConfig(run=RunSection(seed=1), model=config.model)
    assert fingerprint(other) != fingerprint(config)
    assert model_state(other) is ModelState.STALE


def test_commands_of_one_and_two_ranks() -> None:
    one, two = (
        processes_of(RunConfig(learner=LearnerSection(dp_shard=ranks), actor=ActorSection(count=1)), Path("c.yaml"))
        for ranks in (1, 2)
    )
    assert one[1].command[1:] == ["-m", "learner", "c.yaml"]
    assert two[1].command[1:] == [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "learner", "c.yaml",
    ]  # fmt: skip
    assert one[-1].command[1:] == ["-m", "actor", "c.yaml", "--name", "actor-0"]
    assert [process.may_restart for process in one] == [False, False, True, True]
    assert [process.by_torchrun for process in two] == [False, True, False, False]


def test_children_compute_on_their_threads_and_die_with_us() -> None:
    environment = child_environment(3)
    assert (environment["OMP_NUM_THREADS"], environment["CROUPIER_DIE_WITH_PARENT"]) == ("3", "1")
    assert "GLOO_SOCKET_IFNAME" not in environment


def python(code: str, tmp_path: Path, name: str = "child") -> Process:
    return Process(name, [sys.executable, "-c", code], tmp_path / f"{name}.log")


def wait_for(text: str, process: Process) -> None:
    deadline = time.monotonic() + 10
    while text not in (process.log.read_text() if process.log.exists() else ""):
        assert time.monotonic() < deadline, f"{process.name} never said {text!r}"
        time.sleep(0.02)


DEAF = "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); time.sleep(60)"


def test_the_willing_end_and_the_deaf_are_killed_with_their_children(tmp_path: Path) -> None:
    willing = python("import time; print('up'); time.sleep(60)", tmp_path, "willing")
    parent = python(
        f"import subprocess,sys,time; p=subprocess.Popen([sys.executable,'-c',{DEAF!r}],start_new_session=True);"
        "print('child', p.pid); time.sleep(60)",
        tmp_path,
        "parent",
    )
    deaf = python(DEAF, tmp_path, "deaf")
    for process in (willing, parent, deaf):
        process.start()
        wait_for("up", process)
    assert parent.running is not None
    (grandchild,) = descendants(parent.running.pid)
    start = time.monotonic()
    assert stop_all([willing, parent, deaf], timeout_s=0.5) == ["deaf"]
    assert time.monotonic() - start < 3
    assert not any(process.alive for process in (willing, parent, deaf))
    assert not running(grandchild)


def test_each_has_its_own_time_to_end(tmp_path: Path) -> None:
    saves = "import signal,time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), exit(0)));"
    learner, deaf = python(f"{saves} print('up'); time.sleep(60)", tmp_path), python(DEAF, tmp_path, "deaf")
    learner.leave_s, deaf.leave_s = 30.0, 0.1
    for process in (learner, deaf):
        process.start()
        wait_for("up", process)
    assert stop_all([learner, deaf]) == ["deaf"]
    assert learner.poll() == 0


def test_ranks_are_told_themselves_so_that_torchrun_sets_them_no_limit(tmp_path: Path) -> None:
    ends = "import signal,time; signal.signal(signal.SIGTERM, lambda *_: exit({}));"
    rank = f"{ends.format(0)} print('up', flush=True); time.sleep(60)"
    learner = python(
        f"{ends.format(1)} import subprocess,sys;"
        f"sys.exit(subprocess.Popen([sys.executable,'-c',{rank!r}],start_new_session=True).wait(60))",
        tmp_path,
    )
    learner.by_torchrun = True
    learner.start()
    wait_for("up", learner)
    assert stop_all([learner]) == [] and learner.poll() == 0


def running(pid: int) -> bool:
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        if state == "Z":  # nobody has collected it yet, but it is dead
            return False
        time.sleep(0.02)
    return True


def make_run(tmp_path: Path, *processes: Process) -> tuple[Run, io.StringIO]:
    said = io.StringIO()
    config = RunConfig(run=RunSection(name="r", dir=str(tmp_path)))
    config.run.path.mkdir(exist_ok=True)
    run = Run(config, Console(file=said, width=200), StopFlag(), list(processes))
    for process in processes:
        process.start()
    return run, said


def test_an_actor_is_restarted_three_times_and_then_ends_the_run(tmp_path: Path) -> None:
    broker = python("import time; time.sleep(60)", tmp_path, "broker")
    actor = python("print('last words'); raise SystemExit(3)", tmp_path, "actor-0")
    actor.may_restart = True
    run, said = make_run(tmp_path, broker, actor)
    outcome = None
    for _ in range(4):
        assert outcome is None
        assert actor.running is not None
        actor.running.wait()
        outcome = run.check()
    stop_all([broker], 1.0)
    assert (outcome, actor.restarts) == ("failed", 3)
    assert "actor-0 ended with exit code 3; restart 1 of 3" in said.getvalue()
    assert "last words" in said.getvalue()


def test_an_actor_that_would_end_the_same_way_is_not_started_again(tmp_path: Path) -> None:
    broker = python("import time; time.sleep(60)", tmp_path, "broker")
    config = [str(Path(__file__).parents[2] / "configs/agent.yaml"), "task.params.agnt=x", f"run.dir={tmp_path}"]
    ends = f"import sys; from actor.__main__ import main; sys.argv[1:] = {config}; sys.exit(main())"
    actor = python(ends, tmp_path, "actor-0")
    actor.may_restart = True
    run, said = make_run(tmp_path, broker, actor)
    assert actor.running is not None
    assert actor.running.wait() == EXIT_LASTING
    assert run.check() == "failed" and actor.restarts == 0
    stop_all([broker], 1.0)
    assert "has no such parameter" in said.getvalue()


def test_who_leaves_early_is_started_again_and_a_learner_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = python("import time; time.sleep(60)", tmp_path, "broker")
    learner, actor = python("pass", tmp_path, "learner"), python("pass", tmp_path, "actor-0")
    actor.may_restart = True
    run, said = make_run(tmp_path, broker, learner, actor)
    assert wait_all([learner, actor], 10)
    assert run.check() is None and actor.restarts == 0, "the broker may just be ending"
    monkeypatch.setattr("tools.launch.LEAVE_S", 0.0)
    (run.directory / "status.json").write_text(json.dumps({"phase": "running", "step": 5, "steps": 5}))
    assert run.check() is None, "all is trained: the broker evaluates the last version"
    assert actor.restarts == 1
    (run.directory / "status.json").write_text(json.dumps({"phase": "running", "step": 4, "steps": 5}))
    assert run.check() == "failed" and "learner left before the run's end" in said.getvalue()
    (run.directory / "status.json").write_text(json.dumps({"phase": "stopped", "step": 4, "steps": 5}))
    assert run.check() is None
    stop_all([broker, actor], 1.0)


def test_a_dead_broker_ends_the_run_with_its_last_words(tmp_path: Path) -> None:
    broker = python(
        "import os,signal; print('oops', flush=True); os.kill(os.getpid(), signal.SIGKILL)", tmp_path, "broker"
    )
    run, said = make_run(tmp_path, broker, python("pass", tmp_path, "learner"))
    assert wait_all(run.processes, 10)
    assert run.check() == "failed"
    assert "broker was killed by SIGKILL" in said.getvalue()
    assert "oops" in said.getvalue()


def test_a_broker_that_is_done_finishes_the_run(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, python("pass", tmp_path, "broker"), python("pass", tmp_path, "learner"))
    assert wait_all(run.processes, 10)
    assert run.check() == "finished"


def test_the_learner_may_write_its_model_after_the_broker_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.launch.LEAVE_S", 0.0)
    text = f"import time; time.sleep(1); open({str(tmp_path / 'written')!r}, 'w')"
    run, said = make_run(tmp_path, python("pass", tmp_path, "broker"), python(text, tmp_path, "learner"))
    assert wait_all(run.processes[:1], 10)
    assert run.check() == "finished"
    assert (tmp_path / "written").exists() and "waiting for the learner to write" in said.getvalue()


@pytest.mark.parametrize(("text", "word"), [("raise SystemExit(3)", "exit code 3"), ("time.sleep(60)", "0.5 s after")])
def test_a_learner_that_does_not_come_to_the_end_of_writing_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, word: str
) -> None:
    monkeypatch.setattr("tools.launch.LEAVE_S", 0.0)
    learner = python(f"import time; time.sleep(0.2); {text}", tmp_path, "learner")
    run, said = make_run(tmp_path, python("pass", tmp_path, "broker"), learner)
    run.config = replace(run.config, learner=replace(run.config.learner, write_timeout_s=0.5))
    assert wait_all(run.processes[:1], 10)
    outcome = run.check()
    stop_all([learner], 1.0)
    assert outcome == "failed" and word in said.getvalue()


def test_bad_configurations_are_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.yaml")]) == 2
    assert "no such file" in capsys.readouterr().out
    (tmp_path / "run.yaml").write_text("actr: {count: 1}\n")
    assert main([str(tmp_path / "run.yaml")]) == 2
    assert "did you mean 'actor'?" in capsys.readouterr().out


def test_a_missing_model_is_found_before_anything_starts(tmp_path: Path) -> None:
    config = RunConfig(
        run=RunSection(name="r", dir=str(tmp_path)),
        model=ModelSection(path=str(tmp_path / "none")),
        task=TaskSection(name="gym:chain_sum"),
    )
    run = Run(config, Console(file=io.StringIO()), StopFlag())
    with pytest.raises(ModelError, match="no such directory"):
        run.prepare()
    assert not config.run.path.exists()


def launching(tmp_path: Path, resume: bool = False) -> tuple[Run, io.StringIO]:
    """A run whose model is still to be made."""
    config = RunConfig(
        run=RunSection(name="r", dir=str(tmp_path / "runs")),
        model=ModelSection(path=str(tmp_path / "model")),
        broker=BrokerSection(address=f"ipc://{tmp_path}/broker"),
        learner=LearnerSection(resume=resume),
    )
    said = io.StringIO()
    return Run(config, Console(file=said, width=200), StopFlag()), said


def test_a_run_under_way_is_neither_set_aside_nor_resumed(tmp_path: Path) -> None:
    first, _ = launching(tmp_path)
    with first.held:
        first.prepare()
        for resume in (False, True):
            with pytest.raises(ConfigError, match=r"a run of this name is under way; choose another run\.name"):
                launching(tmp_path, resume)[0].prepare()
        assert [path.name for path in (tmp_path / "runs").iterdir()] == ["r"]
    second, said = launching(tmp_path)
    with second.held:
        second.prepare()
        assert "moved the earlier run to" in said.getvalue() and (tmp_path / "runs" / "r.1" / "config.yaml").exists()
        claim(tmp_path / "runs" / "r.1").close()  # which may go on beside it
        with pytest.raises(ConfigError, match="under way"):
            launching(tmp_path)[0].prepare()
    resumed, _ = launching(tmp_path, resume=True)
    with resumed.held:
        resumed.prepare()


def test_a_learner_that_outlived_its_launcher_keeps_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = launching(tmp_path)
    with first.held:
        first.prepare()
    lock = first.directory / "learner.lock"
    with lock.open("a") as learner:
        assert try_lock(learner)
        monkeypatch.setattr("tools.run_files.LEARNER_S", 0.1)
        for resume in (False, True):
            with pytest.raises(ConfigError, match=r"learner of an earlier launch still holds learner\.lock"):
                launching(tmp_path, resume)[0].prepare()
        monkeypatch.setattr("tools.run_files.LEARNER_S", 60.0)
        second, said = launching(tmp_path)
        monkeypatch.setattr(second, "_tell_wait", lambda: (Run._tell_wait(second), learner.close()))  # it has written
        with second.held:
            second.prepare()
    assert "waiting 60 s at most for broker and learner" in said.getvalue()
    assert (tmp_path / "runs" / "r.1" / "learner.lock").exists()


def test_a_broker_that_ends_behind_a_killed_launcher_is_waited_for_and_one_at_work_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.run_files.SETTLE_S", 0.2)
    status, told = tmp_path / "status.json", []
    (tmp_path / "run.json").touch()
    with (tmp_path / "metrics.jsonl").open("a") as broker, (tmp_path / "learner.lock").open("a") as learner:
        assert try_lock(broker) and try_lock(learner)
        status.write_text('{"phase": "running"}')
        with pytest.raises(ConfigError, match="a run of this name is under way"):
            claim(tmp_path, lambda: told.append("waits"))
        assert not told
        status.write_text('{"phase": "stopped"}')
        with pytest.raises(ConfigError, match="interrupted while an earlier launch's broker or learner still ended"):
            claim(tmp_path, is_stopped=lambda: True)
        os.utime(tmp_path / "run.json", (time.time() + 9,) * 2)  # a broker that has begun, and said nothing yet
        with pytest.raises(ConfigError, match="a run of this name is under way"):
            claim(tmp_path, lambda: told.append("waits"))
        os.utime(tmp_path / "run.json", (0, 0))

        def end() -> None:
            told.append("waits")
            learner.close()
            broker.close()

        claim(tmp_path, end).close()
    assert told == ["waits"]


def test_a_terminal_that_is_closed_stops_a_run_unless_hangups_are_ignored() -> None:
    stop, before = StopFlag(), signal.getsignal(signal.SIGHUP)
    console = Console(file=io.StringIO())
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop_on_hangup(stop, console)
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.is_set
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        stop_on_hangup(stop, console)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.is_set and stop.reason == "SIGHUP" and console.file.name == os.devnull
        console.file.close()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_screen_that_takes_nothing_ends_no_run(tmp_path: Path) -> None:
    run, _ = launching(tmp_path)
    run.console.file = io.StringIO()
    run.console.file.close = run.console.file.flush = lambda: None
    run.log = tmp_path / "launch.log"

    def refuse(text: str) -> int:
        raise OSError(errno.EIO, "gone")

    run.console.file.write = refuse
    run.say("still told")
    assert "still told" in run.log.read_text()


def test_a_run_that_goes_on_by_another_rule_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    first, _ = launching(tmp_path)
    other, _ = launching(tmp_path, resume=True)
    other.config = replace(other.config, obrs=ObrsSection(threshold=2.0))
    for run in (first, other):  # without a journal, or with an empty one, nothing would be decided anew
        with run.held:
            run.prepare()
        (run.directory / "journal").mkdir(exist_ok=True)
        (run.directory / "journal" / "data.mdb").touch()
    written = (first.directory / "config.yaml").read_text()
    journal = Journal(first.directory / "journal", "r", 64)
    Recorder(Pipeline(first.config, 16), journal, dict).begin(0)
    journal.close()
    with other.held, pytest.raises(JournalError, match=r"this run has obrs\.threshold=1\.0, not 2\.0; set that back"):
        other.prepare()
    assert (first.directory / "config.yaml").read_text() == written
    again, _ = launching(tmp_path, resume=True)
    with again.held:
        again.prepare()


def ran(tmp_path: Path, steps: int = 20) -> Run:
    """A run of 20 steps by its files, about to go on, perhaps to another number of ``steps``."""
    first, _ = launching(tmp_path)
    with first.held:
        first.prepare()
    (first.directory / "status.json").write_text(json.dumps({**STATUS, "phase": "finished"}))
    (first.directory / "metrics.jsonl").write_text('{"kind": "step", "step": 19}\n{"kind": "st')
    run, _ = launching(tmp_path, resume=True)
    run.config = replace(run.config, run=replace(run.config.run, steps=steps))
    return run


def files_of(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.directory.iterdir() if path.is_file()}


@pytest.mark.parametrize("snapshot", [False, True])
def test_fewer_steps_than_were_assembled_are_refused_before_anything_is_touched(tmp_path: Path, snapshot: bool) -> None:
    run = ran(tmp_path, steps=5)
    journal = Journal(run.directory / "journal", "r", 64)
    recorder = Recorder(Pipeline(run.config, 16), journal, dict)
    recorder.begin(0)
    recorder.start_at(3)
    if snapshot:
        recorder.snapshot()
    for _ in range(3):
        journal.append("assemble", {"version": 3})
    journal.close()
    before = files_of(run)
    words = r"run\.steps=5: this run has assembled 6 already; set run\.steps=6 or more, or choose another run\.name"
    with run.held, pytest.raises(JournalError, match=words):
        run.prepare()
    assert files_of(run) == before
    run.config = replace(run.config, run=replace(run.config.run, steps=6))
    with run.held:
        run.prepare()


def test_a_journal_is_not_left_out_of_a_run_that_goes_on(tmp_path: Path) -> None:
    run = ran(tmp_path)
    journal = Journal(run.directory / "journal", "r", 64)
    Recorder(Pipeline(run.config, 16), journal, dict).begin(0)
    journal.close()
    before = files_of(run)
    run.config = replace(run.config, broker=replace(run.config.broker, journal_mb=0))
    with run.held, pytest.raises(JournalError, match=r"broker\.journal_mb=0: this run has a journal.*as it was, move"):
        run.prepare()
    assert files_of(run) == before


def test_a_run_that_does_not_go_on_is_as_it_was(tmp_path: Path) -> None:
    run = ran(tmp_path, steps=40)
    before = files_of(run)
    with run.held:
        run.prepare()
        assert run.follower.look(1.0).phase == "nothing"  # what an earlier launch left is not told
        assert (run.directory / "status.json").read_bytes() == before["status.json"]
        files = RunFiles(run.directory)  # a broker begins, and ends without a learner
        files.status({"phase": "stopped"})
        assert run.follower.look(1.0).phase == "stopped"
        files.close()
        run.report("failed")
    after = files_of(run)
    assert {name: after[name] for name in ("config.yaml", "status.json")} == {
        name: before[name] for name in ("config.yaml", "status.json")
    }
    assert "summary.json" not in after and "the run is as it was" in run.console.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_that_went_on_keeps_what_it_went_on_with(tmp_path: Path) -> None:
    run = ran(tmp_path, steps=40)
    with run.held:
        run.prepare()
        files = RunFiles(run.directory)
        files.metric("publish", {"version": 20})
        files.close()
        run.report("failed")
    assert "steps: 40" in (run.directory / "config.yaml").read_text()
    assert json.loads((run.directory / "summary.json").read_text())["status"] == "failed"


def test_a_broker_that_was_started_by_hand_keeps_its_directory(tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "runs" / "r")
    with pytest.raises(ConfigError, match="a run of this name is under way"):
        launching(tmp_path)[0].prepare()
    files.close()
    run, _ = launching(tmp_path)
    with run.held:
        run.prepare()
    assert (tmp_path / "runs" / "r.1" / "run.json").exists()


def test_a_directory_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ConfigError, match=r"run\.dir=.*runs': cannot be written \(.*Not a directory"):
        launching(tmp_path)[0].prepare()


def test_a_mesh_that_does_not_divide_the_model_is_found_before_anything_starts(tmp_path: Path) -> None:
    described = {
        "model_type": "qwen3", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(described))
    (tmp_path / "model.safetensors").touch()
    model = ModelSection(path=str(tmp_path))
    check_meshes(RunConfig(model=model, learner=LearnerSection(tp=2, pp=2), replica=ReplicaSection(tp=2)))
    with pytest.raises(ConfigError, match=r"learner: num_key_value_heads=2 is not a multiple of tp=3"):
        check_meshes(RunConfig(model=model, learner=LearnerSection(tp=3)))
    with pytest.raises(ConfigError, match=r"learner: pp=3 stages for num_hidden_layers=2; lower learner\.pp"):
        check_meshes(RunConfig(model=model, learner=LearnerSection(pp=3)))
    with pytest.raises(ConfigError, match=r"replica: num_attention_heads=6 is not a multiple of tp=4"):
        check_meshes(RunConfig(model=model, replica=ReplicaSection(tp=4)))


def test_the_launcher_says_how_the_run_stands(tmp_path: Path) -> None:
    run, said = make_run(tmp_path)
    run.look()
    assert said.getvalue().strip() == "starting"
    (run.directory / "status.json").write_text(json.dumps(STATUS))
    run.look()
    assert "step 30/100" not in said.getvalue()  # a line every few seconds is enough
    run.line_at = -LINE_S
    run.look()
    assert "step 30/100  version 30  reward 0.420" in said.getvalue()


def test_small_figures() -> None:
    assert [duration(s) for s in (None, 5, 65, 3700)] == ["–", "0:05", "1:05", "1:01:40"]
    assert remaining_s(STATUS, (10.0, 10)) == pytest.approx(140.0)
    assert remaining_s({}, None) is None
    assert os.environ.get("CROUPIER_DIE_WITH_PARENT") is None


def test_servers_that_cannot_be_started_are_known_before_anything_is():
    config = RunConfig(actor=ActorSection(engine="sglang"), engine=EngineSection(python="/none/python"))
    with pytest.raises(ConfigError, match=r"engine\.python='/none/python': .*tools\.sglang_cpu install"):
        check_engine(config)
    assert check_engine(RunConfig()) == []


def interpreter(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_an_interpreter_without_sglang_is_refused_and_an_untried_release_is_said(tmp_path: Path) -> None:
    def check(python: str) -> list[str]:
        return check_engine(RunConfig(actor=ActorSection(engine="sglang"), engine=EngineSection(python=python)))

    with pytest.raises(ConfigError, match=r"not installed there \(.*PackageNotFoundError.*tools\.sglang_cpu install"):
        check(sys.executable)
    with pytest.raises(ConfigError, match="exit code 3"):
        check(interpreter(tmp_path / "broken", "exit 3"))
    for version in ("0.5.19", "0.5.22.post1", "0.5.23"):
        assert check(interpreter(tmp_path / version, f"echo {version}")) == []
    for version in ("0.5.18", "0.6.0", "none"):
        (warning,) = check(interpreter(tmp_path / version, f"echo {version}"))
        assert f"SGLang {version}; 0.5.19 to 0.5.23 are supported" in warning


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("task.name=sort7", "no such task; did you mean 'sort6'?"),
        ("broker.address=tcp://0.0.0.0:15700", "so it needs keys"),
        ("staleness.budget=2.5", "override: staleness.budget:"),
    ],
)
def test_what_only_a_process_would_refuse_moves_no_earlier_run(tmp_path, model, capsys, override, words):
    first, _ = launching(tmp_path)
    with first.held:
        first.prepare()
    where = [f"run.dir={tmp_path / 'runs'}", "run.name=r", f"model.path={model}"]
    free = [f"broker.address=tcp://127.0.0.1:{free_port()}"] if "address" not in override else []
    assert main(["configs/smoke.yaml", *where, *free, override]) == 2
    assert words in " ".join(capsys.readouterr().out.split())
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["r"]


def test_a_life_longer_than_two_starts_may_take_forgets_restarts(tmp_path: Path) -> None:
    broker = python("import time; time.sleep(60)", tmp_path, "broker")
    actor = python("raise SystemExit(3)", tmp_path, "actor-0")
    actor.may_restart = True
    run, said = make_run(tmp_path, broker, actor)

    def outlive(seconds: float) -> None:
        assert actor.running is not None
        actor.running.wait()
        actor.started -= seconds
        assert run.check() is None

    for _ in range(5):
        outlive(2 * run.config.engine.start_timeout_s)
    assert actor.restarts == 5 and said.getvalue().count("restart 1 of 3") == 5
    run.config = replace(run.config, engine=EngineSection(start_timeout_s=1.0))
    outlive(HEALTHY_S / 2)  # a server that took a while to start and never answered
    stop_all([broker, actor], 1.0)
    assert "restart 2 of 3" in said.getvalue()


def test_a_reader_that_leaves_ends_no_run() -> None:
    class Gone(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    console = LastingConsole(file=Gone())
    console.print("one")
    console.print("two")
    assert console.quiet


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_a_reader_that_left_was_not_told_is_no_failure_at_the_end(unbuffered: str) -> None:
    script = "from tools.console import LastingConsole; c = LastingConsole(); [c.print('word') for _ in range(9999)]"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], stdout=pipe, stderr=pipe, env=environment) as ours:
        assert ours.stdout is not None and ours.stderr is not None
        ours.stdout.readline()
        ours.stdout.close()
        assert (ours.wait(30), ours.stderr.read()) == (0, b"")


def test_servers_whose_nccl_is_another_are_refused_before_anything_is_started(tmp_path: Path) -> None:
    def check(there: str, here: str = "2.29.7", **weights: str) -> None:
        python = interpreter(tmp_path / "python", f"echo {there}")
        engine = EngineSection(python=python, device="cuda", launch=1)
        section = WeightsSection(**weights)  # type: ignore[arg-type]
        check_nccl(RunConfig(actor=ActorSection(engine="sglang"), engine=engine, weights=section), True, here)

    with pytest.raises(ConfigError, match=r"2\.29\.7 is here and 2\.30\.7 in engine\.python=.*weights\.backend=gloo"):
        check("2.30.7")
    check("2.29.7")
    check("")  # brought by no package
    check("2.30.7 2.29.7")  # two packages, one of them ours
    check("2.30.7", here="2.27.3 2.30.7")
    check("2.30.7; exit 1")  # not known
    with pytest.raises(ConfigError, match=r"2\.29\.7 is here and 2\.27\.3, 2\.30\.7 in"):
        check("2.30.7 2.27.3")
    check("2.30.7", backend="gloo")
    check_nccl(RunConfig(), True)
