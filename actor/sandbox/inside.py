"""Process 1 of a sandbox: lays out files, runs the program, watches it, kills what is left, packs what it wrote.

::

    root -> privileges given up -> the job is read -> files -> READY -> fork -> watch -> kill all -> report

Nothing of the program outlives its run: whatever process 1 leaves alive dies with the namespace when
it ends. Its standard input is held open by the actor; where that closes, nobody waits any more.
"""

import json
import os
import resource
import select
import signal
import stat
import sys
import time
from typing import Any, NoReturn

from actor.sandbox.box import READY, WORK, Entry, Limits, Tree, cost_bytes, pack, pack_tree, unpack, unpack_tree
from actor.sandbox.confine import become, drop_privileges, filter_system_calls, go_first_without_memory, limit_resources
from actor.sandbox.root import build_root

SPACES = (WORK, "/tmp")  # where a program may write
WATCH_S = 0.025  # between two looks at what is used, if the machine lets us look
KILL_S = 5.0  # for killed processes to be gone
OUTPUT_FACTOR = 64  # times what is kept of the output: a program that prints more is killed
TIMES_S = (-(1 << 33), 1 << 33)  # since 1970, of files: what a program sets beyond them cannot be set again
NICENESS = 5  # below the actor that decodes
READ_AT_ONCE = 1 << 16  # bytes
PAGE_SIZE = resource.getpagesize()
TICKS = os.sysconf("SC_CLK_TCK")  # a second
CANNOT_EXECUTE = 127  # as in shells


def main() -> NoReturn:
    """Called with one argument, JSON: ``root`` (arguments of build_root, or null) and ``uid`` (or null)."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # process 1 is sent what it handles and nothing else
    settings = json.loads(sys.argv[1])
    if settings["root"] is not None:
        build_root(spaces=SPACES, **settings["root"])
    if settings["uid"] is not None:
        become(settings["uid"], SPACES)
    drop_privileges()
    os.umask(0o022)
    job, contents = unpack(_read_job())
    limits = Limits(**job["limits"])
    lay_out(unpack_tree(job["files"], contents))
    _write(READY)
    _write(run(job["argv"], job["environment"], limits))
    os._exit(0)


def _read_job() -> bytes:
    """8 bytes of length on standard input, and so many more; it stays open."""
    return _read_exactly(int.from_bytes(_read_exactly(8), "big"))


def _read_exactly(wanted: int) -> bytes:
    pieces = []
    while wanted > 0:
        piece = os.read(0, min(wanted, 1 << 20))
        if not piece:
            os._exit(1)  # nobody waits any more
        pieces.append(piece)
        wanted -= len(piece)
    return b"".join(pieces)


def _write(message: bytes) -> None:
    at = 0
    while at < len(message):
        at += os.write(1, message[at : at + (1 << 20)])


# ---- files ------------------------------------------------------------------------------------------


def lay_out(tree: Tree) -> None:
    """Write ``tree`` below WORK. Raises OSError if it does not fit."""
    for path, entry in tree.items():
        where = os.path.join(WORK, path)
        if entry.kind == "dir":
            os.mkdir(where, 0o700)
        elif entry.kind == "link":
            os.symlink(entry.target, where)
        else:
            with open(os.open(where, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(entry.data)
    for path, entry in reversed(tree.items()):  # children before what they change the time of
        where = os.path.join(WORK, path)
        if entry.kind != "link":
            os.chmod(where, entry.mode)
        os.utime(where, (entry.mtime_s, entry.mtime_s), follow_symlinks=False)


def collect(limits: Limits) -> Tree | None:
    """Everything below WORK; None if it is too much or cannot be read. No process may be left that could change it."""
    tree: Tree = {}
    left = limits.disk_mb << 20
    waiting = [WORK]
    try:
        while waiting:
            folder = waiting.pop()
            if folder != WORK:
                os.chmod(folder, 0o700)
            with os.scandir(folder) as found:
                names = sorted(entry.name for entry in found)
            for name in names:
                where = os.path.join(folder, name)
                status = os.lstat(where)
                entry = _collect_one(where, status, left)
                if entry is None:
                    continue
                left -= cost_bytes(len(entry.data))
                tree[os.path.relpath(where, WORK)] = entry
                if entry.kind == "dir":
                    waiting.append(where)
                if left < 0 or len(tree) > limits.files:
                    return None
    except OSError:  # a path that is too long, say
        return None
    return tree


def _collect_one(where: str, status: os.stat_result, left: int) -> Entry | None:
    """One entry, of which no more than ``left`` bytes and one are read; None for pipes, sockets and devices."""
    mode, mtime_s = stat.S_IMODE(status.st_mode) & 0o777, status.st_mtime_ns // 10**9
    mtime_s = min(max(mtime_s, TIMES_S[0]), TIMES_S[1])
    if stat.S_ISDIR(status.st_mode):
        return Entry("dir", mode=mode, mtime_s=mtime_s)
    if stat.S_ISLNK(status.st_mode):
        return Entry("link", target=os.readlink(where), mtime_s=mtime_s)
    if not stat.S_ISREG(status.st_mode):
        return None
    os.chmod(where, 0o600)
    with open(os.open(where, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        return Entry("file", file.read(max(left, 0) + 1), mode=mode, mtime_s=mtime_s)


# ---- the program ------------------------------------------------------------------------------------


class Output:
    """Head and tail of a stream, as much of each; what lies between is counted."""

    def __init__(self, keep: int) -> None:
        self._half = keep // 2
        self.total = 0
        self._head, self._tail = bytearray(), bytearray()

    def feed(self, piece: bytes) -> None:
        """``piece`` comes next."""
        self.total += len(piece)
        room = self._half - len(self._head)
        self._head += piece[:room]
        self._tail += piece[room:] if room > 0 else piece
        del self._tail[: -self._half]

    def ended(self) -> tuple[bytes, int, int]:
        """(what is kept, where it was cut or -1, bytes left out)."""
        kept = bytes(self._head + self._tail)
        cut = self.total - len(kept)
        return kept, len(self._head) if cut else -1, cut


def run(argv: list[str], environment: dict[str, str], limits: Limits) -> bytes:
    """The report on a program that has run, and of which nothing runs any more."""
    reader, writer = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _become(argv, environment, limits, writer)
    os.close(writer)
    os.set_blocking(reader, False)
    output = Output(limits.output_kb << 10)
    reaped = Reaped(child)
    killed_by = watch(reader, output, reaped, limits, started)
    reaped.kill_all()
    while _drain(reader, output):
        pass
    kept, cut_at, cut_bytes = output.ended()
    tree = collect(limits)
    rows, contents = pack_tree(tree or {})
    header: dict[str, Any] = {
        "exit_code": reaped.exit_code, "killed_by": killed_by, "output": len(kept),
        "cut_at": cut_at, "cut_bytes": cut_bytes, "collected": tree is not None, "files": rows,
    }  # fmt: skip
    return pack(header, kept, contents)


def _become(argv: list[str], environment: dict[str, str], limits: Limits, writer: int) -> NoReturn:
    """The program, in the forked child."""
    try:
        os.setsid()
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # that Python ignores
            signal.signal(number, signal.SIG_DFL)
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        os.closerange(3, 1 << 10)
        os.chdir(WORK)
        os.nice(NICENESS)
        go_first_without_memory()
        limit_resources(limits)
        filter_system_calls()
        os.execvpe(argv[0], argv, environment)
    except BaseException as error:  # noqa: BLE001  # a forked child must not return into its parent's code
        os.write(2, f"{argv[0]}: {error}\n".encode(errors="replace"))
    os._exit(CANNOT_EXECUTE)


class Reaped:
    """The program and its orphans, which are process 1's."""

    def __init__(self, child: int) -> None:
        self.child, self.exit_code = child, -1

    def collect(self) -> bool:
        """Reap who has ended; whether the program has."""
        while self._wait(os.WNOHANG):
            pass
        return self.exit_code >= 0

    def _wait(self, flags: int) -> bool:
        """Whether one was reaped."""
        try:
            pid, status = os.waitpid(-1, flags)
        except ChildProcessError:
            return False
        if pid == self.child:
            code = os.waitstatus_to_exitcode(status)
            self.exit_code = code if code >= 0 else 128 - code
        return pid > 0

    def kill_all(self) -> None:
        """Everything but this process. Raises TimeoutError if something cannot be killed."""
        deadline = time.monotonic() + KILL_S
        while True:
            try:
                os.kill(-1, signal.SIGKILL)
            except ProcessLookupError:
                break
            while self._wait(os.WNOHANG):
                pass
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes that were killed are still there after {KILL_S:g} s")
            time.sleep(0.001)
        self.collect()


def watch(reader: int, output: Output, reaped: Reaped, limits: Limits, started: float) -> str:
    """Until the program ends or goes beyond a limit: that limit's name, or ""."""
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    poll.register(os.pidfd_open(reaped.child), select.POLLIN)
    poll.register(0, 0)  # hang-up alone
    look = started + WATCH_S
    while True:
        now = time.monotonic()
        ready = poll.poll(max(0.0, min(look, started + limits.wall_s) - now) * 1000)
        if any(fd == 0 for fd, _ in ready):
            os._exit(1)
        if any(fd == reader for fd, _ in ready) and not _drain(reader, output):
            poll.unregister(reader)  # closed; the program may go on without it
        if any(fd not in (0, reader) for fd, _ in ready) and reaped.collect():
            return ""
        if output.total > limits.output_kb * OUTPUT_FACTOR << 10:
            return "output"
        now = time.monotonic()
        if now >= started + limits.wall_s:
            return "time"
        if now >= look:
            reaped.collect()
            if over := _used_up(limits):
                return over
            look = now + WATCH_S


def _drain(reader: int, output: Output) -> bool:
    """Read what is there, once; whether there may be more."""
    try:
        piece = os.read(reader, READ_AT_ONCE)
    except BlockingIOError:
        return False
    output.feed(piece)
    return bool(piece)


# ---- what is used -----------------------------------------------------------------------------------


def _used_up(limits: Limits) -> str:
    """Which limit all processes together have gone beyond, or ""."""
    pages, ticks = 0, 0
    others = _others()
    if len(others) > 2 * limits.processes:  # the kernel does not count root's: user_namespaces(7)
        return "processes"
    for pid in others:
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:  # it has ended
            continue
        ticks += sum(map(int, fields[11:15]))  # user and system time, its own and its dead children's: proc(5)
        pages += int(fields[21])
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    if ticks / TICKS + ended.ru_utime + ended.ru_stime > limits.cpu_s:
        return "cpu"
    memory = limits.memory_mb << 20
    if pages * PAGE_SIZE > memory:  # if each shared page is counted for each who has it
        os.kill(-1, signal.SIGSTOP)  # or they would take more while it is looked at closely
        if _proportional() > memory:
            return "memory"
        os.kill(-1, signal.SIGCONT)
    for space in SPACES:
        status = os.statvfs(space)
        if status.f_files - status.f_ffree > limits.files + 1:  # bwrap cannot bound them
            return "files"
    return ""


def _others() -> list[str]:
    return [name for name in os.listdir("/proc") if name.isdigit() and name != "1"]


def _proportional() -> int:
    """Bytes of memory, shared ones divided by their sharers."""
    total = 0
    for pid in _others():
        try:
            with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
                lines = file.read().splitlines()
            total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith(b"Pss:"))
        except PermissionError:  # it hides: all of it counts
            with open(f"/proc/{pid}/statm", "rb") as file:
                total += int(file.read().split()[1]) * PAGE_SIZE
        except OSError:
            continue
    return total
