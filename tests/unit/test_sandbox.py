"""Hostile programs, shut in by every way that this machine has."""

import contextlib
import errno
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from actor.sandbox.backends import CANDIDATES, Backend, find_backend, interpreter, unshare_argv
from actor.sandbox.box import MTIME_S, Entry, Limits, Result, Tree, directory, pack, pack_tree, unpack, unpack_tree
from actor.sandbox.confine import _CLONE, _PRLIMIT, _REFUSED, _SOCKET, filter_program
from actor.sandbox.inside import Output
from actor.sandbox.run import run
from common.errors import SandboxError
from tests.unit.sandboxed import require_sandbox

ROOT = Path(__file__).parents[2]
SMALL = Limits(wall_s=5, cpu_s=3, memory_mb=128, processes=16, disk_mb=1, files=100, output_kb=4)
GONE_S = 10.0  # for killed processes to leave the host's table


def works() -> list[Backend]:
    found = []
    for backend in CANDIDATES:
        with contextlib.suppress(SandboxError, FileNotFoundError):
            if run(["/bin/true"], {}, SMALL, backend).exit_code == 0:
                found.append(backend)
    return found


require_sandbox()
BACKENDS = works()


@pytest.fixture(
    params=[pytest.param(b, id=b.name, marks=pytest.mark.slow if i else ()) for i, b in enumerate(BACKENDS)]
)
def backend(request: pytest.FixtureRequest) -> Backend:
    found: Backend = request.param
    return found


@pytest.fixture
def mark() -> Iterator[str]:
    """A word in the command line of everything that a test starts; nothing with it may be left on this machine."""
    word = f"sandboxed-{uuid.uuid4().hex}"
    yield word
    deadline = time.monotonic() + GONE_S
    while time.monotonic() < deadline and alive(word):
        time.sleep(0.02)
    assert alive(word) == []


def alive(word: str) -> list[str]:
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            with contextlib.suppress(OSError):
                line = (process / "cmdline").read_bytes().decode(errors="replace")
                found += [line] if word in line else []
    return found


def shell(backend: Backend, script: str, files: Tree | None = None, limits: Limits = SMALL) -> Result:
    return run(["/bin/bash", "-c", textwrap.dedent(script)], files or {}, limits, backend)


def python(backend: Backend, script: str, limits: Limits = SMALL, mark: str = "") -> Result:
    return run([interpreter(), "-I", "-S", "-c", textwrap.dedent(script), mark], {}, limits, backend)


# ---- what a program gets ----------------------------------------------------------------------------


def test_files_may_be_of_any_time(backend: Backend) -> None:
    result = shell(backend, "touch -d @9223372036854775807 late; touch -d @-9223372036854775807 early; touch -d @7 a")
    assert result.files is not None and set(result.files) == {"late", "early", "a"}
    assert shell(backend, "stat -c %Y a", result.files).output == b"7\n"


def test_files_go_in_and_come_out(backend: Backend) -> None:
    files = {
        "in": directory(), "in/a.txt": Entry(data=b"one\ntwo\n"), "empty": directory(0o700),
        "in/run": Entry(data=b"#!/bin/sh\necho ran\n", mode=0o755), "to": Entry("link", target="in/a.txt"),
        "caf\udce9": Entry(data=b"\x00\xff"),
    }  # fmt: skip
    result = shell(
        backend,
        """
        pwd; ./in/run; cat to; stat -c '%a %Y %s' in/a.txt in/run; echo three >> in/a.txt; mkdir -p x/y; echo z > x/y/z
        rm caf*; chmod 600 in/run; exit 7
        """,
        files,
    )
    assert result.output.decode() == f"/work\nran\none\ntwo\n644 {MTIME_S} 8\n755 {MTIME_S} 19\n"
    assert (result.exit_code, result.killed_by, result.cut_at) == (7, "", -1)
    assert result.files is not None and set(result.files) == {
        "in",
        "in/a.txt",
        "in/run",
        "to",
        "empty",
        "x",
        "x/y",
        "x/y/z",
    }
    assert result.files["in/a.txt"].data == b"one\ntwo\nthree\n" and result.files["x/y/z"].data == b"z\n"
    assert result.files["in/run"].mode == 0o600 and result.files["empty"] == files["empty"]
    assert result.files["to"].kind == "link" and result.files["to"].target == "in/a.txt"
    again = shell(backend, "find . | sort; cat x/y/z", result.files)  # what came out goes in again
    assert again.output.decode().split() == [
        ".",
        "./empty",
        "./in",
        "./in/a.txt",
        "./in/run",
        "./to",
        "./x",
        "./x/y",
        "./x/y/z",
        "z",
    ]
    assert again.files is not None and again.files == result.files


def test_tools_and_limits_are_there(backend: Backend) -> None:
    result = shell(
        backend,
        "awk 'BEGIN{print 6*7}'; seq 3 | sort -r | tr '\\n' ' '; ulimit -n -u -v; echo $HOME; date +%Z; hostname",
    )
    assert result.exit_code == 0, result.output
    words = result.output.decode().split()
    assert words[:4] == ["42", "3", "2", "1"] and words[-3:] == ["/work", "UTC", "sandbox"]
    assert str(SMALL.open_files) in words and str(SMALL.memory_mb << 10) in words
    assert python(backend, "import json, hashlib, re; print(json.dumps([1]))").output == b"[1]\n"
    assert shell(backend, "no-such-program").exit_code == 127
    assert run(["/no/such"], {}, SMALL, backend).exit_code == 127
    assert shell(backend, "kill -SEGV $$").exit_code == 128 + signal.SIGSEGV


@pytest.mark.slow
def test_many_at_once_do_not_meet(backend: Backend) -> None:
    results: dict[int, Result] = {}

    def one(number: int) -> None:
        results[number] = shell(backend, f"echo {number} > mine; ls; cat mine")

    threads = [threading.Thread(target=one, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {number: result.output for number, result in results.items()} == {
        n: f"mine\n{n}\n".encode() for n in range(6)
    }


# ---- what it must not reach --------------------------------------------------------------------------


def test_the_host_cannot_be_read(backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the host's secret")
    secret.chmod(0o666)
    monkeypatch.setenv("CROUPIER_SECRET", "the host's secret")
    places = ("/proc/1/root", "/proc/self/root", "/", "/work/../../..", "/tmp/..", "/proc/1/cwd")
    tries = "; ".join(f"cat {place}{secret}" for place in places)
    result = shell(
        backend,
        f"""
        {tries}; env; cat /proc/*/environ | tr '\\0' '\\n'; cat /etc/shadow /etc/passwd /proc/kcore | head -c 100
        ls /root/.ssh /home {ROOT} /work/main /var /run /sys /mnt; ls /proc/1/fd /proc/1/cwd/ /proc/1/map_files
        for p in /proc/[0-9]*; do [ $(basename $p) -gt 500 ] && echo process $p; done
        """,
    )
    said = result.output.decode()
    assert "host's secret" not in said and "SECRET" not in said and "root:" not in said and "\nprocess" not in said
    assert "/proc/1/fd': Permission denied" in said and f"'{ROOT}': No such file" in said
    assert result.exit_code in (0, 1, 2) and result.killed_by == ""


def test_the_host_cannot_be_written(backend: Backend, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    result = shell(
        backend,
        f"""
        for d in / /usr /usr/bin /dev /proc /proc/sys/kernel /etc /lib {tmp_path} $(dirname {interpreter()}); do
        echo x > $d/planted && echo wrote $d; done
        echo x > /dev/sda; mknod disk b 8 0; mount -t tmpfs x /tmp; mount -o remount,rw /usr; chroot / true
        echo 1 > /proc/sys/kernel/sysrq; echo b > /proc/sysrq-trigger; chmod u+s /bin/ls
        """,
    )
    assert b"wrote" not in result.output and not list(tmp_path.iterdir())
    assert result.files == {}


def test_no_network_and_no_socket_of_the_host(backend: Backend, tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as named,
        socket.socket(socket.AF_UNIX) as nameless,
    ):
        named.bind(str(tmp_path / "socket"))
        abstract = f"\0croupier-{uuid.uuid4().hex}"
        nameless.bind(abstract)
        for listener in (tcp, named, nameless):
            listener.listen()
            listener.setblocking(False)
        result = python(
            backend,
            f"""
            import socket
            def attempt(family, address, kind=socket.SOCK_STREAM):
                try:
                    with socket.socket(family, kind) as s:
                        s.connect(address)
                    print("reached", address)
                except OSError as error:
                    print(family, error.errno)
            attempt(socket.AF_INET, ("127.0.0.1", {tcp.getsockname()[1]}))
            attempt(socket.AF_INET, ("8.8.8.8", 53), socket.SOCK_DGRAM)
            attempt(socket.AF_INET6, ("::1", {tcp.getsockname()[1]}))
            attempt(socket.AF_VSOCK, (2, 1024))
            attempt(socket.AF_UNIX, {str(tmp_path / "socket")!r})
            attempt(socket.AF_UNIX, {abstract!r})
            for family in (socket.AF_NETLINK, socket.AF_PACKET, socket.AF_ALG):
                try:
                    socket.socket(family, socket.SOCK_RAW)
                    print("reached", family)
                except OSError as error:
                    print(family, error.errno)
            a, b = socket.socketpair(); a.send(b"x"); print("pair", b.recv(1))
            """,
        )  # fmt: skip
        assert b"reached" not in result.output and result.output.endswith(b"pair b'x'\n"), result.output
        assert len(result.output.splitlines()) == 10
        for listener in (tcp, named, nameless):
            with pytest.raises(BlockingIOError):
                listener.accept()


def filtered(program: bytes, arch: int, number: int, argument: int) -> int:
    """What the kernel makes of a filter: the few instructions of it that ours has (linux/filter.h)."""
    data = {0: number, 4: arch, 16: argument & 0xFFFFFFFF, 20: argument >> 32}
    operations, at, loaded = list(struct.iter_unpack("=HBBI", program)), 0, 0
    while True:
        code, if_true, if_false, value = operations[at]
        at += 1
        if code == 0x06:
            return int(value)
        if code == 0x20:
            loaded = data[value]
        elif code == 0x54:
            loaded &= value
        else:
            at += if_true if {0x15: loaded == value, 0x35: loaded >= value}[code] else if_false


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_means_what_it_lists(machine: str) -> None:
    program = filter_program(machine)
    which, arch = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}[machine]
    allowed, refused, kill = 0x7FFF0000, lambda error: 0x00050000 | error, 0x80000000
    named = {pair[which] for pair in _REFUSED.values()}
    clone, socket_, prlimit = _CLONE[which], _SOCKET[which], _PRLIMIT[which]
    assert filtered(program, 0x40000003, 1, 0) == kill, "32-bit calls on x86"
    for number in [*range(600), 1 << 30, (1 << 30) + 1]:
        got = filtered(program, arch, number, 0)
        if number > 456 or number == 435:
            assert got == refused(errno.ENOSYS), number
        elif number in named:
            assert got == refused(errno.EPERM), number
        elif number == socket_:
            families = {family: filtered(program, arch, number, family) for family in range(46)}
            assert families == {f: allowed if f == socket.AF_UNIX else refused(errno.EAFNOSUPPORT) for f in families}
        else:
            assert got == allowed, number
    assert filtered(program, arch, clone, signal.SIGCHLD | 0x3D0F00) == allowed  # a thread of the C library
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert filtered(program, arch, clone, flag | signal.SIGCHLD) == refused(errno.EPERM)
    assert filtered(program, arch, prlimit, 1) == refused(errno.EPERM)
    assert len(named) == len(_REFUSED) and len(program) // 8 < 4096


def test_the_kernel_refuses_what_the_filter_lists(backend: Backend) -> None:
    which = {"x86_64": 0, "aarch64": 1}[os.uname().machine]
    numbers = {name: pair[which] for name, pair in _REFUSED.items()}
    result = python(
        backend,
        f"""
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        def call(*given):
            ctypes.set_errno(0)
            return libc.syscall(*given), ctypes.get_errno()
        for name, number in {numbers!r}.items():
            if call(number, 0, 0, 0, 0, 0) != (-1, 1): print(name, "is let through")
        if call(435, 0, 0) != (-1, 38): print("clone3")
        if call(470, 0, 0) != (-1, 38): print("a new one")
        if call({_CLONE[which]}, 0x10000000 | 17, 0, 0, 0, 0) != (-1, 1): print("clone with a user namespace")
        import resource
        try: resource.prlimit(1, resource.RLIMIT_CPU, (0, 0)); print("prlimit")
        except PermissionError: pass
        resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
        try: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); print("raised")
        except (PermissionError, ValueError): pass
        child = os.fork()
        if child: os.waitpid(child, 0)  # what is left when this ends is killed
        print("looked", child >= 0)
        """,
    )
    assert result.output == b"looked True\n" * 2, result.output
    status = shell(backend, "grep -E '^(Cap(Inh|Prm|Eff|Bnd|Amb)|NoNewPrivs|Seccomp):' /proc/self/status")
    assert status.output.split()[1::2] == [b"0" * 16] * 5 + [b"1", b"2"]


def test_its_supervisor_cannot_be_killed_nor_looked_into(backend: Backend, mark: str) -> None:
    result = shell(
        backend,
        f"""
        : {mark}
        kill -9 1; kill -STOP 1; kill -TERM 1; kill -9 $PPID; kill -INT 1
        cat /proc/1/mem /proc/1/environ /proc/1/maps; echo forged > /proc/1/fd/1; ls /proc/1/fd/1
        sleep 300 & kill -9 -1; wait; echo still here
        """,
    )
    assert (result.killed_by, result.exit_code, result.files) == ("", 0, {})
    assert result.output.endswith(b"still here\n") and result.output.count(b"Permission denied") >= 5, result.output


# ---- what it must not use up -------------------------------------------------------------------------


def test_a_fork_bomb_ends(backend: Backend, mark: str) -> None:
    limits = Limits(wall_s=0.5, processes=16)
    result = shell(backend, f": {mark}; bomb() {{ bomb | bomb & }}; bomb; sleep 60", limits=limits)
    assert result.killed_by in ("time", "cpu", "processes", "output") or result.exit_code == 254  # bash cannot fork


def test_daemons_end_with_their_program(backend: Backend, mark: str) -> None:
    started = time.monotonic()
    result = shell(
        backend,
        f"""
        (setsid nohup bash -c 'trap "" TERM HUP INT; echo {mark}; while :; do sleep 1; done' > daemon.log 2>&1 &)
        (setsid bash -c ': {mark}; exec 0<&- 1>&- 2>&-; exec -a {mark} sleep 300' &) ; sleep 0.3; echo done
        """,
    )
    assert (result.exit_code, result.killed_by, result.output) == (0, "", b"done\n")
    assert result.files is not None and result.files["daemon.log"].data.decode() == f"{mark}\n"
    assert time.monotonic() - started < 60


def test_time_ends_on_both_clocks(backend: Backend, mark: str) -> None:
    asleep = shell(backend, f"echo slept > f; exec -a {mark} sleep 300", limits=Limits(wall_s=0.3))
    assert (asleep.killed_by, asleep.exit_code) == ("time", 137)
    assert asleep.files is not None and asleep.files["f"].data == b"slept\n"  # what it had done is kept
    busy = shell(
        backend,
        f": {mark}; trap '' XCPU TERM; (while :; do :; done) & while :; do :; done",
        limits=Limits(wall_s=60, cpu_s=0.3),
    )
    assert (busy.killed_by, busy.exit_code) == ("cpu", 137)


def test_output_without_end_is_bounded_and_ends(backend: Backend, mark: str) -> None:
    result = shell(
        backend,
        f": {mark}; echo first; yes $(head -c 1000 /dev/zero | tr '\\0' x)",
        limits=Limits(wall_s=60, output_kb=4),
    )
    assert result.killed_by == "output" and len(result.output) == 4096
    assert result.output.startswith(b"first\nxxx") and result.cut_at == 2048 and result.cut_bytes >= 60 * 4096


def test_memory_is_bounded_for_one_and_for_all(backend: Backend, mark: str) -> None:
    alone = python(backend, "x = bytearray(200 << 20)", SMALL, mark)
    assert alone.exit_code == 1 and b"MemoryError" in alone.output
    script = """
        import os, time, mmap
        for _ in range(8):
            if os.fork() == 0: break
        shared = mmap.mmap(-1, 60 << 20)
        for at in range(0, 60 << 20, 4096): shared[at] = 1
        time.sleep(60)
        """
    together = python(backend, script, Limits(wall_s=60, cpu_s=30, memory_mb=128), mark)
    assert (together.killed_by, together.exit_code) == ("memory", 137)


def test_the_disk_is_bounded_in_bytes_and_in_files(backend: Backend) -> None:
    result = shell(
        backend,
        "head -c 3000000 /dev/zero > /tmp/big; for i in 1 2 3; do head -c 600000 /dev/zero > f$i; done; ls -s /tmp/big",
    )
    assert b"No space left" in result.output or b"File size limit" in result.output, result.output
    kept = 0 if result.files is None else sum(len(entry.data) for entry in result.files.values())
    assert kept <= SMALL.disk_mb << 20
    many = shell(backend, "i=0; while [ $i -lt 3000 ]; do : > f$i || exit 9; i=$((i+1)); done; sleep 1")
    assert (many.killed_by == "files" and many.files is None) or many.exit_code == 9
    assert many.files is None or len(many.files) <= SMALL.files


# ---- what comes out ----------------------------------------------------------------------------------


def test_links_and_odd_files_are_bytes_and_nothing_more(backend: Backend) -> None:
    result = shell(
        backend,
        """
        ln -s /etc/passwd a; ln -s ../../../../../etc b; ln -s self self; mkfifo pipe; mkdir locked; echo in > locked/f
        echo hidden > shut; chmod 000 locked shut; ln shut twin; : > $'new\\nline'; : > "$(printf 'bad\\377')"
        """,
        {"link": Entry("link", target="/proc/1/environ")},
    )
    assert result.files is not None, result.output
    kinds = {path: entry.kind for path, entry in result.files.items()}
    assert kinds == {
        "a": "link", "b": "link", "self": "link", "link": "link", "locked": "dir", "locked/f": "file", "shut": "file",
        "twin": "file", "new\nline": "file", "bad\udcff": "file",
    }  # fmt: skip
    assert all(not entry.data for path, entry in result.files.items() if kinds[path] == "link")
    assert result.files["locked"].mode == result.files["shut"].mode == 0 and result.files["twin"].data == b"hidden\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [
        "truncate -s 1000000 a b c d",  # holes take no space in there
        "i=0; while [ $i -lt 90 ]; do mkdir $(printf '%0200d' $i); cd $(printf '%0200d' $i); i=$((i+1)); done",
    ],
    ids=["sparse", "deep"],
)
def test_too_much_is_none(backend: Backend, script: str) -> None:
    assert shell(backend, script).files is None


def test_output_keeps_head_and_tail() -> None:
    for size in (0, 1, 9, 10, 11, 25):
        whole = bytes(range(size))
        for step in (1, 3, 40):
            output = Output(10)
            for at in range(0, size, step):
                output.feed(whole[at : at + step])
            kept, cut_at, cut = output.ended()
            assert cut == max(0, size - 10) and len(kept) == size - cut and cut_at == (5 if cut else -1)
            assert kept == (whole[:5] + whole[-5:] if cut else whole)


def test_bytes_that_are_no_report_are_refused() -> None:
    tree = {"d": directory(), "d/f": Entry(data=b"abc", mode=0o4755), "l": Entry("link", target="x")}
    rows, contents = pack_tree(tree)
    header, rest = unpack(pack({"files": rows}, contents))
    again = unpack_tree(header["files"], rest)
    assert again["d/f"].mode == 0o755 and again["l"] == tree["l"] and again["d"] == tree["d"]
    for bad in (b"", b"\0" * 7, b"\xff" * 8 + b"{}", pack({})[:-1] + b"x", (3).to_bytes(8, "big") + b"[1]"):
        with pytest.raises(ValueError):
            unpack(bad)
    for change in ({"data": 4}, {"data": -1}, {"kind": "device"}, {"data": 2}):
        with pytest.raises(ValueError):
            unpack_tree([rows[0], {**rows[1], **change}, rows[2]], memoryview(contents))


# ---- what starts it ----------------------------------------------------------------------------------


def fake(script: str) -> Backend:
    return Backend("fake", lambda limits: ["/bin/sh", "-c", script])


def test_who_is_at_fault() -> None:
    with pytest.raises(SandboxError, match="fake started no program: no luck"):
        run(["true"], {}, SMALL, fake("echo no luck >&2; exit 3"))
    with pytest.raises(SandboxError, match="started no program"):
        run(["true"], {"big": Entry(data=b"x" * (3 << 20))}, SMALL, BACKENDS[0])  # the caller's files do not fit
    garbage = fake("cat > /dev/null & printf 'ready\\n'; yes garbage")
    for broken in (fake("printf 'ready\\n'"), fake("printf 'ready\\n12345678{}'"), garbage):
        result = run(["true"], {}, SMALL, broken)
        assert (result.killed_by, result.exit_code, result.files) == ("lost", 137, None)


def test_where_nothing_can_be_shut_in_it_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_backend.cache_clear()
    for name in ("bwrap", "unshare"):
        (tmp_path / name).write_text("#!/bin/sh\necho not permitted >&2; exit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        SandboxError, match=r"bwrap started no program: not permitted.*unshare.*apt-get install bubblewrap"
    ):
        find_backend()
    monkeypatch.undo()
    assert find_backend().name == BACKENDS[0].name


def test_nothing_outlives_an_actor_that_is_killed(backend: Backend, mark: str) -> None:
    code = f"""
        from actor.sandbox.backends import CANDIDATES
        from actor.sandbox.box import Limits
        from actor.sandbox.run import run
        chosen, = [b for b in CANDIDATES if b.name == {backend.name!r}]
        script = "(setsid bash -c 'exec -a {mark} sleep 300' &); exec -a {mark} sleep 300"
        run(["/bin/bash", "-c", script], {{}}, Limits(wall_s=300), chosen)
        """
    actor = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(sleeping := [line for line in alive(mark) if line.startswith(mark)]) < 2:
        assert time.monotonic() < deadline, sleeping
        time.sleep(0.02)
    actor.kill()
    assert actor.wait(10) == -signal.SIGKILL
    # the fixture sees that nothing is left


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="every other test is run without root's rights then")
def test_it_works_without_root_s_rights_too(mark: str) -> None:
    """As another user in a user namespace, with an interpreter that this user can read; else with root's own."""
    limits = Limits(wall_s=1, processes=8)
    inside = Backend("unshare", lambda limits: unshare_argv(limits, as_root=False))
    result = shell(inside, "id -u; touch /usr/x; unshare -U true; grep CapEff /proc/self/status", limits=limits)
    assert (
        result.output.split()[0] == b"1000"
        and b"0" * 16 in result.output
        and result.output.count(b"not permitted") == 1
    )
    other = shutil.which("python3", path="/usr/bin")
    if other is None or not os.access(ROOT, os.X_OK):
        return
    code = f"""
        from actor.sandbox.backends import CANDIDATES
        from actor.sandbox.box import Limits
        from actor.sandbox.run import run
        script = ": {mark}; id -u; bomb() {{ bomb | bomb & }}; bomb; sleep 9"
        for backend in CANDIDATES:
            if backend.name in {[backend.name for backend in BACKENDS]}:
                result = run(["/bin/bash", "-c", script], {{}}, Limits(wall_s=1), backend)
                print(result.output.split()[0].decode(), result.killed_by or result.exit_code)
        """
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", other, "-c", textwrap.dedent(code)]
    done = subprocess.run(
        nobody,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    if "ModuleNotFoundError" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip("the checkout cannot be read by another user")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split()
    assert lines[::2] == ["1000"] * len(BACKENDS) and set(lines[1::2]) <= {"time", "cpu", "254", "output"}, done.stdout
