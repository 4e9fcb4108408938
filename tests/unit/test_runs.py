"""A run directory is read as far as it can be, wherever it was cut and whoever wrote it."""

import json
import os

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import RunConfig, RunSection, to_yaml
from common.errors import ConfigError
from common.trace import Tracer, trace_path
from tools import evaluate, export, receipt, replay, report, trace
from tools.console import make_console
from tools.profile import __main__ as profile
from tools.run_files import check_there
from tools.runs import read_run
from tools.timelines import read_timelines

LINES = [
    {"kind": "eval", "time_s": 1.0, "version": 0, "reward": 0.2},
    {"kind": "step", "time_s": 2.0, "step": 0, "reward": 0.3},
    {"kind": "step", "time_s": 3.0, "step": 1, "reward": 0.4},
]


def written(run_dir, lines=LINES):
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text(to_yaml(RunConfig(run=RunSection(name="x"))))
    (run_dir / "status.json").write_text(json.dumps({"phase": "finished", "step": 2, "steps": 2}))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for process in ("actor-0", "broker"):
        life(run_dir, process)
    return run_dir


def life(run_dir, process, role="actor"):
    with Tracer(trace_path(run_dir, process), process, role) as tracer:
        tracer.span("rollouts", "rollout", 10, 20, group=8)


def test_a_misspelt_directory_brings_the_near_one_or_the_newest_to_mind(tmp_path):
    for age, name in enumerate(("quickstart", "smoke", "old-one", "older", "oldest")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
        os.utime(tmp_path / name / "config.yaml", (1000 - age, 1000 - age))
    (tmp_path / "smokes").mkdir()  # holds no run
    with pytest.raises(ConfigError, match=rf"smok: no such directory; name a run's, such as {tmp_path}/smoke$"):
        check_there(tmp_path / "smok")
    with pytest.raises(ConfigError, match=rf"as {tmp_path}/quickstart, {tmp_path}/smoke, {tmp_path}/old-one$"):
        check_there(tmp_path / "zzz")


@pytest.mark.parametrize("tool", [evaluate, export, profile, receipt, replay, report, trace], ids=lambda t: t.__name__)
def test_a_wrong_directory_is_named_by_every_tool_in_the_same_words(tmp_path, capsys, tool):
    assert tool.main([str(tmp_path / "nowhere")]) == 2
    said = "".join(capsys.readouterr())
    assert f"{tmp_path}/nowhere: no such directory; name a run's, such as runs/quickstart" in said
    if tool not in (profile, receipt):  # which say what they lack of a run that has hardly begun
        (tmp_path / "notes.txt").touch()
        assert tool.main([str(tmp_path)]) == 2
        said = "".join(capsys.readouterr())
        assert f"{tmp_path}: no run directory: none of config.yaml, status.json, metrics.jsonl" in said
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("tool", [evaluate, export, replay], ids=lambda t: t.__name__)
def test_a_run_without_its_configuration_is_asked_for_it(tmp_path, capsys, tool):
    (tmp_path / "logs").mkdir()
    assert tool.main([str(tmp_path)]) == 2
    assert f"{tmp_path}: config.yaml is missing, so what was run is not known" in capsys.readouterr().out


def test_an_empty_journal_is_called_empty_and_a_picture_without_a_place_is_told(tmp_path, capsys):
    (written(tmp_path) / "journal").mkdir()
    (tmp_path / "journal" / "data.mdb").touch()
    assert replay.main([str(tmp_path)]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "journal: empty: its broker was ended" in said and "move it away" not in said
    keys = ("lambda_then", "lambda", "acceptance_then", "acceptance", "kl_before", "kl_then", "kl", "ess_then", "ess")
    other = replay.Alternative(RunConfig(), [{"step": 0, **dict.fromkeys(keys, 0.5)}])
    (tmp_path / "replay.png").mkdir()
    with pytest.raises(ConfigError, match=r"cannot be written .*; make it writable, or copy it"):
        replay._compare(other, tmp_path, make_console())


def test_a_whole_directory_leaves_nothing_to_say(tmp_path):
    run = read_run(written(tmp_path / "x"))
    assert run.notes == [] and run.ended and run.config.run.name == "x"
    assert [step["step"] for step in run.steps] == [0, 1] and len(run.evaluations) == 1
    assert {life.process for life in run.timelines.lives} == {"actor-0", "broker"}


def test_an_empty_directory_names_all_that_is_missing(tmp_path):
    run = read_run(tmp_path)
    assert (run.config, run.status, run.records, run.timelines.lives) == (None, {}, [], [])
    named = ("config.yaml: missing", "status.json: missing", "metrics.jsonl: missing", "trace: no timelines")
    assert all(any(name in note for note in run.notes) for name in named) and len(run.notes) == 4
    with pytest.raises(ConfigError, match="no such directory"):
        read_run(tmp_path / "nowhere")


@settings(max_examples=40)
@given(st.sampled_from(("status.json", "metrics.jsonl", "trace/broker.trace")), st.data())
def test_a_file_cut_or_scribbled_on_anywhere_costs_itself_alone(tmp_path_factory, hit, data):
    run_dir = written(tmp_path_factory.mktemp("run"))
    (run_dir / "config.yaml").unlink()
    whole = (run_dir / hit).read_bytes()
    at = data.draw(st.integers(0, 1000)) % (len(whole) + 1)  # a trace is not equally long twice: it tells times
    rest = whole[at + 1 :] if data.draw(st.booleans()) else b""
    (run_dir / hit).write_bytes(whole[:at] + data.draw(st.binary(max_size=9)) + rest)
    run = read_run(run_dir)
    assert hit == "status.json" or run.ended
    assert hit == "metrics.jsonl" or len(run.steps) == 2
    assert "actor-0" in [life.process for life in run.timelines.lives]


def test_a_report_is_written_of_a_directory_all_of_whose_files_are_torn(tmp_path):
    written(tmp_path)
    for name in ("config.yaml", "status.json", "metrics.jsonl"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) * 2 // 3] + b"\xff\x00")
    (tmp_path / "summary.json").write_text("{")
    assert report.main([str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert all(f"- {name}: " in text for name in ("config.yaml", "status.json", "metrics.jsonl"))


@settings(max_examples=25)
@given(st.integers(0, len(json.dumps(LINES[1]))))
def test_what_a_broker_writes_after_one_that_was_killed_in_the_line_is_kept(tmp_path_factory, cut):
    run_dir = written(tmp_path_factory.mktemp("run"), LINES[:1])
    (run_dir / "config.yaml").unlink()
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(LINES[1])[:cut] + json.dumps(LINES[2]) + "\n")
    run = read_run(run_dir)
    assert [step["step"] for step in run.steps][-1:] == [1]
    assert len(run.evaluations) == 1
    assert len(run.notes) == 1 + (cut > 0)


def test_a_life_after_one_that_was_killed_in_a_record_is_read(tmp_path):
    life(tmp_path, "actor-0")
    path = trace_path(tmp_path, "actor-0")
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut] + whole)
        lives = read_timelines(tmp_path).lives
        assert [span.args for span in lives[-1].spans] == [{"group": 8}]
        assert lives[-1].ended == "closed" and len(lives) <= 2


def test_what_another_croupier_wrote_is_named_and_the_rest_is_read(tmp_path):
    written(tmp_path, [*LINES, {"kind": "eval", "version": 3}, {"kind": "weather", "sun": 1}, {"kind": "step"}])
    config = to_yaml(RunConfig(run=RunSection(name="x"))).replace("obrs:\n", "obrs:\n  wings: 2\n") + "moon:\n  a: 1\n"
    (tmp_path / "config.yaml").write_text(config)
    header = {"format": 99, "wire": 9, "process": "replica-0", "role": "replica", "clock_ns": 5}
    (tmp_path / "trace" / "replica-0.trace").write_bytes(msgpack.packb(["h", header]) + msgpack.packb(["z", 1]))
    run = read_run(tmp_path)
    assert run.config.run.name == "x"
    assert any("config.yaml: of another croupier" in note and "obrs.wings, moon" in note for note in run.notes)
    assert any("metrics.jsonl: 2 of 6 lines" in note and "(line 4, 6)" in note for note in run.notes)
    assert any("replica-0.trace" in note and "format 99, this croupier reads 1" in note for note in run.notes)
    assert len(run.notes) == 3 and len(run.timelines.lives) == 2


def test_a_configuration_that_cannot_be_used_is_left_out_with_its_reason(tmp_path):
    for text in ("run: {steps: -3}\n", "wings: 1\nrun: {steps: -3}\n", "{[", "- a\n", "run: 3\n"):
        (tmp_path / "config.yaml").write_text(text)
        run = read_run(tmp_path)
        assert run.config is None
        assert run.notes[0].startswith("config.yaml: cannot be read, left out (")


def test_a_run_that_is_still_written_is_said_to_be(tmp_path):
    written(tmp_path)
    (tmp_path / "status.json").write_text(json.dumps({"phase": "running", "step": 1, "steps": 9}))
    assert "running at step 1 of 9; the run goes on, or was killed" in " ".join(read_run(tmp_path).notes)


def test_the_receipt_of_another_croupier_is_refused_by_the_figure_that_it_lacks(tmp_path, capsys):
    written(tmp_path)
    assert receipt.main([str(tmp_path)]) == 2
    assert "has no 'lag_histogram'" in capsys.readouterr().out
