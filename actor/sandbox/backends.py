"""Ways to make namespaces: bubblewrap, or util-linux's unshare with mounts of our own. Tried, not believed.

As root both set up with root's rights and then become a user that owns nothing, another one for each
run, so that the kernel counts its processes apart. Otherwise both use a user namespace.
"""

import functools
import json
import os
import platform
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from actor.sandbox.box import WORK, Limits
from actor.sandbox.confine import INSIDE_UID, supported
from common.errors import SandboxError

PACKAGE = Path(__file__).resolve().parent
CODE = PACKAGE.parents[1]  # where package ``actor`` lies
CODE_INSIDE = "/croupier"
START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from actor.sandbox.inside import main; main()"
# (first, how many) user ids that nobody has: beyond systemd's containers; Debian's unassigned ones, for containers
FREE_UIDS = ((0x70000000, 1 << 27), (61184, 3000))
REMEDY = (
    "apt-get install bubblewrap; allow user namespaces (sysctl -w kernel.unprivileged_userns_clone=1, on Ubuntu "
    "kernel.apparmor_restrict_unprivileged_userns=0); in a container be root with --cap-add SYS_ADMIN "
    "--security-opt seccomp=unconfined --security-opt systempaths=unconfined"
)

Argv = list[str]


@dataclass(frozen=True)
class Backend:
    """One way that works here."""

    name: str
    make_argv: Callable[[Limits], Argv]  # of the process that starts inside.main


def interpreter() -> str:
    """Path of this Python, outside of any venv; the same inside."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    return str(Path(sys.base_prefix).resolve() / "bin" / version)


def shown() -> tuple[list[tuple[str, str]], dict[str, str]]:
    """(what a sandbox shows read-only: a path of the host and where, symbolic links of its root)."""
    paths, links = ["/usr"], {}
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        path = Path("/", name)
        if path.is_symlink():
            links[str(path)] = os.readlink(path)
        elif path.is_dir():
            paths.append(str(path))
    paths += [path for path in ("/etc/alternatives", "/etc/ld.so.cache") if Path(path).exists()]
    prefix = Path(sys.base_prefix).resolve()
    if not prefix.is_relative_to("/usr"):
        paths.append(str(prefix))
    own = [(str(PACKAGE / "etc" / name), f"/etc/{name}") for name in ("passwd", "group")]
    return [(path, path) for path in paths] + own, links


def _free_uid() -> int:
    """A user id for one run. Raises SandboxError if root may use none here."""
    mapped = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    for first, count in FREE_UIDS:
        if any(inner <= first and first + count <= inner + length for inner, _, length in mapped):
            return random.SystemRandom().randrange(first, first + count)
    raise SandboxError(f"no user ids to give to programs: /proc/self/uid_map maps {mapped}; run the actor unprivileged")


def _start(code: str, root: dict[str, object] | None, uid: int | None) -> Argv:
    return [interpreter(), "-I", "-S", "-c", START, code, json.dumps({"root": root, "uid": uid})]


def bwrap_argv(limits: Limits, as_root: bool) -> Argv:
    """Bubblewrap's command line, in a user namespace unless ``as_root``."""
    paths, links = shown()
    privileges = ["--unshare-user", "--uid", str(INSIDE_UID), "--gid", str(INSIDE_UID)]
    if as_root:  # no more than what becoming another user needs
        privileges = ["--cap-drop", "ALL"]
        privileges += [w for name in ("SETUID", "SETGID", "SETPCAP", "CHOWN") for w in ("--cap-add", f"CAP_{name}")]
    paths.append((str(PACKAGE), f"{CODE_INSIDE}/actor/sandbox"))
    parents = {str(parent) for _, path in paths for parent in Path(path).parents[:-1]} - {path for _, path in paths}
    size = str(limits.disk_mb << 20)
    return [
        "bwrap", "--die-with-parent", "--new-session", "--as-pid-1", "--unshare-pid", "--unshare-net", "--unshare-ipc",
        "--unshare-uts", "--unshare-cgroup-try", "--hostname", "sandbox", *privileges,
        *(word for parent in sorted(parents) for word in ("--perms", "0755", "--dir", parent)),
        *(word for source, path in paths for word in ("--ro-bind", source, path)),
        *(word for link, target in links.items() for word in ("--symlink", target, link)),
        "--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev",
        "--perms", "0777", "--size", size, "--tmpfs", WORK, "--perms", "0777", "--size", size, "--tmpfs", "/tmp",
        "--remount-ro", "/", "--chdir", WORK, "--", *_start(CODE_INSIDE, None, _free_uid() if as_root else None),
    ]  # fmt: skip


def unshare_argv(limits: Limits, as_root: bool) -> Argv:
    """util-linux's command line, with a user namespace unless ``as_root``; root.py then does the mounts."""
    paths, links = shown()
    user = [] if as_root else ["--user", f"--map-user={INSIDE_UID}", f"--map-group={INSIDE_UID}", "--keep-caps"]
    root = {"shown": paths, "links": links, "disk_mb": limits.disk_mb, "files": limits.files}
    return [
        "unshare", *user, "--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup", "--fork", "--kill-child=SIGKILL",
        *_start(str(CODE), root, _free_uid() if as_root else None),
    ]  # fmt: skip


def _is_root() -> bool:
    return os.geteuid() == 0


CANDIDATES = (
    Backend("bwrap", lambda limits: bwrap_argv(limits, _is_root())),
    Backend("unshare", lambda limits: unshare_argv(limits, _is_root())),
)


@functools.cache
def find_backend() -> Backend:
    """The first of CANDIDATES in which a program runs here. Raises SandboxError: each one's reason, and the remedy."""
    from actor.sandbox.run import run

    if not supported():
        raise SandboxError(f"the sandbox's filter knows no system calls of {platform.machine()}; use x86-64 or arm64")
    reasons = []
    for backend in CANDIDATES:
        if shutil.which(backend.make_argv(Limits())[0]) is None:
            reasons.append(f"{backend.name}: not installed")
            continue
        try:
            result = run(["/bin/sh", "-c", "echo $((6 * 7)); ls /proc/1 > there"], {}, Limits(), backend)
        except SandboxError as error:
            reasons.append(f"{backend.name}: {error}")
            continue
        if result.exit_code == 0 and result.output == b"42\n" and list(result.files or ()) == ["there"]:
            return backend
        reasons.append(f"{backend.name}: exit code {result.exit_code}: {result.output.decode(errors='replace')[-300:]}")
    raise SandboxError(f"programs cannot be shut in on this machine ({', '.join(reasons)}); {REMEDY}")
