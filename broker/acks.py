"""Acknowledgements of one look at the socket: what came from one sender is answered at once."""

from collections.abc import Callable

import numpy as np

from common.wire import Ack

TOGETHER = 16  # messages: so few that a sender who may have some unacknowledged is not kept waiting


class Acks:
    """Answers that wait to be sent, by the identity of who is to have them."""

    def __init__(self, send: Callable[[bytes, Ack], None]) -> None:
        self._send = send
        self._waiting: dict[bytes, list[Ack]] = {}

    def add(self, identity: bytes, ack: Ack) -> None:
        """Say ``ack`` with the next :meth:`flush`, or before it with the others of TOGETHER messages."""
        waiting = self._waiting.setdefault(identity, [])
        waiting.append(ack)
        if len(waiting) == TOGETHER:
            self._send(identity, joined(self._waiting.pop(identity)))

    def flush(self) -> None:
        """Send what waits."""
        for identity, waiting in self._waiting.items():
            self._send(identity, joined(waiting))
        self._waiting.clear()


def joined(acks: list[Ack]) -> Ack:
    """One of several."""
    if len(acks) == 1:
        return acks[0]
    return Ack(
        [reason for ack in acks for reason in ack.reasons],
        np.concatenate([ack.groups for ack in acks]),
        np.concatenate([ack.siblings for ack in acks]),
    )
