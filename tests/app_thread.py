"""An aiohttp application on a thread of its own."""

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable

from aiohttp import web

LARGEST = 1 << 28  # bytes of a request


class AppThread:
    """Answers every path on loopback with ``answer``; ``port`` 0 takes a free one, which is its own until it is closed.

    Another one can listen at the port of one that was stopped.
    """

    def __init__(self, answer: Callable[[web.Request], Awaitable[web.StreamResponse]], port: int = 0) -> None:
        self._bound = socket.socket()  # never listens: nobody else is given the port while we do not either
        self._bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._bound.bind(("127.0.0.1", port))
        self.port: int = self._bound.getsockname()[1]
        self._answer = answer
        self._loop = asyncio.new_event_loop()
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._up.wait(5)

    def stop(self) -> None:
        """Refuse connections from now on."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)

    def close(self) -> None:
        """Stop, and let go of the port."""
        self.stop()
        self._bound.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application(client_max_size=LARGEST)
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True)
        self._loop.run_until_complete(site.start())
        self._up.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._end(runner, site))
        self._loop.close()

    async def _end(self, runner: web.AppRunner, site: web.TCPSite) -> None:
        """Leave no connection to the collector: what was accepted gets its transport before its task is cancelled."""
        await site.stop()
        for _ in range(3):
            await asyncio.sleep(0)
        await self._cancelled()  # handlers that sleep
        await runner.cleanup()
        await self._cancelled()
        await asyncio.sleep(0)  # transports close a turn after they are told to

    async def _cancelled(self) -> None:
        tasks = asyncio.all_tasks(self._loop) - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=0.5)
