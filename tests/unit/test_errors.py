"""Which errors come again, however often a process is started."""

import errno

import pytest

from common.errors import ConfigError, ModelError, TaskError, lasting, passing


def follow(error, *causes):
    for cause in causes:
        error.__cause__ = error = cause


@pytest.mark.parametrize(
    ("causes", "comes_again"),
    [
        ([], True), ([FileNotFoundError(errno.ENOENT, "no such file")], True), ([ValueError("no number")], True),
        ([RuntimeError("size mismatch")], True), ([OSError(errno.EADDRINUSE, "in use")], False),
        ([TimeoutError()], False), ([MemoryError()], False), ([ValueError("torn"), OSError(errno.EIO, "I/O")], False),
        ([RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")], False),
        ([RuntimeError("CUDA out of memory. Tried to allocate 20 MiB")], False),
        ([RuntimeError("unable to open file <m> in read-only mode: Too many open files (24)")], False),
        ([RuntimeError("unable to mmap 9 bytes from file <m>: Cannot allocate memory (12)")], False),
        ([Exception("Stale file handle (os error 116)")], False), ([Exception("gone (os error 2)")], True),
        ([FileNotFoundError(errno.ENOENT, "no such file", "/data/out of memory/x")], True),
        ([passing(TaskError("another process builds the index"))], False),
    ],
)  # fmt: skip
def test_what_the_machine_lacked_for_the_moment_may_be_there_later(causes, comes_again):
    error = ModelError("m: cannot be loaded")
    follow(error, *causes)
    with pytest.raises(ModelError) as raised, lasting(ConfigError, ModelError):
        raise error
    assert raised.value.lasting == comes_again


def test_only_the_kinds_named_are_marked_and_none_that_says_it_passes():
    for error in (passing(TaskError("another process builds the index")), ConfigError("bad")):
        with pytest.raises(type(error)) as raised, lasting(TaskError):
            raise error
        assert not raised.value.lasting
