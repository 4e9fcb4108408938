"""Samples in the queues of their homes, and when each may be sent. Pure; servers are only looked at.

::

    place -> queue of the key's home -> ready, while its server keeps up -> sent -> answered
               ^ its server is lost, refuses or is doubted, or another idles: placed again
"""

import asyncio
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from actor.engine.base import SampleRequest
from actor.engine.pacing import Pace
from actor.engine.reply import Piece
from actor.engine.routing import Router
from actor.engine.server import Server, State

REFUSALS = 3  # looks in a row behind which a server did nothing but refuse, until it has failed
REFUSED_REQUESTS = 2  # and of so many requests
STEAL = 2  # samples that must wait at one target before an idle one takes a key from it

log = logging.getLogger("actor.engine")


@dataclass(eq=False)
class Sample:
    """One sibling on its way."""

    request: SampleRequest
    sibling: int
    pieces: list[Piece] = field(default_factory=list)
    sampled: int = 0  # tokens of the pieces
    tries: int = 0  # pieces lost with a server or untrue
    empty: int = 0  # aborts in a row that brought no token
    home: str = ""  # the target in whose queue it was last put
    sent_to: "Target | None" = None  # whose request is under way
    serial: int = 0  # of the request under way: a reply to an earlier one is not ours any more
    task: "asyncio.Future[Any] | None" = None
    updates: int = 0  # of the server that it was sent to, when it was

    @property
    def left(self) -> int:
        """Tokens that may still be sampled."""
        return self.request.max_tokens - self.sampled

    def answered(self) -> "Target":
        """Nothing of it is under way any more; returns whom it had been sent to."""
        target, self.sent_to, self.task, self.serial = self.sent_to, None, None, 0
        assert target is not None
        target.under_way -= 1
        return target


@dataclass(eq=False)
class Target:
    """A serving server, or one data-parallel rank of it."""

    name: str
    server: Server
    rank: int | None
    pace: Pace
    waiting: deque[Sample] = field(default_factory=deque)
    under_way: int = 0
    seen: int = 0  # looks at the server's load that the pace has had
    doubted: int = -1  # looks that there had been when a request to it failed; it gets none before the next
    refused: int = 0  # looks in a row behind which it did nothing but refuse
    refusers: set[int] = field(default_factory=set)  # whose requests those were

    @property
    def load(self) -> int:
        """Samples that it carries or will."""
        return self.under_way + len(self.waiting)

    @property
    def trusted(self) -> bool:
        """Whether it has been heard of since a request to it failed."""
        return self.doubted < self.server.loads

    @property
    def idle(self) -> bool:
        """Whether it could do more than waits for it; one that refuses what it has cannot."""
        return not self.waiting and not self.refused and self.under_way < self.pace.limit

    def doubt(self) -> None:
        """A request to it failed."""
        self.doubted = self.server.loads

    def refuses(self, request_id: int, busy: bool) -> bool:
        """A request was refused, by its status for no fault of its own. Returns whether nothing else came for too long.

        What is refused while its server is ``busy`` with others says no more than that it is full, and what
        befalls one request alone may be that request's fault.
        """
        self.doubt()
        self.refused += not busy
        self.refusers.add(request_id)
        if self.refused < REFUSALS or len(self.refusers) < REFUSED_REQUESTS:
            return False
        self.doubted += 1  # it is looked at once more before it ends
        return True

    def answers(self, sample: Sample, tokens: int) -> None:
        """``sample`` came back with ``tokens``; with none it was aborted, which updates alone may do."""
        server = self.server
        if tokens:
            self.refused = 0
            self.refusers.clear()
        elif sample.updates == server.updates and not server.updating:
            self.doubt()


class Targets:
    """All of them, by name, and the samples that wait for there to be any."""

    def __init__(self, concurrency: int, most: int) -> None:
        """``concurrency`` of each target, 0 lets it be found; never above ``most``."""
        self.router = Router()
        self._concurrency, self._most = concurrency, most
        self._by_name: dict[str, Target] = {}
        self._homeless: deque[Sample] = deque()

    def __iter__(self) -> Iterator[Target]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    def follow(self, servers: Sequence[Server], observe: bool) -> None:
        """Targets come with their server's SERVING and go with anything else; ``observe`` how loaded they are."""
        for server in servers:
            wanted = _names(server) if server.state == State.SERVING else {}
            for target in [t for t in self if t.server is server and t.name not in wanted]:
                del self._by_name[target.name]
                for sample in target.waiting:
                    self.place(sample)
            for name, rank in wanted.items():
                if name not in self._by_name:
                    self._by_name[name] = Target(name, server, rank, Pace(self._concurrency, self._most))
                target = self._by_name[name]
                if observe and server.load is not None and target.seen != server.loads:
                    target.seen = server.loads
                    target.pace.observe(server.load, target.under_way)
        if self._by_name and self._homeless:
            waiting, self._homeless = self._homeless, deque()
            for sample in waiting:
                self.place(sample)

    def place(self, sample: Sample) -> None:
        """Into the queue of its home."""
        if not self._by_name:
            sample.home = ""
            self._homeless.append(sample)
            return
        trusted = [target for target in self if target.trusted]
        loads = {target.name: target.load for target in trusted or self}
        sample.home = self.router.place(sample.request.request_id, loads)
        self._by_name[sample.home].waiting.append(sample)

    def ready(self) -> Iterator[tuple[Target, Sample]]:
        """Every sample that may be sent now, taken from its queue."""
        for target in self:
            if target.server.state != State.SERVING or not target.trusted:
                continue
            if target.idle:
                self._steal(target)
            while target.waiting and target.under_way < target.pace.limit:
                yield target, target.waiting.popleft()

    def _steal(self, idle: Target) -> None:
        """Take a whole key from the longest queue rather than idle."""
        longest = max(self, key=lambda target: len(target.waiting))
        if len(longest.waiting) < STEAL:
            return
        key = longest.waiting[-1].request.request_id
        self.router.move(key, idle.name)
        kept: deque[Sample] = deque()
        for sample in longest.waiting:
            moves = sample.request.request_id == key
            sample.home = idle.name if moves else sample.home
            (idle.waiting if moves else kept).append(sample)
        longest.waiting = kept

    def forget(self, sample: Sample) -> None:
        """It need not wait any more."""
        home = self._by_name.get(sample.home)
        for waiting in (self._homeless, *([home.waiting] if home is not None else [])):
            if sample in waiting:
                waiting.remove(sample)

    def clear(self) -> None:
        """Nothing waits any more."""
        self._homeless.clear()
        for target in self:
            target.waiting.clear()


def _names(server: Server) -> dict[str, int | None]:
    """Targets of a server: itself, or its ranks."""
    ranks = server.identity.data_parallel if server.identity is not None else 1
    return {server.name: None} if ranks == 1 else {f"{server.name}.{rank}": rank for rank in range(ranks)}
