"""One version on its way from the learner to everybody: the broker's coordinator and the collective.

::

    offered -> Prepare to all -> all Ready -> Go to all -> all in the collective -> the learner is done
            -> each receiver: arrived, in use, Applied -> all Applied: settled, the version counts as published
"""

from collections.abc import Callable
from typing import Protocol

from tools.simulate.receiver import Receiver
from tools.simulate.world import World


class Post(Protocol):
    """The broker's door."""

    def post(self, cost: float, action: Callable[..., None], *arguments: object) -> None:
        """A message leaves for the broker; handled there it costs ``cost`` and does ``action``."""

    def answer(self, action: Callable[..., None], *arguments: object) -> None:
        """The broker sends what it decided, once that is on disk."""


class Publish:
    """One attempt, which never fails."""

    def __init__(
        self,
        world: World,
        broker: Post,
        version: int,
        receivers: list[Receiver],
        joined: Callable[[], None],
        sent: Callable[[], None],
        settled: Callable[["Publish"], None],
    ) -> None:
        """``joined``: everybody is in the collective; ``sent``: the learner is done; ``settled``: all use it."""
        self.version = version
        self._world, self._broker, self._receivers = world, broker, receivers
        self._joined, self._sent, self._settled = joined, sent, settled
        self._outside = len(receivers) + 1  # of the collective, the learner included
        self._not_ready, self._not_applied = len(receivers), len(receivers)
        self._learner_done, self._published = False, False
        self._waiting: list[Receiver] = []  # have everything but the digest

    def start(self) -> None:
        """The broker asks everybody; with nobody to ask it is settled."""
        if not self._receivers:
            self._published = True
            self._broker.answer(self._sent)
            self._settled(self)
            return
        for receiver in self._receivers:
            self._broker.answer(receiver.prepare, self)

    def ready(self, receiver: Receiver) -> None:
        """``receiver`` says so."""
        self._broker.post(self._world.setup.broker.message_s, self._on_ready)

    def _on_ready(self) -> None:
        self._not_ready -= 1
        if self._not_ready:
            return
        for receiver in self._receivers:
            self._broker.answer(receiver.go, self)  # the journal notes that it is being sent
        self._broker.answer(self._enter)

    def enter(self, receiver: Receiver) -> None:
        """``receiver`` is in the collective."""
        self._enter()

    def _enter(self) -> None:
        self._outside -= 1
        if not self._outside:
            self._world.clock.after(self._world.setup.weights.wire_s, self._transfer)

    def _transfer(self) -> None:
        world, part = self._world, self._world.setup.weights
        self._joined()
        cost = part.send_s + part.receiver_s * len(self._receivers)
        world.cores.start(cost, self._learner_sent)
        for receiver in self._receivers:
            receiver.begin(self)

    def _learner_sent(self) -> None:
        self._learner_done = True
        self._broker.post(self._world.setup.broker.message_s, self._on_published)
        self._sent()
        for receiver in self._waiting:
            receiver.arrived(self)
        self._waiting.clear()

    def received(self, receiver: Receiver) -> None:
        """``receiver`` has every byte; what it lacks is the learner's digest."""
        if self._learner_done:
            receiver.arrived(self)
        else:
            self._waiting.append(receiver)

    def _on_published(self) -> None:
        self._published = True
        self._settle()

    def applied(self) -> None:
        """One more uses the version."""
        self._broker.post(self._world.setup.broker.message_s, self._on_applied)

    def _on_applied(self) -> None:
        self._not_applied -= 1
        self._settle()

    def _settle(self) -> None:
        if self._published and not self._not_applied:
            self._settled(self)
