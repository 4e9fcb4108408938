"""What every process does at its start: stop signals, death with its launcher, log lines, a free port."""

import ctypes
import gc
import logging
import os
import signal
import socket
import sys
import time
from types import FrameType

PR_SET_PDEATHSIG = 1  # linux/prctl.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
COLLECT_AFTER = 10_000
SAME_STOP_S = 1.0  # a second signal so soon is the first one passed on: torchrun hands its ranks what they got too
KEPT_BYTES, GROWN_BYTES, MAPPED_BYTES = 256 << 20, 16 << 20, 32 << 20


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


class StopFlag:
    """Set by SIGTERM or SIGINT; loops look at it between their turns."""

    def __init__(self) -> None:
        self.is_set = False
        self.reason = ""

    def set(self, reason: str) -> None:
        """Ask the process to end."""
        self.is_set, self.reason = True, reason

    def install(self) -> "StopFlag":
        """Handle SIGTERM and SIGINT from now on; one more, SAME_STOP_S later, ends the process at once."""
        first = 0.0

        def handle(number: int, _frame: FrameType | None) -> None:
            nonlocal first
            now = time.monotonic()
            if not first:
                first = now
                self.set(signal.Signals(number).name)
            elif now - first > SAME_STOP_S:
                sys.exit(128 + number)

        signal.signal(signal.SIGTERM, handle)
        signal.signal(signal.SIGINT, handle)
        return self


def die_with_parent() -> None:
    """Where a launcher asked for it, end with the launcher even if that is killed (Linux)."""
    if os.environ.get("CROUPIER_DIE_WITH_PARENT") and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def keep_freed_memory() -> bool:
    """Let freed memory, up to ``KEPT_BYTES`` of it, be used again instead of going back to the kernel (glibc).

    Who makes and frees megabytes for every batch spends otherwise as long on pages that the kernel takes, clears and
    gives back as on what is in them. Returns whether it was done.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return False
    wanted = ((M_TRIM_THRESHOLD, KEPT_BYTES), (M_TOP_PAD, GROWN_BYTES), (M_MMAP_THRESHOLD, MAPPED_BYTES))
    return all(libc.mallopt(option, value) for option, value in wanted)


def collect_seldom() -> None:
    """Look for cycles after ``COLLECT_AFTER`` new objects, not 700: messages are made of many that are no garbage."""
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER, *gc.get_threshold()[1:])


def setup_logging(name: str) -> logging.Logger:
    """A logger that writes one line an event to stderr."""
    logging.basicConfig(
        level=os.environ.get("CROUPIER_LOG", "INFO").upper(),
        format=f"%(asctime)s {name} %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    return logging.getLogger(name)
