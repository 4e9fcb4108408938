"""Every reward model of one actor, on an event loop in a thread of its own.

::

    submit -> each model, at most its concurrency at once, each with a deadline -> poll, in the actor's loop

Scores are what they are in whatever order they come: a rollout is told of once, with all of them.
"""

import asyncio
import dataclasses
import logging
import queue
import secrets
import threading
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from actor.scoring.endpoint import Endpoint
from actor.scoring.remote import Classifier, Judge, RewardModel
from actor.scoring.rubric import Judged
from common.errors import TaskError
from common.rewards import RewardModelEntry, RewardSection

START_S = 900.0  # until the models are loaded
END_S = 5.0  # for requests under way to be broken off
CHAT = "/chat/completions"
REQUEST_SHARE = 0.9  # of reward.deadline_s for one request: a server that hangs fails, and is not just late
JUDGE_SHARE = 0.95  # ... and for all of a judge's, so that those which were answered count

log = logging.getLogger("actor.scoring")


@dataclass(frozen=True, eq=False)
class Verdict:
    """What the reward models said of one rollout."""

    owner: Any
    scores: dict[str, float] = field(default_factory=dict)  # by channel
    failures: dict[str, str] = field(default_factory=dict)  # why a channel has none


class _Seat:
    """A reward model and what goes in and out of it."""

    def __init__(self, entry: RewardModelEntry, model: RewardModel, endpoint: Endpoint | None) -> None:
        self.entry, self.model, self.endpoint = entry, model, endpoint
        self.slots = asyncio.Semaphore(entry.concurrency if endpoint is not None else 2 * entry.batch)
        self.judged = self.failures = 0
        self.seconds = 0.0


class Judges:
    """See the module. Raises ConfigError, ModelError or TaskError for a model that cannot be used."""

    def __init__(self, section: RewardSection) -> None:
        self._section = section
        self._seats: dict[str, _Seat] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}  # by the owner's identity
        self._verdicts: queue.SimpleQueue[Verdict] = queue.SimpleQueue()
        self._awaited: dict[int, Any] = {}  # owners, for the actor's thread
        self._session: aiohttp.ClientSession | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="reward-models", daemon=True)
        self._thread.start()
        try:
            self._run(self._open(), START_S)
        except BaseException:
            self.close()
            raise

    def _run(self, work: Coroutine[Any, Any, Any], timeout_s: float) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    async def _open(self) -> None:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        secret = secrets.token_bytes(32)
        for name, entry in self._section.models.items():
            endpoint: Endpoint | None = None
            if entry.path:
                from actor.scoring.checkpoint import Checkpoint  # torch and transformers

                model: RewardModel = Checkpoint(name, entry)
            else:
                url = entry.url.rstrip("/") + (CHAT if entry.kind == "grm" else "")
                deadline_s = self._section.deadline_s
                bounded = dataclasses.replace(entry, timeout_s=min(entry.timeout_s, REQUEST_SHARE * deadline_s))
                endpoint = Endpoint(name, url, bounded, entry.read_key(name), self._session)
                if entry.kind == "grm":
                    model = Judge(name, entry, endpoint, secret, JUDGE_SHARE * deadline_s)
                else:
                    model = Classifier(entry, endpoint)
            self._seats[name] = _Seat(entry, model, endpoint)

    # ---- called by the actor's thread -----------------------------------------------------------

    @property
    def pending(self) -> int:
        """Rollouts that :meth:`poll` will still tell of."""
        return len(self._awaited)

    @property
    def counters(self) -> dict[str, float]:
        """What happened so far, model by model; ``down`` is 1 while one is left alone."""
        found: dict[str, float] = {}
        for name, seat in self._seats.items():
            figures: dict[str, float] = {
                "judged": seat.judged, "failures": seat.failures, "unread": seat.model.unread, "seconds": seat.seconds,
            }  # fmt: skip
            if seat.endpoint is not None:
                figures |= {
                    "requests": seat.endpoint.requests, "retries": seat.endpoint.retries,
                    "down": float(seat.endpoint.is_down),
                }  # fmt: skip
            found |= {f"reward_{name}_{what}": value for what, value in figures.items()}
        return found

    def is_down(self, name: str) -> bool:
        """Whether the model ``name`` is left alone."""
        endpoint = self._seats[name].endpoint
        return endpoint is not None and endpoint.is_down

    def submit(self, owner: Any, names: Sequence[str], judged: Judged) -> None:
        """Ask the models ``names`` for ``owner``."""
        self._awaited[id(owner)] = owner
        self._loop.call_soon_threadsafe(self._begin, owner, tuple(names), judged)

    def poll(self) -> list[Verdict]:
        """What was said since; never waits."""
        found = []
        while not self._verdicts.empty():
            verdict = self._verdicts.get()
            if self._awaited.pop(id(verdict.owner), None) is not None:
                found.append(verdict)
        return found

    def drop(self, owner: Any) -> None:
        """Nobody waits for ``owner`` any more; one that is not asked about is no error."""
        if self._awaited.pop(id(owner), None) is not None:
            self._loop.call_soon_threadsafe(self._cancel, owner)

    def close(self) -> None:
        """Break off what is under way and end the thread."""
        if not self._loop.is_closed():
            try:
                self._run(self._end(), END_S)
            except TimeoutError:
                log.warning("requests to reward models do not end")
            for seat in self._seats.values():
                if (close := getattr(seat.model, "close", None)) is not None:
                    close()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(END_S)
            if not self._thread.is_alive():
                self._loop.close()

    # ---- on the event loop ----------------------------------------------------------------------

    def _begin(self, owner: Any, names: tuple[str, ...], judged: Judged) -> None:
        self._tasks[id(owner)] = asyncio.ensure_future(self._judge(owner, names, judged))

    def _cancel(self, owner: Any) -> None:
        task = self._tasks.pop(id(owner), None)
        if task is not None:
            task.cancel()

    async def _end(self) -> None:
        tasks = [*self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def _judge(self, owner: Any, names: tuple[str, ...], judged: Judged) -> None:
        said = await asyncio.gather(*(self._score(self._seats[name], judged) for name in names))
        scores = {name: word for name, word in zip(names, said, strict=True) if isinstance(word, float)}
        failures = {name: word for name, word in zip(names, said, strict=True) if isinstance(word, str)}
        self._tasks.pop(id(owner), None)
        self._verdicts.put(Verdict(owner, scores, failures))

    async def _score(self, seat: _Seat, judged: Judged) -> float | str:
        """A score, or why there is none."""
        deadline_s = self._section.deadline_s
        began = time.monotonic()
        try:
            async with asyncio.timeout(deadline_s):  # for one that is down to come back
                await seat.model.ready()
            async with seat.slots:
                began = time.monotonic()
                async with asyncio.timeout(deadline_s):
                    score = float(await seat.model.score(judged))
        except TimeoutError:
            down = seat.endpoint is not None and seat.endpoint.is_down
            seat.failures += 1
            return f"no score within reward.deadline_s={deadline_s:g}{', the model is down' if down else ''}"
        except TaskError as error:
            seat.failures += 1
            return str(error)
        except Exception as error:  # one answer's trouble is not the others'
            seat.failures += 1
            log.exception("a reward model")
            return f"{type(error).__name__}: {error}"
        seat.judged += 1
        seat.seconds += time.monotonic() - began
        return score
