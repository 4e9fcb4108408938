"""A run directory that one learner at a time writes into, so that no other run begins there meanwhile."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import ConfigError
from common.locks import lock_within

LOCK = "learner.lock"
WAIT_S = 120.0  # for one that was killed, or told to stop and writes its checkpoint

log = logging.getLogger("learner.hold")


@contextmanager
def held(directory: Path, rank: int, is_stopped: Callable[[], bool]) -> Iterator[None]:
    """Hold ``directory`` on rank 0 for a while. Raises :class:`ConfigError` where another learner is at work there."""
    if rank:
        yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / LOCK).open("a")
    except OSError as error:
        raise ConfigError(f"run.dir: {directory} cannot be written ({error}); name another directory") from error
    with file:
        words = f"{directory}: another learner is at work there (it holds {LOCK})"
        if not lock_within(file, WAIT_S, lambda: log.warning("%s; waiting %g s", words, WAIT_S), is_stopped):
            if is_stopped():
                raise ConfigError(f"told to stop while it waited: {words}")
            raise ConfigError(f"{words}; stop it, or choose another run.name")
        yield
