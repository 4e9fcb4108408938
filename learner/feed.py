"""The learner's side of the feed: shards in, commits out; how every rank talks to the broker."""

import logging
import time
from collections.abc import Callable
from typing import Any

from common import wire
from common.errors import DeadlineError
from common.link import BrokerLink

POLL_S = 0.2
WORD_EVERY_S = 10.0
ASK_AGAIN_S = 3.0

log = logging.getLogger("learner.feed")


class Feed:
    """Fetches this rank's shards. Other messages (Resync, PublishDone) go to ``other``."""

    def __init__(self, link: BrokerLink, rank: int, world: int, wait_s: float, should_stop: Callable[[], bool]) -> None:
        self.link = link
        self._rank, self._world = rank, world
        self._wait_s = wait_s
        self._should_stop = should_stop
        self.stopped = False  # the broker said Stop

    def fetch(self, step: int, other: Callable[[Any], None]) -> wire.Shard | None:
        """The shard of ``step``; None if told to stop.

        Raises :class:`DeadlineError` with what the broker last said it waits for.
        """
        request = wire.Fetch(step, self._rank, self._world)
        self.link.send(request)
        began = asked = time.monotonic()
        detail, next_word = "the broker has said nothing", began + WORD_EVERY_S
        while not self._should_stop() and not self.stopped:
            match message := self.link.receive(POLL_S):
                case wire.Shard() if message.step == step:
                    return message
                case wire.Waiting():
                    detail, asked = f"the broker waits for {message.detail}", time.monotonic()
                case wire.Welcome():  # a broker that came back knows of no fetch
                    self.link.send(request)
                    asked = time.monotonic()
                case wire.Stop():
                    self.stopped = True
                case None:
                    pass
                case _:
                    other(message)
            now = time.monotonic()
            if now - asked > ASK_AGAIN_S:  # a broker that works says every second what it waits for
                self.link.send(request)
                asked = now
            if now > next_word:
                log.info("step %d: waiting since %.0f s; %s", step, now - began, detail)
                next_word = now + WORD_EVERY_S
            if now - began > self._wait_s:
                raise DeadlineError(f"no shard for step {step} within {self._wait_s:.0f} s (learner.wait_s): {detail}")
        return None

    def commit(self, step: int, metrics: dict[str, float]) -> None:
        """The step is trained."""
        self.link.send(wire.Commit(step, step + 1, metrics))

    def checkpointed(self, step: int) -> None:
        """Nothing up to ``step`` will be asked for again."""
        self.link.send(wire.Checkpointed(step))
