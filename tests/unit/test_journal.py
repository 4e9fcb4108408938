"""The journal: what is durable is there, in order, whatever happens to the process; disk use is bounded."""

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.chunks import APART_BYTES, DamagedChunk, Event, apart, pack, unpack
from broker.journal import LARGE_KEY, LOCK_BYTES, MEGABYTE, Journal
from common.errors import JournalError


def settle(journal: Journal, timeout: float = 10.0) -> None:
    journal.flush()
    deadline = time.monotonic() + timeout
    while journal.durable < journal.last:
        journal.check()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def fill(journal: Journal, count: int, size: int = 100, start: int = 0) -> list[bytes]:
    written = []
    for i in range(start, start + count):
        frame = np.random.default_rng(i).bytes(size)
        assert journal.append("admit" if i % 3 else "commit", {"i": i}, [frame, b"x" * (i % 5)]) == i
        written.append(frame)
        if i % 7 == 0:
            settle(journal)
    settle(journal)
    return written


def test_events_come_back_in_order_with_their_frames(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "r", 8)
    frames = fill(journal, 40)
    journal.close()
    journal = Journal(tmp_path, "r", 8)
    assert journal.last == journal.durable == 39
    events = list(journal.events())
    assert [e.seq for e in events] == [e.head["i"] for e in events] == list(range(40))
    assert [e.frames for e in events] == [[f, b"x" * (i % 5)] for i, f in enumerate(frames)]
    assert [e.seq for e in journal.events(17)] == list(range(17, 40))
    assert journal.event(23) == Event(23, "admit", {"i": 23}, [frames[23], b"x" * 3])
    assert journal.latest("commit") == 39
    assert journal.latest("nothing") is None
    fill(journal, 5, start=40)
    assert [e.seq for e in journal.events(38)] == list(range(38, 45))
    journal.close()


def test_pruning_keeps_what_is_needed_and_the_file_stays_within_its_bound(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "r", 4)
    kept: list[int] = []
    for round_ in range(60):  # 60 MB through a journal of 4
        start = journal.last + 1
        fill(journal, 10, 100_000, start)
        kept = [*kept[-1:], start + 3]
        journal.prune(kept, journal.last)
        settle(journal)
        assert journal.used_bytes <= 4 * MEGABYTE, round_
    time.sleep(0.05)
    for seq in kept:
        assert journal.event(seq).seq == seq
    with pytest.raises(JournalError, match="event 5 is not there any more"):
        journal.event(5)
    assert (tmp_path / "data.mdb").stat().st_size < 120 * MEGABYTE
    journal.close()


def test_a_full_journal_says_so_and_keeps_what_was_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.journal.MAP_RESERVE", 0)
    journal = Journal(tmp_path, "r", 1)
    with pytest.raises(JournalError, match=r"could not be written.*broker\.journal_mb.*nothing acknowledged is lost"):
        for i in range(100):
            journal.append("admit", {"i": i}, [b"y" * 100_000])
            settle(journal)
    durable = journal.durable
    journal.close()
    again = Journal(tmp_path, "r", 1)
    assert [e.seq for e in again.events()] == list(range(durable + 1))
    again.close()


def test_a_snapshot_is_on_disk_before_what_it_replaces_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path, "r", 8)
    fill(journal, 10)
    monkeypatch.setattr(journal, "_delete", lambda firsts: os.close(-1))  # fails there, as a killed process would stop
    with journal._wake:  # both reach the thread at once
        seq = journal.append("snapshot", {}, [])
        journal.prune([], seq)
    journal.flush()
    journal._thread.join(10)
    journal.close()
    again = Journal(tmp_path, "r", 8)
    assert again.latest("snapshot") == seq == again.last
    again.close()


READER = """
import sys, time
from pathlib import Path
import broker.journal
def slow(*arguments):
    print("inside", flush=True)
    time.sleep(60)
broker.journal.unpack = slow
list(broker.journal.Journal(Path(sys.argv[1]), "", 8, read_only=True).events())
"""


def test_a_reader_that_was_killed_keeps_no_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.journal.MAP_RESERVE", 0)
    journal = Journal(tmp_path, "r", 8)
    fill(journal, 10)
    reader = subprocess.Popen([sys.executable, "-c", READER, str(tmp_path)], stdout=subprocess.PIPE)
    assert reader.stdout is not None
    assert reader.stdout.readline() == b"inside\n"
    reader.kill()
    reader.wait()
    reader.stdout.close()
    for _ in range(20):  # 20 MB through a journal of 8
        fill(journal, 10, 100_000, journal.last + 1)
        journal.prune([], journal.last)
        settle(journal)
    journal.close()


def test_what_is_being_written_counts_as_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path, "r", 8)
    seen: list[int] = []
    monkeypatch.setattr("broker.journal.pack", lambda events: seen.append(journal.used_bytes) or b"\0" * 9_000)
    journal.append("admit", {}, [b"y" * 9_000])
    settle(journal)
    assert seen == [9_000] and journal.used_bytes == 9_000
    journal.close()


def test_another_runs_journal_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path, "one", 4).close()
    with pytest.raises(JournalError, match="belongs to run one, not two"):
        Journal(tmp_path, "two", 4)
    (tmp_path / "data.mdb").write_bytes(b"not a database" * 1000)
    with pytest.raises(JournalError, match=r"cannot be opened.*move it away"):
        Journal(tmp_path, "one", 4)
    with pytest.raises(JournalError, match="no journal there"):
        Journal(tmp_path / "nowhere", "", 4, read_only=True)


def test_who_only_reads_is_never_told_to_move_a_journal_away(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").touch()
    with pytest.raises(JournalError, match="empty: its broker was ended before it had written anything"):
        Journal(tmp_path, "", 4, read_only=True)
    Journal(tmp_path, "r", 4).close()  # a broker begins it
    (tmp_path / "data.mdb").write_bytes(b"not a database" * 1000)
    with pytest.raises(JournalError, match=r"cannot be opened \(.*\); make it readable, or copy it here again$"):
        Journal(tmp_path, "", 4, read_only=True)


NOBODY = """
import os, sys
from pathlib import Path
from broker.journal import Journal
from common.errors import JournalError
os.chdir(sys.argv[1])
if os.geteuid() == 0:
    os.setuid(65534)  # nobody, so that permissions count
try:
    print([e.seq for e in Journal(Path("j"), "", 4, read_only=True).events()])
except JournalError as error:
    print(error)
"""


def test_a_journal_that_may_not_be_written_is_read_when_nobody_writes_it(tmp_path: Path) -> None:
    def read() -> str:
        done = subprocess.run([sys.executable, "-c", NOBODY, str(tmp_path)], capture_output=True, text=True, timeout=30)
        return done.stdout.strip() or done.stderr

    tmp_path.chmod(0o755)
    journal = Journal(tmp_path / "j", "r", 4)
    fill(journal, 3)
    for path, mode in (("data.mdb", 0o444), ("lock.mdb", 0o444), ("", 0o555)):
        (tmp_path / "j" / path).chmod(mode)
    assert read().startswith("j: is being written")
    journal.close()
    assert read() == "[0, 1, 2]"
    (tmp_path / "j").chmod(0o755)
    (tmp_path / "j" / "lock.mdb").unlink()  # as in a copy without it
    (tmp_path / "j").chmod(0o555)
    assert read() == "[0, 1, 2]"
    (tmp_path / "j" / "data.mdb").chmod(0)
    assert read() == "j: cannot be opened (j: Permission denied); make it readable, or copy it here again"


@pytest.mark.parametrize("read_only", [False, True])
def test_a_file_that_was_cut_short_is_refused(tmp_path: Path, read_only: bool) -> None:
    journal = Journal(tmp_path, "r", 16)
    for _ in range(4):
        journal.append("x", {}, [bytes(100_000)])
    journal.close()
    file = tmp_path / "data.mdb"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(JournalError, match=r"data\.mdb: has \d+ of its \d+ bytes: cut short.*copy it here") as caught:
        Journal(tmp_path, "r", 16, read_only=read_only)
    assert ("move it away" in str(caught.value)) != read_only


def damage(directory: Path, *texts: bytes) -> None:
    """Flip a bit behind each of ``texts``, as a disk might."""
    file = directory / "data.mdb"
    content = bytearray(file.read_bytes())
    for text in texts:
        content[content.rindex(text) + len(text)] ^= 4
    file.write_bytes(content)


def test_an_event_that_is_not_what_was_written_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "r", 8)
    for i in range(4):
        journal.append("admit", {"i": i}, [b"frame %d " % i + bytes(50), b"x"])
    journal.close()
    assert len(journal._chunks) == 1
    damage(tmp_path, b"frame 2 ")
    read = Journal(tmp_path, "r", 8, read_only=True)
    assert [read.event(seq).head["i"] for seq in (0, 1, 3)] == [0, 1, 3] and read.latest("admit") == 3
    for reading in (lambda: read.event(2), lambda: list(read.events())):
        with pytest.raises(JournalError, match=r"damaged on the disk \(event 2 \(admit\) is not .*copy it here again$"):
            reading()
    read.close()
    again = Journal(tmp_path, "r", 8)
    with pytest.raises(JournalError, match=r"copy it here again, or move it away, and learner\.resume=true goes on"):
        again.event(2)
    again.close()


def test_large_frames_are_values_of_their_own_that_come_and_go_with_their_chunk(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "r", 64)
    frames = fill(journal, 12, APART_BYTES) + fill(journal, 12, start=12) + fill(journal, 6, APART_BYTES, start=24)
    assert journal.used_bytes > 18 * APART_BYTES
    for again in (False, True):
        if again:
            used = journal.used_bytes
            journal.close()
            journal = Journal(tmp_path, "r", 64)
            assert journal.used_bytes == used
        assert [e.frames[0] for e in journal.events()] == frames and journal.event(5).frames[0] == frames[5]
        assert journal.whole_from() == 0
    journal.prune([8], 24)
    deadline = time.monotonic() + 10
    while journal.is_deleting and time.monotonic() < deadline:
        time.sleep(0.001)
    left = [event.seq for event in journal.events()]
    assert 8 in left and left[-6:] == list(range(24, 30)) and len(left) < 20
    with journal._env.begin() as txn, txn.cursor() as cursor:
        large = [LARGE_KEY.unpack(key)[0] for key in cursor.iternext(values=False) if len(key) == LARGE_KEY.size]
    assert large == [seq for seq in left if len(frames[seq]) == APART_BYTES]
    used = journal.used_bytes
    journal.close()
    damage(tmp_path, frames[27][:100])
    read = Journal(tmp_path, "r", 64, read_only=True)
    assert read.used_bytes == used and read.event(28).frames[0] == frames[28]
    with pytest.raises(JournalError, match="event 27"):
        read.event(27)
    read.close()


def test_a_table_that_is_not_what_was_written_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "r", 8)
    journal.append("admit", {"text": "something"}, [])
    journal.close()
    damage(tmp_path, b"somet")
    with pytest.raises(JournalError, match="the events from 0 on are not what was written"):
        Journal(tmp_path, "r", 8)


@settings(max_examples=60)
@given(st.data())
def test_no_flipped_bit_is_taken_for_what_was_written(data: st.DataObject) -> None:
    frames = st.lists(st.binary(max_size=200) | st.just(bytes(APART_BYTES)), max_size=3)
    events = data.draw(st.lists(st.tuples(st.just("admit"), st.just({"i": 1}), frames), min_size=1))
    views = [(kind, head, [memoryview(f) for f in parts]) for kind, head, parts in events]
    chunk, large = bytearray(pack(views)), {(seq, place): bytes(frame) for seq, place, frame in apart(7, views)}
    whole = [Event(7 + i, *event) for i, event in enumerate(events)]
    assert list(unpack(7, memoryview(chunk), lambda *at: large[at])) == whole
    if large:
        lacking = large.keys() - {data.draw(st.sampled_from(sorted(large)))}
        with pytest.raises(DamagedChunk):
            list(unpack(7, memoryview(chunk), lambda *at: large[at] if at in lacking else None))
    chunk[data.draw(st.integers(0, len(chunk) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = list(unpack(7, memoryview(chunk), lambda *at: large[at]))
    except DamagedChunk:
        return
    assert found == whole  # it lay between two frames


def test_pages_that_were_taken_and_never_written_are_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After this LMDB 0.9 counts a page more than its file has, where no room is taken ahead."""
    monkeypatch.setattr("broker.ahead._system_s", lambda: None)
    rng, journal = random.Random(62), Journal(tmp_path, "r", 64)
    for _ in range(30):
        if rng.random() < 0.8:
            size = rng.randint(60, 1900)
            journal.last += 1
            journal._commit([("x", {}, [memoryview(bytes(size))])])
        else:
            firsts = [first for first, _ in journal._chunks]
            cut, most = rng.randint(0, len(firsts)), min(len(firsts), rng.choice([0, 0, 1, 3]))
            keep = set(rng.sample(firsts, most))
            if gone := [first for first in firsts[:cut] if first not in keep]:
                journal._delete(gone)
    assert journal._missing()[1] > 0
    left = [event.seq for event in journal.events()]
    journal.close()
    journal = Journal(tmp_path, "r", 64)
    assert [event.seq for event in journal.events()] == left
    fill(journal, 1, start=journal.last + 1)
    journal.close()
    journal = Journal(tmp_path, "r", 64)
    assert journal._missing()[1] == 0 and [event.seq for event in journal.events()] == [*left, left[-1] + 1]
    journal.close()


def test_a_reader_sees_a_living_writers_events(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "r", 4)
    fill(journal, 10)
    script = (
        "import sys; from pathlib import Path; from broker.journal import Journal\n"
        "j = Journal(Path(sys.argv[1]), '', 4, read_only=True); print([e.seq for e in j.events()]); j.close()"
    )
    said = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=30)
    assert said.stdout.strip() == str(list(range(10))), said.stderr
    journal.close()


WRITER = """
import os, sys
from pathlib import Path
from broker.journal import Journal
journal = Journal(Path(sys.argv[1]), "r", 64)
while True:
    for _ in range(5):
        journal.append("admit", {"i": journal.last + 1}, [os.urandom(20_000)])
    journal.flush()
    print(journal.durable, flush=True)
"""


def test_what_was_durable_when_the_process_was_killed_is_there(tmp_path: Path) -> None:
    for life in range(4):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        said = -1
        for line in writer.stdout:
            said = int(line)
            if said > 100 * (life + 1):
                break
        os.kill(writer.pid, signal.SIGKILL)
        rest = writer.stdout.read().split(b"\n")[:-1]
        writer.stdout.close()
        writer.wait()
        said = max([said, *map(int, rest)])
        journal = Journal(tmp_path, "r", 64)
        assert journal.last >= said
        assert [e.head["i"] for e in journal.events()] == list(range(journal.last + 1))
        journal.close()


def test_whoever_waits_for_the_disk_is_told_of_commits_and_of_the_failure(tmp_path):
    told = threading.Event()
    journal = Journal(tmp_path, "r", 1, on_commit=told.set)
    journal.append("note", {})
    journal.flush()
    assert told.wait(5) and journal.durable == 0
    told.clear()
    journal._env.close()  # as good as a broken disk
    with suppress(JournalError):  # the thread may have met it already, behind its last commit
        journal.append("note", {})
    journal.flush()
    assert told.wait(5)
    with pytest.raises(JournalError, match="could not be written"):
        journal.check()


def test_a_disk_without_room_for_the_lock_file_is_told_before_it_is_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """LMDB would make it sparse, and the first write to it would end the process by SIGBUS."""

    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr("os.posix_fallocate", full)
        with pytest.raises(JournalError, match=r"j: cannot be written \(No space left on device\); make room there"):
            Journal(tmp_path / "j", "r", 64)
    Journal(tmp_path / "j", "r", 64).close()
    found = (tmp_path / "j" / "lock.mdb").stat()
    assert found.st_blocks * 512 >= found.st_size == LOCK_BYTES


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match=r"file/j: cannot be written \(Not a directory\)"):
        Journal(tmp_path / "file" / "j", "r", 64)


def test_where_a_file_system_reserves_nothing_the_lock_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unable(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr("os.posix_fallocate", unable)
    for _ in range(2):
        journal = Journal(tmp_path / "j", "r", 64)
        assert (tmp_path / "j" / "lock.mdb").stat().st_blocks * 512 >= LOCK_BYTES
        fill(journal, 3, start=journal.last + 1)
        journal.close()
