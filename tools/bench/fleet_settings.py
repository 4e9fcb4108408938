"""What a fleet's settings cost and bring: cache hits by routing, generation time lost by mode of update."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch
from safetensors.torch import load_file

from actor.engine.base import Completion, Failure, SampleRequest
from actor.engine.routing import Router
from actor.engine.server import State
from actor.engine.sglang import SglangEngine
from common.config import RunConfig
from common.errors import EngineError
from common.weights import Bucket, plan_buckets
from learner.weights.pack import flatten
from tools.bench.harness import Row, interleave

PROMPT, COMPLETION, VOCABULARY = 64, 256, 4096
REQUESTS = 96
TURNS, CONVERSATIONS, SAID = 4, 24, 48
UPDATES, FLIGHT = 4, 32
UP_S, PASS_S = 240.0, 300.0


class RandomRouter(Router):
    """Every request anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self._random = np.random.default_rng(0)

    def place(self, key: int, loads: Any) -> str:
        """One of them."""
        return str(self._random.choice(list(loads)))


def caching(config: RunConfig, reps: int) -> list[Row]:
    """Share of the prompts' tokens that a cache had, over conversations of ``TURNS`` turns and two siblings."""
    engine = engine_on(config)
    try:
        routers: dict[str, Callable[[], Router]] = {"key": Router, "random": RandomRouter}
        contestants = {name: partial(conversations, engine, make) for name, make in routers.items()}
        share = interleave(contestants, reps)
    finally:
        engine.close()
    return [
        Row("fleet", f"prompt tokens read from a cache, {TURNS} turns, 2 servers", share["key"], "of all",
            "random routing", share["random"], reps)
    ]  # fmt: skip


def conversations(engine: SglangEngine, make: Callable[[], Router]) -> float:
    """Play them to the end on cold caches; the share of prompt tokens that were cached."""
    asyncio.run(_flush([server.client.url for server in engine.servers]))
    engine._targets.router = make()
    rng = np.random.default_rng(1)
    before = engine.counters
    contexts = {(n, s): _ids(rng, PROMPT) for n in range(CONVERSATIONS) for s in range(1)}
    contexts |= {(n, 1): contexts[n, 0] for n in range(CONVERSATIONS)}
    for turn in range(TURNS):
        for (n, sibling), context in contexts.items():
            engine.add(SampleRequest(n, context, 1, 16, 1.0, (0, 0), ignore_eos=True, first_sibling=sibling,
                                     first_token=16 * turn))  # fmt: skip
        for done in drain(engine):
            key = (done.request_id, done.sibling)
            contexts[key] = np.concatenate([contexts[key], done.token_ids, _ids(rng, SAID)])
    after = engine.counters
    read = after["prompt_tokens"] - before["prompt_tokens"]
    return (after["cached_tokens"] - before["cached_tokens"]) / read


def _ids(rng: np.random.Generator, count: int) -> Any:
    return rng.integers(2, VOCABULARY, count).astype(np.int32)


async def _flush(urls: list[str]) -> None:
    async with aiohttp.ClientSession() as session:
        for url in urls:
            async with session.post(f"{url}/flush_cache", params={"timeout": "5"}) as answer:
                await answer.read()


def engine_on(config: RunConfig) -> SglangEngine:
    """An engine whose servers all serve."""
    engine = SglangEngine(config, "bench")
    deadline = time.monotonic() + UP_S
    while any(server.state != State.SERVING for server in engine.servers):
        if time.monotonic() > deadline:
            engine.close()
            raise EngineError(f"not all servers serve: {[(s.name, s.state, s.why) for s in engine.servers]}")
        engine.step(0.05)
    return engine


def drain(engine: SglangEngine) -> list[Completion]:
    """Everything in flight."""
    done: list[Completion] = []
    deadline = time.monotonic() + PASS_S
    while engine.in_flight:
        if time.monotonic() > deadline:
            raise EngineError(f"{engine.in_flight} requests were not answered within {PASS_S:g} s")
        for one in engine.step(0.01):
            if isinstance(one, Failure):
                raise EngineError(one.reason)
            done.append(one)
    return done


# ---- updates -------------------------------------------------------------------------------------


@dataclass
class Feeder:
    """Keeps ``FLIGHT`` requests in flight until ``total`` have been started."""

    engine: SglangEngine
    total: int
    started: int = 0
    ended: int = 0

    def turn(self) -> None:
        """One step."""
        while self.started < self.total and self.engine.in_flight < FLIGHT:
            prompt = _ids(np.random.default_rng(self.started), PROMPT)
            self.engine.add(SampleRequest(self.started, prompt, 1, COMPLETION, 1.0, (0, 0), ignore_eos=True))
            self.started += 1
        self.ended += len(self.engine.step(0.01))


def updates(config: RunConfig, reps: int) -> list[Row]:
    """Wall-clock of a fixed amount of sampling, without versions and with ``UPDATES`` of them under it."""
    state = load_file(Path(config.model.path) / "model.safetensors")
    listing = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in state.items()]
    buckets = [
        (bucket, flatten(bucket, state, torch.empty(bucket.nbytes, dtype=torch.uint8)))
        for bucket in plan_buckets(listing, 64 << 20)
    ]
    engines = {mode: engine_on(replace(config, engine=replace(config.engine, update=mode)))
               for mode in ("retract", "in_place", "abort")}  # fmt: skip
    version = 0

    def sample(engine: SglangEngine, count: int, pause: bool = False) -> float:
        nonlocal version
        feeder, began = Feeder(engine, REQUESTS), time.perf_counter()
        for update in range(count):
            while feeder.ended < REQUESTS * (update + 1) // (count + 1):
                feeder.turn()
            version += 1
            if pause:
                drained = len(drain(engine))
                feeder.ended += drained
            _take(engine, version, buckets, feeder)
        while feeder.ended < REQUESTS:
            feeder.turn()
        return time.perf_counter() - began

    try:
        contestants: dict[str, Callable[[], float]] = {"none": lambda: sample(engines["retract"], 0)}
        contestants |= {mode: partial(sample, engine, UPDATES) for mode, engine in engines.items()}
        contestants["fleet paused"] = lambda: sample(engines["retract"], UPDATES, pause=True)
        seconds = interleave(contestants, reps)
    finally:
        for engine in engines.values():
            engine.close()
    lost = {name: max(0.0, 1 - seconds["none"] / took) for name, took in seconds.items()}
    drained = max(lost["fleet paused"], 1e-9)
    name = f"generation time lost to {UPDATES} updates, engine.update="
    return [
        Row("fleet", name + mode, lost[mode], "of all", "fleet drained each time", drained, reps) for mode in engines
    ]


def _take(engine: SglangEngine, version: int, buckets: list[tuple[Bucket, torch.Tensor]], feeder: Feeder) -> None:
    engine.load(version, buckets)
    deadline = time.monotonic() + PASS_S
    while (loaded := engine.loaded()) is None:
        if time.monotonic() > deadline:
            raise EngineError(f"version {version} was not taken within {PASS_S:g} s")
        feeder.turn() if engine.in_flight else engine.step(0.01)
    if loaded.error:
        raise EngineError(loaded.error)
