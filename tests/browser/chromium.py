"""A real headless Chromium over its DevTools protocol, through aiohttp, which is there anyway."""

import asyncio
import base64
import json
import shutil
import subprocess
import time

import aiohttp

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
)  # fmt: skip
START_S = 60.0
ANSWER_S = 30.0


def find_chromium():
    """Where it is, or None."""
    return next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )


class Browser:
    """One page; calls are synchronous, events are collected while they wait."""

    def __init__(self, program, profile):
        self.loop = asyncio.new_event_loop()
        self.process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self.problems = []  # what the console said at level error, and what was thrown and not caught
        self.failed = []  # requests that came to nothing
        self._next, self._session, self._socket = 0, None, None
        try:
            self.loop.run_until_complete(self._connect(profile / "DevToolsActivePort"))
        except BaseException:
            self.close()
            raise

    async def _connect(self, port_file):
        deadline = time.monotonic() + START_S
        while not (port_file.exists() and "\n" in port_file.read_text()):
            assert time.monotonic() < deadline and self.process.poll() is None, "chromium did not start"
            await asyncio.sleep(0.05)
        port = port_file.read_text().splitlines()[0]
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            pages = [page for page in await answer.json() if page["type"] == "page"]
        self._socket = await self._session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=64 << 20)
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self._send(f"{domain}.enable")

    def send(self, method, **parameters):
        return self.loop.run_until_complete(self._send(method, **parameters))

    async def _send(self, method, **parameters):
        self._next += 1
        await self._socket.send_json({"id": self._next, "method": method, "params": parameters})
        deadline = time.monotonic() + ANSWER_S
        while True:
            message = await asyncio.wait_for(self._socket.receive(), max(0.1, deadline - time.monotonic()))
            said = json.loads(message.data)
            if said.get("id") == self._next:
                assert "error" not in said, (method, said["error"])
                return said["result"]
            self._note(said)

    def _note(self, event):
        values = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                details = values["exceptionDetails"]
                self.problems.append(details.get("exception", {}).get("description") or details["text"])
            case "Runtime.consoleAPICalled" if values["type"] in ("error", "assert"):
                self.problems.append(" ".join(str(a.get("value", a.get("description"))) for a in values["args"]))
            case "Log.entryAdded" if values["entry"]["level"] == "error":
                where = self.failed if values["entry"]["source"] == "network" else self.problems
                where.append(values["entry"]["text"])

    # ---- what a test does -----------------------------------------------------------------------

    def open(self, url):
        self.send("Page.navigate", url=url)

    def look(self, width, height, dark=False, phone=False, still=False):
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"},
        ]
        self.send("Emulation.setEmulatedMedia", features=features)

    def ask(self, script):
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script, seconds=20.0):
        deadline = time.monotonic() + seconds
        while not (found := self.ask(script)):
            assert time.monotonic() < deadline, f"never true: {script}; console: {self.problems}"
            time.sleep(0.1)
        return found

    def move(self, x, y):
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key):
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def screenshot(self, path, whole=False):
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self):
        async def leave():
            if self._socket is not None:
                await self._socket.close()
            if self._session is not None:
                await self._session.close()

        self.loop.run_until_complete(leave())
        self.loop.close()
        self.process.kill()
        self.process.wait()
