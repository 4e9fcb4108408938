"""A run whose processes are started, killed and started again one by one, as users do."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from common.config import load, to_yaml
from tests.integration.forked import Forked

ROOT = Path(__file__).parents[2]
BRIEF = ("warmstart.target_reward=0.0",)


def free_address():
    """Below the ephemeral ports: a peer that waits for its broker must not be handed the broker's own port."""
    while True:
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", random.randrange(10_000, 16_000)))
            return f"tcp://127.0.0.1:{s.getsockname()[1]}"


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def make_model(path, *overrides):
    """A barely warmed-up model: these tests prove plumbing, not learning."""
    subprocess.run(
        [sys.executable, "-m", "tools.warmstart", "configs/smoke.yaml", f"model.path={path}", *BRIEF, *overrides],
        cwd=ROOT, env=environment(), check=True, timeout=100, capture_output=True,
    )  # fmt: skip
    return path


def lines_of(run, kind=None):
    """The lines of ``metrics.jsonl``, of one kind or all; one that its broker is still writing is none yet."""
    file = run / "metrics.jsonl"
    whole = file.read_text().rpartition("\n")[0] if file.exists() else ""
    return [x for x in map(json.loads, whole.splitlines()) if kind in (None, x["kind"])]


class Fleet:
    """Processes of one configuration, by name."""

    def __init__(self, directory, model, *overrides, places=None, extra=None, base="configs/smoke.yaml"):
        """``places``: command words before a process's own, by name; ``extra``: of the environment."""
        self.directory = directory
        here = [f"run.dir={directory}", f"model.path={model}", f"broker.address={free_address()}", *BRIEF]
        config = load(ROOT / base, [*here, *overrides])
        self.config, self.run = config, config.run.path
        self.file = directory / "run.yaml"
        self.file.write_text(to_yaml(config))
        self.running = {}
        self.places, self.extra = places or {}, extra or {}

    def start(self, name, *overrides, ranks=0):
        """``learner``, ``replica-N``, ``reference-N``, ``teacher-X-N``, ``actor-N``; ``ranks``: torchrun."""
        kind, *who = name.split("-")
        module = "learner.score" if kind in ("replica", "reference", "teacher") else kind
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"] if ranks else []
        named = ["--name", name] if "-" in name else []
        if kind in ("reference", "teacher"):
            named += ["--serves", kind if kind == "reference" else who[0]]
        if not ranks and not self.places:
            self.running[name] = Forked(module, [str(self.file), *named, *overrides], self.log(name))
            return self.running[name]
        words = [sys.executable, "-m", *torchrun, module, str(self.file), *named, *overrides]
        with self.log(name).open("ab") as log:
            self.running[name] = subprocess.Popen(
                [*self.places.get(name, []), *words], cwd=ROOT, env={**environment(), **self.extra},
                stderr=log, stdout=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        return self.running[name]

    def log(self, name):
        return self.directory / f"{name}.log"

    def kill(self, name, number=signal.SIGKILL):
        os.killpg(self.running[name].pid, number)
        return self.running[name].wait(20)

    def wait(self, name, timeout=60):
        return self.running[name].wait(timeout)

    def steps(self):
        return lines_of(self.run, "step")

    def metrics(self):
        return lines_of(self.run)

    def status(self):
        return json.loads((self.run / "status.json").read_text())

    def wait_for_step(self, step, timeout=60):
        deadline = time.monotonic() + timeout
        while not any(s["step"] >= step for s in self.steps()):
            assert time.monotonic() < deadline, self.words()
            time.sleep(0.05)

    def wait_for_log(self, name, words, timeout=60):
        deadline = time.monotonic() + timeout
        while words not in (self.log(name).read_text() if self.log(name).exists() else ""):
            assert time.monotonic() < deadline, self.words()
            time.sleep(0.05)

    def words(self):
        return "\n".join(f"== {p.name}\n{p.read_text()[-2000:]}" for p in sorted(self.directory.glob("*.log")))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.running.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
