"""What the broker was told, on disk before anybody is answered: an append-only log in LMDB.

::

    append(kind, head, frames) -> seq          the loop, at once, nothing written yet
    [thread] one transaction per group of events, fsync -> durable = seq
    the loop sends the answers that waited for seq

A group commit is one LMDB value, a *chunk* (:mod:`broker.chunks`): its events' headers and frames; large frames
follow it as values of their own. So large values are written at nearly the speed of a bare append and fsync, where
many small ones come to 0.6 (docs/decisions/0008). Chunks are deleted whole, and LMDB uses their pages again, so the
file stays within its bound.
"""

import errno
import fcntl
import logging
import os
import struct
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lmdb

from broker.ahead import Ahead
from broker.chunks import DamagedChunk, Event, apart, pack, table_of, unpack
from common.config import MEGABYTE
from common.durable import make_directory, sync
from common.errors import JournalError

CHUNK_BYTES = 4 * MEGABYTE  # a group commit is cut here
SLACK = 1.5  # map size over the bound on what is kept: LMDB needs room to copy and to fragment
MAP_RESERVE = 64 * MEGABYTE
PAGES_BESIDE = MEGABYTE // 4  # of a commit beside its values, at most
CLOSE_S = 10.0
LOCK_BYTES = 8192  # what LMDB asks for its lock file
KEY = struct.Struct(">Q")  # of a chunk: its first event's number
LARGE_KEY = struct.Struct(">QH")  # of a large frame: its event's number, its place
UNWRITTEN_BYTES = 64 << 10  # at the file's end that may be missing while its writer is at work
IDENTITY = b"\0"  # sorts before every event, so that events can be appended
FLOCK = struct.Struct("@hhqqi")  # Linux's struct flock
FORMAT = 4  # 3: what is not awaited is not in it, and it begins with the settings; 4: digests

ANEW = "move it away, and learner.resume=true goes on from the newest checkpoint"
EMPTY = "empty: its broker was ended before it had written anything, so there is nothing to read"

log = logging.getLogger("broker.journal")


def _check_begun(directory: Path) -> None:
    """Raise :class:`JournalError` unless there is something to read."""
    try:
        size = (directory / "data.mdb").stat().st_size
    except FileNotFoundError:
        raise JournalError(
            f"{directory}: no journal there; it is written by the broker (broker.journal_mb > 0)"
        ) from None
    except OSError as error:
        raise JournalError(
            f"{directory}: cannot be opened ({error.strerror}); make it readable, or copy it here again"
        ) from error
    if size == 0:
        raise JournalError(f"{directory}: {EMPTY}")


def _fill(lock_file: int) -> None:
    try:
        os.posix_fallocate(lock_file, 0, LOCK_BYTES)
    except (OSError, AttributeError) as error:  # which macOS has not
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        size = os.fstat(lock_file).st_size
        os.pwrite(lock_file, bytes(max(0, LOCK_BYTES - size)), size)


def _make(directory: Path) -> None:
    """LMDB writes to its lock file through a map: on a full disk that would end the process without a word."""
    try:
        make_directory(directory)
        descriptor = os.open(directory / "lock.mdb", os.O_RDWR | os.O_CREAT, 0o664)
        try:
            _fill(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise JournalError(
            f"{directory}: cannot be written ({error.strerror}); make room there or make it writable, or choose "
            "another run.dir"
        ) from error


def _open(directory: Path, map_size: int, read_only: bool) -> lmdb.Environment:
    """A reader that may not write LMDB's lock file goes without, which is safe where nobody writes the journal.

    Raises :class:`JournalError` where somebody does.
    """
    try:
        return lmdb.open(str(directory), map_size=map_size, meminit=False, readonly=read_only, readahead=False)
    except lmdb.ReadonlyError:
        if not read_only:
            raise
    if _is_held(directory / "lock.mdb"):
        raise JournalError(
            f"{directory}: is being written, and may be read meanwhile by those only who may write lock.mdb there; "
            "wait for the run's end, or make it writable"
        )
    return lmdb.open(str(directory), map_size=map_size, readonly=True, lock=False, readahead=False)


def _is_held(lock_file: Path) -> bool:
    """Whether another process has an LMDB environment open: it holds the first byte of its lock file."""
    try:
        with lock_file.open("rb") as file:
            asked = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
            return bool(FLOCK.unpack(fcntl.fcntl(file, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise JournalError(
            f"{lock_file}: cannot be read ({error.strerror}); make it readable, or copy it here again"
        ) from error


class Journal:
    """One writer (a thread of its own), any number of readers in other processes."""

    def __init__(
        self,
        directory: Path,
        run_id: str,
        limit_mb: float,
        read_only: bool = False,
        on_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """Open or create ``directory``. Raises :class:`JournalError` if it is another run's or damaged.

        ``on_commit`` is called by the writing thread after every group commit, and when it has failed.
        """
        self.directory = directory
        self.limit_bytes = int(limit_mb * MEGABYTE)
        if read_only:
            _check_begun(directory)
        else:
            _make(directory)
        self._remedy = "copy it here again" + ("" if read_only else f", or {ANEW}")
        remedy = f"make it readable, or {self._remedy}" if read_only else self._remedy
        try:
            map_size = int(self.limit_bytes * SLACK) + MAP_RESERVE
            self._env = _open(directory, map_size, read_only)
            self._check_size()
            self._check(run_id, read_only)
            if not read_only:
                sync(directory)
            self._env.reader_check()
        except lmdb.Error as error:
            raise JournalError(f"{directory}: cannot be opened ({error}); {remedy}") from error
        self._chunks: list[tuple[int, int]] = []  # (first seq, bytes), ascending
        self._list()
        self._kept_bytes = sum(size for _, size in self._chunks)
        self.last = self._last_seq()
        self.durable = self.last
        self._pending: list[tuple[str, dict[str, Any], list[memoryview]]] = []
        self._pending_bytes = 0
        self._prunes: list[list[int]] = []  # asked for, and not done yet
        self.on_commit = on_commit
        self._error: JournalError | None = None
        self._closing = False
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ahead: Ahead | None = None
        if not read_only:
            self._ahead = Ahead(directory / "data.mdb", map_size)
            self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
            self._thread.start()

    def _said(self) -> int:
        """Bytes that the file should have."""
        page: int = self._env.stat()["psize"]
        return int((self._env.info()["last_pgno"] + 1) * page)

    def _missing(self) -> tuple[int, int]:
        """Bytes that the file should have, and how many of them it lacks; never more than it does."""
        said = self._said()
        return said, max(0, said - (self.directory / "data.mdb").stat().st_size)

    def _check_size(self) -> None:
        """Reading beyond the end of a file that was cut short would end the process without a word."""
        said, missing = self._missing()
        if missing > UNWRITTEN_BYTES:
            raise JournalError(
                f"{self.directory / 'data.mdb'}: has {said - missing} of its {said} bytes: cut short, or copied in "
                f"part; {self._remedy}"
            )

    def _fill_up(self) -> None:
        """LMDB may count pages at the end that it took and gave back without writing them."""
        said, missing = self._missing()
        if missing:
            os.truncate(self.directory / "data.mdb", said)

    def _check(self, run_id: str, read_only: bool) -> None:
        with self._env.begin(write=not read_only) as txn:
            known = txn.get(IDENTITY)
            if known is None and not read_only:
                txn.put(IDENTITY, f"{FORMAT} {run_id}".encode())
                return
            if known is None:
                raise JournalError(f"{self.directory}: {EMPTY}")
            written = known.decode(errors="replace").split(" ")
        if written[0] != str(FORMAT):
            raise JournalError(
                f"{self.directory}: written by another croupier (format {written[0]!r}, this one reads {FORMAT}); "
                f"use that one{'' if read_only else f', or {ANEW}'}"
            )
        if run_id and written[-1] != run_id:
            raise JournalError(
                f"{self.directory}: belongs to run {written[-1]}, not {run_id}; move it away or use another run.name"
            )

    def _list(self) -> None:
        with self._reading() as txn, txn.cursor() as cursor:
            for key, value in cursor:
                if len(key) == KEY.size:
                    self._chunks.append((KEY.unpack(key)[0], len(value)))
                elif len(key) > KEY.size and self._chunks:  # a large frame of that chunk
                    self._chunks[-1] = (self._chunks[-1][0], self._chunks[-1][1] + len(value))

    def _last_seq(self) -> int:
        if not self._chunks:
            return -1
        first, _ = self._chunks[-1]
        return first + len(self._kinds_of(first)) - 1

    def _kinds_of(self, first: int) -> list[str]:
        """Kinds of the events in the chunk that begins at ``first``; [] if it was pruned."""
        with self._reading() as txn:
            value = txn.get(KEY.pack(first))
            return [] if value is None else [row[0] for row in table_of(first, memoryview(value))[0]]

    def _events_of(self, first: int, only: int | None = None) -> list[Event]:
        """Events of that chunk, or ``only`` the one of that number; [] if it was pruned."""
        with self._reading() as txn:
            value = txn.get(KEY.pack(first))
            if value is None:
                return []

            def large(seq: int, place: int) -> bytes | None:
                frame = txn.get(LARGE_KEY.pack(seq, place))
                return None if frame is None else bytes(frame)

            return list(unpack(first, memoryview(value), large, only))

    @contextmanager
    def _reading(self) -> Iterator[lmdb.Transaction]:
        """Raises :class:`JournalError` for what is damaged."""
        try:
            with self._env.begin(buffers=True) as txn:
                yield txn
        except (lmdb.CorruptedError, lmdb.PageNotFoundError, DamagedChunk) as error:
            raise JournalError(f"{self.directory}: damaged on the disk ({error}); {self._remedy}") from error

    # ---- writing --------------------------------------------------------------------------------

    def append(self, kind: str, head: dict[str, Any], frames: Sequence[Any] = ()) -> int:
        """Queue an event for the next group commit; returns its number. Frames must not change."""
        self.check()
        views = [memoryview(f).cast("B") for f in frames]
        with self._wake:
            self._pending.append((kind, head, views))
            self._pending_bytes += sum(v.nbytes for v in views)
            self.last += 1
            return self.last

    def flush(self) -> None:
        """Let the thread commit what was appended."""
        with self._wake:
            self._wake.notify()

    def check(self) -> None:
        """Raise what stopped the thread, if anything did."""
        if self._error is not None:
            raise self._error

    @property
    def used_bytes(self) -> int:
        """Bytes of the chunks kept, and of what is being written or waits for it."""
        return self._kept_bytes + self._pending_bytes

    @property
    def is_deleting(self) -> bool:
        """Whether something that was pruned is still there."""
        return bool(self._prunes)

    def prune(self, needed: Sequence[int], before: int) -> None:
        """Delete the chunks of events older than ``before`` that hold none of ``needed``."""
        with self._wake:
            firsts = [first for first, _ in self._chunks]
            keep = {bisect_right(firsts, seq) - 1 for seq in needed}
            ends = [*firsts[1:], self.durable + 1][: len(firsts)]
            gone = [
                first
                for i, (first, end) in enumerate(zip(firsts, ends, strict=True))
                if end <= before and i not in keep
            ]
            if gone:
                self._prunes.append(gone)
                self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._pending or self._prunes or self._closing):
                    self._wake.wait()
                events, self._pending = self._pending, []
                prunes = list(self._prunes)
                if self._closing and not events and not prunes:
                    return
            try:
                self._commit(events)  # before anything is deleted: the snapshot that takes its place is among them
                for gone in prunes:
                    self._delete(gone)
                    with self._wake:
                        self._prunes.remove(gone)
                self._fill_up()
            except Exception as error:  # noqa: BLE001  # whatever it is, the broker must hear of it
                log.error("%s", error)
                self._error = JournalError(
                    f"{self.directory}: what was decided could not be written ({error}); make room on the disk or "
                    "raise broker.journal_mb, then start the broker again: nothing acknowledged is lost"
                )
                self.on_commit()
                return

    def _commit(self, events: list[tuple[str, dict[str, Any], list[memoryview]]]) -> None:
        start = 0
        while start < len(events):
            end, size = start, 0
            while end < len(events) and (end == start or size < CHUNK_BYTES):
                size += sum(f.nbytes for f in events[end][2])
                end += 1
            first = self.durable + 1
            value, large = pack(events[start:end]), list(apart(first, events[start:end]))
            kept = len(value) + sum(frame.nbytes for _, _, frame in large)
            if self._ahead is not None:
                self._ahead.take(self._said(), kept + PAGES_BESIDE)
            with self._env.begin(write=True) as txn:
                if not txn.put(KEY.pack(first), value, append=True):
                    raise lmdb.KeyExistsError(f"event {first} is there already")
                for seq, place, frame in large:
                    txn.put(LARGE_KEY.pack(seq, place), frame, append=True)
            with self._wake:
                self._chunks.append((first, kept))
                self._kept_bytes += kept
                self._pending_bytes -= size
                self.durable = first + (end - start) - 1
            start = end
            self.on_commit()

    def _delete(self, firsts: list[int]) -> None:
        self._env.reader_check()  # a reader that was killed would keep every page from being used again
        with self._env.begin(write=True) as txn, txn.cursor() as cursor:
            for first in firsts:
                if cursor.set_key(KEY.pack(first)) and cursor.delete():
                    while len(cursor.key()) > KEY.size:  # its large frames, which follow it
                        cursor.delete()
        dead = set(firsts)
        with self._wake:
            self._kept_bytes -= sum(size for first, size in self._chunks if first in dead)
            self._chunks = [c for c in self._chunks if c[0] not in dead]

    def close(self) -> None:
        """Commit what waits and close."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(CLOSE_S)
            if self._thread.is_alive():  # a disk that stands still: closing under the thread would end the process
                log.error("%s: the disk has not taken the last events within %.0f s", self.directory, CLOSE_S)
                return
        if self._ahead is not None:
            with suppress(OSError):  # it is longer than it need be
                self._ahead.give_back(self._said())
        self._env.close()

    # ---- reading --------------------------------------------------------------------------------

    def events(self, first: int = 0) -> Iterator[Event]:
        """Every event kept from number ``first`` on, in order; pruned ones are missing."""
        starts = [start for start, _ in self._chunks]
        for start in starts[max(0, bisect_right(starts, first) - 1) :]:
            for event in self._events_of(start):
                if event.seq >= first:
                    yield event

    def event(self, seq: int) -> Event:
        """One event. Raises :class:`JournalError` if it was pruned."""
        index = bisect_right(self._chunks, (seq, 1 << 62)) - 1
        if index >= 0:
            for found in self._events_of(self._chunks[index][0], seq):
                return found
        raise JournalError(f"{self.directory}: event {seq} is not there any more")

    def whole_from(self) -> int:
        """The number from which on no event on disk is missing; reads no frames."""
        following = self.durable + 1
        for first, _ in reversed(self._chunks):
            if first + len(self._kinds_of(first)) != following:
                return following
            following = first
        return following

    def count(self, kind: str, first: int = 0) -> int:
        """How many events of ``kind`` are kept from number ``first`` on; reads no frames."""
        starts = [start for start, _ in self._chunks]
        found = 0
        for start in starts[max(0, bisect_right(starts, first) - 1) :]:
            found += self._kinds_of(start)[max(0, first - start) :].count(kind)
        return found

    def latest(self, kind: str) -> int | None:
        """The number of the newest event of ``kind``; None if there is none."""
        for first, _ in reversed(self._chunks):
            kinds = self._kinds_of(first)
            if kind in kinds:
                return first + len(kinds) - 1 - kinds[::-1].index(kind)
        return None
