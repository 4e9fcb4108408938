"""Whether a file can be written where it is wanted, known before the work is done, and in words if it cannot."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.errors import ConfigError, CroupierError

PICTURES = (".png", ".svg")


def check_output(path: Path, endings: Sequence[str] = ()) -> None:
    """Raises :class:`ConfigError` with what is in the way of ``path``, which must end in one of ``endings``."""
    if endings and path.suffix not in endings:
        raise ConfigError(f"{path}: must end in {' or '.join(endings)}")
    if path.is_dir():
        raise ConfigError(f"{path}: is a directory; name a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no directory {path.parent}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{path}: may not be written; name a file elsewhere")


def check_folder(path: Path) -> None:
    """As :func:`check_output`, but the directory is made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{path.parent}: cannot be made ({error.strerror or error}); name a file elsewhere"
        ) from error
    check_output(path)


@contextmanager
def writing(path: Path, remedy: str) -> Iterator[None]:
    """What the system refuses within is a :class:`ConfigError`: ``path`` cannot be written, and ``remedy``."""
    try:
        yield
    except CroupierError:  # a DeadlineError is an OSError too
        raise
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error}); {remedy}") from error
