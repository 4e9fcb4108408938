"""A reward model's server on loopback, with whatever manners a test gives it."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

Handler = Callable[[web.Request, Any], "web.StreamResponse | Awaitable[web.StreamResponse]"]


def chat(text: Any) -> web.Response:
    """A chat completion of one message."""
    return web.json_response({"choices": [{"message": {"role": "assistant", "content": text}}]})


class RewardServer:
    """Answers with ``handler(request, body)``, which may be replaced at any time; keeps what it was asked."""

    def __init__(self, handler: Handler) -> None:
        self.handler, self.asked, self.headers = handler, [], []
        self.open = self.most = 0  # requests at once, now and ever
        self._port = 0
        self._loop = asyncio.new_event_loop()
        self._up = threading.Event()
        self._start()

    def _start(self) -> None:
        self._up.clear()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._up.wait(5)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application(client_max_size=1 << 26)
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, shutdown_timeout=0.05, access_log=None)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", self._port, reuse_address=True)
        self._loop.run_until_complete(site.start())
        self._port = runner.addresses[0][1]
        self._up.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

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
        return f"http://127.0.0.1:{self._port}"

    def stop(self) -> None:
        """Refuse connections; :meth:`restart` listens at the same port again."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)

    def restart(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._start()
