"""Typed ZeroMQ sockets: the broker's ROUTER and a peer's DEALER.

Delivery is at least once: a peer that was cut off says Hello again and sends what was never
acknowledged, and the broker tells repeats by their ids. Both ends bound their queues and what one
message may weigh.

With keys (:mod:`common.keys`) connections are encrypted and authenticated by CURVE. A
:class:`_Doorman` lets in who is on the allow-list, and each message is held against the name of
the key that its connection was made with. Between machines there is no connection without keys.

:class:`BrokerLink` owns its DEALER in a thread of its own, so a peer keeps its heartbeat while
its main thread computes. Messages cross to the main thread through a queue.
"""

import contextlib
import logging
import queue
import re
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import zmq
from zmq.utils import z85

from common.codec import MAX_FRAMES, decode, encode
from common.errors import DataError, DeadlineError, ProtocolError, WireError
from common.keys import AllowList, ClientKeys, ServerKeys, fingerprint, require_keys
from common.wire import FROM_BROKER, TO_BROKER, Bye, Heartbeat, Hello, Pong, Refused, Welcome, WhoAreYou

HIGH_WATER_MARK = 1000  # messages a socket buffers; beyond it sends wait in the outbox
MAX_MESSAGE_BYTES = 1 << 30  # where broker.max_message_mb is not given
FRAME_OVERHEAD = 256  # bytes that encryption adds to a frame, and more
WAITING_MESSAGES = 10_000  # of one peer that does not read, beyond the socket's own; then it counts as gone
RECEIVE_MESSAGES = 64  # taken at once, so that answers and weights do not wait behind a flood
RECEIVE_BYTES = 16 << 20
LINGER_MS = 500  # how long a closing socket tries to deliver
POLL_S = 0.2
RECONNECT_MS = 100
SILENT_BROKER_S = 10.0  # without a sign of life the link says Hello again
ZERO_COPY_BYTES = 64 * 1024
ZAP_ADDRESS, ZAP_VERSION, ZAP_DOMAIN = "inproc://zeromq.zap.01", b"1.0", "croupier"
REPEAT_WORD_S = 60.0  # one log line in this time about one key
REPEAT_WORDS_KEPT = 1000  # keys remembered for that
HANDSHAKE_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)

log = logging.getLogger("sockets")


def _nbytes(frames: list[Any]) -> int:
    return sum(memoryview(f).nbytes for f in frames)


def _check_size(message: Any, frames: list[Any], limit: int) -> int:
    nbytes = _nbytes(frames)
    if nbytes > limit:
        raise WireError(
            f"{message.TAG} of {nbytes} bytes exceeds the {limit} that one message may have; raise "
            "broker.max_message_mb for every process"
        )
    return nbytes


def _receive(socket: zmq.Socket[bytes], max_frames: int, limit: int) -> tuple[list[zmq.Frame], str]:
    """One message's frames, or the first alone and what is wrong with the rest. Raises zmq.Again if none is there."""
    frames: list[zmq.Frame] = []
    count, nbytes, more = 0, 0, True
    while more:
        frame = socket.recv(flags=zmq.NOBLOCK, copy=False)
        more = frame.more
        count += 1
        nbytes += len(frame)
        if count <= max_frames and nbytes <= limit:
            frames.append(frame)
        else:
            del frames[1:]
    if count > max_frames:
        return frames, f"message of {count} frames exceeds {max_frames}"
    if nbytes > limit:
        return frames, f"message of {nbytes} bytes exceeds the {limit} of broker.max_message_mb"
    return frames, ""


class _Seldom:
    """Says whether something may be said again about a key; remembers a bounded number of them."""

    def __init__(self) -> None:
        self._said: dict[object, float] = {}

    def __call__(self, key: object) -> bool:
        now = time.monotonic()
        if now - self._said.get(key, -REPEAT_WORD_S) < REPEAT_WORD_S:
            return False
        if len(self._said) >= REPEAT_WORDS_KEPT:
            self._said = {k: at for k, at in self._said.items() if now - at < REPEAT_WORD_S}
        if len(self._said) >= REPEAT_WORDS_KEPT:
            return False
        self._said[key] = now
        return True


class _Doorman:
    """Answers libzmq's question, once a connection, whether a key is on the allow-list (ZAP, RFC 27), in a thread.

    The sockets that ask are told to refuse everybody should nobody answer (ZAP_ENFORCE_DOMAIN).
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], allowed: AllowList) -> None:
        self._context = context
        self._allowed = allowed
        self._may_say = _Seldom()
        self._socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(ZAP_ADDRESS)
        self._thread = threading.Thread(target=self._run, name="doorman", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; from now on nobody is let in."""
        with self._context.socket(zmq.REQ) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(ZAP_ADDRESS)
            socket.send(b"")
            self._thread.join()

    def _run(self) -> None:
        with self._socket:
            while len(frames := self._socket.recv_multipart()) > 1:
                self._socket.send_multipart([ZAP_VERSION, frames[1], *self._answer(frames), b""])

    def _answer(self, frames: list[bytes]) -> tuple[bytes, bytes, bytes]:
        """Status code, its text and the user id, which is the key as text."""
        if len(frames) != 7 or frames[0] != ZAP_VERSION or frames[5] != b"CURVE" or len(frames[6]) != 32:
            return b"400", b"only CURVE", b""
        public = z85.encode(frames[6])
        if self._allowed.name_of(public) is not None:
            return b"200", b"OK", public
        if self._may_say(public):
            log.warning(
                "refused the unknown key %s from %s; `python -m tools.keys allow DIR NAME FILE` lets it in",
                fingerprint(public), frames[3].decode(errors="replace"),
            )  # fmt: skip
        return b"400", b"unknown key", b""


def speaks_as(key_name: str, claimed: str) -> bool:
    """Whether the key ``key_name`` may carry the peer name ``claimed``: its own, or its own and a rank (``x.3``)."""
    return claimed == key_name or re.fullmatch(re.escape(key_name) + r"\.[0-9]+", claimed) is not None


@dataclass
class _Waiting:
    """What one peer has not taken yet."""

    messages: deque[list[Any]] = field(default_factory=deque)
    nbytes: int = 0


def _send(socket: zmq.Socket[bytes], frames: list[Any]) -> None:
    large = any(memoryview(f).nbytes >= ZERO_COPY_BYTES for f in frames)
    socket.send_multipart(frames, flags=zmq.NOBLOCK, copy=not large)


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
        self._may_say = _Seldom()
        self.impostors: Counter[str] = Counter()
        self._context = zmq.Context()
        self._doorman = _Doorman(self._context, self._allowed) if self._allowed is not None else None
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
        nbytes = _check_size(message, frames[1:], self._limit)
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
        waiting.nbytes += _nbytes(frames)

    def _try_send(self, identity: bytes, frames: list[Any]) -> bool:
        try:
            _send(self._socket, frames)
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

    def receive(self, timeout_s: float, is_muted: Callable[[bytes], bool] | None = None) -> list[tuple[bytes, Any]]:
        """What has arrived, up to a bound, waiting at most ``timeout_s`` for the first.

        Each item is the sender's identity with a message, or with the exception that its bytes
        caused (:class:`WireError`, :class:`DataError`). What a sender says of whom ``is_muted`` is
        true is dropped unread.
        """
        self._flush()
        received: list[tuple[bytes, Any]] = []
        if not self._socket.poll(int(timeout_s * 1000)):
            return received
        nbytes = 0
        for _ in range(RECEIVE_MESSAGES):
            try:
                frames, fault = _receive(self._socket, 1 + MAX_FRAMES, self._limit)
            except zmq.Again:
                break
            identity = bytes(frames[0].buffer)
            nbytes += sum(len(f) for f in frames)
            if is_muted is not None and is_muted(identity):
                continue
            found = self._decode(frames, fault)
            if self._is_genuine(identity, frames[0], found):
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
            return error

    def _is_genuine(self, identity: bytes, frame: zmq.Frame, message: Any) -> bool:
        """Whether identity and Hello carry the name of the key that the connection was made with."""
        if self._allowed is None:
            return True
        public = str(frame.get("User-Id")).encode()
        name = self._allowed.name_of(public)
        claims = {identity.partition(b"/")[0].decode(errors="replace")}
        if isinstance(message, Hello):
            claims.add(message.name)
        if name is not None and all(speaks_as(name, claimed) for claimed in claims):
            return True
        self.impostors[name or "revoked"] += 1
        if self._may_say(public):
            why = f"belongs to {name}" if name else "is no longer allowed"
            log.warning("dropped a message as %r: its key %s %s", sorted(claims)[0][:40], fingerprint(public), why)
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
        self._context.destroy(linger=linger_ms)


class BrokerLink:
    """A peer's connection to the broker: Hello, heartbeats, reconnection, typed messages.

    ``hello`` is sent at the start and whenever the broker does not know us; its ``version`` and
    ``run_id`` are kept current through :meth:`set_version` and the Welcome. Every Welcome is also
    handed to the owner, who then sends again what was never acknowledged.

    ``keys`` (:func:`common.keys.client_keys`) may only be left out where the address is local.
    """

    def __init__(
        self, address: str, hello: Hello, *, keys: ClientKeys | None = None, max_message_bytes: int | None = None
    ) -> None:
        require_keys(address, keys is not None)
        self.address = address
        self._keys = keys
        self._limit = max_message_bytes or MAX_MESSAGE_BYTES
        self._hint = ""  # why the last handshake failed
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
        _check_size(message, frames, self._limit)
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
        with self._lock:
            self._context.destroy(linger=LINGER_MS)

    def _run(self) -> None:
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
        monitor: zmq.Socket[bytes] = socket.get_monitor_socket(HANDSHAKE_EVENTS)
        socket.connect(self.address)
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
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
            if monitor in ready:
                self._note_handshakes(monitor)
            if socket in ready:
                heard = time.monotonic()
                self._take(socket)
            self._drain(socket)
            if self._closing.is_set() and not self._outbox:
                break
            if self._closing.is_set() and not self.welcomed:
                break
        socket.disable_monitor()
        monitor.close()
        socket.close(linger=LINGER_MS)

    def _note_handshakes(self, monitor: "zmq.Socket[bytes]") -> None:
        while monitor.poll(0):
            event, _ = struct.unpack("=Hi", monitor.recv_multipart()[0])
            hint = "" if event == zmq.EVENT_HANDSHAKE_SUCCEEDED else f"; {self._handshake_failure(event)}"
            if hint and hint != self._hint:
                self.log.warning("%s: %s", self.address, hint[2:])
            self._hint = hint

    def _handshake_failure(self, event: int) -> str:
        if self._keys is None:
            return "something answers there, and not as a broker without keys would: set broker.keys if it has them"
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return (
                f"the broker there refuses the key {fingerprint(self._keys.public)} of {self._keys.name}, which may "
                f"not be in its allow-list: on its machine `python -m tools.keys allow DIR {self._keys.name} FILE`"
            )
        return (
            "something answers there, and not as the owner of server.pub would: copy server.pub from the broker's "
            "machine again, and see that broker.keys is set there too"
        )

    def _take(self, socket: "zmq.Socket[bytes]") -> None:
        for _ in range(HIGH_WATER_MARK):
            try:
                frames, fault = _receive(socket, MAX_FRAMES, self._limit)
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
