"""Two network hosts on one machine: namespaces joined by a link that can be cut, slow and lossy.

The link is two TUN devices and a thread that carries IP packets between them, since not every
kernel has netem. Needs root and /dev/net/tun.
"""

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time
from pathlib import Path

CLONE_NEWNET = 0x40000000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
MTU = 1400
QUEUE = 5000  # packets on the way; the rest is dropped as a router would
DEVICE = "link0"


def missing() -> str:
    """Why this machine cannot do it; "" if it can."""
    if os.geteuid() != 0:
        return "needs root"
    if not Path("/dev/net/tun").exists():
        return "needs /dev/net/tun"
    with contextlib.suppress(OSError):
        name = f"croupier-try-{os.getpid()}"
        if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0:
            subprocess.run(["ip", "netns", "del", name], check=True)
            return ""
    return "needs `ip netns`"


def _tun(namespace: str) -> int:
    """A TUN device of ``namespace``, made by a thread that enters it and ends."""
    made: list[int | OSError] = []

    def make() -> None:
        try:
            with open(f"/var/run/netns/{namespace}") as file:
                if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
            made.append(fd)
        except OSError as error:
            made.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if isinstance(made[0], OSError):
        raise made[0]
    return made[0]


class TwoHosts:
    """Hosts ``a`` (10.77.0.1) and ``b`` (10.77.0.2); ``delay_s`` one way, ``loss`` a packet, ``cut`` at will."""

    addresses = ("10.77.0.1", "10.77.0.2")

    def __init__(self, delay_s=0.0, loss=0.0, seed=0):
        self.delay_s, self.loss, self.cut = delay_s, loss, False
        self.carried, self.lost = 0, 0
        self._random = random.Random(seed)
        self.names = tuple(f"croupier-{side}-{os.getpid()}" for side in "ab")
        self._closing = threading.Event()

    def __enter__(self):
        self._fds = []
        for name, address in zip(self.names, self.addresses, strict=True):
            subprocess.run(["ip", "netns", "add", name], check=True)
            self._fds.append(_tun(name))
            for words in (
                ["addr", "add", f"{address}/24", "dev", DEVICE],
                ["link", "set", "lo", "up"],
                ["link", "set", DEVICE, "mtu", str(MTU), "up"],
            ):
                subprocess.run(["ip", "-n", name, *words], check=True)
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._closing.set()
        self._thread.join(5)
        for fd in self._fds:
            os.close(fd)
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False)

    def on(self, side):
        """The words that put a command on host ``a`` or ``b``."""
        return ["ip", "netns", "exec", self.names["ab".index(side)]]

    def _carry(self):
        waiting, number = [], 0
        while not self._closing.is_set():
            now = time.monotonic()
            while waiting and waiting[0][0] <= now:
                _, _, to, packet = heapq.heappop(waiting)
                if not self.cut:
                    with contextlib.suppress(OSError):  # the device's queue is full: lost
                        os.write(to, packet)
            pause = min(0.2, waiting[0][0] - now) if waiting else 0.2
            ready, _, _ = select.select(self._fds, [], [], max(0.0, pause))
            for fd in ready:
                to = self._fds[1 - self._fds.index(fd)]
                with contextlib.suppress(BlockingIOError):
                    for _ in range(100):
                        packet = os.read(fd, 65536)
                        number += 1
                        if self.cut or self._random.random() < self.loss or len(waiting) >= QUEUE:
                            self.lost += 1
                        else:
                            self.carried += 1
                            heapq.heappush(waiting, (time.monotonic() + self.delay_s, number, to, packet))
