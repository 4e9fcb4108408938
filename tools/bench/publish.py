"""Publishing a version over gloo, or NCCL: Qwen3-MoE's tensors, over 0.5 GB, from a learner to one receiver.

The limit is one broadcast of the same bytes in one flat tensor, nothing laid out or unpacked. Ours
counts until every tensor lies in the receiver's parameters and its digest was compared. Two
processes, so that on a machine of two cores each end has one.
"""

import queue
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from common.config import OptimSection
from common.errors import DeadlineError
from common.weights import WeightReceiver
from common.wire import Applied, Go, Prepare, Publish, Published, Ready
from learner.layout import places, views
from learner.model.config import ModelConfig
from learner.model.decoder import Decoder
from learner.optim import Optimizer
from learner.score import PolicyScorer
from learner.weights.gather import Snapshot, WeightGather
from learner.weights.group import WeightGroup, join
from learner.weights.publish import WeightPublisher
from tools.bench.harness import Row

BUCKET_MB = 64.0
DEADLINE_S = 60.0
CPU = torch.device("cpu")
CONFIG = ModelConfig(
    vocab_size=32768, hidden_size=512, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=8,
    num_key_value_heads=4, head_dim=64, rms_norm_eps=1e-6, tie_word_embeddings=False, num_experts=64,
    num_experts_per_tok=4, moe_intermediate_size=96,
)  # fmt: skip
WAYS = ("ours", "one flat broadcast", "a broadcast a tensor")


def run(reps: int) -> list[Row]:
    """From this process's memory to another's, over gloo."""
    return measure(reps, (CPU, CPU))


def measure(reps: int, ends: tuple[torch.device, torch.device]) -> list[Row]:
    """GB/s of each way from the first device to the second, taking turns; over NCCL between GPUs."""
    sender, target = ends
    model = _model(1).to(sender)
    names = len(places(CONFIG))
    nbytes = sum(view.nbytes for view in views(model).values())
    here, there = mp.get_context("spawn").Pipe()
    process = mp.get_context("spawn").Process(target=_receiver, args=(there, target), daemon=True)
    process.start()
    try:
        learner = _Learner(model, here, sender)
        taken: dict[str, list[float]] = {way: [] for way in WAYS}
        for repeat in range(-2, reps):
            for way in WAYS:
                seconds = learner.measure(way)
                if repeat >= 0:  # before that both arenas are touched for the first time
                    taken[way].append(nbytes / seconds / 1e9)
        here.send(("stop",))
        process.join(DEADLINE_S)
    finally:
        process.kill()
    found = {way: statistics.median(values) for way, values in taken.items()}
    over = " over NCCL" if sender.type == "cuda" else ""
    label, limit = f"publish {nbytes / 1e9:.2f} GB in {names} tensors{over}", found["one flat broadcast"]
    return [Row("learner", f"{label}: {w}", v, "GB/s", "one flat broadcast", limit, reps) for w, v in found.items()]


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def _model(seed: int) -> Decoder:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = Decoder(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


class _Learner:
    """The sender, and the broker's part of the handshake."""

    def __init__(self, model: Decoder, pipe: Connection, device: torch.device) -> None:
        Optimizer(model, OptimSection(), 1)  # moves the parameters into flat buffers, as training does
        self.model, self.pipe, self.version = model, pipe, 0
        self.began = 0.0
        self._answers: queue.Queue[Any] = queue.Queue()
        self.publisher = WeightPublisher(
            self._send, self._receive, "127.0.0.1", BUCKET_MB, DEADLINE_S, device, _backend(device)
        )
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        pipe.send(("join", self.store.port))
        self.group = WeightGroup(self.store, 0, 0, 2, _backend(device), DEADLINE_S, device)
        self.flat = torch.zeros(sum(v.nbytes for v in views(model).values()), dtype=torch.uint8, device=device)

    def measure(self, way: str) -> float:
        """Seconds until the receiver has everything."""
        if way == "ours":
            self.version += 1
            snapshot = Snapshot(WeightGather(self.model, self.publisher.bucket_bytes))
            self.publisher.publish(self.version, snapshot, lambda _: None, lambda: False)
            return self._wait(Applied) - self.began
        self.pipe.send((way,))
        self._wait(str)
        self.began = time.perf_counter()
        tensors = [self.flat] if way == "one flat broadcast" else list(views(self.model).values())
        for tensor in tensors:
            self.group.start(tensor.view(-1).view(torch.uint8)).wait()
        return self._wait(str) - self.began

    def _send(self, message: Any) -> None:
        if isinstance(message, Publish):
            self.pipe.send(Prepare(1, 1, 1, 2, asdict(message)))
            self._wait(Ready)
            go = Go(1, message.version, ["receiver"], 2)
            self.began = time.perf_counter()
            self.pipe.send(go)
            self._answers.put(go)
        else:
            assert isinstance(message, Published), message

    def _receive(self, timeout: float) -> Any:
        return self._answers.get(timeout=timeout)

    def _wait(self, kind: type) -> float:
        if not self.pipe.poll(DEADLINE_S):
            raise DeadlineError(f"the receiving process said nothing within {DEADLINE_S:.0f} s")
        message = self.pipe.recv()
        assert isinstance(message, kind), message
        return time.perf_counter()


def _receiver(pipe: Connection, device: torch.device) -> None:
    """The other process: a replica's own receiver and swap, and the two plain ways."""
    model = _model(2).to(device)
    scorer = PolicyScorer(model, 64.0)
    receiver = WeightReceiver(pipe.send, lambda prepare: join(prepare, DEADLINE_S, device), DEADLINE_S)
    tensors: dict[str, list[Tensor]] = {
        "one flat broadcast": [
            torch.zeros(sum(v.nbytes for v in views(model).values()), dtype=torch.uint8, device=device)
        ],
        "a broadcast a tensor": [view.clone().view(-1).view(torch.uint8) for view in views(model).values()],
    }
    group: WeightGroup | None = None
    swapping = threading.Event()

    def swap() -> None:
        while not swapping.is_set():
            staged = receiver.staged()
            if staged is None:
                time.sleep(0.001)
                continue
            receiver.applied(staged, adopted=scorer.swap(staged))

    threading.Thread(target=swap, daemon=True).start()
    handlers: dict[type, Callable[[Any], None]] = {Prepare: receiver.on_prepare, Go: receiver.on_go}
    while True:
        message = pipe.recv()
        if type(message) in handlers:
            handlers[type(message)](message)
        elif message[0] == "join":
            store = dist.TCPStore("127.0.0.1", message[1], is_master=False, timeout=timedelta(seconds=DEADLINE_S))
            group = WeightGroup(store, 0, 1, 2, _backend(device), DEADLINE_S, device)
        elif message[0] == "stop":
            swapping.set()
            return
        else:
            assert group is not None, "join comes first"
            pipe.send("ready")
            for tensor in tensors[message[0]]:
                group.start(tensor).wait()
            pipe.send("done")
