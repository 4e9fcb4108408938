"""A root file system of its own, built with mounts by a process that may mount. What bwrap does, where there is none.

::

    read-only clones of /usr ... -> a small tmpfs at PLACE -> pivot_root -> the old root is let go -> read-only

Linux 5.12 or later: clones are read-only with everything that is mounted below them.
"""

import ctypes
import os
import struct
from collections.abc import Sequence
from pathlib import Path

PLACE = "/tmp"  # any directory would do: only this mount namespace sees what is mounted there
DEVICES = ("null", "zero", "full", "random", "urandom")
ROOT_OPTIONS = "mode=0755,size=1m,nr_inodes=1k"  # mount points and links alone
HOSTNAME = b"sandbox"

_libc = ctypes.CDLL(None, use_errno=True)
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = 428, 429, 442  # of every architecture
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC, _MOVE_MOUNT_F_EMPTY_PATH = 1, os.O_CLOEXEC, 4
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV, _ATTR_NOEXEC = 1, 2, 4, 8
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = (
    1, 2, 4, 8, 32, 4096, 1 << 14, 1 << 18
)  # fmt: skip
_MNT_DETACH = 2


def _check(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    given = [text.encode() for text in (source, target, kind)]
    _check(_libc.mount(*given, ctypes.c_ulong(flags), options.encode() or None), f"mount {kind or source} at {target}")


def _clone(path: str, attributes: int) -> int:
    """A file descriptor of a mount that shows ``path``, with ``attributes`` here and below."""
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_RECURSIVE
    tree = _check(_libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, path.encode(), flags), f"open_tree {path}")
    wanted = struct.pack("=QQQQ", attributes, 0, 0, 0)  # struct mount_attr: set, clear, propagation, user namespace
    where = _AT_EMPTY_PATH | _AT_RECURSIVE
    _check(_libc.syscall(_SYS_MOUNT_SETATTR, tree, b"", where, wanted, ctypes.c_size_t(32)), f"mount_setattr {path}")
    return tree


def _attach(tree: int, target: str) -> None:
    flags = _MOVE_MOUNT_F_EMPTY_PATH
    _check(_libc.syscall(_SYS_MOVE_MOUNT, tree, b"", _AT_FDCWD, target.encode(), flags), f"move_mount {target}")
    os.close(tree)


def build_root(
    shown: Sequence[tuple[str, str]], links: dict[str, str], spaces: Sequence[str], disk_mb: int, files: int
) -> None:
    """Leave for a root with what is ``shown`` (path here, path there), ``links`` (path -> target) and empty ``spaces``.

    All of it is read-only but the spaces, which hold ``disk_mb`` and ``files`` each. Raises OSError, with
    what was attempted. The process must be pid 1 of a fresh pid namespace, in a mount namespace of its own.
    """
    _check(_libc.sethostname(HOSTNAME, len(HOSTNAME)), "sethostname")
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    plain = _ATTR_NOSUID | _ATTR_NODEV
    devices = [f"/dev/{name}" for name in DEVICES]
    trees = [(there, Path(here).is_dir(), _clone(here, plain | _ATTR_RDONLY)) for here, there in shown]
    trees += [(device, False, _clone(device, _ATTR_NOSUID | _ATTR_NOEXEC)) for device in devices]
    _mount("tmpfs", PLACE, "tmpfs", _MS_NOSUID | _MS_NODEV, ROOT_OPTIONS)
    os.umask(0o022)
    for path, is_dir, tree in trees:
        target = Path(PLACE + path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if is_dir:
            target.mkdir(exist_ok=True)
        else:
            target.touch()
        _attach(tree, str(target))
    streams = {f"/dev/{name}": f"fd/{number}" for number, name in enumerate(("stdin", "stdout", "stderr"))}
    for name, to in {**links, "/dev/fd": "/proc/self/fd", **streams}.items():
        Path(PLACE + name).symlink_to(to)
    for space in ("/proc", *spaces):
        Path(PLACE + space).mkdir()
    _mount("proc", PLACE + "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    for space in spaces:
        _mount(
            "tmpfs", PLACE + space, "tmpfs", _MS_NOSUID | _MS_NODEV, f"mode=0777,size={disk_mb}m,nr_inodes={files + 1}"
        )
    os.chdir(PLACE)
    _check(_libc.syscall(_SYS_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount2")  # the old root lies on top of the new one
    os.chdir("/")
    _mount("none", "/", "", _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
