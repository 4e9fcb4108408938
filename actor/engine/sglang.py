"""Sampling on real SGLang servers: token ids in, token ids out, log q and versions as the servers log them.

::

    add -> home of its key (actor.engine.routing) -> sent while the server keeps up (actor.engine.pacing)
        -> reply (actor.engine.reply) -> Completion
             | aborted by an update: the tokens are kept, the rest is asked for as a further piece
             | server lost or refuses, or reply untrue: all of it is thrown away and sampled again elsewhere

Servers live on an event loop in a thread (actor.engine.server); this object belongs to the actor's
main thread, which reads replies there, so that nothing heavy runs on the loop.
"""

import asyncio
import contextlib
import hashlib
import logging
import queue
import threading
from collections import Counter
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import torch

from actor.engine.base import Completion, Failure, Loaded, SampleRequest, check_request
from actor.engine.client import ServerLostError, ServerRefusedError
from actor.engine.loading import differing, read_model_facts
from actor.engine.pieces import completion_of, fields_of, until_end, versions_of
from actor.engine.push import Pusher, Version
from actor.engine.reply import Asked, Piece, read_piece
from actor.engine.server import Server, State
from actor.engine.targets import Sample, Target, Targets
from common.config import RunConfig
from common.errors import DataError, EngineError
from common.routing import read_routing
from common.trace import Tracer, silent
from common.weights import Bucket

END_S = 15.0  # for the servers to be stopped
COUNTED = (
    "requests", "requests_failed", "replies_refused", "retries", "resumed", "prompt_tokens", "cached_tokens",
)  # fmt: skip
MARGIN = 2  # tokens by which SGLang cuts requests short of its context, without a word
MOST_EMPTY = 50  # aborts without a token before a rollout is tried elsewhere

log = logging.getLogger("actor.engine")


class SglangEngine:
    """Samples on the servers of ``config.engine``; see :class:`actor.engine.base.Engine`.

    Raises EngineError if none of them can be used.
    """

    def __init__(self, config: RunConfig, name: str, tracer: Tracer | None = None) -> None:
        """``name`` of the actor."""
        self.config, self.name = config, name
        self._tracer = tracer or silent()
        self._model = read_model_facts(Path(config.rollout_path), config.rollout.max_length, MARGIN)
        self.vocab_size, self._stop_ids = self._model.vocab_size, self._model.stop_ids
        self.eos_id = self._stop_ids[0] if self._stop_ids else -1
        routing = read_routing(config)
        self._routed = (routing.sparse, routing.per_token) if routing else ((), 0)
        place = hashlib.blake2b(f"{config.run.path.absolute()}".encode(), digest_size=4).hexdigest()
        self._tag_prefix = f"{config.run.name}-{place}-"  # so that no other run's versions are taken for ours
        self.device = torch.device("cpu")
        self._counters: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))
        self._targets = Targets(config.engine.concurrency, config.actor.max_sequences)
        self._samples: dict[tuple[int, int], Sample] = {}
        self._ended: list[Completion | Failure] = []
        self._events: queue.SimpleQueue[tuple[Sample, int, bytes | EngineError] | None] = queue.SimpleQueue()
        self._serial = 0
        self._held: Version | None = None
        self._loading = False
        self._loaded_version = 0
        self._refused: Loaded | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()
        self._lives: dict[str, int] = {}  # server -> which of its lives was last seen
        self._servers: list[Server] = self._run(self._begin())

    def _run(self, work: Coroutine[Any, Any, Any], timeout_s: float = END_S) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    async def _begin(self) -> list[Server]:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60.0))
        weights, engine = self.config.weights, self.config.engine
        self._pusher = Pusher(weights.deadline_s, weights.least_mb_s, self.name)
        addresses = engine.addresses or ("",) * engine.launch
        servers: list[Server] = []
        for index, address in enumerate(addresses):
            label = f"{self.name}/server-{index}"
            server = Server(
                self.config, label, address, self._session, self._pusher, self.tag, self._model,
                lambda: self._events.put(None), index, lambda: servers,
            )  # fmt: skip
            servers.append(server)
            server.begin()
        return servers

    def tag(self, version: int) -> str:
        """What servers call a version of this run."""
        return f"{self._tag_prefix}{version}"

    # ---- what the actor sees ---------------------------------------------------------------------

    @property
    def version(self) -> int:
        """The oldest that a serving server samples from; -1 while none serves."""
        return min((server.version for server in self._servers if server.state == State.SERVING), default=-1)

    @property
    def busy(self) -> bool:
        """Whether anything is in flight or a server is not as it should be."""
        return bool(self._samples) or self._loading or any(s.state != State.SERVING for s in self._servers)

    @property
    def in_flight(self) -> int:
        """Siblings that have not been returned."""
        return len(self._samples)

    @property
    def slots(self) -> int:
        """What its servers are given at once, as they find it (engine.concurrency)."""
        return sum(target.pace.limit for target in self._targets)

    @property
    def counters(self) -> dict[str, float]:
        """Requests, tokens, retries, and how the servers are."""
        serving = [server for server in self._servers if server.state == State.SERVING]
        return {
            **{name: float(value) for name, value in self._counters.items()},
            "servers": float(len(self._servers)),
            "servers_serving": float(len(serving)),
            "server_restarts": float(sum(server.restarts for server in self._servers)),
            "seconds_paused": sum(server.paused_s for server in self._servers),
            "concurrency": float(self.slots),
            "routes_moved": float(self._targets.router.moved),
            "routes_displaced": float(self._targets.router.displaced),
        }

    @property
    def servers(self) -> Sequence[Server]:
        """For reports and tests."""
        return self._servers

    def add(self, request: SampleRequest) -> None:
        """Queue a request. Raises EngineError, naming it, if it can never be sampled."""
        check_request(request, self.vocab_size, self.config.rollout.max_length, self.config.actor.max_sequences)
        for index in range(request.samples):
            sample = Sample(request, request.first_sibling + index)
            self._samples[request.request_id, sample.sibling] = sample
            self._targets.place(sample)

    def step(self, wait_s: float = 0.0) -> Sequence[Completion | Failure]:
        """Read what has been answered and send what may be sent; returns what ended."""
        self._drain(wait_s)
        self._check_floor()
        self._forsake_the_lost()
        self._targets.follow(self._servers, observe=not self._loading)
        for target, sample in self._targets.ready():
            self._send(target, sample)
        ended, self._ended = self._ended, []
        return ended

    def cancel(self, request_id: int, sibling: int) -> None:
        """Forget one sibling."""
        sample = self._samples.pop((request_id, sibling), None)
        if sample is None:
            return
        self._cancel(sample)
        self._targets.forget(sample)

    def abort(self) -> None:
        """Forget everything in flight."""
        for sample in list(self._samples.values()):
            self._cancel(sample)
        self._samples.clear()
        self._targets.clear()

    @property
    def holds(self) -> int:
        """The version that the broker is told: with ``weights.route=direct`` the oldest of a server that lives.

        While none does, the newest: there is nobody to send it to.
        """
        if self.config.route == "relay":
            return self._loaded_version
        alive = (State.STALE, State.SYNCED, State.SERVING)
        newest = self._held.number if self._held is not None else 0
        return min((server.version for server in self._servers if server.state in alive), default=newest)

    def lacking(self, version: int) -> Sequence[Server]:
        """Servers that live and do not have ``version``."""
        return [s for s in self._servers if s.state in (State.STALE, State.SERVING) and s.version < version]

    def differs(self, tensors: dict[str, tuple[int, ...]]) -> str:
        """How the tensors of a version (name -> shape) differ from this model's; "" if they do not."""
        return differing(self._model.shapes, tensors, self.config.rollout_frozen)

    def run(self, work: Coroutine[Any, Any, None]) -> Any:
        """Start ``work`` on the engine's loop; returns its future."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def expect(self, version: Version) -> None:
        """On the loop: servers without ``version`` do not serve once they have to start anew."""
        self._held = version
        for server in self._servers:
            server.aim(version)

    def allowed_s(self, version: Version) -> float:
        """What an update may take."""
        return self._pusher.allowed_s(version)

    def load(self, version: int, buckets: Sequence[tuple[Bucket, torch.Tensor]]) -> None:
        """Push a version to every server; each goes on sampling as soon as it has it."""
        tensors = {slot.name: slot.shape for bucket, _ in buckets for slot in bucket.slots}
        wrong = self.differs(tensors)
        if wrong:  # a server would pass over what it does not know and say that all is well
            self._refused = Loaded(version, f"version {version}: {wrong}")
            return
        self._held = Version(version, self.tag(version), buckets)
        self._loading = True
        held = self._held

        def aim() -> None:
            for server in self._servers:
                server.aim(held)

        self._loop.call_soon_threadsafe(aim)

    def loaded(self) -> Loaded | None:
        """In use once every server that serves has it, and at least one does."""
        if self._refused is not None:
            refused, self._refused = self._refused, None
            return refused
        if not self._loading or self._held is None:
            return None
        number = self._held.number
        if not all(server.settled for server in self._servers):
            return None
        if any(server.state == State.SERVING and server.version == number for server in self._servers):
            self._loading, self._loaded_version = False, number
            return Loaded(number, keeps=True)
        return None  # none serves now; those that come back start from it

    def close(self) -> None:
        """Stop what we started."""

        async def end() -> None:
            await asyncio.gather(*(server.end() for server in self._servers), return_exceptions=True)
            self._pusher.close()
            await self._session.close()

        with contextlib.suppress(TimeoutError):
            self._run(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=1.0)
        if not self._thread.is_alive():
            self._loop.close()

    # ---- servers ---------------------------------------------------------------------------------

    def _check_floor(self) -> None:
        """Raise EngineError once too few servers can ever serve again."""
        least = self.config.engine.least_servers
        hopeful = [server for server in self._servers if server.state != State.GONE]
        if len(hopeful) < least:
            reasons = "; ".join(server.why for server in self._servers if server.state == State.GONE)
            raise EngineError(
                f"{self.name}: {len(hopeful)} of {len(self._servers)} servers are left, "
                f"engine.least_servers={least} are needed: {reasons}"
            )

    def _forsake_the_lost(self) -> None:
        """What an earlier life of a server was sampling is sampled again."""
        for server in self._servers:
            if server.state not in (State.LOST, State.GONE) and server.lives == self._lives.get(server.name):
                continue
            self._lives[server.name] = server.lives
            for sample in [s for s in self._samples.values() if s.sent_to is not None and s.sent_to.server is server]:
                self._cancel(sample)
                self._retry(sample, f"{server.name} was lost")

    # ---- requests --------------------------------------------------------------------------------

    def _send(self, target: Target, sample: Sample) -> None:
        self._serial += 1
        sample.serial, serial = self._serial, self._serial
        target.under_way += 1
        sample.sent_to, sample.updates = target, target.server.updates
        rid = f"{self.name}.{serial}"
        fields = fields_of(sample, target, rid, self._stop_ids, routed=bool(self._routed[0]))
        body = orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY)
        client, timeout = target.server.client, self.config.engine.request_timeout_s

        async def ask() -> None:
            try:
                answer: bytes | EngineError = await client.send("/generate", body, timeout)
            except EngineError as error:
                answer = error
            self._events.put((sample, serial, answer))

        sample.task = asyncio.run_coroutine_threadsafe(ask(), self._loop)  # type: ignore[assignment]
        self._counters["requests"] += 1

    def _cancel(self, sample: Sample) -> None:
        if sample.task is None:
            return
        sample.task.cancel()
        rid = f"{self.name}.{sample.serial}"
        client = sample.answered().server.client
        asyncio.run_coroutine_threadsafe(_quietly(client.abort(rid)), self._loop)

    def _drain(self, wait_s: float) -> None:
        """Take every answer; the first may be waited for."""
        event = self._first(wait_s) if wait_s else None
        while True:
            if event is not None:
                self._take(*event)
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                return

    def _first(self, wait_s: float) -> tuple[Sample, int, bytes | EngineError] | None:
        with self._tracer.within("idle.server") if self._samples else contextlib.nullcontext():
            try:
                return self._events.get(timeout=wait_s)
            except queue.Empty:
                return None

    def _take(self, sample: Sample, serial: int, answer: bytes | EngineError) -> None:
        if serial != sample.serial:
            return  # cancelled meanwhile
        target = sample.answered()
        if isinstance(answer, EngineError):
            self._counters["requests_failed"] += 1
            self._doubt(target, sample, answer)
            self._retry(sample, str(answer))
            return
        request = sample.request
        asked = Asked(
            len(request.prompt_ids) + sample.sampled, sample.left, request.top_logprobs, self.vocab_size, *self._routed
        )
        try:
            piece = read_piece(answer, asked)
            versions_of(piece, self._tag_prefix)
        except DataError as error:
            self._counters["replies_refused"] += 1
            if "weight version" in str(error):
                self._loop.call_soon_threadsafe(target.server.disown, str(error))
            self._retry(sample, f"{sample.home}: {error}")
            return
        target.answers(sample, len(piece.token_ids))
        self._join(sample, until_end(piece, () if request.ignore_eos else self._stop_ids))

    def _doubt(self, target: Target, sample: Sample, error: EngineError) -> None:
        """``target`` is sent nothing before its next look, if what ``sample`` met is its fault; it may have failed."""
        server = target.server
        if isinstance(error, ServerLostError):
            target.doubt()
            self._loop.call_soon_threadsafe(server.suspect, str(error))
        elif isinstance(error, ServerRefusedError) and error.passing:
            busy = any(other.under_way for other in self._targets if other.server is server)
            if target.refuses(sample.request.request_id, busy):
                self._loop.call_soon_threadsafe(server.fail, f"it does nothing but refuse: {error}")

    def _join(self, sample: Sample, piece: Piece) -> None:
        """A further piece: the end, or a reason to ask for the rest."""
        self._counters["cached_tokens"] += piece.cached_tokens
        self._counters["prompt_tokens"] += len(sample.request.prompt_ids) + sample.sampled
        if len(piece.token_ids):
            sample.pieces.append(piece)
        sample.sampled += len(piece.token_ids)
        if piece.finish == "abort" and sample.left > 0:
            sample.empty = 0 if len(piece.token_ids) else sample.empty + 1
            if sample.empty > MOST_EMPTY:
                self._retry(sample, f"{sample.home} aborted it {sample.empty} times before it ran")
                return
            self._counters["resumed"] += 1
            self._targets.place(sample)
            return
        key = (sample.request.request_id, sample.sibling)
        del self._samples[key]
        self._ended.append(completion_of(sample, self._stop_ids, self._tag_prefix))

    def _retry(self, sample: Sample, why: str) -> None:
        """Sample it again from its prompt, elsewhere: what a lost server sampled is nobody's rollout."""
        sample.tries += 1
        sample.pieces.clear()
        sample.sampled = sample.empty = 0
        if sample.tries >= self.config.engine.attempts:
            self._samples.pop((sample.request.request_id, sample.sibling), None)
            reason = f"{sample.tries} attempts (engine.attempts), the last: {why}"
            self._ended.append(Failure(sample.request.request_id, sample.sibling, reason))
            return
        self._counters["retries"] += 1
        log.warning("rollout %d.%d is sampled again: %s", sample.request.request_id, sample.sibling, why)
        self._targets.place(sample)


async def _quietly(work: Coroutine[Any, Any, Any]) -> None:
    with contextlib.suppress(EngineError):
        await work
