"""One real server for all tests that only talk to it; those that kill servers start their own."""

import contextlib
import os
import signal
import time
import urllib.request
from pathlib import Path

import pytest

from actor.engine.process import ServerProcess, command
from common.process import free_port
from tests.sglang.servers import make_models, run_config
from tools.processes import descendants

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def sglang_python() -> Path:
    """The interpreter beside which SGLang is installed."""
    python = Path(os.environ.get("CROUPIER_SGLANG_PYTHON", REPOSITORY / ".sglang" / "bin" / "python"))
    if not python.exists():
        pytest.skip("no SGLang; install it with python -m tools.sglang_cpu install")
    return python


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def server(sglang_python, models, tmp_path_factory) -> str:
    """The address of a running server of ``models["first"]``."""
    directory = tmp_path_factory.mktemp("server")
    port = free_port()
    process = ServerProcess(
        command(run_config(models["first"], directory, sglang_python), port, "nobody-0"), directory / "log", 1, True
    )
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 240
    while True:
        assert not process.ended and time.monotonic() < deadline, process.ended or "not up within 240 s"
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2)
            break
        except OSError:
            time.sleep(0.5)
    yield url
    process.kill()


@pytest.fixture(autouse=True)
def no_server_is_left():
    """Whatever a test started has ended with it."""
    before = _servers()
    yield
    deadline = time.monotonic() + 10
    while (left := _servers() - before) and time.monotonic() < deadline:
        time.sleep(0.2)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def _servers() -> set[int]:
    """Server processes that this one started."""
    found = set()
    for pid in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            if b"sglang.launch_server" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(pid)
    return found
