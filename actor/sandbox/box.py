"""What goes into a sandbox and what comes out, and their bytes.

::

    job:     8 bytes length of all that follows | 8 bytes length | JSON header | contents of its files
    report:  READY | 8 bytes length | JSON header | output | contents of its files

Both sides read both with :func:`unpack`. A header names each file's size; contents follow in order.
"""

import json
import struct
from dataclasses import asdict, dataclass
from typing import Any, Literal

WORK = "/work"  # where files are laid out, commands start and files are collected
READY = b"ready\n"  # what comes before it is the environment's failure, what comes behind it the program's
PAGE = 4096  # bytes that a byte of a file takes
MTIME_S = 1_600_000_000  # of files that a caller made: the same in every run
_LENGTH = struct.Struct(">Q")

Kind = Literal["file", "dir", "link"]


@dataclass(frozen=True)
class Entry:
    """A file, directory or symbolic link below WORK."""

    kind: Kind = "file"
    data: bytes = b""  # of a file
    target: str = ""  # of a link; never followed outside of the sandbox
    mode: int = 0o644
    mtime_s: int = MTIME_S


Tree = dict[str, Entry]  # by path relative to WORK, parents before children


def directory(mode: int = 0o755) -> Entry:
    """An empty directory."""
    return Entry("dir", mode=mode)


@dataclass(frozen=True)
class Limits:
    """Of one run. A program that goes beyond memory, files, CPU or wall-clock is killed; see Result.killed_by."""

    wall_s: float = 10.0
    cpu_s: float = 5.0  # of all processes together
    memory_mb: int = 256  # resident, of all processes together, as watched; and of each one's address space, exactly
    processes: int = 32
    disk_mb: int = 8  # of WORK, and as much again of /tmp
    files: int = 2000  # and directories and links, in each of the two
    open_files: int = 64  # of each process
    output_kb: int = 64  # kept of standard output and error; as much of its head as of its tail


@dataclass(frozen=True)
class Result:
    """What became of a program."""

    exit_code: int  # as a shell counts: 128 + the signal that ended it
    output: bytes  # standard output and error as they came, cut in the middle at ``cut_at``
    cut_at: int  # -1: the output is whole
    cut_bytes: int  # left out there
    killed_by: str  # "", the limit ("time", "cpu", "memory", "processes", "files", "output"), or "lost": no report came
    files: Tree | None  # below WORK in the end; None if they are more than the limits, or cannot be read


def pack(header: dict[str, Any], *blobs: bytes) -> bytes:
    """Length, header and contents."""
    text = json.dumps(header).encode()
    return b"".join([_LENGTH.pack(len(text)), text, *blobs])


def unpack(message: bytes) -> tuple[dict[str, Any], memoryview]:
    """The header, and what follows it. Raises ValueError for anything that is no message."""
    if len(message) < _LENGTH.size:
        raise ValueError(f"{len(message)} bytes are no message")
    (length,) = _LENGTH.unpack_from(message)
    if length > len(message) - _LENGTH.size:
        raise ValueError(f"a header of {length} bytes in a message of {len(message)}")
    header = json.loads(message[_LENGTH.size : _LENGTH.size + length])
    if not isinstance(header, dict):
        raise ValueError("a header must be an object")
    return header, memoryview(message)[_LENGTH.size + length :]


def pack_tree(tree: Tree) -> tuple[list[dict[str, Any]], bytes]:
    """A tree as part of a header, and its contents."""
    rows, contents = [], []
    for path, entry in tree.items():
        row = asdict(entry)
        row["path"], row["data"] = path, len(entry.data)
        rows.append(row)
        contents.append(entry.data)
    return rows, b"".join(contents)


def unpack_tree(rows: list[dict[str, Any]], contents: memoryview) -> Tree:
    """Its inverse. Raises ValueError, TypeError or KeyError for rows that are none."""
    tree: Tree = {}
    at = 0
    for row in rows:
        kind, size, path = row["kind"], int(row["data"]), str(row["path"])
        if kind not in ("file", "dir", "link") or not 0 <= size <= len(contents) - at:
            raise ValueError(f"{path!r}: a {kind} of {size} bytes where {len(contents) - at} are left")
        tree[path] = Entry(
            kind, bytes(contents[at : at + size]), str(row["target"]), int(row["mode"]) & 0o777, int(row["mtime_s"])
        )
        at += size
    if at != len(contents):
        raise ValueError(f"{len(contents) - at} bytes belong to no file")
    return tree


def cost_bytes(size: int) -> int:
    """What a file of ``size`` bytes takes on a disk of pages."""
    return -(-size // PAGE) * PAGE
