"""Which embedded store the journal should use: LMDB and SQLite beside a bare append, each commit on disk.

A commit is one group of records, as the broker's group commit makes them. SQLite runs in WAL mode
with synchronous=FULL. Files lie below the working directory, on the disk that a run uses, and stay
until the end: pages of a file that was just deleted take writes several times as fast.
"""

import os
import sqlite3
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lmdb

from tools.bench.harness import Row, interleave

SHAPES = ((256 << 10, 8), (256 << 10, 1), (4 << 10, 64), (4 << 10, 1))  # bytes a record, records a commit
BYTES = 64 << 20  # written by each contestant at most
COMMITS = 200  # at most


def _commits(record: int, group: int) -> int:
    return max(4, min(COMMITS, BYTES // (record * group)))


def _rate(record: int, group: int, commit: Callable[[int, bytes], None]) -> float:
    payload = os.urandom(record)
    count = _commits(record, group)
    started = time.perf_counter()
    for number in range(count):
        commit(number, payload)
    return count * group * record / 1e6 / (time.perf_counter() - started)


def append_rate(record: int, group: int, place: Path) -> float:
    """MB/s of append + fdatasync."""
    with tempfile.NamedTemporaryFile(dir=place, delete=False) as file:

        def commit(_: int, payload: bytes) -> None:
            for _ in range(group):
                file.write(payload)
            file.flush()
            os.fdatasync(file.fileno())

        return _rate(record, group, commit)


def lmdb_rate(record: int, group: int, place: Path, join: bool) -> float:
    """MB/s of LMDB; ``join``: a group as one value, as the journal does it, or else each record its own."""
    with lmdb.open(tempfile.mkdtemp(dir=place), map_size=1 << 30) as store:

        def commit(number: int, payload: bytes) -> None:
            with store.begin(write=True) as transaction:
                if join:
                    transaction.put(number.to_bytes(8, "big"), payload * group)
                    return
                for n in range(group):
                    transaction.put((number * group + n).to_bytes(8, "big"), payload)

        return _rate(record, group, commit)


def sqlite_rate(record: int, group: int, place: Path) -> float:
    """MB/s of SQLite."""
    store = sqlite3.connect(Path(tempfile.mkdtemp(dir=place)) / "journal.sqlite", isolation_level=None)
    store.execute("pragma journal_mode=wal")
    store.execute("pragma synchronous=full")
    store.execute("create table events (seq integer primary key, value blob)")

    def commit(number: int, payload: bytes) -> None:
        store.execute("begin")
        store.executemany("insert into events values (?, ?)", ((number * group + n, payload) for n in range(group)))
        store.execute("commit")

    try:
        return _rate(record, group, commit)
    finally:
        store.close()


def run(reps: int) -> list[Row]:
    """MB/s of each store at each shape, beside the bare append."""
    rows = []
    with tempfile.TemporaryDirectory(dir=".") as name:
        place = Path(name)
        for record, group in SHAPES:
            contestants = {
                "append": partial(append_rate, record, group, place),
                "LMDB, a group as one value": partial(lmdb_rate, record, group, place, True),
                "LMDB, a record a value": partial(lmdb_rate, record, group, place, False),
                "SQLite": partial(sqlite_rate, record, group, place),
            }
            speed = interleave(contestants, reps)
            shape = f"{record >> 10} kB, {group} a commit"
            rows += [
                Row("store", f"{shape}: {store}", speed[store], "MB/s", "append + fdatasync", speed["append"], reps)
                for store in list(contestants)[1:]
            ]
    return rows
