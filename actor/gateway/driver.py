"""Agents at work: started for granted rollouts, stopped at their deadline, polled by the actor's loop.

::

    start -> waiting -> Agent in a thread -> its requests -> Ask -> engine -> answer
                          | returns, raises, or is late
                          +-> Ended: turns and channels
"""

import asyncio
import copy
import inspect
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from actor.engine.base import Completion
from actor.evaluation import EVALUATION_ID
from actor.gateway.chat import Limits
from actor.gateway.server import Ask, Gateway
from actor.gateway.template import ChatTemplate
from actor.rollout import Rollout, Turn
from actor.tasks.agent import AgentSession, AgentTask
from actor.tasks.foreign import words_of_failure
from common.config import RunConfig
from common.errors import ConfigError, TaskError

END_S = 2.0  # for stopped agents to be gone when the actor ends
CLIENTS = ("httpx", "httpx2")  # loggers of an agent's HTTP client, which would write a line a request into ours

log = logging.getLogger("actor.gateway")


@dataclass(frozen=True, eq=False)
class Asked:
    """A rollout's agent waits for a completion."""

    rollout: Rollout
    ask: Ask


@dataclass(frozen=True, eq=False)
class Ended:
    """A rollout's agent is done; ``error`` says why nothing came of it."""

    ask: ClassVar[None] = None
    rollout: Rollout
    turns: list[Turn]
    channels: dict[str, float]
    error: str


class _Agent:
    """One agent on one rollout, in a thread of its own that ends with it."""

    def __init__(self, rollout: Rollout, seat: int, deadline: float) -> None:
        self.rollout, self.seat, self.deadline = rollout, seat, deadline
        self.ask: Ask | None = None  # that it waits for
        self.channels: dict[str, float] = {}
        self.error = "it was broken off"
        self._lock = threading.Lock()
        self._stopped = False
        self._stop: Callable[[], Any] | None = None
        self._thread: threading.Thread | None = None

    def start(self, task: AgentTask, session: AgentSession, ended: "Callable[[_Agent], None]") -> None:
        """``ended`` is called in the thread."""
        name = f"agent-{self.rollout.request_id}-{self.rollout.sibling}"
        self._thread = threading.Thread(target=self._run, args=(task, session, ended), name=name, daemon=True)
        self._thread.start()

    def _run(self, task: AgentTask, session: AgentSession, ended: "Callable[[_Agent], None]") -> None:
        try:
            given = task.call(session)
            if inspect.isawaitable(given):
                given = asyncio.run(self._wait(given))
            self.channels = task.read_channels(given)
            self.error = ""
        except asyncio.CancelledError:
            self.error = "it was stopped"
        except (Exception, SystemExit) as error:  # noqa: BLE001  # an agent is foreign code
            self.error = words_of_failure(error)
        finally:
            ended(self)

    async def _wait(self, given: Any) -> Any:
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(given)
        with self._lock:
            self._stop = lambda: loop.call_soon_threadsafe(task.cancel)
            if self._stopped:
                task.cancel()
        try:
            return await task
        finally:
            with self._lock:
                self._stop = None

    def stop(self) -> None:
        """Cancel an async agent, kill a command; a function in a thread goes on until its next request fails."""
        with self._lock:
            self._stopped = True
            if self._stop is not None:
                self._stop()

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def join(self, timeout_s: float) -> None:
        """Wait for its thread."""
        if self._thread is not None:
            self._thread.join(timeout_s)


class Driver:
    """Every agent of one actor. Used by the actor's main thread alone.

    Raises TaskError or ConfigError for a task that cannot be served.
    """

    def __init__(self, config: RunConfig, task: AgentTask, cancel: Callable[[int, int], None]) -> None:
        """``cancel``: the engine's, for requests of agents that are gone."""
        if config.evaluation.prompts > task.held_out:
            raise ConfigError(
                f"evaluation.prompts={config.evaluation.prompts}: task.params.heldout={task.held_out} questions are "
                "held out"
            )
        self._config, self._task, self._cancel = config, task, cancel
        self._events: queue.SimpleQueue[Ask | tuple[_Agent, list[Turn]]] = queue.SimpleQueue()
        template = ChatTemplate(config.rollout_path, task.chat_template)
        self._gateway = Gateway(template, Path(config.rollout_path).name, task.port, self._events)
        self._waiting: deque[Rollout] = deque()
        self._running: dict[int, _Agent] = {}  # by seat, in the order of their deadlines
        self._seats: dict[tuple[int, int], int] = {}
        self._leaving: deque[_Agent] = deque()  # given up, their threads still there, oldest first
        self._next_seat = 0
        for client in CLIENTS:
            logging.getLogger(client).setLevel(logging.WARNING)
        log.info("agents are served at %s", self._gateway.url)

    @property
    def busy(self) -> bool:
        """Whether an agent is at work."""
        return bool(self._waiting or self._running)

    def start(self, rollouts: Sequence[Rollout]) -> None:
        """An agent for each, as soon as one of ``task.params.workers`` is free."""
        self._waiting.extend(rollouts)

    def poll(self) -> list[Asked | Ended]:
        """What happened since; never waits. Raises TaskError if too many agents cannot be stopped."""
        self._begin()  # before anything ends: what ends may take siblings that wait with it
        out: list[Asked | Ended] = []
        while not self._events.empty():
            event = self._events.get()
            if isinstance(event, Ask):
                if (agent := self._running.get(event.seat)) is not None:
                    agent.ask = event
                    out.append(Asked(agent.rollout, event))
                continue
            agent, turns = event
            if self._remove(agent):
                error = agent.error or ("" if turns else "it made no request")
                out.append(Ended(agent.rollout, turns, agent.channels, error))
        out += self._expire()
        return [event for event in out if event.ask is None or event.ask.seat in self._running]  # none asks and ends

    def _begin(self) -> None:
        limit = self._task.workers
        while self._waiting and len(self._running) < limit and len(self._running) + len(self._leaving) < 2 * limit:
            rollout = self._waiting.popleft()
            agent = _Agent(rollout, self._next_seat, time.monotonic() + self._task.deadline_s)
            self._next_seat += 1
            self._running[agent.seat] = agent
            self._seats[rollout.request_id, rollout.sibling] = agent.seat
            heldout = rollout.request_id >= EVALUATION_ID
            name = f"rollout {rollout.request_id}.{rollout.sibling}"
            key = self._gateway.open(agent.seat, name, self._limits(heldout), agent.deadline)
            question = copy.deepcopy(rollout.item.reference)  # its own: an agent may write into it
            session = AgentSession(self._gateway.url, key, question, "heldout" if heldout else "train")
            agent.start(self._task, session, self._ended)

    def _limits(self, heldout: bool) -> Limits:
        rollout = self._config.rollout
        evaluated = (self._config.evaluation.temperature,) if heldout else ()
        return Limits(
            temperatures=(rollout.temperature, *evaluated),
            max_tokens=rollout.max_tokens,
            max_turns=rollout.max_turns,
            max_length=rollout.max_length,
            top_logprobs=rollout.top_logprobs,
        )

    def _ended(self, agent: _Agent) -> None:
        """In the agent's thread."""
        self._gateway.leave(agent.seat, lambda turns: self._events.put((agent, turns)))

    def _expire(self) -> list[Asked | Ended]:
        now, late = time.monotonic(), list[Asked | Ended]()
        while self._running and (agent := next(iter(self._running.values()))).deadline <= now:
            reason = f"its agent did not end within task.params.deadline_s={self._task.deadline_s:g}"
            self._evict(agent, reason)
            late.append(Ended(agent.rollout, [], {}, reason))
        self._leaving = deque(agent for agent in self._leaving if agent.is_alive)
        workers, patience = self._task.workers, self._task.deadline_s
        if len(self._leaving) >= workers and self._leaving[workers - 1].deadline + patience < now:
            raise TaskError(
                f"{len(self._leaving)} agents still run {patience:g} s after their deadline, and a function cannot be "
                "stopped from outside: give it deadlines of its own, or run it as task.params.command"
            )
        return late

    def _remove(self, agent: _Agent) -> bool:
        """False if it was given up before."""
        if self._running.pop(agent.seat, None) is None:
            return False
        rollout = agent.rollout
        del self._seats[rollout.request_id, rollout.sibling]
        if agent.ask is not None:
            self._cancel(rollout.request_id, rollout.sibling)
        return True

    def _evict(self, agent: _Agent, reason: str) -> None:
        if self._remove(agent):
            self._gateway.evict(agent.seat, reason)
            agent.stop()
            self._leaving.append(agent)

    def answer(self, rollout: Rollout, completion: Completion) -> None:
        """What its agent asked for."""
        agent = self._running[self._seats[rollout.request_id, rollout.sibling]]
        assert agent.ask is not None
        self._gateway.answer(agent.ask, completion)
        agent.ask = None

    def drop(self, request_id: int, sibling: int, reason: str) -> None:
        """Nobody waits for this rollout any more; one that has ended is no error."""
        seat = self._seats.get((request_id, sibling))
        if seat is not None:
            self._evict(self._running[seat], reason)
        else:
            self._waiting = deque(r for r in self._waiting if (r.request_id, r.sibling) != (request_id, sibling))

    def close(self) -> None:
        """Stop every agent and the server."""
        self._waiting.clear()
        for agent in list(self._running.values()):
            self._evict(agent, "the actor ends")
        deadline = time.monotonic() + END_S
        for agent in self._leaving:
            agent.join(max(0.0, deadline - time.monotonic()))
        self._gateway.close()
