"""One server's life: JOIN -> STALE -> SYNCED -> SERVING, until it is lost, and then again.

::

    JOIN     started or found; asked who it is; its log-probabilities tested
    STALE    its weights are not the actor's newest version (or not known to be any)
    SYNCED   the newest version is in it; its checksum is compared with its siblings'
    SERVING  gets requests; looked at every heartbeat; takes each new version in flight
    LOST     did not answer in time, or ended; started again after a wait that doubles
    GONE     restarted too often, or of a kind that no restart mends

Runs as one coroutine a server on the engine's event loop; the engine reads ``state`` and ``version``.
"""

import asyncio
import enum
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

import aiohttp

from actor.engine.client import Client, ServerLostError, ServerRefusedError
from actor.engine.loading import ModelFacts
from actor.engine.pacing import Load
from actor.engine.probe import Identity, check_density, identify
from actor.engine.process import ServerProcess, command
from actor.engine.push import Pusher, TornError, Version
from common.config import RunConfig
from common.errors import EngineError
from common.process import free_port

POLL_S = 0.5  # of a server that starts
FORGIVEN_S = 300.0  # in good health after which earlier restarts no longer count
LONGEST_WAIT_S = 60.0  # between two restarts
GOING_S, GOING_LOOKS = 1.0, 10  # that a process which was killed may take to be gone
PUSHES = 3  # attempts to bring a version to a server that lives

log = logging.getLogger("actor.engine")


class State(enum.StrEnum):
    """Where a server is in its life."""

    JOIN = "JOIN"
    STALE = "STALE"
    SYNCED = "SYNCED"
    SERVING = "SERVING"
    LOST = "LOST"
    GONE = "GONE"


class UnfitError(EngineError):
    """The server is of a kind that no restart mends: another model, settings under which log q is wrong."""


class Server:
    """A server that the actor started, or one at a given address."""

    def __init__(
        self,
        config: RunConfig,
        name: str,
        address: str,
        session: aiohttp.ClientSession,
        pusher: Pusher,
        tag: Callable[[int], str],
        model: ModelFacts,
        notify: Callable[[], None],
        index: int,
        siblings: Callable[[], Sequence["Server"]],
    ) -> None:
        """``address`` "" starts one; ``tag`` names a version as servers are told it; ``notify`` wakes the engine.

        ``index`` counts the servers of an actor: each that it starts takes GPUs of its own.
        """
        self.config, self.name, self.address = config, name, address
        self.state = State.JOIN
        self.version = -1  # -1: not known to be any of ours
        self.torn = False  # part of a version may be in it: it is paused until it has a whole one
        self.identity: Identity | None = None
        self.why = ""  # it was lost
        self.restarts = 0
        self.paused_s = 0.0  # in all updates so far
        self.updates = 0
        self.load: Load | None = None  # the latest
        self.loads = 0  # looks at it
        self.client = Client(address, name, session)
        self._session, self._pusher, self._tag, self._model = session, pusher, tag, model
        self._notify, self.index, self.siblings = notify, index, siblings
        self._process: ServerProcess | None = None
        self._target: Version | None = None
        self._changed = asyncio.Event()
        self._updating = asyncio.Lock()
        self.failure: Exception | None = None  # of an update from the learner; ends this life
        self._receiving = False  # from the learner
        self._refusals = 0  # of updates from the learner, in a row
        self.lives = 0  # joins so far
        self._task: asyncio.Task[None] | None = None

    # ---- what the engine asks --------------------------------------------------------------------

    def begin(self) -> None:
        """Start its life."""
        self._task = asyncio.create_task(self._live(), name=self.name)

    def aim(self, version: Version) -> None:
        """Bring it to ``version`` when it can be."""
        self._target = version
        self._changed.set()

    @property
    def settled(self) -> bool:
        """Whether it has the version that it was last told to take, or cannot take any now."""
        return self.state not in (State.SERVING, State.SYNCED) or self._target is None or self._has_target

    @property
    def _has_target(self) -> bool:
        return self._target is not None and self.version == self._target.number

    def suspect(self, why: str) -> None:
        """A request to it failed: look at it at once."""
        if self.state == State.SERVING:
            self.why = why
            self._changed.set()

    def fail(self, why: str) -> None:
        """It is of no use as it is: it starts anew."""
        if self.state == State.SERVING:
            self.failure = ServerLostError(why)
            self._changed.set()

    @property
    def updating(self) -> bool:
        """Whether a version is on its way into it, for which what runs may be aborted."""
        return self._receiving or not self.settled

    def disown(self, why: str) -> None:
        """It samples from weights that are not ours: it must take the version again."""
        if self.state != State.SERVING:
            return
        log.warning("%s: %s; its weights are sent again", self.name, why)
        self.version = -1
        if self._target is None:  # nobody has any to send: it starts anew
            self.failure = ServerLostError(f"{self.name}: {why}")
        self._set(State.STALE)
        self._changed.set()

    async def receive(self, version: Version, take: Callable[[], Awaitable[float]]) -> str:
        """The learner brings ``version``; ``take`` has the server receive it. Returns what went wrong, or ""."""
        life = self.lives
        async with self._updating:
            if self.lives != life or self.state not in (State.STALE, State.SERVING):
                return f"{self.name} is {self.state}"
            self._receiving = True
            try:
                await self._taken(version, await take())
                self._refusals = 0
            except TornError as error:
                self._tear()
                self._refuses(error, error.lost)
                return str(error)
            except ServerRefusedError as error:
                what = "stays paused" if self.torn else f"samples on from version {self.version}"
                log.warning("%s %s: %s", self.name, what, error)
                self._refuses(error)
                return str(error)
            except Exception as error:  # noqa: BLE001  # whatever it is, the broker must hear of it
                self.failure = error
                return f"{type(error).__name__}: {error}"
            finally:
                self._receiving = False
                self._changed.set()
        return ""

    def _refuses(self, error: EngineError, lost: bool = False) -> None:
        """It did not take what the learner brought; too often in a row end this life."""
        self._refusals += 1
        if lost or self._refusals >= PUSHES:
            self.failure = error

    def _tear(self) -> None:
        """Whatever it samples belongs to no version: it is paused until it has one."""
        self.torn, self.version = True, -1
        self._set(State.STALE)

    async def end(self) -> None:
        """Stop it if it is ours; leave it alone if it is not."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._process is not None:
            await asyncio.to_thread(self._process.kill)
        else:
            await self._pusher.part(self.client)

    # ---- its life --------------------------------------------------------------------------------

    def _set(self, state: State) -> None:
        if state != self.state:
            log.info("%s: %s -> %s", self.name, self.state, state)
        self.state = state
        self._notify()

    async def _live(self) -> None:
        while self.state != State.GONE:
            try:
                await self._join()
                await self._serve()
            except UnfitError as error:
                self._gone(str(error))
            except EngineError as error:
                await self._lost(str(error))
            except asyncio.CancelledError:
                raise
            except Exception as error:  # an oversight of ours must not look like a server that is fine
                log.exception("%s", self.name)
                await self._lost(f"{type(error).__name__}: {error}")

    async def _join(self) -> None:
        self._set(State.JOIN)
        self.version, self.failure, self._refusals = -1, None, 0
        self.lives += 1
        await self._start()
        try:
            self.identity = await identify(self.client, self.config.engine.update)
            await self._check_model(self.identity)
        except ServerLostError:
            raise
        except EngineError as error:
            raise UnfitError(str(error)) from error
        await self._find_version()
        try:
            await check_density(self.client, self._model.vocab_size, self.config.rollout.temperature)
        except ServerLostError as error:
            raise ServerLostError(f"{error} (while its log-probabilities were tested)") from error
        except EngineError as error:
            raise UnfitError(str(error)) from error

    async def _check_model(self, identity: Identity) -> None:
        served = (await self.client.call("/model_info")).get("architectures")
        if served and self._model.architectures and served != self._model.architectures:
            raise EngineError(
                f"{self.name} serves {', '.join(served)}, its actor has {self.config.rollout_path}, which is "
                f"{', '.join(self._model.architectures)}; start it with that model"
            )
        if self._process is not None and identity.ranks != self.config.engine.tp:
            raise EngineError(f"{self.name} has {identity.ranks} ranks where engine.tp={self.config.engine.tp}")

    async def _start(self) -> None:
        """Start it, or wait until it is there."""
        engine = self.config.engine
        if not self.address:
            port = free_port()
            self.client = Client(f"http://127.0.0.1:{port}", self.name, self._session)
            where = self.config.run.path / "logs" / f"{self.name.replace('/', '-')}.log"
            argv = command(self.config, port, self._tag(0), self.index)
            try:
                self._process = ServerProcess(argv, where, self.config.actor.threads, engine.device == "cpu")
            except OSError as error:
                raise UnfitError(f"engine.python={engine.python!r} cannot be run: {error}") from error
        deadline = time.monotonic() + engine.start_timeout_s
        while not await self.client.healthy():
            if self._process is not None and (ended := self._process.ended):
                raise ServerLostError(f"{self.name} {ended}")
            if time.monotonic() > deadline:
                where_ = f"; see {self._process.log}" if self._process is not None else f" at {self.address}"
                raise ServerLostError(
                    f"{self.name} did not answer within {engine.start_timeout_s:g} s (engine.start_timeout_s){where_}"
                )
            await asyncio.sleep(POLL_S)

    async def _find_version(self) -> None:
        """Which of our versions it has: ours has the starting model, one that ran already is given it."""
        if self._process is None:
            fields = {
                "model_path": self.config.rollout_path,
                "weight_version": self._tag(0),
                "flush_cache": True,
                "abort_all_requests": True,
            }
            allowed = self.config.weights.deadline_s
            await self.client.end_update(allowed)  # whoever drove it before may have left it so
            await self.client.resume()
            await self.client.pause("abort", allowed)  # until nothing of theirs is sampled any more
            try:
                await self.client.must("/update_weights_from_disk", fields, self.config.engine.start_timeout_s)
                await self.client.resume()
            except ServerRefusedError as error:
                if not self.torn:
                    await self.client.resume()
                raise UnfitError(
                    f"{self.name} cannot load model {self.config.rollout_path}: {error}; it must serve a model of "
                    "that architecture and see the same path"
                ) from error
        said = await self.client.version()
        if said != self._tag(0):
            raise UnfitError(f"{self.name} serves weight version {said!r} after it was told {self._tag(0)!r}")
        self.version, self.torn = 0, False

    async def _serve(self) -> None:
        """Bring it to the newest version, then keep it there and alive."""
        heartbeat = self.config.engine.heartbeat_s
        since = time.monotonic()
        while True:
            self._changed.clear()
            if self.failure is not None:
                failure, self.failure = self.failure, None
                raise ServerLostError(str(failure))
            target = self._target
            if target is not None and not self._has_target:
                if target.is_here:
                    await self._take(target)
                elif self.state != State.SERVING:
                    self._set(State.STALE)  # only the learner can bring it
            elif self.version < 0 and self.config.route == "relay":
                raise ServerLostError(f"{self.name} has weights of nobody's version")
            if self.state != State.SERVING and self.version >= 0 and (target is None or self._has_target):
                await self._compare()
                self.why = ""
                self._set(State.SYNCED)
                self._set(State.SERVING)
            try:
                await asyncio.wait_for(self._changed.wait(), heartbeat)
            except TimeoutError:
                if time.monotonic() - since > FORGIVEN_S:
                    self.restarts = 0
            async with self._updating:  # a server that receives weights answers nobody else
                await self._look()

    async def _look(self) -> None:
        """A heartbeat: the scheduler itself must answer within the deadline."""
        if self._process is not None and (ended := self._process.ended):
            raise ServerLostError(f"{self.name} {ended}")
        self.load = await self.client.look(self.config.engine.server_timeout_s)
        self.loads += 1
        self._notify()

    async def _take(self, version: Version) -> None:
        """Push ``version``; tries again while the server lives."""
        if self.state == State.JOIN:
            self._set(State.STALE)
        for attempt in range(1, PUSHES + 1):
            try:
                paused = await self._pusher.push(self.client, self.ranks, version, self.config.engine.update, self.torn)
                break
            except TornError as error:
                self._tear()
                reason: EngineError = error
            except EngineError as error:
                reason = error
            log.warning("%s did not take version %d (attempt %d): %s", self.name, version.number, attempt, reason)
            if attempt == PUSHES or (self._process is not None and self._process.ended):
                raise ServerLostError(f"{self.name} did not take version {version.number}: {reason}") from reason
        await self._taken(version, paused)

    async def _taken(self, version: Version, paused_s: float) -> None:
        """It has received ``version``, by its own account too."""
        said = await self.client.version()
        if said != version.tag:
            raise ServerLostError(f"{self.name} serves {said!r} after it was sent {version.tag!r}")
        self.version, self.torn = version.number, False
        self.paused_s += paused_s
        self.updates += 1
        self._notify()

    async def _compare(self) -> None:
        """Its weights must sum up to what those of its siblings with that version sum up to."""
        target, mine = self._target, await self.read_checksum()
        for sibling in self.siblings():
            if sibling is self or sibling.state != State.SERVING or sibling.version != self.version:
                continue
            if sibling.identity != self.identity or not mine:
                continue
            theirs, version = await sibling.read_checksum(), sibling.version
            moving = self._target is not target or not sibling.settled  # a new version arrived meanwhile
            if theirs and theirs != mine and version == self.version and not moving:
                raise ServerLostError(
                    f"{self.name} has checksum {mine[:16]} of version {version}, {sibling.name} has {theirs[:16]}"
                )
            return

    @property
    def ranks(self) -> int:
        """Processes of it that receive weights."""
        return self.identity.ranks if self.identity is not None else 1

    async def read_checksum(self) -> str:
        """What its weights sum up to, in its own terms; "" where it cannot say."""
        try:
            answer = await self.client.call(
                "/weights_checker", {"action": "checksum"}, self.config.engine.server_timeout_s
            )
        except ServerRefusedError:
            return ""
        return str(answer.get("per_engine_checksum") or "") if isinstance(answer, dict) else ""

    # ---- its ends --------------------------------------------------------------------------------

    async def _lost(self, why: str) -> None:
        for _ in range(GOING_LOOKS if self._process is not None else 0):  # its sockets close before it has ended
            assert self._process is not None
            if ended := self._process.ended:
                why = f"{self.name} {ended}"
                break
            await asyncio.sleep(GOING_S / GOING_LOOKS)
        self.why, self.version = why, -1
        self._pusher.leave(self.name)
        log.error("lost a server: %s", why)
        self._set(State.LOST)
        if self._process is not None:
            await asyncio.to_thread(self._process.kill)
        engine = self.config.engine
        if self.restarts >= engine.restarts:
            self._gone(f"{why} (restarted {self.restarts} times, engine.restarts)")
            return
        wait = min(LONGEST_WAIT_S, engine.backoff_s * 2**self.restarts)
        self.restarts += 1
        log.info("%s is started again in %.1f s (restart %d of %d)", self.name, wait, self.restarts, engine.restarts)
        await asyncio.sleep(wait)

    def _gone(self, why: str) -> None:
        self.why, self.version = why, -1
        log.error("gave up a server: %s", why)
        self._set(State.GONE)
        if self._process is not None:
            self._process.kill()
