"""Data parallelism: every rank holds the model, gradients are summed.

Sums, not means: the loss already carries the global denominator.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import ConfigError, DeadlineError

COLLECTIVE_TIMEOUT_S = 600.0
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class DataParallel:
    """This rank among its peers; a world of 1 needs no process group."""

    def __init__(self, rank: int, world: int, device: torch.device) -> None:
        self.rank, self.world, self.device = rank, world, device

    @classmethod
    def from_environment(cls) -> "DataParallel":
        """Join the group that torchrun describes; alone without torchrun. NCCL on GPUs, gloo on CPUs."""
        present = [name for name in NEEDED if name in os.environ]
        on_gpu = torch.cuda.is_available()
        local = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
        if "RANK" not in os.environ:
            return cls(0, 1, device)
        if len(present) < len(NEEDED):
            raise ConfigError(
                f"{', '.join(set(NEEDED) - set(present))} not set beside RANK: start the ranks with torchrun"
            )
        if on_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S))
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def all_reduce_sum(self, tensors: Iterable[Tensor]) -> None:
        """Sum each tensor over ranks, in place, through one flat buffer per dtype."""
        if self.world == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for group in by_dtype.values():
            flat = torch.cat([t.reshape(-1) for t in group])
            dist.all_reduce(flat)
            start = 0
            for tensor in group:
                tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
                start += tensor.numel()

    def sum_floats(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sum named numbers over ranks in float64; every rank must bring the same names."""
        if self.world == 1:
            return dict(values)
        names = sorted(values)
        total = torch.tensor([values[n] for n in names], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(names, total.tolist(), strict=True))

    def broadcast_int(self, value: int) -> int:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.broadcast(tensor, 0)
        return int(tensor.item())

    def barrier(self) -> None:
        """Wait for every rank; :class:`DeadlineError` after the group's timeout."""
        if self.world == 1:
            return
        try:
            dist.barrier()
        except RuntimeError as error:
            raise DeadlineError(
                f"rank {self.rank}: not every rank arrived within {COLLECTIVE_TIMEOUT_S:.0f} s: {error}"
            ) from error

    def differing_ranks(self, model: nn.Module) -> list[int]:
        """Ranks whose parameters are not bit for bit those of rank 0; empty when all agree."""
        digest = hashlib.blake2b(digest_size=8)
        for parameter in model.parameters():
            digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        if self.world == 1:
            return []
        mine = torch.tensor([int.from_bytes(digest.digest(), "little", signed=True)], device=self.device)
        gathered = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(gathered, mine)
        return [rank for rank, other in enumerate(gathered) if int(other) != int(gathered[0])]

    def close(self) -> None:
        """Leave the group."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()
