"""Weights over NCCL: from one GPU to another, or what one GPU can show of it by itself."""

import time
from datetime import timedelta

import torch
import torch.distributed as dist

from learner.weights.group import WeightGroup
from tools.bench import publish
from tools.bench.harness import Row, interleave

NBYTES = 1 << 29
DEADLINE_S = 60.0


def run(reps: int) -> list[Row]:
    """A publish between two GPUs; with one, a broadcast to nobody and the sums that the digest is made of."""
    if torch.cuda.device_count() > 1:
        return publish.measure(reps, (torch.device("cuda", 0), torch.device("cuda", 1)))
    return [_alone(reps, torch.device("cuda", 0))]


def _alone(reps: int, device: torch.device) -> Row:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=DEADLINE_S))
    group = WeightGroup(store, 0, 0, 1, "nccl", DEADLINE_S, device)
    weights = torch.zeros(NBYTES, dtype=torch.uint8, device=device)
    other = torch.empty_like(weights)

    def ours() -> float:
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        work = group.start(weights)
        group.sums(weights)  # ends once the sums are on the host
        work.wait()
        return NBYTES / (time.perf_counter() - began) / 1e9

    def copy() -> float:
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        other.copy_(weights)
        torch.cuda.synchronize(device)
        return NBYTES / (time.perf_counter() - began) / 1e9

    contestants = {"ours": ours, "copy": copy}
    interleave(contestants, 2)
    found = interleave(contestants, reps)
    group.close()
    label = f"publish {NBYTES / 1e9:.2f} GB over NCCL to nobody, and its sums"
    return Row("learner", label, found["ours"], "GB/s", "a copy on the device", found["copy"], reps)
