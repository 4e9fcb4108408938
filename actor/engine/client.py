"""One SGLang server over HTTP: its endpoints with deadlines, and errors that name it.

Only what ../shared/sglang.md calls measured is used. Runs on the engine's event loop; nothing here
waits without a deadline.
"""

import asyncio
from typing import Any

import aiohttp
import orjson

from actor.engine.pacing import Load
from common.errors import EngineError

SHORT_S = 10.0  # for calls that do no work
NOT_THERE, TOO_MANY, BROKEN = 404, 429, 500


class ServerLostError(EngineError):
    """The server does not answer: refused, reset, timed out or gone."""


class ServerRefusedError(EngineError):
    """The server answered that it will not."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status

    @property
    def passing(self) -> bool:
        """Whether that is the server's trouble, which may pass, and not the request's."""
        return self.status == TOO_MANY or self.status >= BROKEN


class Client:
    """The endpoints of the server at ``url``; ``session`` is shared by all servers."""

    def __init__(self, url: str, name: str, session: aiohttp.ClientSession) -> None:
        self.url, self.name = url.rstrip("/"), name
        self._session = session

    async def send(
        self, path: str, body: bytes | None, timeout_s: float, params: dict[str, str] | None = None
    ) -> bytes:
        """POST ``body``, or GET without one. Raises ServerLostError or ServerRefusedError."""
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(SHORT_S, timeout_s))
        headers = {"Content-Type": "application/json"}
        method = "GET" if body is None else "POST"
        try:
            async with self._session.request(
                method, self.url + path, data=body, headers=headers, timeout=timeout
            ) as answer:
                content = await answer.read()
                if answer.status != 200:
                    text = content.decode(errors="replace")[:300]
                    raise ServerRefusedError(f"{self.name} {path}: HTTP {answer.status}: {text}", answer.status)
                return content
        except TimeoutError as error:
            raise ServerLostError(f"{self.name} {path}: no answer within {timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerLostError(f"{self.name} {path}: {type(error).__name__}: {error}") from error

    async def call(self, path: str, fields: dict[str, Any] | None = None, timeout_s: float = SHORT_S) -> Any:
        """JSON in, JSON out; None for an empty answer."""
        content = await self.send(path, None if fields is None else orjson.dumps(fields), timeout_s)
        try:
            return orjson.loads(content) if content else None
        except orjson.JSONDecodeError:
            return content.decode(errors="replace")

    async def must(self, path: str, fields: dict[str, Any], timeout_s: float = SHORT_S) -> None:
        """A call whose answer says ``success``; ServerRefusedError if it says otherwise."""
        answer = await self.call(path, fields, timeout_s)
        if isinstance(answer, dict) and answer.get("success") is False:
            raise ServerRefusedError(f"{self.name} {path}: {str(answer.get('message'))[:300]}", 200)

    async def healthy(self) -> bool:
        """Whether it answers at all."""
        try:
            await self.send("/health", None, SHORT_S)
        except EngineError:
            return False
        return True

    async def look(self, timeout_s: float) -> Load | None:
        """Its load, after its scheduler has answered too; None where it cannot say (a release without /v1/loads).

        The load alone would not do: it comes from a snapshot, which a stuck scheduler leaves behind.
        """
        await self.call("/server_info", None, timeout_s)
        try:
            answer = await self.call("/v1/loads?include=core,queues", None, timeout_s)
        except ServerRefusedError:
            return None
        ranks = answer["loads"]
        return Load(
            running=sum(rank["num_running_reqs"] for rank in ranks),
            waiting=sum(rank["num_waiting_reqs"] for rank in ranks),
            usage=max(rank["token_usage"] for rank in ranks),
            retracted=sum((rank.get("queues") or {}).get("retracted", 0) for rank in ranks),
        )

    async def version(self) -> str:
        """The weight version that it says it serves."""
        return str((await self.call("/model_info"))["weight_version"])

    async def pause(self, mode: str, timeout_s: float) -> None:
        """Stop sampling between two tokens."""
        await self.call("/pause_generation", {"mode": mode}, timeout_s)

    async def resume(self) -> None:
        """Sample again."""
        await self.call("/continue_generation", {})

    async def begin_update(self, timeout_s: float) -> bool:
        """Open an update session; False where the server is too old to have them (before 0.5.21)."""
        try:
            await self.must("/begin_weight_update", {"selector": "all"}, timeout_s)
        except ServerRefusedError as error:
            if error.status != NOT_THERE:
                raise
            return False
        return True

    async def end_update(self, timeout_s: float) -> None:
        """Close the session; one that is not open is no error."""
        try:
            await self.call("/end_weight_update", {}, timeout_s)
        except ServerRefusedError:
            return

    async def abort(self, rid: str) -> None:
        """Forget a request; one that is unknown is no error."""
        await self.call("/abort_request", {"rid": rid})


async def within(seconds: float, awaitable: Any, what: str) -> Any:
    """``awaitable``'s result; ServerLostError that says ``what`` was late."""
    try:
        return await asyncio.wait_for(awaitable, seconds)
    except TimeoutError as error:
        raise ServerLostError(f"{what} took longer than {seconds:g} s") from error
