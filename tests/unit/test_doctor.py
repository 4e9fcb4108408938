"""The doctor finds what is missing, and starts where nothing is installed."""

import subprocess
import sys
from pathlib import Path

import pytest
from aiohttp import web

import common
from actor.sandbox.backends import find_backend
from common.config import load
from common.errors import ConfigError, ModelError
from tests.chatml import make_chat_model
from tests.unit.reward_server import RewardServer
from tests.unit.sandboxed import require_sandbox
from tools.doctor import (
    ROOT,
    Finding,
    check_checkout,
    check_package,
    check_run,
    main,
    pinned_versions,
    requirements,
    show,
)
from tools.preflight import check_rewards


@pytest.mark.parametrize(
    ("override", "what", "words", "remedy"),
    [
        ("run.dir={file}/below", "run directory", "cannot be written", "name another directory"),
        ("broker.keys=/nowhere", "keys", "no such key", "python -m tools.keys make"),
        ("run.steps=", "run file", "override: run.steps: needs a value", ""),
        ("stalenes.budget=1", "run file", "unknown section stalenes", "did you mean 'staleness'?"),
    ],
)
def test_what_a_launch_refuses_the_doctor_finds(
    override: str, what: str, words: str, remedy: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    found = check_run(str(ROOT / "configs" / "smoke.yaml"), [override.format(file=tmp_path / "file")])
    (bad,) = (finding for finding in found if finding.what == what)
    assert (bad.state, words in bad.detail) == ("missing", True), bad
    assert bad.remedy.startswith(remedy)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # it looks, and leaves nothing


def test_common_is_this_checkout_s() -> None:
    assert Path(common.__file__ or "").resolve().parents[1] == Path(__file__).resolve().parents[2] == ROOT
    assert check_checkout().state == "ok"


def test_every_requirement_is_pinned() -> None:
    pinned = pinned_versions()
    assert {"torch", "pyzmq", "reasoning-gym"} <= set(requirements())
    assert set(requirements()) <= set(pinned)
    assert pinned["torch"] == "2.13.0"


def test_packages_missing_and_at_another_version() -> None:
    missing = check_package("no-such-package-at-all", "1.2")
    assert missing.state == "missing"
    assert "no-such-package-at-all==1.2" in missing.remedy
    other = check_package("rich", "0.0.1")
    assert other.state == "note"
    assert "tested with 0.0.1" in other.detail


def test_a_healthy_run_passes_and_a_bad_one_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quickstart = str(ROOT / "configs" / "quickstart.yaml")
    free = [f"broker.address=ipc://{tmp_path}/broker"]
    assert main([quickstart, *free]) == 0
    assert "gloo on loopback" in capsys.readouterr().out
    states = {
        f.what: f for f in check_run(quickstart, [*free, "task.name=gym:chain_sum", f"model.path={tmp_path}/none"])
    }
    assert states["model"].state == "missing"
    assert states["run directory"].state == "ok"
    assert "download the model" in states["model"].remedy
    make_chat_model(tmp_path / "chat")
    agent = str(ROOT / "configs" / "agent.yaml")
    (tasks,) = [
        f for f in check_run(agent, [*free, f"model.path={tmp_path}/chat", "task.params.agnt=x"]) if f.what == "tasks"
    ]
    assert tasks.state == "missing" and "agent has no such parameter" in tasks.detail
    (finding,) = check_run(quickstart, ["actor.cuont=2"])
    assert finding.remedy == "did you mean 'count'?"


def test_an_engine_without_sglang_is_missing_and_an_untried_one_noted(tmp_path: Path) -> None:
    given = [f"broker.address=ipc://{tmp_path}/broker", f"model.path={tmp_path}", "actor.engine=sglang"]

    def found(python: str) -> Finding:
        findings = check_run(str(ROOT / "configs" / "sglang.yaml"), [*given, f"engine.python={python}"])
        return next(finding for finding in findings if finding.what == "SGLang")

    missing = found(sys.executable)
    assert missing.state == "missing" and "sglang is not installed there" in missing.detail
    assert "python -m tools.sglang_cpu install" in missing.remedy
    (tmp_path / "python").write_text("#!/bin/sh\necho 0.6.1\n")
    (tmp_path / "python").chmod(0o755)
    untried = found(f"{tmp_path}/python")
    assert untried.state == "note" and "SGLang 0.6.1; 0.5.19 to 0.5.23 are supported" in untried.detail


def test_in_a_pipe_addresses_and_commands_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    address, remedy = f"ipc://{'long/' * 30}broker", f"python -m tools.keys make {'keys/' * 30}"
    show([Finding("broker address", "missing", f"{address}: no directory", remedy)])
    assert capsys.readouterr().out == f"missing  broker address: {address}: no directory -> {remedy}\n"


def test_it_starts_without_site_packages() -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-m", "tools.doctor", "configs/quickstart.yaml"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "missing  torch: not installed" in done.stdout


def test_a_task_that_runs_programs_needs_a_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_sandbox()
    given = str(ROOT / "configs" / "terminal.yaml"), [f"broker.address=ipc://{tmp_path}/broker"]
    find_backend.cache_clear()
    found = {finding.what: finding for finding in check_run(*given)}["sandbox"]
    assert (found.state, found.detail) == ("ok", find_backend().name)
    monkeypatch.setenv("PATH", str(tmp_path))
    find_backend.cache_clear()
    found = {finding.what: finding for finding in check_run(*given)}["sandbox"]
    assert found.state == "missing" and "bwrap: not installed, unshare: not installed" in found.detail
    assert found.remedy.startswith("apt-get install bubblewrap")
    quickstart = check_run(str(ROOT / "configs" / "quickstart.yaml"), given[1])
    assert "sandbox" not in {finding.what for finding in quickstart}
    find_backend.cache_clear()


REWARDED = """
task: {reward_weights: {correct: 1.0, style: 0.2}}
reward: {models: {style: {kind: grm, url: "URL/v1", model: m, rubric: Be kind., api_key_env: JUDGE_KEY}}}
"""


def test_a_judge_that_is_away_is_said_and_a_key_that_is_not_set_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = RewardServer(lambda request, body: web.Response(status=404))
    file = tmp_path / "run.yaml"
    file.write_text(REWARDED.replace("URL", server.url))
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    found = {f.what: f for f in check_run(str(file), [f"broker.address=ipc://{tmp_path}/broker"])}["rewards"]
    assert found.state == "missing" and "export it where the actors start" in found.remedy + found.detail
    monkeypatch.setenv("JUDGE_KEY", "k")
    assert check_rewards(load(file)) == [] and server.headers[-1]["Authorization"] == "Bearer k"
    server.handler = lambda request, body: web.Response(status=401)
    assert "refuses the key (HTTP 401)" in check_rewards(load(file))[0]
    server.close()
    assert "does not answer" in check_rewards(load(file))[0]
    found = {f.what: f for f in check_run(str(file), [f"broker.address=ipc://{tmp_path}/broker"])}["rewards"]
    assert found.state == "note" and "does not answer" in found.detail
    with pytest.raises(ConfigError, match="no such file; correct the path"):
        check_rewards(load(file, ["reward.exemplars=/no/such.jsonl"]))
    file.write_text("task: {reward_weights: {correct: 1, taste: 1}}\nreward: {models: {taste: {path: /no/model}}}\n")
    with pytest.raises(ModelError, match=r"reward\.models\.taste\.path='/no/model': no such directory"):
        check_rewards(load(file))
