"""A stand-in for a judge: ``python -m tools.examples.judge [PORT]`` serves ``POST /v1/chat/completions``.

It speaks the protocol that a judge of ``reward.models`` is asked by and knows one rubric: how much of
the answer's digits ascends. ``configs/judged.yaml`` is rewarded by it; a real judge is any server of an
OpenAI-compatible API.
"""

import argparse
import re
import sys
from itertools import pairwise
from typing import Any

from aiohttp import web

HOST, PORT = "127.0.0.1", 8100
ANSWER = re.compile(r"BEGIN ANSWER (\w+)\n(.*?)\nEND ANSWER \1", re.DOTALL)


def judge(text: str) -> str:
    """What the judge writes of a request's last message."""
    found = ANSWER.search(text)
    digits = [c for c in found[2] if c.isdigit()] if found is not None else []
    steps = [before <= after for before, after in pairwise(digits)]
    share = sum(steps) / len(steps) if steps else 0.0
    return f"{sum(steps)} of {len(steps)} steps ascend.\nScore: {1 + 9 * share:.1f}"


async def _complete(request: web.Request) -> web.Response:
    body: dict[str, Any] = await request.json()
    said = {"role": "assistant", "content": judge(body["messages"][-1]["content"])}
    return web.json_response({"choices": [{"index": 0, "message": said, "finish_reason": "stop"}]})


async def _models(_: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": "stand-in", "object": "model"}]})


def main(arguments: list[str] | None = None) -> int:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m tools.examples.judge", description="A stand-in for a judge."
    )
    parser.add_argument("port", nargs="?", default=PORT, type=int, metavar="PORT", help=f"on {HOST}; {PORT}")
    port = parser.parse_args(arguments).port
    if not 0 < port < 1 << 16:
        parser.error(f"PORT {port}: must lie in [1, 65535]")
    app = web.Application()
    app.router.add_post("/v1/chat/completions", _complete)
    app.router.add_get("/v1/models", _models)
    web.run_app(app, host=HOST, port=port, access_log=None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
