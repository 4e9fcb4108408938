"""An engine without a model: completions are what a function of the request and the sibling says."""

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from actor.engine.base import Completion, Failure, SampleRequest, check_request
from actor.outbox import Finished
from actor.play import Play
from actor.tasks.sort6 import encode

ANY = 1 << 30  # what a request may ask for

Script = Callable[[SampleRequest, int], str | None]  # None: the engine fails at it


class ScriptedEngine:
    """What an actor's play needs of an engine. Everything asked for ends at the next step."""

    def __init__(self, script: Script, version: int = 0, encode: Callable[[str], NDArray[np.int32]] = encode) -> None:
        self.script, self.version, self.encode = script, version, encode
        self.asked: list[SampleRequest] = []
        self._waiting: list[SampleRequest] = []
        self.cancelled: list[tuple[int, int]] = []
        self.vocab_size = ANY

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    def add(self, request: SampleRequest) -> None:
        check_request(request, self.vocab_size, ANY, ANY)
        self.asked.append(request)
        self._waiting.append(request)

    def cancel(self, request_id: int, sibling: int) -> None:
        self.cancelled.append((request_id, sibling))

    def step(self, wait_s: float = 0.0) -> Sequence[Completion | Failure]:
        waiting, self._waiting = self._waiting, []
        return [self._end(r, r.first_sibling + i) for r in waiting for i in range(r.samples)]

    def _end(self, request: SampleRequest, sibling: int) -> Completion | Failure:
        text = self.script(request, sibling)
        if text is None:
            return Failure(request.request_id, sibling, "scripted")
        ids = self.encode(text)
        n, k = len(ids), request.top_logprobs
        return Completion(
            request.request_id, sibling, ids, np.full(n, -0.5, np.float32), np.full(n, self.version, np.int32),
            np.zeros((n, k), np.int32), np.zeros((n, k), np.float32),
            np.zeros((len(request.prompt_ids) + n, 0), np.uint16), "stop",
        )  # fmt: skip


def play_out(play: Play, engine: ScriptedEngine) -> list[Finished]:
    """Everything that ``play`` has begun, to its end; verifiers in threads included."""
    finished, deadline = [], time.monotonic() + 60
    while len(play.rollouts):
        finished += play.collect(engine.step())
        assert time.monotonic() < deadline, "rollouts without end"
        time.sleep(0.001)
    return finished
