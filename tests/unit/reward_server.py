"""A reward model's server on loopback, with whatever manners a test gives it."""

from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from tests.app_thread import AppThread

Handler = Callable[[web.Request, Any], "web.StreamResponse | Awaitable[web.StreamResponse]"]


def chat(text: Any) -> web.Response:
    """A chat completion of one message."""
    return web.json_response({"choices": [{"message": {"role": "assistant", "content": text}}]})


class RewardServer:
    """Answers with ``handler(request, body)``, which may be replaced at any time; keeps what it was asked."""

    def __init__(self, handler: Handler) -> None:
        self.handler, self.asked, self.headers = handler, [], []
        self.open = self.most = 0  # requests at once, now and ever
        self._server = AppThread(self._answer)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else None
        self.asked.append(body)
        self.headers.append(dict(request.headers))
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            answer = self.handler(request, body)
            return await answer if isinstance(answer, Awaitable) else answer
        finally:
            self.open -= 1

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.port}"

    def stop(self) -> None:
        """Refuse connections; :meth:`restart` listens at the same port again."""
        self._server.stop()

    def restart(self) -> None:
        stopped, self._server = self._server, AppThread(self._answer, self._server.port)
        stopped.close()

    def close(self) -> None:
        self._server.close()
