"""A peer's end of ZeroMQ: a typed DEALER in a thread of its own.

The thread keeps the heartbeat while the owner's main thread computes; messages cross to the main
thread through a queue.
"""

import contextlib
import logging
import math
import queue
import re
import struct
import sys
import threading
import time
from collections import deque
from typing import Any

import zmq

from common.codec import MAX_FRAMES, decode, encode
from common.config import BrokerSection
from common.errors import ConfigError, DataError, DeadlineError, ProtocolError, WireError
from common.frames import (
    FRAME_OVERHEAD,
    HIGH_WATER_MARK,
    LINGER_MS,
    MAX_MESSAGE_BYTES,
    check_size,
    receive_frames,
    send_frames,
)
from common.keys import ClientKeys, client_keys, fingerprint, require_keys
from common.trace import Tracer, silent
from common.waker import Waker
from common.wire import FAILED, FROM_BROKER, MAX_TEXT, Bye, Heartbeat, Hello, Pong, Refused, Welcome, WhoAreYou

EVERYWHERE = "tcp://*:"  # where a broker listens on all of its machine's addresses
POLL_S = 0.2
RECONNECT_MS = 100
SILENT_BROKER_S = 10.0  # without a sign of life the link says Hello again
REFUSED_S = 2.0  # from an end that libzmq does not come back from: the broker's owner may have let the key in
ZAP_FAILED = 500  # what a refused handshake tells of a broker that could not look (RFC 27)
HANDSHAKE_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
CONNECTION_EVENTS = zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED


class BrokerLink:
    """A peer's connection to the broker: Hello, heartbeats, reconnection, typed messages.

    ``hello`` is sent at the start, on every new connection and whenever the broker does not know us;
    its ``version`` and ``run_id`` are kept current through :meth:`set_version` and the Welcome. Every
    Welcome that ends a time without one is also handed to the owner, who then sends again what was never
    acknowledged.

    ``keys`` (:func:`common.keys.client_keys`) may only be left out where the address is local.
    """

    def __init__(
        self,
        address: str,
        hello: Hello,
        *,
        keys: ClientKeys | None = None,
        max_message_bytes: int | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        require_keys(address, keys is not None)
        if address.startswith(EVERYWHERE):
            raise ConfigError(f"broker.address={address!r}: is the broker's alone; give its peers tcp://HOST:PORT")
        self.address = address
        self._keys = keys
        self._limit = max_message_bytes or MAX_MESSAGE_BYTES
        self._hint = ""  # why the last handshake failed
        self._shaken = False  # whether the connection's handshake has ended, either way
        self._connect_due = math.inf  # after a connection's end that libzmq takes for the last
        self._silent_s = 0.0  # since the broker was heard, as the thread lived it: a stopped process does not count it
        self._patience_s = math.inf  # for a broker that was there before
        self.log = logging.getLogger(f"{hello.role}.link")
        self.counters: dict[str, float] = {}
        self.tracer = tracer or silent(hello.name, hello.role)
        self._hello = hello
        self._inbox: queue.Queue[Any] = queue.Queue()
        self._outbox: deque[list[Any]] = deque()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._welcomed = threading.Event()
        self._heartbeat_s = 1.0
        self._hello_due, self._hello_again_s = 0.0, self._heartbeat_s  # while there is no Welcome
        self._context = zmq.Context()
        self._waker = Waker(self._context)
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

    @property
    def version(self) -> int:
        """The weights that this peer holds, as it last said."""
        return self._hello.version

    def set_version(self, version: int) -> None:
        """The weights that this peer now holds."""
        self._hello.version = version

    def send(self, message: Any) -> None:
        """Queue a message; arrays must not be changed afterwards."""
        frames = encode(message)
        check_size(message, frames, self._limit)
        with self._lock:
            self._outbox.append(frames)
        self._waker.wake()

    def receive(self, timeout_s: float = 0.0) -> Any | None:
        """The next message, or None after ``timeout_s``. Raises what the broker refused us for."""
        try:
            message = self._inbox.get(block=timeout_s > 0, timeout=timeout_s or None)
        except queue.Empty:
            if self._silent_s > self._patience_s:
                raise DeadlineError(
                    f"the broker at {self.address} has been silent for {self._silent_s:.0f} s "
                    f"({self._hello.role}.wait_s={self._patience_s:g}); start it again and then this process"
                ) from None
            return None
        if isinstance(message, Refused):
            raise ProtocolError(f"the broker at {self.address} refused this {self._hello.role}: {message.reason}")
        if isinstance(message, Exception):
            raise message
        return message

    def wait_welcome(self, wait_s: float, should_stop: Any = lambda: False) -> Welcome | None:
        """Wait for the first Welcome; None if asked to stop. Says once a few seconds what it waits for.

        Later, a broker that is silent for ``wait_s`` is a :class:`DeadlineError` of :meth:`receive`.
        """
        deadline = time.monotonic() + wait_s
        next_word = time.monotonic() + 2.0
        while time.monotonic() < deadline:
            if should_stop():
                return None
            message = self.receive(POLL_S)
            if isinstance(message, Welcome):
                self._patience_s = wait_s
                return message
            if time.monotonic() > next_word:
                self.log.info("waiting for a broker at %s", self.address)
                next_word = time.monotonic() + 5.0
        raise DeadlineError(
            f"no broker answered at broker.address={self.address} within {wait_s:.0f} s; "
            "start one with `python -m broker RUN.yaml` or correct the address" + self._hint
        )

    def close(self, reason: str | None = "") -> None:
        """Say Bye with ``reason`` (nothing at all for None) and end the thread."""
        if self._closing.is_set():
            return
        if self.welcomed and reason is not None:
            self.send(Bye(reason))
        self._closing.set()
        self._thread.join(timeout=2.0)
        self._waker.close()
        self._context.destroy(linger=LINGER_MS)

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:  # whatever it is, the owner must hear of it
            self.log.exception("the link to the broker at %s has failed", self.address)
            self._inbox.put(error)

    def _open(self) -> "zmq.Socket[bytes]":
        socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.SNDHWM, HIGH_WATER_MARK),
            (zmq.RCVHWM, HIGH_WATER_MARK),
            (zmq.MAXMSGSIZE, self._limit + FRAME_OVERHEAD),
            (zmq.LINGER, LINGER_MS),
            (zmq.RECONNECT_IVL, RECONNECT_MS),
            (zmq.RECONNECT_IVL_MAX, 10 * RECONNECT_MS),
        ):
            socket.setsockopt(option, value)
        socket.setsockopt(zmq.IDENTITY, f"{self._hello.name}/{self._hello.session}/{self._hello.rank}".encode())
        if self._keys is not None:
            socket.curve_publickey = self._keys.public
            socket.curve_secretkey = self._keys.secret
            socket.curve_serverkey = self._keys.server
        return socket

    def _serve(self) -> None:
        socket = self._open()
        monitor: zmq.Socket[bytes] = socket.get_monitor_socket(HANDSHAKE_EVENTS | CONNECTION_EVENTS)
        socket.connect(self.address)
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        poller.register(self._waker.seen, zmq.POLLIN)
        next_beat, turn, next_word = 0.0, time.monotonic(), SILENT_BROKER_S
        while True:
            now = time.monotonic()
            self._silent_s, turn = self._silent_s + min(now - turn, 1.0), now
            if self._silent_s > next_word and self._patience_s < math.inf:
                self.log.info("the broker at %s has been silent for %.0f s", self.address, self._silent_s)
                next_word = self._silent_s + SILENT_BROKER_S
            if now >= next_beat:
                if self._silent_s > SILENT_BROKER_S:
                    self._welcomed.clear()
                if self.welcomed:
                    self._push(socket, encode(self._heartbeat()))
                elif now >= self._hello_due:
                    self._say_hello(socket)
                next_beat = now + self._heartbeat_s
            if now >= self._connect_due:
                self._connect_again(socket)
            ready = dict(poller.poll(int(POLL_S * 1000)))
            if self._waker.seen in ready:
                self._waker.clear()
            if monitor in ready and self._note_handshakes(monitor):  # what another connection carried may be lost
                self._hello_due, self._hello_again_s = now + self._heartbeat_s, self._heartbeat_s
                if self.welcomed:
                    self._welcomed.clear()
                    next_beat = self._hello_due = 0.0
            if socket in ready:
                self._silent_s, next_word = 0.0, SILENT_BROKER_S
                known = self.welcomed
                self._take(socket)
                if self.welcomed and not known:
                    next_beat = 0.0  # the sooner the clocks are compared
            self._drain(socket)
            if self._closing.is_set() and not self._outbox:
                break
            if self._closing.is_set() and not self.welcomed:
                break
        socket.disable_monitor()
        monitor.close()
        socket.close(linger=LINGER_MS)

    def _heartbeat(self) -> Heartbeat:
        counters = {name: float(value) for name, value in dict(self.counters).items()}
        return Heartbeat(self._hello.version, counters, self.tracer.seconds(), time.monotonic_ns())

    def _say_hello(self, socket: "zmq.Socket[bytes]") -> None:
        """And not again before it had time to be answered: a broker that comes back finds every one and answers it."""
        self._push(socket, encode(self._hello))
        self._hello_due = time.monotonic() + self._hello_again_s
        self._hello_again_s = min(2 * self._hello_again_s, SILENT_BROKER_S)

    def _connect_again(self, socket: "zmq.Socket[bytes]") -> None:
        self._connect_due = math.inf
        with contextlib.suppress(zmq.ZMQError):  # it may have forgotten the address with the connection
            socket.disconnect(self.address)
        socket.connect(self.address)

    def _note_handshakes(self, monitor: "zmq.Socket[bytes]") -> bool:
        """Whether a connection was made.

        One that ended is made again by libzmq, which then says so, or else later by us: a handshake that was
        refused, and an answer that is none, it takes for final.
        """
        made = False
        while monitor.poll(0):
            event, detail = struct.unpack("=Hi", monitor.recv_multipart()[0])
            if event in (zmq.EVENT_CONNECTED, zmq.EVENT_CONNECT_RETRIED):
                self._shaken, self._connect_due = False, math.inf
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                made, self._shaken, self._connect_due = True, True, math.inf
                self._hint = ""
            else:
                self._connect_due = time.monotonic() + REFUSED_S
                if event & HANDSHAKE_EVENTS or not self._shaken:
                    self._note_failure(event, detail)
                self._shaken = True
        return made

    def _note_failure(self, event: int, detail: int) -> None:
        hint = f"; {self._handshake_failure(event, detail)}"
        if hint != self._hint:
            self.log.warning("%s: %s", self.address, hint[2:])
        self._hint = hint

    def _handshake_failure(self, event: int, detail: int) -> str:
        if self._keys is None:
            return (
                "something answers there, and not as a broker without keys would: set broker.keys if it has them (or "
                "that broker is going down, or it is none)"
            )
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and detail >= ZAP_FAILED:
            return "the broker there could not read its allow-list, which its log tells more of; it is asked again"
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return (
                f"the broker there refuses the key {fingerprint(self._keys.public)} of {self._keys.name}, which may "
                f"not be in its allow-list: on its machine `python -m tools.keys allow DIR {self._keys.name} FILE`"
            )
        return (
            "the handshake was broken off there: that broker is going down, has no keys (broker.keys), is not the "
            "owner of server.pub, which is then to be copied from its machine again, or is no broker"
        )

    def _take(self, socket: "zmq.Socket[bytes]") -> None:
        for _ in range(HIGH_WATER_MARK):
            try:
                frames, fault = receive_frames(socket, MAX_FRAMES, self._limit)
            except zmq.Again:
                return
            if fault:
                self.log.warning("ignored a message from the broker: %s", fault)
                continue
            try:
                message = decode([f.buffer for f in frames], FROM_BROKER)
            except (WireError, DataError) as error:
                self.log.warning("ignored a message from the broker: %s", error)
                continue
            if isinstance(message, WhoAreYou):
                if self.welcomed:  # else a Hello is on its way, behind what this answers
                    self._welcomed.clear()
                    self._say_hello(socket)
            elif isinstance(message, Welcome):
                self._hello.run_id = message.run_id
                self._heartbeat_s = self._hello_again_s = message.heartbeat_s
                if not self.welcomed:  # not one more Hello's: everything unacknowledged would be sent again
                    self._welcomed.set()
                    self._inbox.put(message)
            elif isinstance(message, Pong):
                back = time.monotonic_ns()
                self.tracer.offset.observe(message.echo_ns, message.received_ns, message.sent_ns, back)
            else:
                self._inbox.put(message)

    def _drain(self, socket: "zmq.Socket[bytes]") -> None:
        while self._outbox and (self.welcomed or self._closing.is_set()):
            if not self._push(socket, self._outbox[0]):
                return
            self._outbox.popleft()

    def _push(self, socket: "zmq.Socket[bytes]", frames: list[Any]) -> bool:
        try:
            send_frames(socket, frames)
        except zmq.Again:
            return False
        return True


def parting(orderly: str) -> str:
    """What a Bye says at a process's end, in a ``finally``: ``orderly``, or what ended it."""
    error = sys.exception()
    return orderly if error is None else f"{FAILED} {type(error).__name__}: {error}"[:MAX_TEXT]


def connect(section: BrokerSection, hello: Hello, tracer: Tracer | None = None) -> BrokerLink:
    """A peer's link as ``section`` configures it; its key is named as the peer is, without a rank."""
    keys = client_keys(section, re.sub(r"\.[0-9]+$", "", hello.name))
    return BrokerLink(section.address, hello, keys=keys, max_message_bytes=section.max_message_bytes, tracer=tracer)
