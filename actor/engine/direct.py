"""Servers as members of the learner's own weights group (``weights.route=direct``): nothing passes the actor.

The way for GPUs, where buckets go from the learner's memory to every server's by NCCL. The actor
only holds the ends together: it says Ready for all ranks of its servers that lack the version and,
when told Go, has them join, pause, receive and continue. What it cannot do here is compare the
bytes' digest, which SGLang does not know; the servers' checksums are compared with each other.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

from actor.engine.push import Version, join, quit_group, update
from actor.engine.server import Server
from actor.engine.sglang import SglangEngine
from common.errors import EngineError
from common.trace import Tracer, silent
from common.weights import StagedWeights, group_name, plan_buckets
from common.wire import Applied, Go, Prepare, Publish, Ready, ReceiveFailed

log = logging.getLogger("actor.weights")


class DirectReceiver:
    """An actor's side of the handshake for its servers; the surface of :class:`common.weights.WeightReceiver`."""

    def __init__(
        self, send: Callable[[Any], None], engine: SglangEngine, mode: str, tracer: Tracer | None = None
    ) -> None:
        self._send, self._engine, self._mode = send, engine, mode
        self._tracer = tracer or silent()
        self._prepared: tuple[Prepare, Sequence[Server]] | None = None
        self._under_way: Any = None
        self._owed: Prepare | None = None  # it came while a collective was under way
        self._groups: dict[str, tuple[str, int]] = {}  # server -> the group that it is in, and in which of its lives

    def on_prepare(self, message: Prepare) -> None:
        """Say how many ranks can receive now."""
        if self._under_way is not None and not self._under_way.done():
            self._owed = message
            return
        publish = Publish(**message.publish)
        wrong = self._engine.differs({name: tuple(shape) for name, _, shape in publish.tensors})
        if wrong:
            self._send(ReceiveFailed(message.epoch, publish.version, wrong))
        servers = () if wrong else self._engine.lacking(publish.version)
        if newcomers := self._newcomers(group_name(publish.port, message.epoch), servers):
            self._send(ReceiveFailed(message.epoch, publish.version, f"{newcomers} would come to a group that has met"))
        self._prepared = (message, servers)
        self._send(Ready(message.epoch, publish.version, sum(server.ranks for server in servers)))

    def _newcomers(self, group: str, servers: Sequence[Server]) -> str:
        """Names of ``servers`` that are not in ``group``, where servers of ours are or have been; "" if none is.

        Whoever joins a group that others have formed waits for them until its deadline.
        """
        if all(held != group for held, _ in self._groups.values()):
            return ""
        return ", ".join(s.name for s in servers if self._groups.get(s.name) != (group, s.lives))

    def on_go(self, message: Go) -> None:
        """Have the servers receive, in the background."""
        prepared, self._prepared = self._prepared, None
        if prepared is None or prepared[0].epoch != message.epoch:
            self._send(ReceiveFailed(message.epoch, message.version, "Go without a matching Prepare"))
            return
        self._under_way = self._engine.run(self._receive(*prepared))

    def staged(self) -> StagedWeights | None:
        """Versions go to the servers without a stop here."""
        if self._owed is not None and self._under_way.done():
            owed, self._owed = self._owed, None
            self.on_prepare(owed)
        return None

    def applied(self, staged: StagedWeights, *, adopted: bool = False, copied: bool = False) -> None:
        """Never called: nothing is staged."""

    def failed(self, staged: StagedWeights, reason: str) -> None:
        """Never called: nothing is staged."""

    def close(self) -> None:
        """A collective under way is abandoned with the loop."""

    # ---- on the engine's loop --------------------------------------------------------------------

    async def _receive(self, prepare: Prepare, servers: Sequence[Server]) -> None:
        publish = Publish(**prepare.publish)
        buckets = plan_buckets(publish.tensors, publish.bucket_bytes)
        version = Version(publish.version, self._engine.tag(publish.version), [(bucket, None) for bucket in buckets])
        work, first, began = [], prepare.rank, self._tracer.now()
        for server in servers:
            work.append(server.receive(version, self._taking(prepare, server, first, version)))
            first += server.ranks
        errors = [error for error in await asyncio.gather(*work) if error]
        self._tracer.span("weights", "receive", began, self._tracer.now(), version=publish.version)
        if len(errors) < len(servers):
            self._engine.expect(version)
            self._send(Applied(prepare.epoch, publish.version, ""))
        else:
            self._send(ReceiveFailed(prepare.epoch, publish.version, "; ".join(errors)[:500]))

    def _taking(self, prepare: Prepare, server: Server, rank: int, version: Version) -> Callable[[], Any]:
        publish, group = prepare.publish, group_name(prepare.publish["port"], prepare.epoch)
        allowed = self._engine.allowed_s(version) + publish["seconds"]

        async def take() -> float:
            client, mine = server.client, (group, server.lives)
            try:
                held = self._groups.get(server.name)
                if held != mine:
                    if held is not None:
                        await quit_group(client, held[0])  # unknown to a new process
                    where = publish["host"], publish["port"], rank, prepare.world, publish["backend"]
                    await join(client, group, *where, allowed)
                    self._groups[server.name] = mine
                return await update(client, group, version, self._mode, allowed, server.torn)
            except EngineError:
                self._groups.pop(server.name, None)
                raise

        return take
