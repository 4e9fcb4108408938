"""The broker's way of a trajectory: socket, admission, journal, packing; beside raw sockets and the peers' formats.

::

    child: encode -> DEALER ====> ROUTER -> decode -> admit -> journal -> (durable) -> ack ====> child
                                                        step full -> collate -> shards

A peer's format is measured twice: to arrays in the receiver's hands, and put in place of ours before the same
admission and packing.
"""

import base64
import json
import multiprocessing as mp
import os
import pickle  # a peer's wire format, between our own two processes
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import zmq

from broker.acks import Acks
from broker.journal import Journal
from broker.outlet import Outlet
from broker.pipeline import Pipeline
from broker.recorder import Recorder
from common import wire
from common.codec import decode, encode
from common.config import BrokerSection, ObrsSection, RolloutSection, RunConfig, RunSection, StalenessSection
from common.obrs import coins, thin
from common.process import collect_seldom, free_port, keep_freed_memory
from common.sockets import RouterSocket
from common.zbounds import z_bounds
from tools.bench import thinning
from tools.bench.harness import Row, interleave, rate, touch_memory

TOKENS, TOPK, VOCAB = 2048, 20, 151_936
GROUPS, GROUP_SIZE = 16, 8  # trajectories a step: GROUPS * GROUP_SIZE, one message a group
STEPS = {0: 48, TOPK: 12}  # of a passage, by alternatives a token: some .3 s
WITHIN = ("pickle 5", "json + base64")  # peers' formats that are taken through admission and packing, too
SLOW = {0: 48, TOPK: 12}  # messages of a format that takes milliseconds for each
ASSEMBLE_AHEAD = 8
WINDOW = ASSEMBLE_AHEAD * GROUPS  # messages under way: as many as the steps that are assembled ahead hold
QUEUED = 10_000
TOUCHED_MB = 2048  # before each passage: the file's pages and those of three processes, several times over
DEADLINE_S = 120.0
THIN_SHAPE = (64, 4096)
CAP = np.float32(2.0)


def config(topk: int, steps: int, tokens: int = TOKENS, queue_mb: float = 1 << 16) -> RunConfig:
    """Everything granted at once, nothing rejected: the data path alone."""
    return RunConfig(
        run=RunSection(steps=steps),
        rollout=RolloutSection(
            groups_per_step=GROUPS, group_size=GROUP_SIZE, max_prompt_tokens=64, max_tokens=tokens, top_logprobs=topk
        ),
        staleness=StalenessSection(steps),
        obrs=ObrsSection(mode="off"),
        broker=BrokerSection(queue_mb=queue_mb, assemble_ahead=ASSEMBLE_AHEAD),
    )


def message(group: int, topk: int, tokens: int = TOKENS) -> wire.Trajectories:
    """A whole group."""
    n = GROUP_SIZE * tokens
    random = np.random.default_rng(group)
    on = np.ones(n, np.uint8)
    on[::tokens] = 0
    return wire.Trajectories(
        "bench", ["correct"], np.full(GROUP_SIZE, group), np.arange(GROUP_SIZE, dtype=np.int32),
        random.random(GROUP_SIZE, np.float32), np.zeros((GROUP_SIZE, 1), np.float32), np.zeros(GROUP_SIZE, np.uint8),
        np.arange(0, n + 1, tokens, dtype=np.int32), random.integers(0, VOCAB, n, np.int32), on,
        np.where(on, -random.random(n, np.float32), np.float32(0)), np.where(on, 0, -1).astype(np.int32),
        random.integers(0, VOCAB, (n, topk), np.int32), -3 - 9 * random.random((n, topk), np.float32),
    )  # fmt: skip


def _arrays(trajectories: wire.Trajectories) -> dict[str, np.ndarray]:
    return {k: v for k, v in vars(trajectories).items() if isinstance(v, np.ndarray)}


def _to_json(trajectories: wire.Trajectories) -> list[Any]:
    fields = {
        k: [base64.b64encode(np.ascontiguousarray(v).data).decode(), v.dtype.str, list(v.shape)]
        for k, v in _arrays(trajectories).items()
    }
    return [json.dumps(fields).encode()]


def _from_json(frames: list[Any]) -> Any:
    fields = json.loads(bytes(frames[0]))
    return {k: np.frombuffer(base64.b64decode(b), d).reshape(s) for k, (b, d, s) in fields.items()}


def _to_lists(trajectories: wire.Trajectories) -> list[Any]:
    return [msgpack.packb({k: v.tolist() for k, v in _arrays(trajectories).items()})]


def _from_lists(frames: list[Any]) -> Any:
    return {k: np.asarray(v) for k, v in msgpack.unpackb(bytes(frames[0])).items()}


OURS = "raw pyzmq"  # its frames are ours
FORMATS: dict[str, tuple[Callable[[wire.Trajectories], list[Any]], Callable[[list[Any]], Any]]] = {
    OURS: (lambda m: encode(m), lambda frames: [np.frombuffer(f, np.uint8) for f in frames]),
    "pickle 5": (lambda m: [pickle.dumps(m, 5)], lambda frames: pickle.loads(frames[0])),
    "json + base64": (_to_json, _from_json),
    "msgpack lists": (_to_lists, _from_lists),
}


# ---- children -----------------------------------------------------------------------------------


@contextmanager
def _sending(target: Callable[..., None], *args: Any) -> Iterator[None]:
    """``target(*args, started)`` in a process of its own, which passes the barrier ``started`` before it sends.

    Memory is touched between its start and that: what is free for two seconds is given back to the machine's host.
    """
    started = mp.get_context("spawn").Barrier(2)
    child = mp.get_context("spawn").Process(target=target, args=(*args, started), daemon=True)
    child.start()
    try:
        started.wait(DEADLINE_S)
        touch_memory(TOUCHED_MB)
        started.wait(DEADLINE_S)
        yield
    finally:
        child.join(10)
        child.kill()


def _push(address: str, name: str, topk: int, count: int, started: Barrier) -> None:
    """Send ``count`` messages in a peer's format, encoding each."""
    context = zmq.Context()
    socket = context.socket(zmq.PUSH)
    socket.setsockopt(zmq.SNDHWM, WINDOW)
    socket.connect(address)
    to_frames, pool = FORMATS[name][0], [message(g, topk) for g in range(4)]
    ready = [to_frames(m) for m in pool] if name == OURS else None
    started.wait(DEADLINE_S)
    started.wait(DEADLINE_S)
    for index in range(count):
        frames = ready[index % 4] if ready else to_frames(pool[index % 4])
        socket.send_multipart(frames, copy=False)
    socket.close(linger=-1)
    context.term()


def _actor(address: str, groups: list[int], topk: int, name: str, started: Barrier) -> None:
    """Send every group through a DEALER in the format of ``name``, at most WINDOW unacknowledged."""
    to_frames = FORMATS[name][0]
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(address)
    pool = [message(g, topk) for g in range(4)]
    waiting = 0
    started.wait(DEADLINE_S)
    started.wait(DEADLINE_S)
    for index, group in enumerate(groups):
        m = pool[index % 4]
        m.groups = np.full(GROUP_SIZE, group)
        socket.send_multipart(to_frames(m), copy=False)
        waiting += 1
        while waiting >= WINDOW or (waiting and socket.poll(0)):
            waiting -= _acknowledged(socket)
    while waiting:
        waiting -= _acknowledged(socket)
    socket.close(linger=0)
    context.term()


def _acknowledged(socket: "zmq.Socket[bytes]") -> int:
    """How many messages the next acknowledgement is of."""
    ack = decode(socket.recv_multipart(), wire.FROM_BROKER)
    return len(ack.reasons) // GROUP_SIZE


# ---- contestants --------------------------------------------------------------------------------


def peer_rate(name: str, topk: int, count: int) -> float:
    """Trajectories a second in a peer's format, arrays in the receiver's hands."""
    context = zmq.Context()
    socket = context.socket(zmq.PULL)
    socket.setsockopt(zmq.RCVHWM, WINDOW)
    address = f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1', 10_000, 16_000)}"
    try:
        with _sending(_push, address, name, topk, count):
            began = 0.0
            for _ in range(count):
                if not socket.poll(int(DEADLINE_S * 1000)):
                    raise TimeoutError(f"{name}: the sender is silent")
                frames = socket.recv_multipart(copy=False)
                FORMATS[name][1]([f.buffer for f in frames])
                began = began or time.perf_counter()
            return GROUP_SIZE * (count - 1) / (time.perf_counter() - began)
    finally:
        context.destroy(linger=0)


@dataclass
class Passage:
    """What one passage through the broker's parts showed."""

    rate: float = 0.0
    latencies: list[float] = field(default_factory=list)  # of each message: received -> its shard made, seconds


class _Door(RouterSocket):
    """The broker's socket, where trajectories come in a peer's format."""

    def __init__(self, address: str, name: str) -> None:
        super().__init__(address)
        self._from_frames = FORMATS[name][1]

    def _decode(self, frames: list[zmq.Frame], fault: str) -> Any:
        found = self._from_frames([f.buffer for f in frames[1:]])
        return found if isinstance(found, wire.Trajectories) else wire.Trajectories("bench", ["correct"], **found)


def broker_passage(topk: int, journal_dir: Path | None, name: str = OURS) -> Passage:
    """Trajectories a second through socket, admission, journal if any, and packing, until acknowledged and sharded.

    They come in the format of ``name``; acknowledgements are ours.
    """
    keep_freed_memory()  # both as the broker does
    collect_seldom()
    steps = STEPS[topk]
    pipeline = Pipeline(config(topk, steps), VOCAB)
    address = f"tcp://127.0.0.1:{free_port()}"
    router = RouterSocket(address) if name == OURS else _Door(address, name)
    journal = Journal(journal_dir, "bench", 16_384, on_commit=router.wake) if journal_dir else None
    recorder = Recorder(pipeline, journal, dict)
    recorder.begin(0)
    outlet = Outlet(recorder)
    acks = Acks(lambda identity, ack: outlet.do(partial(_answer, router, identity, ack)))
    groups = [g for _ in range(steps) for g in _grant_all(recorder)]
    result, arrived = Passage(), dict[int, float]()
    try:
        with _sending(_actor, address, groups, topk, name):
            began, deadline = 0.0, time.monotonic() + DEADLINE_S
            while pipeline.ledger.next_step < steps or outlet.holding:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the broker's passage stands at step {pipeline.ledger.next_step}")
                for identity, found in router.receive(0.05):
                    began = began or time.perf_counter()
                    arrived[found.sole_group] = time.perf_counter()
                    acks.add(identity, recorder.admit(found, "a", 0))
                acks.flush()
                outlet.release()
                _assemble(recorder, arrived, result)
                outlet.release()
            result.rate = GROUP_SIZE * (len(groups) - 1) / (time.perf_counter() - began)
        return result
    finally:
        router.close()
        if journal is not None:
            journal.close()


def _answer(router: RouterSocket, identity: bytes, ack: wire.Ack) -> None:
    router.send(identity, ack)


def _grant_all(recorder: Recorder) -> list[int]:
    grant = recorder.grant("a", GROUPS, 0)
    return [] if grant is None else [int(g) for g in grant.groups]


def _assemble(recorder: Recorder, arrived: dict[int, float], result: Passage) -> None:
    while True:
        step = recorder.pipeline.ledger.next_step
        recorder.assemble(step)
        if recorder.pipeline.ledger.next_step == step or recorder.shard(step, 0, 2) is None:
            return
        now = time.perf_counter()
        decided = recorder.pipeline.step(step)
        if decided is not None:
            result.latencies += [now - arrived[g] for g in decided.batch.groups[::GROUP_SIZE].tolist()]
        recorder.commit(step, {})
        recorder.checkpointed(step)


def disk_rate(topk: int, directory: Path) -> float:
    """Trajectories a second that a bare append and fdatasync of the same bytes takes, a message at a time.

    Into a new file, as the journal's is: the pages of one that was just deleted take writes four times as fast.
    """
    frames = [bytes(f) for f in encode(message(0, topk))]
    messages = GROUPS * STEPS[topk]
    target, _ = tempfile.mkstemp(dir=directory)
    touch_memory(TOUCHED_MB)
    try:
        began = time.perf_counter()
        for _ in range(messages):
            os.writev(target, frames)
            os.fdatasync(target)
        return GROUP_SIZE * messages / (time.perf_counter() - began)
    finally:
        os.close(target)


def memory_row(reps: int) -> Row:
    """Resident bytes of 10,000 queued trajectories beside their own size."""
    tokens, groups = 512, QUEUED // GROUP_SIZE
    steps = groups // GROUPS + 1
    pipeline = Pipeline(config(0, steps, tokens), VOCAB)
    granted = [int(g) for _ in range(steps) for g in pipeline.grant("a", GROUPS, 0).groups][:groups]  # type: ignore[union-attr]
    before = _resident()
    for group in granted:
        frames = [bytes(f) for f in encode(message(group, 0, tokens))]
        pipeline.admit(decode(frames, wire.TO_BROKER), "a", 0)
    grown = _resident() - before
    return Row(
        "broker",
        f"resident memory of {QUEUED:,} queued",
        grown / 1e6,
        "MB",
        "their bytes",
        pipeline.queue_bytes / 1e6,
        1,
    )


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return float(pages * resource.getpagesize())


def decision_rows(reps: int) -> list[Row]:
    """Rejection beside truncated importance sampling on the same arrays."""
    random, n = np.random.default_rng(0), THIN_SHAPE[0] * THIN_SHAPE[1]
    log_q = -random.exponential(1.0, n).astype(np.float32)
    log_p = np.minimum(log_q + random.normal(0, 0.1, n).astype(np.float32), np.float32(0))
    groups, siblings = np.arange(THIN_SHAPE[0]), np.zeros(THIN_SHAPE[0], np.int32)
    lengths = np.full(THIN_SHAPE[0], THIN_SHAPE[1])
    m = n // 8  # rows with alternatives: 20 numbers each
    topk_q = np.sort(np.log(random.dirichlet(np.full(TOPK + 5, 0.3), m)[:, :TOPK] + 1e-9).astype(np.float32))[:, ::-1]
    topk_p = np.minimum(topk_q + random.normal(0, 0.05, topk_q.shape).astype(np.float32), np.float32(-1e-4))
    topk_p -= np.log(np.maximum(1.0, np.exp(topk_p).sum(1, keepdims=True)))
    inside = np.ones(m, np.bool_)

    def truncated() -> object:
        return np.minimum(np.exp(log_p - log_q), CAP)

    def decide() -> object:
        return thin(log_p, log_q, coins(0, groups, siblings, lengths, 7), 0.0)

    def bound() -> object:
        return z_bounds(topk_q, topk_p, topk_q[:, 0], topk_p[:, 0], inside, 0.0)

    work: dict[str, tuple[Callable[[], object], int]] = {
        "truncated": (truncated, n), "decide": (decide, n), "bounds": (bound, m),
    }  # fmt: skip
    speed = interleave({k: partial(rate, f, c / 1e6) for k, (f, c) in work.items()}, reps)
    reference = "truncated importance sampling, numpy"
    return [
        Row("broker", "coins, accept, log m", speed["decide"], "Mtok/s", reference, speed["truncated"], reps),
        Row("broker", f"bounds of Z, top-{TOPK}", speed["bounds"], "Mtok/s", reference, speed["truncated"], reps),
    ]


def run(reps: int) -> list[Row]:
    """Every figure of the broker."""
    rows = []
    with tempfile.TemporaryDirectory(dir=".") as place:
        for topk, label in ((0, "lean"), (TOPK, f"top-{TOPK}")):
            rows += _path_rows(topk, label, Path(place), reps)
    return [*rows, *decision_rows(reps), memory_row(reps), fresh_memory_row(reps), *thinning.run()]


def fresh_memory_row(reps: int) -> Row:
    """What the machine's host takes for memory at its first touch: noise of whatever allocates."""
    first, again = (statistics.median(of) for of in zip(*(touch_memory(TOUCHED_MB) for _ in range(reps)), strict=True))
    size = TOUCHED_MB / 1e3
    return Row("broker", "memory, first touch", size / first, "GB/s", "second touch", size / again, reps)


def _path_rows(topk: int, label: str, place: Path, reps: int) -> list[Row]:
    latencies: list[float] = []
    made = iter(range(1000))

    def through(journalled: bool) -> float:
        passage = broker_passage(topk, place / f"{label}{next(made)}" if journalled else None)
        latencies.extend(passage.latencies if journalled else [])
        return passage.rate

    contestants: dict[str, Callable[[], float]] = {
        "broker": lambda: through(False), "journal": lambda: through(True), "disk": lambda: disk_rate(topk, place),
    }  # fmt: skip
    for name in FORMATS:
        count = SLOW[topk] if name in ("json + base64", "msgpack lists") else GROUPS * STEPS[topk]
        contestants[name] = partial(peer_rate, name, topk, count)
    for name in WITHIN:
        contestants[f"{name}, the same way"] = partial(lambda name: broker_passage(topk, None, name).rate, name)
    speed = interleave(contestants, reps)
    megabytes = sum(memoryview(f).nbytes for f in encode(message(0, topk))) / GROUP_SIZE / 1e6
    rows = [
        Row("broker", f"{label}: socket to shards", speed["broker"], "traj/s", name, speed[name], reps)
        for name in (*FORMATS, *(f"{name}, the same way" for name in WITHIN))
    ]
    rows.append(
        Row(
            "broker",
            f"{label}: the same",
            speed["broker"] * megabytes,
            "MB/s",
            "raw pyzmq",
            speed["raw pyzmq"] * megabytes,
            reps,
        )
    )
    for reference in ("disk", "broker", "raw pyzmq"):
        said = {"disk": "append + fdatasync", "broker": "without a journal"}.get(reference, reference)
        rows.append(
            Row("broker", f"{label}: with the journal", speed["journal"], "traj/s", said, speed[reference], reps)
        )
    cuts = statistics.quantiles(latencies, n=100)
    rows.append(Row("broker", f"{label}: received to shard, p99", 1e3 * cuts[98], "ms", "p50", 1e3 * cuts[49], reps))
    return rows
