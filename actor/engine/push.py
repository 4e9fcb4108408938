"""A version into a server: from the actor's memory through a group of the two, or from the learner itself.

::

    join (once) -> pause -> begin -> [one broadcast per bucket | /update_weights_from_distributed] -> end -> continue

:class:`Pusher` is the first way (``weights.route=relay``): the actor is rank 0, the server's ranks are
the others. The learner's own broadcast has ended and its digest was compared before this begins, so
a learner that dies or hangs never reaches a server. :mod:`actor.engine.direct` is the second
(docs/decisions/0015).
"""

import asyncio
import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from actor.engine.client import SHORT_S, Client, ServerLostError, ServerRefusedError, within
from common.config import MEGABYTE
from common.deadlines import brief
from common.errors import EngineError
from common.weights import Bucket, store_prefix

NOT_RECEIVED = "Failed to receive weights"  # SGLang's words for a broadcast that broke: nothing was loaded

log = logging.getLogger("actor.engine")


@dataclass(frozen=True, eq=False)
class Version:
    """A complete set of weights in the actor's memory."""

    number: int
    tag: str  # what servers call it
    buckets: Sequence[tuple[Bucket, torch.Tensor | None]]  # layout and uint8 bytes (None: the learner's), in order

    @property
    def is_here(self) -> bool:
        """Whether its bytes are in the actor's memory, and not the learner's alone."""
        return all(flat is not None for _, flat in self.buckets)

    @property
    def nbytes(self) -> int:
        """Of all buckets."""
        return sum(bucket.nbytes for bucket, _ in self.buckets)


class TornError(ServerLostError):
    """Some buckets are in the server and some are not: it must not sample before it has a whole version."""

    def __init__(self, message: str, lost: bool) -> None:
        """``lost``: it does not answer either."""
        super().__init__(message)
        self.lost = lost


class Pusher:
    """The actor's end of all groups with its servers."""

    def __init__(self, deadline_s: float, least_mb_s: float, name: str) -> None:
        self._deadline_s, self._least = deadline_s, least_mb_s * MEGABYTE
        self._name = f"{name}/{secrets.token_hex(4)}"  # a server remembers the groups of actors that have ended
        self._store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=deadline_s)
        )
        self._groups: dict[str, tuple[str, Any]] = {}  # server -> name of the group, the group
        self._joined = 0

    def allowed_s(self, version: Version) -> float:
        """What an update may take."""
        return self._deadline_s + version.nbytes / self._least

    async def push(self, client: Client, ranks: int, version: Version, mode: str, torn: bool) -> float:
        """Bring ``version`` to a server of ``ranks``; returns the seconds for which it did not sample.

        ``torn``: it has part of a version. Raises EngineError: the server then samples on as before,
        unless the error is a :class:`TornError`.
        """
        allowed = self.allowed_s(version)
        name, group = await self._join(client, ranks, allowed)

        def broadcast(flat: torch.Tensor) -> None:
            try:
                group.broadcast([flat]).wait()
            except RuntimeError as error:
                raise ServerLostError(f"{client.name} left a broadcast: {brief(error)}") from error

        try:
            return await update(
                client, name, version, mode, allowed, torn, lambda flat: in_thread(lambda: broadcast(flat))
            )
        except BaseException:
            self.leave(client.name)
            raise

    async def _join(self, client: Client, ranks: int, allowed: float) -> tuple[str, Any]:
        if client.name in self._groups:
            return self._groups[client.name]
        self._joined += 1
        name = f"{self._name}/{self._joined}"
        world, timeout = 1 + ranks, timedelta(seconds=allowed)
        store = dist.PrefixStore(store_prefix(name, "cpu"), self._store)
        ours = in_thread(lambda: dist.ProcessGroupGloo(store, 0, world, timeout))
        await join(client, name, "127.0.0.1", self._store.port, 1, world, "gloo", allowed)
        try:
            group = await within(allowed, ours, f"{client.name} joining a weights group")
        except RuntimeError as error:
            raise ServerLostError(f"{client.name} did not join a weights group: {brief(error)}") from error
        self._groups[client.name] = (name, group)
        return name, group

    async def part(self, client: Client) -> None:
        """Leave the group with a server that goes on without us."""
        held = self._groups.get(client.name)
        if held is not None:
            with contextlib.suppress(EngineError):
                await quit_group(client, held[0])
            self.leave(client.name)

    def leave(self, server: str) -> None:
        """Forget the group with a server; its sockets close."""
        held = self._groups.pop(server, None)
        if held is not None:
            held[1].abort()

    def close(self) -> None:
        """Leave every group."""
        for server in list(self._groups):
            self.leave(server)


async def join(
    client: Client, group: str, host: str, port: int, rank: int, world: int, backend: str, allowed: float
) -> None:
    """The server's ranks become ``[rank, ...)`` of a group of ``world`` whose rank 0 keeps the store at host:port."""
    fields = {
        "master_address": host,
        "master_port": port,
        "rank_offset": rank,
        "world_size": world,
        "group_name": group,
        "backend": backend,
    }
    await client.must("/init_weights_update_group", fields, allowed)


async def quit_group(client: Client, group: str) -> None:
    """The server forgets ``group``; one that it does not know is no error."""
    with contextlib.suppress(ServerRefusedError):
        await client.call("/destroy_weights_update_group", {"group_name": group})


async def update(
    client: Client,
    group: str,
    version: Version,
    mode: str,
    allowed: float,
    torn: bool,
    broadcast: "Callable[[torch.Tensor], asyncio.Future[Any]] | None" = None,
) -> float:
    """The server takes ``version`` from rank 0 of ``group``; returns the seconds for which it did not sample.

    ``torn``: an earlier update left part of a version in it. ``broadcast`` sends one bucket if we are
    rank 0. Raises EngineError: :class:`TornError` if the server has some buckets and not all (it then
    stays paused), else it samples on as before.
    """
    began = time.monotonic()
    inside = torn  # whether something of a version may be in the server
    await client.pause(mode, allowed)
    try:
        session = await client.begin_update(allowed)
        for number, (bucket, flat) in enumerate(version.buckets, 1):
            last = number == len(version.buckets)
            fields = {
                "names": [slot.name for slot in bucket.slots],
                "dtypes": [slot.dtype for slot in bucket.slots],
                "shapes": [list(slot.shape) for slot in bucket.slots],
                "group_name": group,
                "load_format": "flattened_bucket",
                "weight_version": version.tag if last else None,
                "flush_cache": last and mode != "in_place",  # together they are refused after the fact
            }
            try:
                await take_bucket(client, fields, allowed, broadcast(flat) if broadcast and flat is not None else None)
            except ServerRefusedError as error:  # only what was not received was not loaded either
                inside = inside or NOT_RECEIVED not in str(error)
                raise
            except BaseException:
                inside = True  # it may be loading it still
                raise
            inside = True
        if session:
            await client.end_update(allowed)
    except asyncio.CancelledError:
        raise  # we are ending; a server of ours ends too, and another is given a model by whoever comes next
    except BaseException as error:
        await _recover(client, group, inside, error)
        raise
    await client.resume()
    return time.monotonic() - began


async def take_bucket(
    client: Client, fields: dict[str, Any], allowed: float, sending: "asyncio.Future[Any] | None"
) -> None:
    """One call of the server, and our side of its broadcast."""
    await client.must("/update_weights_from_distributed", fields, allowed)
    if sending is not None:
        await within(allowed, sending, f"{client.name} in a broadcast")


async def _recover(client: Client, group: str, torn: bool, why: BaseException) -> None:
    """Close the session and leave the group; sample on only if nothing is in."""
    try:
        await client.end_update(SHORT_S)
        await quit_group(client, group)
        if not torn:
            await client.resume()
    except EngineError as error:
        torn = True
        log.warning("%s cannot leave a broken update: %s", client.name, error)
    if torn:
        lost = isinstance(why, ServerLostError)
        raise TornError(f"{client.name} may have parts of a version that broke off: {why}", lost) from why


def in_thread(work: Callable[[], Any]) -> "asyncio.Future[Any]":
    """``work()`` in a thread of its own, which does not hold up the process's end."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())  # whoever waits may be gone

    def settle(result: Any, error: Exception | None) -> None:
        if not future.done():
            future.set_result(result) if error is None else future.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except Exception as caught:  # noqa: BLE001  # handed to whoever waits
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="push", daemon=True).start()
    return future
