"""Who may connect: CURVE's question to the broker for each new connection, and what a key may call itself."""

import logging
import re
import threading
import time

import zmq
from zmq.utils import z85

from common.keys import AllowList, fingerprint

ZAP_ADDRESS, ZAP_VERSION, ZAP_DOMAIN = "inproc://zeromq.zap.01", b"1.0", "croupier"
REPEAT_WORD_S = 60.0  # one log line in this time about one key
REPEAT_WORDS_KEPT = 1000  # keys remembered for that

log = logging.getLogger("sockets")


class Seldom:
    """Says whether something may be said again about a key; remembers a bounded number of them."""

    def __init__(self) -> None:
        self._said: dict[object, float] = {}

    def __call__(self, key: object) -> bool:
        """Whether enough time has passed; a yes is remembered."""
        now = time.monotonic()
        if now - self._said.get(key, -REPEAT_WORD_S) < REPEAT_WORD_S:
            return False
        if len(self._said) >= REPEAT_WORDS_KEPT:
            self._said = {k: at for k, at in self._said.items() if now - at < REPEAT_WORD_S}
        if len(self._said) >= REPEAT_WORDS_KEPT:
            return False
        self._said[key] = now
        return True


class Doorman:
    """Answers libzmq's question, once a connection, whether a key is on the allow-list (ZAP, RFC 27), in a thread.

    The sockets that ask are told to refuse everybody should nobody answer (ZAP_ENFORCE_DOMAIN).
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], allowed: AllowList) -> None:
        self._context = context
        self._allowed = allowed
        self._may_say = Seldom()
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
                try:
                    answer = self._answer(frames)
                except Exception:  # whatever it is: without this thread nobody would be let in again
                    log.exception("the allow-list could not be asked; the connection is refused")
                    answer = b"500", b"the allow-list could not be asked", b""
                self._socket.send_multipart([ZAP_VERSION, frames[1], *answer, b""])

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
