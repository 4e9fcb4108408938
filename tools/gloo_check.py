"""Whether torch's gloo backend works on this machine's loopback interface."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
from torch.distributed import HashStore, ProcessGroupGloo


def add_over_loopback(timeout_s: float) -> float:
    """Two ranks, one thread each, all-reduce a number; returns the seconds it took or raises RuntimeError."""
    store, timeout, start = HashStore(), timedelta(seconds=timeout_s), time.monotonic()

    def rank_adds(rank: int) -> float:
        group = ProcessGroupGloo(store, rank, 2, timeout)
        value = torch.full((1,), float(rank + 1))
        group.allreduce([value]).wait()  # type: ignore[attr-defined]  # missing from torch's stub
        return float(value)

    with ThreadPoolExecutor(2) as pool:
        sums = list(pool.map(rank_adds, range(2)))
    if sums != [3.0, 3.0]:
        raise RuntimeError(f"gloo added 1 and 2 to {sums}")
    return time.monotonic() - start
