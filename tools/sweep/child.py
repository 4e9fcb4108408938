"""One run of a sweep as a child process: ``tools.launch`` in a session of its own.

A sweep that is killed takes its runs along: the kernel sends them SIGTERM, on which the launcher
stops everything. Until it has, it holds the sweep's lock (:class:`Lock`), so that the same sweep does
not start beside what is left of it.
"""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Protocol

from common.config import RunConfig, to_yaml
from common.errors import ConfigError
from common.locks import lock_within
from tools.outputs import writing
from tools.processes import SAVE_S

STOP_S = SAVE_S + 15.0  # for a launcher to stop all its processes and to write its report
LOCK_S = SAVE_S + 20.0  # for what is left of a killed sweep to end
PORTS = (10_000, 32_000)  # below the ephemeral ones: a peer that waits must not be handed its broker's port
FOLLOW = (  # SIGTERM with the parent, unless that is gone already; then the command
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15, 0, 0, 0); "
    "sys.exit(1) if os.getppid() != int(sys.argv[1]) else os.execvp(sys.argv[2], sys.argv[2:])"
)


class Child(Protocol):
    """A run that was started."""

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        ...

    def ask(self) -> None:
        """Tell it to end."""
        ...

    def stop(self) -> None:
        """End it and wait until it has ended."""
        ...


class Launcher(Protocol):
    """Starts runs."""

    def __call__(self, config: RunConfig, log: Path) -> Child:
        """Start ``config``; what it says goes to ``log``."""
        ...


@dataclass
class Launched:
    """A ``tools.launch`` process."""

    process: "subprocess.Popen[bytes]"
    asked: bool = False  # to end

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        return self.process.poll()

    def ask(self) -> None:
        """SIGTERM, once."""
        if self.process.poll() is None and not self.asked:
            self.asked = True
            self.process.terminate()

    def stop(self) -> None:
        """SIGTERM, and SIGKILL for the whole session if that is not enough."""
        if self.process.poll() is None:
            self.ask()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(STOP_S)


def launch(config: RunConfig, log: Path, keep: Sequence[int] = ()) -> Launched:
    """Start ``tools.launch`` on a free port; the file descriptors ``keep`` stay open in it."""
    config = replace(config, broker=replace(config.broker, address=free_address()))
    log.parent.mkdir(parents=True, exist_ok=True)
    file = log.with_suffix(".yaml")
    file.write_text(to_yaml(config))
    command = [sys.executable, "-m", "tools.launch", str(file)]
    if sys.platform == "linux":
        command = [sys.executable, "-c", FOLLOW, str(os.getpid()), *command]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C reaches the sweep alone
            pass_fds=tuple(keep),
        )
    return Launched(process)


def free_address() -> str:
    """A broker address that nobody listens on now."""
    while True:
        port = random.randrange(*PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return f"tcp://127.0.0.1:{port}"


class Lock:
    """Held by a sweep, and by its launchers as long as they live: two sweeps never share a directory."""

    def __init__(self, directory: Path, say: Callable[[str], None]) -> None:
        """Take it within ``LOCK_S``, and ``say`` so if that takes time. Raises :class:`ConfigError` if it cannot."""
        with writing(directory, "set run.dir to another directory"):
            directory.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] = (directory / "lock").open("a")
        waiting = f"{directory}: waiting for what is left of an earlier sweep to end, {LOCK_S:.0f} s at most"
        if not lock_within(self._file, LOCK_S, lambda: say(waiting)):
            self._file.close()
            raise ConfigError(f"{directory}: another sweep is running there; wait for it, or stop it first")

    @property
    def descriptor(self) -> int:
        """Of the lock file."""
        return self._file.fileno()

    def release(self) -> None:
        """Let go; launchers that are still there keep it."""
        self._file.close()
