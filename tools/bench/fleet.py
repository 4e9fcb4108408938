"""The actor and its SGLang server, beside the same server driven by a bare asyncio loop.

::

    python -m actor  <- grants, acks -  this process, which plays the broker     tokens/s, lean and with top-20
    asyncio: POST /generate, parse the JSON, throw it away                       the same requests, same server
    two servers, conversations of several turns                                  share of the prompts read from a cache
    one server that takes versions while it samples                              generation time lost, by engine.update

Needs the server's environment (``python -m tools.sglang_cpu install``), or CROUPIER_SGLANG_PYTHON.
The bare loop asks for alternatives as SGLang's JSON lists, as peers do; the actor as base64 of flat arrays.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import aiohttp
import numpy as np
import orjson
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging as transformers_logging

from actor.engine.client import Client
from actor.engine.probe import sampling
from actor.engine.process import ServerProcess, command
from common import wire
from common.config import (
    ActorSection,
    BrokerSection,
    EngineSection,
    ModelSection,
    RolloutSection,
    RunConfig,
    RunSection,
    TaskSection,
    to_yaml,
)
from common.errors import EngineError
from common.process import free_port
from common.sockets import RouterSocket
from tools.bench.fleet_settings import COMPLETION, PASS_S, PROMPT, REQUESTS, UP_S, VOCABULARY, caching, updates
from tools.bench.harness import Row, interleave

SIBLINGS = 8
GROUPS = REQUESTS // SIBLINGS
CONCURRENT = 48  # of the bare loop; the actor finds its own
RUNNING = 32  # that the server decodes together
TOP = 20
BAR = 0.9


def run(reps: int) -> list[Row]:
    """Every part on servers that are started once."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="croupier-bench-") as folder:
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(_shape()).save_pretrained(Path(folder) / "model")
        config = _config(Path(folder))
        with _server(config, Path(folder), 0) as first:
            rows = throughput(config, Path(folder), first, reps)
            rows += updates(_on(config, first), reps)
            with _server(config, Path(folder), 1) as second:
                rows += caching(_on(config, first, second), reps)
    return rows


def _shape() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=16, num_experts=8, num_experts_per_tok=2,
        norm_topk_prob=True, max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=1, pad_token_id=0,
    )  # fmt: skip


def _config(folder: Path) -> RunConfig:
    python = os.environ.get("CROUPIER_SGLANG_PYTHON", ".sglang/bin/python")
    if not Path(python).exists():
        raise EngineError(f"{python}: no SGLang; python -m tools.sglang_cpu install")
    return RunConfig(
        run=RunSection(name="bench", dir=str(folder)),
        model=ModelSection(path=str(folder / "model")),
        task=TaskSection(name="fixed", params={"prompt_tokens": PROMPT}, reward_weights={"correct": 1.0}),
        rollout=RolloutSection(
            groups_per_step=GROUPS, group_size=SIBLINGS, max_prompt_tokens=PROMPT + 512,
            max_tokens=COMPLETION, ignore_eos=True,
        ),
        broker=BrokerSection(address=f"tcp://127.0.0.1:{free_port()}"),
        actor=ActorSection(count=1, engine="sglang", max_sequences=REQUESTS, wait_s=UP_S, unacked_mb=1024.0),
        engine=EngineSection(python=python, device="cpu", heartbeat_s=0.5),
    )  # fmt: skip


def _on(config: RunConfig, *urls: str) -> RunConfig:
    return replace(config, engine=replace(config.engine, launch=0, addresses=urls))


@contextlib.contextmanager
def _server(config: RunConfig, folder: Path, index: int) -> Iterator[str]:
    port = free_port()
    argv = [*command(config, port, "croupier-bench"), "--max-running-requests", str(RUNNING)]
    process = ServerProcess(argv, folder / f"server-{index}.log", 1, cpu=True)
    try:
        yield asyncio.run(_wait_up(f"http://127.0.0.1:{port}", process))
    finally:
        process.kill()


async def _wait_up(url: str, process: ServerProcess) -> str:
    deadline = time.monotonic() + UP_S
    async with aiohttp.ClientSession() as session:
        client = Client(url, "the server", session)
        while time.monotonic() < deadline and not process.ended:
            if await client.healthy():
                return url
            await asyncio.sleep(0.5)
    raise EngineError(f"the server did not come up within {UP_S:g} s: {process.ended or process.log}")


# ---- tokens/s ------------------------------------------------------------------------------------


def throughput(config: RunConfig, folder: Path, url: str, reps: int) -> list[Row]:
    """Trajectories built, sent and acknowledged, beside answers thrown away."""
    rows = []
    for k, name in ((0, "lean"), (TOP, f"top-{TOP}")):
        rollout = replace(config.rollout, top_logprobs=k)
        one = replace(_on(config, url), rollout=rollout, broker=_fresh(config.broker))
        with Dealer(one, folder / f"actor-{k}.yaml") as dealer:
            dealer.round()  # the controller finds its limit
            contestants: dict[str, Callable[[], float]] = {
                "actor": dealer.round,
                "bare": partial(_run_bare, url, k),
            }
            speed = interleave(contestants, reps)
        figure, bar = f"through the actor, {name}", f"bar: {BAR} of it"
        rows.append(Row("fleet", figure, speed["actor"], "tok/s", "bare asyncio loop", speed["bare"], reps))
        rows.append(Row("fleet", figure, speed["actor"], "tok/s", bar, BAR * speed["bare"], reps))
    return rows


def _fresh(broker: BrokerSection) -> BrokerSection:
    return replace(broker, address=f"tcp://127.0.0.1:{free_port()}")


class Dealer:
    """An actor process, and a broker that only grants and acknowledges."""

    def __init__(self, config: RunConfig, file: Path) -> None:
        self.config, self.file = config, file
        self.socket = RouterSocket(config.broker.address)
        self.identity = b""
        self.next_group = 0

    def __enter__(self) -> "Dealer":
        self.file.write_text(to_yaml(self.config))
        self.log = self.file.with_suffix(".log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "actor", str(self.file)], stdout=self.log, stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        if self.identity:
            self.socket.send(self.identity, wire.Stop("the benchmark is over"))
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10.0)
        self.process.kill()
        self.socket.close()
        self.log.close()

    def round(self) -> float:
        """Completion tokens/s of ``GROUPS`` groups, from the grant to the last trajectory acknowledged."""
        deadline, tokens, left = time.monotonic() + PASS_S, 0, REQUESTS
        while not self.identity:
            self._serve(deadline)
        began = time.perf_counter()
        groups = np.arange(self.next_group, self.next_group + GROUPS)
        self.next_group += GROUPS
        self.socket.send(self.identity, wire.Grant(0, -1, 0, groups, groups))
        while left > 0:
            for message in self._serve(deadline):
                tokens += sum(message.summary[1])
                left -= len(message.groups)
        return tokens / (time.perf_counter() - began)

    def _serve(self, deadline: float) -> list[wire.Trajectories]:
        if time.monotonic() > deadline or self.process.poll() is not None:
            raise EngineError(f"the actor did not answer: {self.file.with_suffix('.log').read_text()[-1000:]}")
        arrived = []
        for identity, message in self.socket.receive(0.05):
            match message:
                case wire.Hello():
                    self.identity = identity
                    self.socket.send(identity, wire.Welcome("bench", 0, 1.0))
                case wire.Heartbeat():
                    self.socket.send(identity, wire.Pong(0))
                case wire.Trajectories():
                    arrived.append(message)
                    self.socket.send(identity, wire.Ack([""] * len(message.groups), message.groups, message.siblings))
        return arrived


def _run_bare(url: str, k: int) -> float:
    return asyncio.run(bare(url, k))


async def bare(url: str, k: int) -> float:
    """Completion tokens/s of as many requests, each answer parsed and thrown away."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(2, VOCABULARY, (GROUPS, PROMPT)).tolist()
    gate, tokens = asyncio.Semaphore(CONCURRENT), 0

    async def ask(session: aiohttp.ClientSession, prompt: list[int]) -> int:
        fields = {
            "input_ids": prompt,
            "sampling_params": sampling(1.0, COMPLETION, [], True),
            "return_logprob": True,
            "top_logprobs_num": k,
        }
        async with gate, session.post(f"{url}/generate", data=orjson.dumps(fields), headers=JSON) as answer:
            return len(orjson.loads(await answer.read())["output_ids"])

    timeout = aiohttp.ClientTimeout(total=PASS_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        began = time.perf_counter()
        tokens = sum(await asyncio.gather(*(ask(session, p) for p in prompts for _ in range(SIBLINGS))))
        return tokens / (time.perf_counter() - began)


JSON = {"Content-Type": "application/json"}
