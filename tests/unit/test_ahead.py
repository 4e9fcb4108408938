"""Room ahead of the journal's file: there while it grows, gone when it is closed, and no error where there is none."""

import errno
import os

import pytest

from broker import ahead
from broker.ahead import LEAST_BYTES, Ahead
from broker.journal import Journal

FRAME = memoryview(bytes(range(256)) * 1024)  # 256 kB: a value of its own


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    return path


def allocated(path):
    return path.stat().st_blocks * 512


def test_room_is_on_the_disk_before_it_is_written_and_given_back_behind_what_was(file):
    room = Ahead(file, bound=1 << 30)
    room.take(used=100, coming=5000)
    assert file.stat().st_size == 100 + 5000 + LEAST_BYTES
    assert allocated(file) >= 5000 + LEAST_BYTES
    before = file.stat().st_size
    room.take(used=before - 10, coming=10)  # it still fits
    assert file.stat().st_size == before
    room.take(used=before - 10, coming=11)
    assert file.stat().st_size == 2 * (before - 10) + 11
    room.give_back(used=300)
    assert file.stat().st_size == 300
    assert file.read_bytes() == b"x" * 100 + bytes(200)


def test_a_file_takes_no_more_than_it_may_have(file):
    room = Ahead(file, bound=10_000)
    room.take(used=100, coming=50)
    assert file.stat().st_size == 10_000
    room.take(used=9_990, coming=50)  # that is the writer's to refuse
    assert file.stat().st_size == 10_000
    room.give_back(used=20_000)  # never longer
    assert file.stat().st_size == 10_000


def test_a_disk_that_fills_up_keeps_what_others_may_need(file):
    """Less is asked for each time, then nothing; a part that was taken goes back."""
    asked = []

    def full(descriptor, offset, size):
        asked.append(size)
        os.ftruncate(descriptor, offset + size // 2)
        raise OSError(errno.ENOSPC, "No space left on device")

    room = Ahead(file, bound=1 << 40, allocate=full)
    for used in range(1 << 30, (1 << 30) + 20):
        room.take(used, coming=0)
        assert file.stat().st_size == 100
    sizes = [size - (1 << 30) for size in asked]
    assert len(asked) == 7, "64 MB, 32, ... 1"
    assert sizes == sorted(set(sizes), reverse=True)


def test_a_file_system_that_cannot_is_asked_once(file):
    asked = []

    def unable(descriptor, offset, size):
        asked.append(size)
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    room = Ahead(file, bound=1 << 30, allocate=unable)
    for _ in range(3):
        room.take(used=100, coming=50)
    assert len(asked) == 1
    room.give_back(used=100)


def written(directory, events):
    journal = Journal(directory, "run", 64)
    for number in range(events):
        journal.append("x", {"n": number}, [FRAME])
    journal.flush()
    return journal


def test_a_journal_s_file_is_no_longer_than_its_pages_once_it_is_closed(tmp_path):
    journal = written(tmp_path, 8)
    while journal.durable < 7:
        journal.check()
    assert (tmp_path / "data.mdb").stat().st_size >= 8 * FRAME.nbytes + LEAST_BYTES
    journal.close()
    again = Journal(tmp_path, "run", 64, read_only=True)
    assert (tmp_path / "data.mdb").stat().st_size == again._said()
    assert [event.head["n"] for event in again.events()] == list(range(8))
    assert all(event.frames == [FRAME] for event in again.events())
    again.close()


def test_a_journal_that_finds_no_room_ahead_is_written_all_the_same(tmp_path, monkeypatch):
    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ahead, "_system_s", lambda: full)
    written(tmp_path, 8).close()
    again = Journal(tmp_path, "run", 64, read_only=True)
    assert [event.frames for event in again.events()] == [[FRAME]] * 8
    again.close()
