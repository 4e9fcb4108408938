"""Typed ZeroMQ sockets: the broker's ROUTER and a peer's DEALER.

Delivery is at least once: a peer that was cut off says Hello again and sends what was never
acknowledged, and the broker tells repeats by their ids. Both ends bound their queues.

:class:`BrokerLink` owns its DEALER in a thread of its own, so a peer keeps its heartbeat while
its main thread computes. Messages cross to the main thread through a queue.
"""

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from typing import Any

import zmq

from common.codec import decode, encode
from common.errors import DataError, DeadlineError, ProtocolError, WireError
from common.wire import FROM_BROKER, TO_BROKER, Bye, Heartbeat, Hello, Pong, Refused, Welcome, WhoAreYou

HIGH_WATER_MARK = 1000  # messages a socket buffers; beyond it sends wait in the outbox
MAX_MESSAGE_BYTES = 1 << 30
RECEIVE_MESSAGES = 64  # taken at once, so that answers and weights do not wait behind a flood
RECEIVE_BYTES = 16 << 20
LINGER_MS = 500  # how long a closing socket tries to deliver
POLL_S = 0.2
RECONNECT_MS = 100
SILENT_BROKER_S = 10.0  # without a sign of life the link says Hello again
ZERO_COPY_BYTES = 64 * 1024


def _send(socket: zmq.Socket[bytes], frames: list[Any]) -> None:
    large = any(memoryview(f).nbytes >= ZERO_COPY_BYTES for f in frames)
    socket.send_multipart(frames, flags=zmq.NOBLOCK, copy=not large)


class RouterSocket:
    """The broker's end: one ROUTER for every peer."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.SNDHWM, HIGH_WATER_MARK),
            (zmq.RCVHWM, HIGH_WATER_MARK),
            (zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES),
            (zmq.LINGER, LINGER_MS),
        ):
            self._socket.setsockopt(option, value)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._outbox: dict[bytes, deque[list[Any]]] = {}
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ProtocolError(
                f"cannot listen on broker.address={address}: {error}; another broker may be running, "
                "stop it or set broker.address to a free port"
            ) from error

    def send(self, identity: bytes, message: Any) -> bool:
        """Queue ``message`` for a peer; False if the peer is not connected any more."""
        waiting = self._outbox.get(identity)
        frames = [identity, *encode(message)]
        if waiting:
            waiting.append(frames)
            return True
        return self._try_send(identity, frames)

    def _try_send(self, identity: bytes, frames: list[Any]) -> bool:
        try:
            _send(self._socket, frames)
        except zmq.Again:
            self._outbox.setdefault(identity, deque()).append(frames)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._outbox.pop(identity, None)
            return False
        return True

    def forget(self, identity: bytes) -> None:
        """Drop what waits for a peer that is gone."""
        self._outbox.pop(identity, None)

    def receive(self, timeout_s: float) -> list[tuple[bytes, Any]]:
        """What has arrived, up to a bound, waiting at most ``timeout_s`` for the first.

        Each item is the sender's identity with a message, or with the exception that its bytes
        caused (:class:`WireError`, :class:`DataError`).
        """
        self._flush()
        received: list[tuple[bytes, Any]] = []
        if not self._socket.poll(int(timeout_s * 1000)):
            return received
        nbytes = 0
        while len(received) < RECEIVE_MESSAGES and nbytes < RECEIVE_BYTES:
            try:
                frames = self._socket.recv_multipart(flags=zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            identity = bytes(frames[0].buffer)
            nbytes += sum(len(f) for f in frames)
            try:
                received.append((identity, decode([f.buffer for f in frames[1:]], TO_BROKER)))
            except (WireError, DataError) as error:
                received.append((identity, error))
        return received

    def _flush(self) -> None:
        for identity in [i for i, waiting in self._outbox.items() if waiting]:
            waiting = self._outbox.pop(identity)
            while waiting:
                frames = waiting.popleft()
                if not self._try_send(identity, frames):
                    break
                if identity in self._outbox:  # full again: keep the order
                    self._outbox[identity].extend(waiting)
                    break

    def close(self) -> None:
        """Close, delivering what is queued for at most LINGER_MS."""
        self._context.destroy(linger=LINGER_MS)


class BrokerLink:
    """A peer's connection to the broker: Hello, heartbeats, reconnection, typed messages.

    ``hello`` is sent at the start and whenever the broker does not know us; its ``version`` and
    ``run_id`` are kept current through :meth:`set_version` and the Welcome. Every Welcome is also
    handed to the owner, who then sends again what was never acknowledged.
    """

    def __init__(self, address: str, hello: Hello) -> None:
        self.address = address
        self.log = logging.getLogger(f"{hello.role}.link")
        self.counters: dict[str, float] = {}
        self._hello = hello
        self._inbox: queue.Queue[Any] = queue.Queue()
        self._outbox: deque[list[Any]] = deque()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._welcomed = threading.Event()
        self._heartbeat_s = 1.0
        self._context = zmq.Context()
        self._wake_receive: zmq.Socket[bytes] = self._context.socket(zmq.PAIR)
        self._wake_send: zmq.Socket[bytes] = self._context.socket(zmq.PAIR)
        self._wake_receive.bind("inproc://wake")
        self._wake_send.connect("inproc://wake")
        self._thread = threading.Thread(target=self._run, name="broker-link", daemon=True)
        self._thread.start()

    @property
    def welcomed(self) -> bool:
        """Whether the broker knows us at present."""
        return self._welcomed.is_set()

    @property
    def run_id(self) -> str:
        """The run that the broker told us of; empty before the first Welcome."""
        return self._hello.run_id

    def set_version(self, version: int) -> None:
        """The weights that this peer now holds."""
        self._hello.version = version

    def send(self, message: Any) -> None:
        """Queue a message; arrays must not be changed afterwards."""
        frames = encode(message)
        with self._lock:
            self._outbox.append(frames)
            if not self._wake_send.closed:
                with contextlib.suppress(zmq.Again):  # the thread has plenty of wake-ups waiting already
                    self._wake_send.send(b"", flags=zmq.NOBLOCK)

    def receive(self, timeout_s: float = 0.0) -> Any | None:
        """The next message, or None after ``timeout_s``. Raises what the broker refused us for."""
        try:
            message = self._inbox.get(block=timeout_s > 0, timeout=timeout_s or None)
        except queue.Empty:
            return None
        if isinstance(message, Refused):
            raise ProtocolError(f"the broker at {self.address} refused this {self._hello.role}: {message.reason}")
        if isinstance(message, Exception):
            raise message
        return message

    def wait_welcome(self, wait_s: float, should_stop: Any = lambda: False) -> Welcome | None:
        """Wait for the first Welcome; None if asked to stop. Says once a few seconds what it waits for."""
        deadline = time.monotonic() + wait_s
        next_word = time.monotonic() + 2.0
        while time.monotonic() < deadline:
            if should_stop():
                return None
            message = self.receive(POLL_S)
            if isinstance(message, Welcome):
                return message
            if time.monotonic() > next_word:
                self.log.info("waiting for a broker at %s", self.address)
                next_word = time.monotonic() + 5.0
        raise DeadlineError(
            f"no broker answered at broker.address={self.address} within {wait_s:.0f} s; "
            "start one with `python -m broker RUN.yaml` or correct the address"
        )

    def close(self, reason: str | None = "") -> None:
        """Say Bye with ``reason`` (nothing at all for None) and end the thread."""
        if self._closing.is_set():
            return
        if self.welcomed and reason is not None:
            self.send(Bye(reason))
        self._closing.set()
        self._thread.join(timeout=2.0)
        with self._lock:
            self._context.destroy(linger=LINGER_MS)

    def _run(self) -> None:
        socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.SNDHWM, HIGH_WATER_MARK),
            (zmq.RCVHWM, HIGH_WATER_MARK),
            (zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES),
            (zmq.LINGER, LINGER_MS),
            (zmq.RECONNECT_IVL, RECONNECT_MS),
            (zmq.RECONNECT_IVL_MAX, 10 * RECONNECT_MS),
        ):
            socket.setsockopt(option, value)
        socket.setsockopt(zmq.IDENTITY, f"{self._hello.name}/{self._hello.session}/{self._hello.rank}".encode())
        socket.connect(self.address)
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._wake_receive, zmq.POLLIN)
        next_beat, heard = 0.0, time.monotonic()
        while True:
            now = time.monotonic()
            if now >= next_beat:
                if now - heard > SILENT_BROKER_S:
                    self._welcomed.clear()
                beat = Heartbeat(self._hello.version, dict(self.counters)) if self.welcomed else self._hello
                self._push(socket, encode(beat))
                next_beat = now + self._heartbeat_s
            ready = dict(poller.poll(int(POLL_S * 1000)))
            if self._wake_receive in ready:
                while self._wake_receive.poll(0):
                    self._wake_receive.recv()
            if socket in ready:
                heard = time.monotonic()
                self._take(socket)
            self._drain(socket)
            if self._closing.is_set() and not self._outbox:
                break
            if self._closing.is_set() and not self.welcomed:
                break
        socket.close(linger=LINGER_MS)

    def _take(self, socket: "zmq.Socket[bytes]") -> None:
        for _ in range(HIGH_WATER_MARK):
            try:
                frames = socket.recv_multipart(flags=zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                message = decode([f.buffer for f in frames], FROM_BROKER)
            except (WireError, DataError) as error:
                self.log.warning("ignored a message from the broker: %s", error)
                continue
            if isinstance(message, WhoAreYou):
                self._welcomed.clear()
                self._push(socket, encode(self._hello))
            elif isinstance(message, Welcome):
                self._hello.run_id = message.run_id
                self._heartbeat_s = message.heartbeat_s
                self._welcomed.set()
                self._inbox.put(message)
            elif not isinstance(message, Pong):
                self._inbox.put(message)

    def _drain(self, socket: "zmq.Socket[bytes]") -> None:
        while self._outbox and (self.welcomed or self._closing.is_set()):
            if not self._push(socket, self._outbox[0]):
                return
            self._outbox.popleft()

    def _push(self, socket: "zmq.Socket[bytes]", frames: list[Any]) -> bool:
        try:
            _send(socket, frames)
        except zmq.Again:
            return False
        return True
