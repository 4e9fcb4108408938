"""The run directory: time that does not jump, lines cut short, a damaged identity."""

import json
import math
import threading
import time

import orjson
import pytest

from broker.runfiles import RunFiles
from common.errors import ConfigError, ProtocolError
from common.locks import try_lock
from tools.watch.history import History


def test_a_clock_that_jumps_moves_no_time_stamp(tmp_path, monkeypatch):
    files = RunFiles(tmp_path)
    for jump in (0.0, -86_400.0, 86_400.0):
        monkeypatch.setattr(time, "time", lambda jump=jump: 1.8e9 + jump)
        files.metric("step", {"step": 1})
        files.status({})
    files.close()
    times = [json.loads(line)["time_s"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert 0 <= times[0] <= times[1] <= times[2] < 60
    monkeypatch.setattr(time, "time", lambda: 1.0)  # before the run began
    again = RunFiles(tmp_path)
    assert 0 <= again.seconds() < 60
    again.close()


def test_a_directory_that_is_moved_away_while_it_is_waited_for_is_told(tmp_path):
    first, told = RunFiles(tmp_path / "r"), []
    asked = threading.Event()
    thread = threading.Thread(target=lambda: told.append(refusal(tmp_path / "r", asked)))
    thread.start()
    assert asked.wait(10)
    (tmp_path / "r").rename(tmp_path / "r.1")
    first.close()
    thread.join(10)
    assert "was moved away while this broker waited for it" in told[0]


def refusal(directory, asked):
    with pytest.raises(ConfigError) as refused:
        RunFiles(directory, lambda: asked.set() or False)
    return str(refused.value)


def test_a_line_cut_short_is_no_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 3}\n{"kind": "step", "st')
    files = RunFiles(tmp_path)
    assert files.last("step", "step") == 3 and files.last("budget", "move") == -1
    files.metric("budget", {"move": 0, "step": 9})
    assert files.last("budget", "move") == 0
    files.close()


def test_numbers_that_are_not_finite_are_null_and_a_skipped_update_is_a_step(tmp_path):
    files = RunFiles(tmp_path)
    files.metric(
        "step",
        {"step": 7, "reward": 0.5, "grad_norm": math.nan, "loss": -math.inf, "tasks": {"a": [(math.inf, 1.5)]}},
        ("alert", {"step": 7, "value": math.nan}),
    )
    files.status({"grad_norm": math.nan, "peers": [{"rate": math.inf}]})
    files.close()
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    step, alert = map(orjson.loads, lines)  # which knows no NaN
    assert (step["grad_norm"], step["loss"], step["tasks"], step["reward"]) == (None, None, {"a": [[None, 1.5]]}, 0.5)
    assert alert["value"] is None
    status = orjson.loads((tmp_path / "status.json").read_bytes())
    assert (status["grad_norm"], status["peers"]) == (None, [{"rate": None}])
    history = History()
    history.take(lines)
    assert (history.damaged, [row.step for row in history.receipts]) == (0, [7])


def test_a_run_keeps_its_name_and_counts_its_brokers(tmp_path, monkeypatch):
    first = RunFiles(tmp_path)
    with pytest.raises(ConfigError, match="another broker is at work there"):
        RunFiles(tmp_path, lambda: True)
    monkeypatch.setattr("broker.runfiles.LOCK_S", 0.05)
    with pytest.raises(ConfigError, match=r"stop it, or choose another run\.name"):
        RunFiles(tmp_path)
    first.close()
    second = RunFiles(tmp_path)
    assert (first.run_id, first.generation, second.generation) == (second.run_id, 0, 1)
    (tmp_path / "run.json").write_text("{")
    second.close()
    with pytest.raises(ProtocolError, match=r"move .* away"):
        RunFiles(tmp_path)


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run\.dir: .*file/run cannot be written .*name another directory"):
        RunFiles(tmp_path / "file" / "run")


def test_a_run_that_goes_on_without_a_journal_has_no_line_twice(tmp_path):
    files = RunFiles(tmp_path)
    for step in range(4):
        files.metric("publish", {"version": step})
        files.metric("eval", {"version": step, "version_asked": step, "reward": 0.5})
        files.metric("step", {"step": step}, ("alert", {"step": step}))
        files.metric("budget", {"move": step, "step": step})
    with (tmp_path / "metrics.jsonl").open("a") as torn:
        torn.write('{"kind": "st\n')
    files.close()
    again = RunFiles(tmp_path)
    again.forget_from(2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        assert not try_lock(file)  # the file that is there now is held
    again.metric("step", {"step": 2})
    again.forget_from(9)  # nothing to cut
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    told = {kind: [] for kind in ("publish", "eval", "step", "alert", "budget")}
    for line in lines:
        if line != '{"kind": "st':
            found = json.loads(line)
            told[found["kind"]].append(found["version" if found["kind"] in ("publish", "eval") else "step"])
    assert told == {"publish": [0, 1, 2], "eval": [0, 1], "step": [0, 1, 2], "alert": [0, 1], "budget": [0, 1]}
    assert '{"kind": "st' in lines and sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "run.json"]
    again.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        assert try_lock(file)


def test_a_broker_that_waited_for_a_file_that_was_replaced_takes_the_new_one(tmp_path):
    first = RunFiles(tmp_path)
    first.metric("step", {"step": 4})
    waits, found = threading.Event(), []
    second = threading.Thread(target=lambda: found.append(RunFiles(tmp_path, lambda: waits.set() or False)))
    second.start()
    assert waits.wait(10)
    first.forget_from(2)
    first.close()
    second.join(10)
    found[0].metric("step", {"step": 2})
    found[0].close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [2]
