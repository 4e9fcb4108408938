"""What is to be there behind a power cut is synced, in the order in which it is needed."""

import errno
import os
from pathlib import Path

import pytest

from common.durable import make_directory, replace_text, sync


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was synced, in order."""
    found: list[str] = []

    def fsync(descriptor: int) -> None:
        found.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    monkeypatch.setattr("os.fsync", fsync)
    return found


def test_every_directory_that_is_made_is_named_in_one_that_is_synced(tmp_path: Path, synced: list[str]) -> None:
    make_directory(tmp_path / "a" / "b" / "c")
    assert sorted(synced) == sorted([tmp_path.name, "a", "b"])
    synced.clear()
    make_directory(tmp_path / "a" / "b")
    assert not synced


def test_a_file_is_synced_before_it_takes_its_name_and_the_name_behind_it(tmp_path: Path, synced: list[str]) -> None:
    replace_text(tmp_path / "x.json", "1")
    assert synced == [f"x.json.tmp{os.getpid()}", tmp_path.name]
    synced.clear()
    replace_text(tmp_path / "x.json", "2", durable=False)
    assert not synced and [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert (tmp_path / "x.json").read_text() == "2"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_syncs_no_directory_is_no_fault_and_no_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def unable(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", unable)
    sync(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=os.strerror(number)):
        sync(tmp_path / "file")


def test_what_cannot_be_written_leaves_the_old_and_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_text(tmp_path / "x", "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_text(tmp_path / "x", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "old"
