"""Who receives weights: the handshake and the collective as :mod:`common.weights` keeps them.

::

    Prepare -> (between two steps, or two batches) Ready ... Go -> (again) in the collective
            -> arrived, by a thread beside -> taken into use between two steps -> Applied
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from tools.simulate.world import World

if TYPE_CHECKING:
    from tools.simulate.publish import Publish

IDLE_LOOK_S = 0.005  # half of actor.service.IDLE_WAIT_S: an idle process notices weights that its thread has staged


class Receiver:
    """A process's thread for weights. ``busy`` says whether the owner looks by itself soon."""

    def __init__(self, world: World, wake: Callable[[], None], is_idle: Callable[[], bool]) -> None:
        self._world, self._wake, self._is_idle = world, wake, is_idle
        self._mail: list[tuple[str, Publish]] = []
        self.staged: list[Publish] = []

    def prepare(self, publish: "Publish") -> None:
        """The broker's Prepare has come."""
        self._mail.append(("prepare", publish))
        self._wake()

    def go(self, publish: "Publish") -> None:
        """The broker's Go has come."""
        self._mail.append(("go", publish))
        self._wake()

    def between(self) -> None:
        """The owner looks at what has come."""
        if not self._mail:
            return
        mail, self._mail = self._mail, []
        for what, publish in mail:
            if what == "prepare":
                publish.ready(self)
            else:
                publish.enter(self)

    def begin(self, publish: "Publish") -> None:
        """Everybody is in the collective: receive in the background."""
        self._world.cores.start(self._world.setup.weights.receive_s, publish.received, self)

    def arrived(self, publish: "Publish") -> None:
        """The version is whole, with its digest."""
        self.staged.append(publish)
        if self._is_idle():
            self._world.clock.after(IDLE_LOOK_S, self._wake)
        else:
            self._wake()
