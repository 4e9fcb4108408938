"""A real sweep of two cells, killed in the second and gone on with."""

import json
import subprocess
import sys
import time

import pytest

from tests.integration.fleet import BRIEF, ROOT, environment
from tests.integration.test_end_to_end import processes_of

SMALL = (
    "run.steps=4",
    "evaluation.every=2",
    "evaluation.prompts=16",
    "broker.heartbeat_s=0.3",
    "broker.peer_timeout_s=4",
)


def words(tmp_path, model):
    sweep = [sys.executable, "-m", "tools.sweep", "configs/smoke.yaml", "staleness.budget=0,2", "--name", "mini"]
    return [*sweep, f"run.dir={tmp_path}", f"model.path={model}", *BRIEF, *SMALL]


def wait_for(condition, process, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(600)  # on a busy machine; about 25 s on a quiet one
def test_a_sweep_that_is_killed_goes_on_and_reports(tmp_path, model):
    directory = tmp_path / "mini"
    first, second = (directory / f"staleness.budget={budget}" / "seed-0" for budget in (0, 2))
    with (tmp_path / "out").open("w") as out:
        sweep = subprocess.Popen(words(tmp_path, model), cwd=ROOT, env=environment(), stdout=out, stderr=out)
        try:
            wait_for((second / "config.yaml").exists, sweep, 250)
        finally:
            sweep.kill()
            sweep.wait(10)
    done = (first / "metrics.jsonl").stat()
    assert json.loads((first / "summary.json").read_text())["status"] == "finished"

    again = subprocess.run(
        words(tmp_path, model), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=250
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert "1 of 2 runs are done" in again.stdout and "was set aside as seed-0.1" in again.stdout
    assert (first / "metrics.jsonl").stat() == done  # not run again
    assert json.loads((second / "summary.json").read_text())["steps"] == 4
    assert "2 of 2 runs are finished and measured" in (directory / "report.md").read_text()
    assert "recommended: staleness.budget=" in again.stdout
    assert (directory / "report.html").stat().st_size > 50_000
    assert processes_of(directory) == []
    assert not any((directory / "start").glob("*/warmstart.json")) and (model / "warmstart.json").exists()
