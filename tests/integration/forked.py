"""Processes that begin with torch and transformers imported: forked from a server that did it once.

What runs in them is ``python -m MODULE ARGUMENTS`` all the same; only seconds of imports are saved.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys

PRELOAD = [
    "broker.service", "actor.service", "learner.train", "learner.score",
    "transformers.models.qwen3_moe.modeling_qwen3_moe", "transformers.models.auto.modeling_auto",
]  # fmt: skip
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


def _run(module, arguments, log):
    os.setsid()
    signal.set_wakeup_fd(-1)
    with open(log, "ab") as file, open(os.devnull, "wb") as nothing:
        os.dup2(file.fileno(), 2)
        os.dup2(nothing.fileno(), 1)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


class Forked:
    """As much of :class:`subprocess.Popen` as the tests use."""

    def __init__(self, module, arguments, log):
        self.process = _context.Process(target=_run, args=(module, arguments, str(log)), daemon=False)
        self.process.start()
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.process), timeout)
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)
