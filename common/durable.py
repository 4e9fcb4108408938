"""What is still there where the machine loses its power: a file's content, and the directory entry that names it."""

import errno
import os
from pathlib import Path

CANNOT = {errno.EINVAL, errno.ENOTSUP, errno.EACCES}  # of a directory that its file system syncs not, or we read not


def sync(path: Path) -> None:
    """Have ``path``, a file or a directory, on disk. Raises :class:`OSError`."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in CANNOT or not path.is_dir():
            raise


def make_directory(path: Path) -> None:
    """``path`` and what is missing above it. Raises :class:`OSError`."""
    missing = [one for one in (path, *path.parents) if not one.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync(made.parent)


def replace_text(path: Path, text: str, durable: bool = True) -> None:
    """Put a file of ``text`` in the place of ``path``, whole or not at all. Raises :class:`OSError`."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with temporary.open("w") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        sync(path.parent)
