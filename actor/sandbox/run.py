"""A program shut in, from the actor's side: one process started, one message to it, one from it, a deadline on both."""

import os
import selectors
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict

from actor.sandbox.backends import Backend, find_backend, interpreter
from actor.sandbox.box import READY, Limits, Result, Tree, pack, pack_tree, unpack, unpack_tree
from common.errors import SandboxError

START_S = 30.0  # until the program starts: the environment's time
REPORT_S = 20.0  # behind the program's last moment
HEADER_BYTES = 4096 + 512  # at most, for one file of a report: its path and the rest
REAP_S = 10.0  # for a killed process to be gone
SAID = 4096  # bytes of the start's complaints that are kept
READ_AT_ONCE = 1 << 16


def environment() -> dict[str, str]:
    """What a program finds in its environment; nothing of the actor's."""
    path = dict.fromkeys(["/usr/local/bin", "/usr/bin", "/bin", os.path.dirname(interpreter())])
    return {
        "PATH": ":".join(path), "HOME": "/work", "TMPDIR": "/tmp", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", "TZ": "UTC",
        "TERM": "dumb", "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip


def run(program: Sequence[str], files: Tree, limits: Limits, backend: Backend | None = None) -> Result:
    """Run ``program`` in WORK with ``files`` in it. Blocks for ``limits.wall_s`` and a little at most; thread-safe.

    Raises SandboxError if the program could not be started: never for what the program does.
    """
    rows, contents = pack_tree(files)
    header = {"argv": list(program), "environment": environment(), "limits": asdict(limits), "files": rows}
    job = pack(header, contents)
    chosen = backend or find_backend()
    argv = chosen.make_argv(limits)
    try:
        process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, cwd="/",
            env={"PATH": os.environ.get("PATH", os.defpath)}, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise SandboxError(f"{chosen.name} cannot be started: {error}") from error
    exchange = _Exchange(process, len(job).to_bytes(8, "big") + job, limits)
    try:
        exchange.run()
    finally:
        process.kill()  # its children go with it
        exchange.close()
    if not exchange.received.startswith(READY):
        said = exchange.said.decode(errors="replace").strip().splitlines()
        raise SandboxError(
            f"{chosen.name} started no program: {said[-1] if said else exchange.why or 'it said nothing'}"
        )
    return _read(bytes(exchange.received[len(READY) :]))


class _Exchange:
    """The job goes in while the report and complaints come out."""

    def __init__(self, process: "subprocess.Popen[bytes]", job: bytes, limits: Limits) -> None:
        self._process, self._left = process, memoryview(job)
        self.received, self.said, self.why = bytearray(), bytearray(), ""
        self._most = (limits.disk_mb << 20) + (limits.output_kb << 10) + (limits.files + 1) * HEADER_BYTES
        self._wall_s = limits.wall_s

    def run(self) -> None:
        """Until the report is whole, its limit is reached or time is up."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        deadline, started = time.monotonic() + START_S, False
        with selectors.DefaultSelector() as selector:
            for stream, event in (
                (process.stdin, selectors.EVENT_WRITE),
                (process.stdout, selectors.EVENT_READ),
                (process.stderr, selectors.EVENT_READ),
            ):
                os.set_blocking(stream.fileno(), False)
                selector.register(stream, event)
            while process.stdout in {key.fileobj for key in selector.get_map().values()}:
                left = deadline - time.monotonic()
                if left <= 0 or len(self.received) > self._most:
                    self.why = "it is late" if left <= 0 else "its report is too long"
                    return
                for key, _ in selector.select(left):
                    if not self._move(key.fd, key.fileobj is process.stdin, key.fileobj is process.stdout):
                        selector.unregister(key.fileobj)
                if not started and self.received.startswith(READY):
                    deadline, started = time.monotonic() + self._wall_s + REPORT_S, True

    def close(self) -> None:
        """Close the streams and reap the process, which is dead. Raises TimeoutExpired if the kernel keeps it."""
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()
        self._process.wait(REAP_S)

    def _move(self, fd: int, writes: bool, report: bool) -> bool:
        """One step with a stream that is ready; whether more is to come."""
        try:
            if writes:
                self._left = self._left[os.write(fd, self._left[: 1 << 20]) :]
                return bool(self._left)
            piece = os.read(fd, READ_AT_ONCE)
        except BlockingIOError:
            return True
        except BrokenPipeError:
            return False
        if report:
            self.received += piece
        else:
            self.said = (self.said + piece)[-SAID:]
        return bool(piece)


def _read(report: bytes) -> Result:
    """Of a program that was started: one without a whole report has taken its sandbox down."""
    try:
        header, rest = unpack(report)
        size = int(header["output"])
        if not 0 <= size <= len(rest):
            raise ValueError(f"{size} bytes of output where {len(rest)} are left")
        files = unpack_tree(header["files"], rest[size:])
        return Result(
            int(header["exit_code"]), bytes(rest[:size]), int(header["cut_at"]), int(header["cut_bytes"]),
            str(header["killed_by"]), files if header["collected"] else None,
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, RecursionError):
        return Result(137, b"", -1, 0, "lost", None)
