"""The lines that a growing file gained since it was last asked; what was read is never read again."""

import os
from pathlib import Path
from typing import BinaryIO

HEAD = 256  # bytes by which a file is known again: file systems give freed inodes away
CHUNK = 1 << 20  # bytes read at a time
LINE_LIMIT = 16 << 20  # bytes; a longer line is none of ours


class Tail:
    """Follows one path, through truncation and replacement.

    A last line without its newline waits for the rest. ``restarts`` counts how often the file turned out to
    be another one; what came before it is void then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.restarts = 0
        self.missing = True  # at the last look
        self.behind = 0  # bytes not read yet
        self.too_long = 0  # lines beyond LINE_LIMIT
        self._inode = -1
        self._offset = 0  # of the first byte not read
        self._head = b""
        self._torn: list[bytes] = []
        self._torn_bytes, self._skipping = 0, False

    def read(self, limit: int = CHUNK) -> list[bytes]:
        """The next whole lines, without their ends, from at most ``limit`` bytes; empty where there are none."""
        try:
            with self.path.open("rb") as file:
                data = self._take(file, limit)
        except OSError:
            self.missing, self.behind = True, 0
            return []
        self.missing = False
        return self._split(data)

    def _take(self, file: BinaryIO, limit: int) -> bytes:
        self._recognise(file)
        head = self._head
        if len(head) < HEAD:
            file.seek(0)
            head = file.read(HEAD)
        file.seek(self._offset)
        data = file.read(limit)
        size = os.fstat(file.fileno()).st_size
        self._offset += len(data)  # nothing fails any more
        self._head = head[: self._offset]
        self.behind = max(0, size - self._offset)
        return data

    @property
    def offset(self) -> int:
        """Bytes read of the present file."""
        return self._offset

    def _recognise(self, file: BinaryIO) -> None:
        """Begin anew if this is not the file that was read so far."""
        found = os.fstat(file.fileno())
        same = (
            found.st_ino == self._inode and found.st_size >= self._offset and file.read(len(self._head)) == self._head
        )
        if self._inode == -1 or not same:
            if self._offset:
                self.restarts += 1
            self._inode, self._offset, self._head = found.st_ino, 0, b""
            self._torn, self._torn_bytes, self._skipping = [], 0, False

    def _split(self, data: bytes) -> list[bytes]:
        if not data:
            return []
        *whole, rest = data.split(b"\n")
        if whole:
            whole[0] = b"".join([*self._torn, whole[0]])
            self._torn, self._torn_bytes = [], 0
            if self._skipping:
                del whole[0]
                self._skipping = False
        if rest and not self._skipping:
            self._torn.append(rest)
            self._torn_bytes += len(rest)
            if self._torn_bytes > LINE_LIMIT:
                self._torn, self._torn_bytes, self._skipping = [], 0, True
                self.too_long += 1
        return whole
