"""One reward model's server over HTTP: bounded requests, retries with growing waits, and a rest when it is down."""

import asyncio
import logging
import math
import time
from typing import Any

import aiohttp
import orjson

from actor.scoring.breaker import Breaker
from common.errors import TaskError
from common.rewards import RewardModelEntry

LONGEST_ANSWER = 4 << 20  # bytes of a reply
CONNECT_S = 10.0
EXACTLY = math.inf  # aiohttp rounds longer timeouts up to whole seconds, beyond the deadline that they lie within
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 15.0  # between two tries of one request
BUSY = (408, 425, 429)  # refusals that a later try may not meet
NOT_HERE = (401, 403, 404)  # ... and those that every request will
SHOWN = 200  # characters of a refusal

log = logging.getLogger("actor.scoring")


class ModelDownError(TaskError):
    """A reward model that is left alone for now."""


class RequestError(TaskError):
    """A request that came to nothing."""

    def __init__(self, message: str, again: bool, counts: bool = True) -> None:
        """``again``: a later try may succeed; ``counts``: it says something of the server, not of the request."""
        super().__init__(message)
        self.again, self.counts = again, counts


class Endpoint:
    """The server of the reward model ``name``. Everything runs on one event loop."""

    def __init__(self, name: str, url: str, entry: RewardModelEntry, key: str, session: aiohttp.ClientSession) -> None:
        self.name, self.url, self._entry, self._session = name, url, entry, session
        self._key = key
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        total, connect = entry.timeout_s, min(CONNECT_S, entry.timeout_s)
        self._timeout = aiohttp.ClientTimeout(total, sock_connect=connect, ceil_threshold=EXACTLY)
        self._breaker = Breaker(entry.down_after, entry.probe_s)
        self._came_up = asyncio.Event()
        self.requests = self.retries = 0

    @property
    def is_down(self) -> bool:
        """Whether it is left alone."""
        return self._breaker.is_down

    async def ready(self) -> None:
        """Wait while it is left alone. Raises ModelDownError at once if its absence is neutral."""
        while (wait_s := self._breaker.wait_s(time.monotonic())) > 0:
            if self._entry.on_failure == "neutral":
                raise ModelDownError(f"{self.name} is down")
            try:
                await asyncio.wait_for(self._came_up.wait(), wait_s)
            except TimeoutError:
                continue  # time for another try

    async def _admitted(self) -> None:
        """The same for one request; of those that wait for a server to come back, one goes ahead to look."""
        while not self._breaker.admits(time.monotonic()):
            await self.ready()

    async def ask(self, body: dict[str, Any]) -> Any:
        """The answer to ``body``, both JSON. Raises RequestError or ModelDownError."""
        encoded, wait_s = orjson.dumps(body), FIRST_WAIT_S
        for attempt in range(self._entry.retries + 1):
            await self._admitted()
            try:
                self.requests += 1
                answer = await self._post(encoded)
            except RequestError as error:
                self._failed(error)
                if not error.again or attempt == self._entry.retries:
                    raise
                self.retries += 1
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
                continue
            if self._breaker.succeeded():
                log.info("reward model %s answers again", self.name)
                self._came_up.set()
            return answer
        raise AssertionError("a loop with at least one turn")

    def _failed(self, error: RequestError) -> None:
        if error.counts and self._breaker.failed(time.monotonic()):
            self._came_up.clear()
            what = "its channel is left out" if self._entry.on_failure == "neutral" else "rollouts wait for it"
            log.warning(
                "reward model %s is down after %d failures in a row, the last: %s; %s, a try every %g s",
                self.name, self._entry.down_after, error, what, self._entry.probe_s,
            )  # fmt: skip

    async def _post(self, body: bytes) -> Any:
        try:
            async with self._session.post(
                self.url, data=body, headers=self._headers, timeout=self._timeout, allow_redirects=False
            ) as answer:
                content = await _read(answer)
                status = answer.status
        except TimeoutError as error:
            raise RequestError(f"{self.name}: no answer within {self._entry.timeout_s:g} s", again=True) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise RequestError(f"{self.name}: {type(error).__name__}: {error}", again=True) from error
        if status != 200:
            text = content.decode(errors="replace")[:SHOWN]
            text = text.replace(self._key, "…") if self._key else text  # servers repeat what they do not accept
            passing = status >= 500 or status in BUSY
            raise RequestError(f"{self.name}: HTTP {status}: {text}", passing, passing or status in NOT_HERE)
        try:
            return orjson.loads(content)
        except orjson.JSONDecodeError as error:
            raise RequestError(f"{self.name}: its answer is no JSON: {content[:SHOWN]!r}", again=True) from error


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    """The whole body. Raises ValueError for one that is too long."""
    content = bytearray()
    async for piece in answer.content.iter_chunked(1 << 16):
        content += piece
        if len(content) > LONGEST_ANSWER:
            answer.close()
            raise ValueError(f"an answer of more than {LONGEST_ANSWER >> 20} MB")
    return bytes(content)
