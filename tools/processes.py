"""The processes of one run: start, watch, restart, stop, leave none behind.

::

    Process.start() -> poll() -> (restart | report) -> stop_all(): SIGTERM -> wait -> SIGKILL of the whole family

Each child has its own session, so a terminal's Ctrl-C reaches the launcher alone, and its own log.
"""

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType

from common.config import RunConfig
from tools.devices import VISIBLE
from tools.run_files import LOGS

TERMINATE_S = 10.0  # between SIGTERM and SIGKILL: one that only just starts may take long on a full machine
SAVE_S = 60.0  # the same for a learner that writes a checkpoint, and the broker that hears of it
POLL_S = 0.05
NO_DEVICES: Mapping[str, str] = MappingProxyType({})
TORCHRUN = "torch.distributed.run"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass
class Process:
    """One child process and its log file."""

    name: str
    command: Sequence[str]
    log: Path
    threads: int = 1
    may_restart: bool = False  # the run goes on without it for a moment
    devices: str | None = None  # its CUDA_VISIBLE_DEVICES; None: as here
    leave_s: float = TERMINATE_S  # to end by itself after SIGTERM
    by_torchrun: bool = False  # it starts ranks and would kill them 30 s after a SIGTERM of its own
    restarts: int = 0
    in_a_row: int = 0  # of them, without five minutes of health between
    started: float = 0.0  # when it was started last
    running: "subprocess.Popen[bytes] | None" = field(default=None, repr=False)

    def start(self) -> None:
        """Start it, or start it again; the log is appended to."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.started = time.monotonic()
        with self.log.open("ab") as log:
            self.running = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=child_environment(self.threads, self.devices),
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """The exit code, or None while it runs; minus the signal's number if one ended it."""
        return None if self.running is None else self.running.poll()

    @property
    def alive(self) -> bool:
        """Started and not ended."""
        return self.running is not None and self.running.poll() is None


def child_environment(threads: int, devices: str | None = None) -> dict[str, str]:
    """This environment, for a child that computes on ``threads`` cores and dies with its launcher.

    ``devices``: the GPUs that it sees; None for those that are seen here.
    """
    environment = {key: value for key, value in os.environ.items() if key != "GLOO_SOCKET_IFNAME"}
    environment |= dict.fromkeys(THREADS, str(threads))
    if devices is not None:
        environment[VISIBLE] = devices
    return environment | {
        "CROUPIER_DIE_WITH_PARENT": "1",
        "PYTHONUNBUFFERED": "1",  # a killed process leaves its last words in its log
        "TOKENIZERS_PARALLELISM": "false",
    }


def processes_of(config: RunConfig, config_file: Path, devices: Mapping[str, str] = NO_DEVICES) -> list[Process]:
    """Every process of the run, the broker first; all read the run directory's own configuration.

    ``devices``: of those processes that take GPUs, see :func:`tools.devices.deal`.
    """
    logs = config.run.path / LOGS
    python, file = sys.executable, str(config_file)
    found = [Process("broker", [python, "-m", "broker", file], logs / "broker.log", leave_s=SAVE_S)]
    learner = [*_start(config.learner.ranks), "learner", file]
    found.append(Process("learner", learner, logs / "learner.log", config.learner.threads, leave_s=SAVE_S))
    for index in range(config.replica.count if config.obrs.mode != "off" else 0):
        name = f"replica-{index}"
        command = [*_start(config.replica.ranks), "learner.score", file, "--name", name]
        found.append(Process(name, command, logs / f"{name}.log", config.replica.threads, may_restart=True))
    for model in config.frozen.values():
        for name in map(model.process, range(model.count)):
            start = _start(config.replica.ranks)
            command = [*start, "learner.score", file, "--name", name, "--serves", model.name]
            found.append(Process(name, command, logs / f"{name}.log", config.replica.threads, may_restart=True))
    for index in range(config.actor.count):
        name = f"actor-{index}"
        command = [python, "-m", "actor", file, "--name", name]
        found.append(Process(name, command, logs / f"{name}.log", config.actor.threads, may_restart=True))
    for process in found:
        process.by_torchrun = TORCHRUN in process.command
        process.devices = devices.get(process.name)
    return found


def _start(ranks: int) -> list[str]:
    """How a module is started on ``ranks`` processes of this machine."""
    if ranks == 1:
        return [sys.executable, "-m"]
    return [sys.executable, "-m", TORCHRUN, "--standalone", "--nproc-per-node", str(ranks), "-m"]


def descendants(root: int) -> dict[int, int]:
    """Processes below ``root`` as id -> start time (torchrun puts its ranks into sessions of their own). Linux."""
    children: dict[int, list[int]] = {}
    started: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        stat = _stat(int(entry.name))
        if stat is not None:
            parent, started[int(entry.name)] = stat
            children.setdefault(parent, []).append(int(entry.name))
    found: dict[int, int] = {}
    frontier = [root]
    while frontier:
        frontier = [child for parent in frontier for child in children.get(parent, [])]
        found |= {pid: started[pid] for pid in frontier}
    return found


def _stat(pid: int) -> tuple[int, int] | None:
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return None
    return int(after_name[1]), int(after_name[19])  # fields 4 and 22 of proc(5): parent, start time in ticks


def wait_all(processes: Iterable[Process], timeout_s: float) -> bool:
    """Wait until none is alive; False if time ran out."""
    deadline = time.monotonic() + timeout_s
    waiting = list(processes)
    while waiting := [process for process in waiting if process.alive]:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def stop_all(processes: Iterable[Process], timeout_s: float = math.inf) -> list[str]:
    """End them all, each within its ``leave_s`` and all within ``timeout_s``; returns whom it had to kill."""
    alive = [process for process in processes if process.alive]
    families = {process.name: descendants(process.running.pid) for process in alive if process.running is not None}
    for process in alive:
        _ask_to_end(process, families[process.name])
    began = time.monotonic()
    for process in sorted(alive, key=attrgetter("leave_s")):
        wait_all([process], began + min(process.leave_s, timeout_s) - time.monotonic())
    stubborn = [process for process in alive if process.alive]
    for process in alive:
        if process in stubborn:
            _send(process, signal.SIGKILL)
        for pid, started in families[process.name].items():
            stat = _stat(pid)
            if stat is not None and stat[1] == started:  # still the same process, not a later one of that id
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    wait_all(stubborn, 1.0)
    return [process.name for process in stubborn]


def _ask_to_end(process: Process, family: Mapping[int, int]) -> None:
    """SIGTERM; where torchrun started ranks only they get it: torchrun ends behind them, and sets no limit."""
    ranks = [pid for pid in family if process.by_torchrun and _is_child(pid, process)]
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    if not ranks:
        _send(process, signal.SIGTERM)


def _is_child(pid: int, process: Process) -> bool:
    stat = _stat(pid)
    return stat is not None and process.running is not None and stat[0] == process.running.pid


def _send(process: Process, number: signal.Signals) -> None:
    if process.running is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.running.pid, number)
