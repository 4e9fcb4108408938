"""The exception tree.

::

    CroupierError
    ├── ConfigError       a YAML or override that cannot be run
    ├── ModelError        a model directory that is missing, half written or unsupported
    ├── TaskError         a task or reward that does not exist or misbehaves
    │   └── SandboxError  a sandbox that cannot be started: never what runs in one
    ├── EngineError       the sampling engine failed
    ├── WireError         bytes that are not a valid message of this WIRE_VERSION
    ├── DataError         a well-formed message whose contents break the contract
    ├── ProtocolError     the other side refused us, or spoke out of turn
    │   └── RevokedError  its key is no longer allowed
    ├── DeadlineError     a wait ran out; the message names who was late
    ├── WeightsError      a weight publish or reload failed
    ├── CheckpointError   a checkpoint that is damaged or belongs to another run
    └── JournalError      the broker's journal, or its run directory, cannot be written, read or is another run's
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from typing import TypeVar

OF_THE_MOMENT = {
    errno.EADDRINUSE, errno.EAGAIN, errno.EBUSY, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOBUFS,
    errno.ENOMEM, errno.ENOSPC, errno.ESTALE, errno.ETIMEDOUT,
}  # fmt: skip
# As libraries say it that lose the number.
WORDS_OF_THE_MOMENT = {os.strerror(number).lower() for number in OF_THE_MOMENT} | {
    "can't allocate memory", "out of memory", "alloc_failed", "busy or unavailable",
}  # fmt: skip
OS_ERROR = re.compile(r"\(os error (\d+)\)")  # as Rust ends it


class CroupierError(Exception):
    """Base of every error that a user can cause and mend."""

    lasting = False  # whether the process would end by it again, however often it is started
    may_pass = False  # whether it may be over by then


E = TypeVar("E", bound=CroupierError)


class ConfigError(CroupierError, ValueError):
    """A configuration that cannot be run: names the key, its value and the remedy."""


class ModelError(CroupierError, ValueError):
    """A model directory that is missing, half written or of an unsupported architecture."""


class TaskError(CroupierError, ValueError):
    """A task or reward channel that does not exist or returned what it must not."""


class SandboxError(TaskError):
    """A sandbox that cannot be started here: names what was tried and the remedy. Never the program's doing."""


class EngineError(CroupierError, RuntimeError):
    """The sampling engine met something that it cannot sample from."""


class WireError(CroupierError, ValueError):
    """Bytes that are not a valid message of this wire version."""


class DataError(CroupierError, ValueError):
    """A well-formed message whose contents break the contract (NaN, wrong length, future version)."""


class ProtocolError(CroupierError, RuntimeError):
    """The peer refused us or spoke out of turn."""


class RevokedError(ProtocolError):
    """A message came from a peer whose key has been revoked since it connected."""


class DeadlineError(CroupierError, TimeoutError):
    """A wait ran out; the message names who was late."""


class WeightsError(CroupierError, RuntimeError):
    """A weight publish or reload failed."""


class CheckpointError(CroupierError, RuntimeError):
    """A checkpoint that is damaged or belongs to another run."""


class JournalError(CroupierError, RuntimeError):
    """The broker's journal or its run directory cannot be written or read, or belongs to another run."""


@contextlib.contextmanager
def lasting(*kinds: type[CroupierError]) -> Iterator[None]:
    """Mark errors of ``kinds`` as such that come again: what raises them here looks at nothing that changes.

    But for those that are :func:`passing`, or follow from what the machine lacked at that moment.
    """
    try:
        yield
    except kinds as error:
        error.lasting = not (error.may_pass or _is_of_the_moment(error))
        raise


def passing(error: E) -> E:
    """Mark ``error`` as one that may be over when the process is started again."""
    error.may_pass = True
    return error


def _is_of_the_moment(error: BaseException) -> bool:
    cause = error.__cause__
    if cause is None:
        return False
    if isinstance(cause, MemoryError | TimeoutError) or getattr(cause, "may_pass", False):
        return True
    if isinstance(cause, OSError) and cause.errno is not None:  # its words name a file, too, which says nothing
        return cause.errno in OF_THE_MOMENT or _is_of_the_moment(cause)
    try:
        said = str(cause).lower()
    except Exception:  # noqa: BLE001  # foreign code
        said = ""
    numbers = {int(number) for number in OS_ERROR.findall(said)}
    if numbers & OF_THE_MOMENT or any(words in said for words in WORDS_OF_THE_MOMENT):
        return True
    return _is_of_the_moment(cause)
