"""The broker's end of ZeroMQ: one typed ROUTER for every peer.

Delivery is at least once: a peer that was cut off says Hello again and sends what was never
acknowledged, and the broker tells repeats by their ids. Queues and messages are bounded.

With keys (:mod:`common.keys`) connections are encrypted and authenticated by CURVE. A
:class:`~common.curve.Doorman` lets in who is on the allow-list, and each message is held against
the name of the key that its connection was made with. Between machines there is no connection
without keys.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import zmq

from common.codec import MAX_FRAMES, decode, encode
from common.curve import ZAP_DOMAIN, Doorman, Seldom, speaks_as
from common.errors import DataError, ProtocolError, RevokedError, WireError
from common.frames import (
    FRAME_OVERHEAD,
    HIGH_WATER_MARK,
    LINGER_MS,
    MAX_MESSAGE_BYTES,
    check_size,
    count_bytes,
    receive_frames,
    send_frames,
)
from common.keys import AllowList, ServerKeys, fingerprint, require_keys
from common.waker import Waker
from common.wire import TO_BROKER, Hello

WAITING_MESSAGES = 10_000  # of one peer that does not read, beyond the socket's own; then it counts as gone
RECEIVE_MESSAGES = 64  # taken at once, so that answers and weights do not wait behind a flood
RECEIVE_BYTES = 16 << 20

REVOKED = (
    "its key is no longer allowed; `python -m tools.keys allow DIR NAME FILE` on the broker's machine lets it in, then "
    "start it again"
)

log = logging.getLogger("sockets")


def _key_of(frame: zmq.Frame) -> bytes:
    """The public key that the connection was made with."""
    return str(frame.get("User-Id")).encode()


@dataclass
class _Waiting:
    """What one peer has not taken yet."""

    messages: deque[list[Any]] = field(default_factory=deque)
    nbytes: int = 0


class RouterSocket:
    """The broker's end: one ROUTER for every peer.

    ``keys`` (:func:`common.keys.broker_keys`) may only be left out where the address is local.
    ``impostors`` counts messages dropped by the name of the key: sent under another's name, or by a
    key that has been revoked since it connected.
    """

    def __init__(self, address: str, *, keys: ServerKeys | None = None, max_message_bytes: int | None = None) -> None:
        require_keys(address, keys is not None)
        self._limit = max_message_bytes or MAX_MESSAGE_BYTES
        self._allowed = AllowList(keys.allowed) if keys else None
        self._may_say = Seldom()
        self.impostors: Counter[str] = Counter()
        self._context = zmq.Context()
        self._doorman = Doorman(self._context, self._allowed) if self._allowed is not None else None
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.SNDHWM, HIGH_WATER_MARK),
            (zmq.RCVHWM, HIGH_WATER_MARK),
            (zmq.MAXMSGSIZE, self._limit + FRAME_OVERHEAD),
            (zmq.LINGER, LINGER_MS),
        ):
            self._socket.setsockopt(option, value)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        if keys is not None:
            self._socket.curve_server = 1
            self._socket.curve_secretkey = keys.secret
            self._socket.zap_domain = ZAP_DOMAIN.encode()
            self._socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
            if not self._allowed:
                log.warning("%s allows nobody: `python -m tools.keys make DIR --client NAME`", keys.allowed)
        self._outbox: dict[bytes, _Waiting] = {}
        self._waker = Waker(self._context)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._waker.seen, zmq.POLLIN)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._stop(0)
            raise ProtocolError(
                f"cannot listen on broker.address={address}: {error}; another broker may be running, "
                "stop it or set broker.address to a free port"
            ) from error

    def send(self, identity: bytes, message: Any) -> bool:
        """Queue ``message`` for a peer; False if the peer is not connected any more, or has long stopped reading."""
        frames = [identity, *encode(message)]
        nbytes = check_size(message, frames[1:], self._limit)
        waiting = self._outbox.get(identity)
        if waiting is None:
            return self._try_send(identity, frames)
        if len(waiting.messages) >= WAITING_MESSAGES or waiting.nbytes + nbytes > 2 * self._limit:
            log.warning("%r reads nothing: %d messages for it are dropped", identity[:40], len(waiting.messages))
            self.forget(identity)
            return False
        self._wait(identity, frames)
        return True

    def _wait(self, identity: bytes, frames: list[Any]) -> None:
        waiting = self._outbox.setdefault(identity, _Waiting())
        waiting.messages.append(frames)
        waiting.nbytes += count_bytes(frames)

    def _try_send(self, identity: bytes, frames: list[Any]) -> bool:
        try:
            send_frames(self._socket, frames)
        except zmq.Again:
            self._wait(identity, frames)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._outbox.pop(identity, None)
            return False
        return True

    def forget(self, identity: bytes) -> None:
        """Drop what waits for a peer that is gone."""
        self._outbox.pop(identity, None)

    def wait(self, timeout_s: float) -> bool:
        """Whether something has arrived within ``timeout_s``, or before :meth:`wake`; sends first what had to wait."""
        self._flush()
        ready = dict(self._poller.poll(int(timeout_s * 1000)))
        if self._waker.seen in ready:
            self._waker.clear()
        return self._socket in ready

    def wake(self) -> None:
        """End a :meth:`wait`, the present one or the next. Of any thread."""
        self._waker.wake()

    def receive(self, timeout_s: float, is_muted: Callable[[bytes], bool] | None = None) -> list[tuple[bytes, Any]]:
        """What has arrived, up to a bound, waiting at most ``timeout_s`` for the first.

        Each item is the sender's identity with a message, or with the exception that its bytes
        caused (:class:`WireError`, :class:`DataError`); where its key is no longer allowed, with a
        :class:`RevokedError` instead of what it said. What a sender says of whom ``is_muted`` is
        true is dropped unread.
        """
        received: list[tuple[bytes, Any]] = []
        if not self.wait(timeout_s):
            return received
        nbytes = 0
        for _ in range(RECEIVE_MESSAGES):
            try:
                frames, fault = receive_frames(self._socket, 1 + MAX_FRAMES, self._limit)
            except zmq.Again:
                break
            identity = bytes(frames[0].buffer)
            nbytes += sum(len(f) for f in frames)
            if is_muted is not None and is_muted(identity):
                continue
            found = self._decode(frames, fault)
            if self._is_revoked(frames[0]):
                received.append((identity, RevokedError(REVOKED)))
            elif self._is_genuine(identity, frames[0], found):
                received.append((identity, found))
            if nbytes >= RECEIVE_BYTES:
                break
        return received

    def _decode(self, frames: list[zmq.Frame], fault: str) -> Any:
        if fault:
            return WireError(fault)
        try:
            return decode([f.buffer for f in frames[1:]], TO_BROKER)
        except (WireError, DataError) as error:
            return type(error)(str(error))  # its causes and their tracebacks would keep the message

    def _is_revoked(self, frame: zmq.Frame) -> bool:
        if self._allowed is None or self._allowed.name_of(_key_of(frame)) is not None:
            return False
        self.impostors["revoked"] += 1
        return True

    def _is_genuine(self, identity: bytes, frame: zmq.Frame, message: Any) -> bool:
        """Whether identity and Hello carry the name of the key that the connection was made with."""
        if self._allowed is None:
            return True
        public = _key_of(frame)
        name = self._allowed.name_of(public)
        claims = {identity.partition(b"/")[0].decode(errors="replace")}
        if isinstance(message, Hello):
            claims.add(message.name)
        if name is not None and all(speaks_as(name, claimed) for claimed in claims):
            return True
        self.impostors[str(name)] += 1
        if self._may_say(public):
            words = "dropped a message as %r: its key %s belongs to %s"
            log.warning(words, sorted(claims)[0][:40], fingerprint(public), name)
        return False

    def _flush(self) -> None:
        for identity in list(self._outbox):
            waiting = self._outbox.pop(identity).messages
            while waiting:
                if not self._try_send(identity, waiting.popleft()):
                    break
                if identity in self._outbox:  # full again: keep the order
                    for frames in waiting:
                        self._wait(identity, frames)
                    break

    def close(self) -> None:
        """Close, delivering what is queued for at most LINGER_MS."""
        self._stop(LINGER_MS)

    def _stop(self, linger_ms: int) -> None:
        if self._doorman is not None:
            self._doorman.close()
            self._doorman = None
        self._waker.close()
        self._context.destroy(linger=linger_ms)
