"""The page and what feeds it, over HTTP: read only, and only what the screen shows.

::

    one thread follows the run; requests see what it last saw
    /             the page: one document, its script and style within, allowed by their hashes
    /api/state    how the run stands now
    /api/metrics  the curves, ?since=STEP&key=KEY for what is new

No path is ever looked up on disk.
"""

import base64
import contextlib
import gzip
import hashlib
import ipaddress
import secrets
import socket
import socketserver
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import orjson
from rich.console import Console

from common.errors import ConfigError
from common.process import StopFlag
from tools.watch import feed
from tools.watch.follow import Follower
from tools.watch.sound import text
from tools.watch.view import View

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("chart.js", "panels.js", "page.js")
EVERY_S = 0.5
IDLE_S = 20.0  # a connection that asks nothing for longer is closed
CONNECTIONS = 64
GZIP_FROM = 1400  # bytes; less fits into one packet


def build_page() -> tuple[bytes, str]:
    """The document, and the Content-Security-Policy that allows its own script and style and nothing else."""
    style = (PAGE / "page.css").read_text()
    script = "\n".join((PAGE / name).read_text() for name in SCRIPTS)
    document = (PAGE / "page.html").read_text().replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)

    def allowed(inline: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {allowed(script)}; style-src {allowed(style)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return document.encode(), policy


class Latest:
    """Follows the run in a thread of its own; answers are made from what it last saw."""

    def __init__(self, follower: Follower) -> None:
        self._follower, self._lock, self._stop = follower, threading.Lock(), threading.Event()
        self._token = secrets.token_hex(4)  # keys of an earlier server are none of ours
        self._view: View = follower.look()
        self._thread = threading.Thread(target=self._run, name="follow", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        failed = False
        while not self._stop.wait(EVERY_S if failed or self._follower.caught_up else 0.01):
            with self._lock:
                try:
                    self._view, failed = self._follower.look(0.1), False
                except Exception as error:  # noqa: BLE001  # a disk that fails for a moment, a file of nobody's
                    failed = True
                    self._view.status_age_s = self._follower.age()
                    self._view.notes = [f"the run directory cannot be read: {text(error, 200)}"]

    @property
    def _epoch(self) -> str:
        return f"{self._token}.{self._follower.epoch}"

    def state(self) -> bytes:
        """JSON."""
        with self._lock:
            return orjson.dumps(feed.state(self._view, self._epoch), option=orjson.OPT_NON_STR_KEYS)

    def metrics(self, since: int, key: str) -> bytes:
        """JSON."""
        with self._lock:
            return orjson.dumps(feed.metrics(self._follower.history, self._epoch, since, key))

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD of three paths."""

    server: "Server"
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "croupier", ""
    timeout = IDLE_S

    def do_GET(self) -> None:
        """One of the three, or 404."""
        if not self._for_us():
            self._say(HTTPStatus.MISDIRECTED_REQUEST, "this address is for this machine only: ask for localhost")
            return
        path, _, query = self.path.partition("?")
        match path:
            case "/":
                self._send(HTTPStatus.OK, self.server.page, "text/html; charset=utf-8")
            case "/api/state":
                self._send(HTTPStatus.OK, self.server.latest.state(), "application/json")
            case "/api/metrics":
                self._metrics(parse_qs(query))
            case _:
                self._say(HTTPStatus.NOT_FOUND, "there is /, /api/state and /api/metrics")

    do_HEAD = do_GET

    def _refuse(self) -> None:
        self.close_connection = True  # its body is not read
        self._say(HTTPStatus.METHOD_NOT_ALLOWED, "nothing can be changed here: GET only")

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _refuse

    def _metrics(self, query: dict[str, list[str]]) -> None:
        since = query.get("since", ["0"])[-1]
        if not (since.isascii() and since.isdigit() and len(since) < 16):
            self._say(HTTPStatus.BAD_REQUEST, "since must be a step: a whole number, 0 or more")
            return
        body = self.server.latest.metrics(int(since), query.get("key", [""])[-1])
        self._send(HTTPStatus.OK, body, "application/json")

    def _for_us(self) -> bool:
        """Whether the name that was asked for is ours: a page elsewhere must not read through a name of its own."""
        if not self.server.private:
            return True
        host = self.headers.get("Host", "localhost")
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        return is_loopback(name.lower())

    def _say(self, status: HTTPStatus, words: str) -> None:
        self._send(status, orjson.dumps({"error": words}), "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        packed = len(body) >= GZIP_FROM and "gzip" in self.headers.get("Accept-Encoding", "")
        if packed:
            body = gzip.compress(body, 3)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Vary", "Accept-Encoding")
        self.send_header("Content-Security-Policy", self.server.policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        if packed:
            self.send_header("Content-Encoding", "gzip")
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """A page that asks once a second is no news."""


class Server(ThreadingHTTPServer):
    """Serves one run until :meth:`close`."""

    daemon_threads = True
    request_queue_size = CONNECTIONS

    def __init__(self, follower: Follower, host: str = "127.0.0.1", port: int = 0) -> None:
        """Raises :class:`ConfigError` where the address cannot be listened on."""
        self.page, self.policy = build_page()
        self.private = is_loopback(host)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._open: set[Any] = set()  # connections
        self._slots = threading.BoundedSemaphore(CONNECTIONS)
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"--host {host} --port {port}: cannot be listened on ({error}); --port 0 takes any"
            ) from error
        self.latest = Latest(follower)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.1,), name="web", daemon=True)
        self._thread.start()

    def server_bind(self) -> None:
        """Without asking a name server for our own name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    @property
    def url(self) -> str:
        """Where the page is."""
        name = self.server_name
        return f"http://{f'[{name}]' if ':' in name else name}:{self.server_port}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for a connection, while there are not too many."""
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        self._open.add(request)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The connection's life."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._open.discard(request)
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that goes away is no error of ours; anything else ends on stderr as usual."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    def close(self) -> None:
        """End both threads and free the address."""
        self.shutdown()
        self.server_close()
        for connection in list(self._open):  # browsers keep theirs
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self.latest.close()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(follower: Follower, host: str, port: int, console: Console, stop: StopFlag) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    server = Server(follower, host, port)
    try:
        console.print(f"{follower.run_dir} is shown at {server.url} (Ctrl-C ends it)", markup=False, soft_wrap=True)
        if not server.private:
            console.print(
                f"warning: everybody who reaches {host} can read along, without a password; "
                "the usual 127.0.0.1 and an ssh tunnel (ssh -L) keep it private",
                style="yellow", markup=False, soft_wrap=True,
            )  # fmt: skip
        while not stop.is_set:
            threading.Event().wait(0.2)
    finally:
        server.close()
    return 0
