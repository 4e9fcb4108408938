"""A version from the actor's memory into one of its servers, through a process group of the two.

::

    join (once) -> pause -> begin -> [one broadcast per bucket | /update_weights_from_distributed] -> end -> continue

The actor is rank 0 and the server's tensor-parallel ranks are the others. The learner's own
broadcast has ended and its digest was compared before this begins, so a learner that dies or hangs
never reaches a server (docs/decisions/0015).
"""

import asyncio
import contextlib
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from actor.engine.client import Client, ServerLostError, within
from common.errors import EngineError
from common.weights import Bucket, brief, store_prefix


@dataclass(frozen=True, eq=False)
class Version:
    """A complete set of weights in the actor's memory."""

    number: int
    tag: str  # what servers call it
    buckets: Sequence[tuple[Bucket, torch.Tensor]]  # layout and uint8 bytes, in the order they are sent

    @property
    def nbytes(self) -> int:
        """Of all buckets."""
        return sum(bucket.nbytes for bucket, _ in self.buckets)


class TornError(ServerLostError):
    """Some buckets are in the server and some are not: it must not sample before it has a whole version."""


class Pusher:
    """The actor's end of all groups with its servers."""

    def __init__(self, deadline_s: float, least_mb_s: float, name: str) -> None:
        self._deadline_s, self._least = deadline_s, least_mb_s * (1 << 20)
        self._name = f"{name}/{secrets.token_hex(4)}"  # a server remembers the groups of actors that have ended
        self._store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=deadline_s)
        )
        self._groups: dict[str, tuple[str, Any]] = {}  # server -> name of the group, the group
        self._joined = 0

    def allowed_s(self, version: Version) -> float:
        """What a push may take."""
        return self._deadline_s + version.nbytes / self._least

    async def push(self, client: Client, ranks: int, version: Version, mode: str) -> float:
        """Bring ``version`` to a server of ``ranks``; returns the seconds for which it did not sample.

        Raises EngineError. The server then samples on under its old version, unless the error is a
        :class:`TornError`.
        """
        allowed = self.allowed_s(version)
        name, group = await self._join(client, ranks, allowed)
        loop = asyncio.get_running_loop()
        began = loop.time()
        sent = 0
        await client.pause(mode, allowed)
        try:
            session = await client.begin_update(allowed)
            for bucket, flat in version.buckets:
                await self._send(client, name, group, bucket, flat, allowed, self._fields(version, sent, mode))
                sent += 1
            if session:
                await client.end_update(allowed)
        except BaseException as error:
            self.leave(client.name)  # ends a broadcast that the server may still wait in
            await self._recover(client, name, torn=sent > 0, why=error)
            raise
        await client.resume()
        return loop.time() - began

    @staticmethod
    def _fields(version: Version, sent: int, mode: str) -> dict[str, Any]:
        """What only the last call says: the new version's name, and that caches of the old one are void."""
        last = sent == len(version.buckets) - 1
        return {"weight_version": version.tag if last else None, "flush_cache": last and mode != "in_place"}

    async def _send(
        self, client: Client, name: str, group: Any, bucket: Bucket, flat: torch.Tensor, allowed: float, last: Any
    ) -> None:
        slots = bucket.slots
        fields = {
            "names": [slot.name for slot in slots],
            "dtypes": [slot.dtype for slot in slots],
            "shapes": [list(slot.shape) for slot in slots],
            "group_name": name,
            "load_format": "flattened_bucket",
            **last,
        }

        def broadcast() -> None:
            try:
                group.broadcast([flat]).wait()
            except RuntimeError as error:
                raise ServerLostError(f"{client.name} left a broadcast: {brief(error)}") from error

        sending = in_thread(broadcast)
        taking = asyncio.ensure_future(client.must("/update_weights_from_distributed", fields, allowed))
        try:
            await taking
            await within(allowed, sending, f"{client.name} in a broadcast of {bucket.nbytes >> 20} MB")
        finally:
            taking.cancel()

    async def _recover(self, client: Client, group: str, torn: bool, why: BaseException) -> None:
        """Close the session and leave the group; sample on only if no bucket is in."""
        try:
            await client.end_update(self._deadline_s)
            await client.call("/destroy_weights_update_group", {"group_name": group}, self._deadline_s)
            if not torn:
                await client.resume()
        except ServerLostError:
            return  # the caller will notice
        except Exception as error:  # noqa: BLE001  # a server that refuses its own clean-up
            raise TornError(f"{client.name} cannot leave a broken update: {error}") from why
        if torn:
            raise TornError(f"{client.name} has parts of a version that broke off: {why}") from why

    async def _join(self, client: Client, ranks: int, allowed: float) -> tuple[str, Any]:
        if client.name in self._groups:
            return self._groups[client.name]
        self._joined += 1
        name = f"{self._name}/{self._joined}"
        world = 1 + ranks
        timeout = timedelta(seconds=allowed)
        store = dist.PrefixStore(store_prefix(name, "cpu"), self._store)
        ours = in_thread(lambda: dist.ProcessGroupGloo(store, 0, world, timeout))
        fields = {
            "master_address": "127.0.0.1",
            "master_port": self._store.port,
            "rank_offset": 1,
            "world_size": world,
            "group_name": name,
            "backend": "gloo",
        }
        try:
            await client.must("/init_weights_update_group", fields, allowed)
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
                await client.call("/destroy_weights_update_group", {"group_name": held[0]})
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
