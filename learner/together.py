"""One stop for all ranks: who is told to stop tells the others, who may wait for what will not come any more."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from common.process import StopFlag
from learner.mesh import Mesh

LOOK_S = 0.5
KEY = "stop"

log = logging.getLogger("learner")


@contextmanager
def shared(stop: StopFlag, mesh: Mesh) -> Iterator[None]:
    """Within, ``stop`` is set on every rank soon after it is on one. A thread looks: no rank need meet another."""
    if mesh.world == 1:
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_share, args=(stop, mesh, over), name="stop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(2 * LOOK_S)


def _share(stop: StopFlag, mesh: Mesh, over: threading.Event) -> None:
    store = mesh.store()
    try:
        while not over.wait(LOOK_S):
            if stop.is_set:
                store.set(KEY, f"rank {mesh.rank}: {stop.reason}")
                return
            if store.check([KEY]):
                stop.set(f"as {store.get(KEY).decode()}")
                log.info("stopping, %s", stop.reason)
                return
    except RuntimeError as error:  # its host is gone, and torchrun ends this rank too
        log.warning("rank %d cannot hear of the others any more: %s", mesh.rank, error)
