"""The gateway's HTTP server on loopback, on an event loop in a thread of its own.

::

    POST /v1/chat/completions -> key -> seat -> read (text thread) -> Ask -> the actor's engine
                                                   agent <- answer (text thread) <- Completion

One seat is one rollout. Its requests are answered one after another. Seats and conversations change
on the loop alone, between two awaits; rendering and encoding run in one other thread, so that
nothing heavy runs on the loop.
"""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import queue
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from actor.engine.base import Completion
from actor.gateway.chat import BAD_REQUEST, GONE, NOT_FOUND, TOO_LARGE, UNAUTHORIZED, Limits, Refusal, models_body
from actor.gateway.conversation import Conversations, Placed
from actor.gateway.template import ChatTemplate
from actor.rollout import Turn
from common.errors import ConfigError

HOST = "127.0.0.1"
MAX_BODY = 32 << 20  # bytes of a request
START_S = 10.0  # until the server listens
END_S = 5.0  # for its connections to be closed
MAX_DIGITS = 20  # of a seat's number
CLIENT_GONE = 499  # nginx's status for it; nobody reads the answer

log = logging.getLogger("actor.gateway")


@dataclass(eq=False)
class Ask:
    """A completion that the agent in a seat waits for."""

    seat: int
    placed: Placed
    answer: "asyncio.Future[Completion]"


@dataclass(eq=False)
class _Seat:
    number: int
    name: str  # for log lines
    conversations: Conversations
    deadline: float  # on the clock of time.monotonic
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    over: str = ""  # why nothing more is answered
    waiting: "asyncio.Future[Completion] | None" = None

    def check(self) -> None:
        """Raise Refusal once nothing more is answered."""
        if self.over:
            raise _over(self.over)


class Gateway:
    """Serves ``url`` until :meth:`close`; what agents ask for appears in ``asks``.

    Raises ConfigError if ``port`` (0: the system chooses) cannot be had.
    """

    def __init__(self, template: ChatTemplate, model: str, port: int, asks: "queue.SimpleQueue[Any]") -> None:
        self._template, self._model, self._asks = template, model, asks
        self._secret = secrets.token_bytes(32)
        self._seats: dict[int, _Seat] = {}
        self._loudness = logging.WARNING
        self._text = ThreadPoolExecutor(1, thread_name_prefix="gateway-text")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gateway", daemon=True)
        self._thread.start()
        try:
            self._runner, self.url = self._run(self._listen(port), START_S)
        except OSError as error:
            self._end()
            raise ConfigError(
                f"task.params.port={port}: {error.strerror or 'timed out'}; leave it out and the system chooses"
            ) from error

    def _run(self, work: Coroutine[Any, Any, Any], timeout_s: float) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    async def _listen(self, port: int) -> tuple[web.AppRunner, str]:
        app = web.Application(client_max_size=MAX_BODY, middlewares=[_refuse])
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        app.router.add_route("*", "/{path:.*}", _nowhere)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        await web.TCPSite(runner, HOST, port).start()
        return runner, f"http://{HOST}:{runner.addresses[0][1]}/v1"

    # ---- called from other threads --------------------------------------------------------------

    def open(self, seat: int, name: str, limits: Limits, deadline: float) -> str:
        """A new seat for ``name``, answered until ``deadline`` (of time.monotonic); returns its API key."""

        def sit() -> None:
            self._seats[seat] = _Seat(seat, name, Conversations(self._template, limits), deadline)

        self._post(sit)
        return f"croupier-{seat}-{self._sign(seat)}"

    def leave(self, seat: int, then: Callable[[list[Turn]], None]) -> None:
        """Its agent has ended; ``then`` is called with its turns, on the server's thread."""

        def leave() -> None:
            found = self._seats.get(seat)
            self._close_seat(seat, "its agent has ended")
            then(found.conversations.turns if found is not None else [])

        self._post(leave)

    def evict(self, seat: int, reason: str) -> None:
        """Nothing more is answered there."""
        self._post(lambda: self._close_seat(seat, reason))

    def answer(self, ask: Ask, completion: Completion) -> None:
        """The completion that was asked for."""

        def resolve() -> None:
            if not ask.answer.done():
                ask.answer.set_result(completion)

        self._post(resolve)

    def _post(self, call: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the actor has ended, and nobody is served
            self._loop.call_soon_threadsafe(call)

    def close(self) -> None:
        """Stop listening; whoever still waits is refused."""

        async def close() -> None:
            for seat in list(self._seats):
                self._close_seat(seat, "the actor ends")
            await self._runner.cleanup()

        with contextlib.suppress(TimeoutError):
            self._run(close(), END_S)
        self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(END_S)
        self._text.shutdown(wait=False, cancel_futures=True)
        if not self._thread.is_alive():
            self._loop.close()

    # ---- on the loop ----------------------------------------------------------------------------

    def _sign(self, seat: int) -> str:
        return hmac.new(self._secret, str(seat).encode(), hashlib.sha256).hexdigest()[:32]

    def _close_seat(self, number: int, reason: str) -> None:
        seat = self._seats.pop(number, None)
        if seat is not None:
            seat.over = reason
            if seat.waiting is not None and not seat.waiting.done():
                seat.waiting.set_exception(_over(reason))

    def _seat(self, request: web.Request) -> _Seat:
        """Whose request it is. Raises Refusal for a key that is none, or whose rollout is over."""
        scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
        _, number, signature = (*secret.strip().split("-"), "", "", "")[:3]
        signed = (
            number.isdecimal()
            and len(number) < MAX_DIGITS
            and hmac.compare_digest(signature.encode(errors="replace"), self._sign(int(number)).encode())
        )
        if scheme.lower() != "bearer" or not signed:
            text = "this API key belongs to no rollout; use the api_key that the agent was given"
            raise Refusal(UNAUTHORIZED, text, code="invalid_api_key")
        if int(number) not in self._seats:
            raise _over("it has ended")
        return self._seats[int(number)]

    async def _models(self, request: web.Request) -> web.Response:
        self._seat(request)
        return web.Response(body=models_body(self._model), content_type="application/json")

    async def _chat(self, request: web.Request) -> web.Response:
        seat = self._seat(request)
        try:
            async with asyncio.timeout(seat.deadline - time.monotonic()):
                body = await request.read()
                async with seat.lock:
                    return await self._turn(seat, request, body)
        except TimeoutError:
            raise _over("its deadline has passed") from None

    async def _turn(self, seat: _Seat, request: web.Request, body: bytes) -> web.Response:
        seat.check()
        if _is_gone(request):
            return web.Response(status=CLIENT_GONE)
        talk, loop = seat.conversations, self._loop
        placed = await loop.run_in_executor(self._text, talk.read, body)
        seat.check()
        seat.waiting = loop.create_future()
        self._asks.put(Ask(seat.number, placed, seat.waiting))
        completion = await seat.waiting
        number = f"{seat.number}-{len(talk.turns)}"
        reply = await loop.run_in_executor(self._text, talk.answer, placed, completion, number, self._model)
        seat.check()
        if _is_gone(request):  # nobody hears it: what an agent never saw is no turn of its conversation
            return web.Response(status=CLIENT_GONE)
        talk.take(placed, reply)
        if placed.why:
            log.log(self._loudness, "%s begins a new segment: %s", seat.name, placed.why)
            self._loudness = logging.DEBUG  # the counter "segments" tells how many follow
        return web.Response(body=reply.body, content_type=reply.content_type)


def _is_gone(request: web.Request) -> bool:
    """Whether nobody waits for the response."""
    return request.transport is None


def _over(reason: str) -> Refusal:
    return Refusal(GONE, f"this rollout is over: {reason}", code="rollout_over")


@web.middleware
async def _refuse(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except Refusal as error:
        refusal = error
    except web.HTTPRequestEntityTooLarge:
        refusal = Refusal(TOO_LARGE, f"the body has more than {MAX_BODY >> 20} MB; send less", code="too_large")
    except web.RequestPayloadError as error:
        refusal = Refusal(BAD_REQUEST, f"the body cannot be read: {error}")
    return web.Response(status=refusal.status, body=refusal.body, content_type="application/json")


async def _nowhere(request: web.Request) -> web.Response:
    text = f"{request.method} {request.path}: no such route; there are POST /v1/chat/completions and GET /v1/models"
    raise Refusal(NOT_FOUND, text, code="unknown_url")
