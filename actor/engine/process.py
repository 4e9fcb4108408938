"""An SGLang server as a child process: its command, its log, its end.

The command runs under a line of Python that asks the kernel to kill it with the actor, so that a
killed actor leaves no server behind; SGLang's own children follow theirs the same way.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from common.config import RunConfig

LAST_LINES = 6
DIE_WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9, 0, 0, 0); os.execvp(sys.argv[1], sys.argv[1:])"
CPU_ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1"}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false",  # else /health samples, a second each time
}
CPU_FLAGS = (
    "--max-total-tokens", "65536",  # else the key-value pool takes most of the memory
    "--sleep-on-idle",  # else an idle scheduler keeps a core busy, which others here need
)  # fmt: skip


def command(config: RunConfig, port: int, tag: str, index: int = 0) -> list[str]:
    """What starts an actor's server number ``index`` of the run's model on ``port``, serving weight version ``tag``."""
    engine = config.engine
    flags = [
        "--model-path", config.rollout_path,
        "--host", "127.0.0.1",
        "--port", str(port),
        "--dtype", config.model.dtype,
        "--weight-version", tag,
        "--tp-size", str(engine.tp),
        "--skip-tokenizer-init",
        "--log-level", "info",
        "--log-level-http", "warning",
    ]  # fmt: skip
    if engine.device != "auto":
        flags += ["--device", engine.device]
    if engine.device == "cpu":
        flags += CPU_FLAGS
    else:
        flags += ["--base-gpu-id", str(index * engine.tp)]
    if config.rollout.routing_replay:
        flags.append("--enable-return-routed-experts")
    return [engine.python, "-m", "sglang.launch_server", *flags, *engine.args]


class ServerProcess:
    """A running server, or one that has ended."""

    def __init__(self, argv: Sequence[str], log: Path, threads: int, cpu: bool) -> None:
        """Start it; its words go to the end of ``log``."""
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | ENVIRONMENT | (CPU_ENVIRONMENT if cpu else {})
        if cpu:
            environment["OMP_NUM_THREADS"] = str(threads)
        for name in ("PYTHONPATH", "CROUPIER_DIE_WITH_PARENT"):
            environment.pop(name, None)
        with log.open("ab") as sink:
            self._running = subprocess.Popen(
                [argv[0], "-c", DIE_WITH_PARENT, *argv],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    @property
    def ended(self) -> str:
        """How it ended; "" while it runs."""
        code = self._running.poll()
        if code is None:
            return ""
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"{how}; {self.log} ends: {self._last_words()}"

    def _last_words(self) -> str:
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 8192))
            lines = file.read().decode(errors="replace").splitlines()
        return " | ".join(line.strip() for line in lines[-LAST_LINES:] if line.strip())[-600:]

    def kill(self) -> None:
        """End it and its children now."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._running.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._running.wait(timeout=5.0)

    @property
    def pid(self) -> int:
        """Of the server, which leads a session of its own."""
        return self._running.pid
