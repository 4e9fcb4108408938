"""Who computes what: the axes pp x dp_replicate x dp_shard x ep x tp, and the groups they make.

::

    tp            a layer's heads, inner width and vocabulary; the tokens between those (sequence parallel)
    ep            data for dense layers, a share of the experts for sparse ones
    dp_shard      data; the optimizer's state is cut over dp_shard x ep (experts: over dp_shard)
    dp_replicate  data; everything repeated
    pp            consecutive layers

A rank reads shard ``data_rank`` of ``data_ranks`` = dp_replicate * dp_shard * ep. Experts lie on
the ep x tp ranks: under sequence parallelism each of those holds tokens of its own, so a token
travels once and no expert is cut.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from common.config import LearnerSection, ReplicaSection
from common.errors import ConfigError, DeadlineError
from learner.device import pick_device

COLLECTIVE_TIMEOUT_S = 600.0  # for a collective that all ranks are about to enter
AXES = ("pp", "dp_replicate", "dp_shard", "ep", "tp")  # slowest first: tp neighbours share a node
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Axis:
    """This rank's place on one axis, or on several flattened into one."""

    rank: int = 0
    size: int = 1
    group: Any = None  # the process group; None where the size is 1


ALONE = Axis()


class Mesh:
    """This rank among all; a world of one needs no process group."""

    def __init__(
        self, sizes: Mapping[str, int], rank: int, device: torch.device, timeout_s: float = COLLECTIVE_TIMEOUT_S
    ) -> None:
        """``sizes`` by axis. With more than one rank, torch's default group must exist, and its timeout be
        ``timeout_s``; collective.
        """
        self.timeout_s = timeout_s
        self.sizes = {name: int(sizes.get(name, 1)) for name in AXES}
        self.world, self.rank, self.device = math.prod(self.sizes.values()), rank, device
        self.at = self._coordinates(rank)
        self._mesh = None
        if self.world > 1:
            self._mesh = init_device_mesh(device.type, tuple(self.sizes.values()), mesh_dim_names=AXES)
        self.pp, self.tp = self._axis("pp"), self._axis("tp")
        self.experts = self._axis("ep", "tp")
        self.dp_shard, self.dp_replicate = self._axis("dp_shard"), self._axis("dp_replicate")
        self.dense_shard = self._axis("dp_shard", "ep")
        self.ends = self._pipeline_ends()

    @classmethod
    def from_environment(cls, config: LearnerSection | ReplicaSection, timeout_s: float) -> "Mesh":
        """Join the group that torchrun describes; alone without torchrun. NCCL on GPUs, gloo on CPUs.

        ``timeout_s``: how long a rank may wait for the others (learner.patience).
        Raises :class:`ConfigError` if the axes' product is not the number of ranks.
        """
        device = pick_device()
        on_gpu = device.type == "cuda"
        world = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
        sizes = {name: getattr(config, name, 1) for name in AXES}
        check_world(sizes, world)
        if "RANK" not in os.environ:
            return cls(sizes, 0, device)
        missing = [name for name in NEEDED if name not in os.environ]
        if missing:
            raise ConfigError(f"{', '.join(missing)} not set beside RANK: start the ranks with torchrun")
        if on_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout_s))
        return cls(sizes, dist.get_rank(), device, timeout_s)

    # ---- where everybody is ---------------------------------------------------------------------

    def _coordinates(self, rank: int) -> dict[str, int]:
        at = {}
        for name in reversed(AXES):
            rank, at[name] = divmod(rank, self.sizes[name])
        return at

    def rank_of(self, **at: int) -> int:
        """The rank at these coordinates; axes that are not named are 0."""
        rank = 0
        for name in AXES:
            rank = rank * self.sizes[name] + at.get(name, 0)
        return rank

    def _axis(self, *names: str) -> Axis:
        rank, size = 0, 1
        for name in names:
            rank, size = rank * self.sizes[name] + self.at[name], size * self.sizes[name]
        if size == 1 or self._mesh is None:
            return Axis(rank, size)
        part = self._mesh[names[0]] if len(names) == 1 else self._mesh[names]._flatten("_".join(names))
        return Axis(rank, size, part.get_group())

    def _pipeline_ends(self) -> Axis:
        """First and last stage of this pipeline: they share the embedding where the head is tied."""
        if self.sizes["pp"] < 2:
            return ALONE
        mine = ALONE
        width = self.world // self.sizes["pp"]
        for column in range(width):  # every rank takes part in making every group
            first, last = column, column + (self.sizes["pp"] - 1) * width
            group = dist.new_group([first, last])
            if self.rank in (first, last):
                mine = Axis(int(self.rank == last), 2, group)
        return mine

    @property
    def data_ranks(self) -> int:
        """How many shards a step has."""
        return self.sizes["dp_replicate"] * self.sizes["dp_shard"] * self.sizes["ep"]

    @property
    def data_rank(self) -> int:
        """Which of them is ours."""
        at, sizes = self.at, self.sizes
        return (at["dp_replicate"] * sizes["dp_shard"] + at["dp_shard"]) * sizes["ep"] + at["ep"]

    @property
    def is_first_stage(self) -> bool:
        """Holds the embedding."""
        return self.at["pp"] == 0

    @property
    def is_last_stage(self) -> bool:
        """Holds the final norm and the head."""
        return self.at["pp"] == self.sizes["pp"] - 1

    # ---- small collectives over all ranks -------------------------------------------------------

    def sum(self, tensor: Tensor) -> Tensor:
        """Over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_floats(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sum named numbers in float64; every rank must bring the same names."""
        names = sorted(values)
        total = self.sum(torch.tensor([values[n] for n in names], dtype=torch.float64, device=self.device))
        return dict(zip(names, total.tolist(), strict=True))

    def max_int(self, value: int) -> int:
        """The greatest of all ranks' values; :class:`DeadlineError` after the group's timeout."""
        return self.max_ints(value)[0]

    def max_ints(self, *values: int) -> tuple[int, ...]:
        """The same of several numbers, each by itself."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.int64, device=self.device)
        with self._meeting():
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
            return tuple(tensor.tolist())

    def broadcast_int(self, value: int) -> int:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.broadcast(tensor, 0)
        return int(tensor.item())

    def barrier(self) -> None:
        """Wait for every rank; :class:`DeadlineError` after the group's timeout."""
        if self.world > 1:
            with self._meeting():
                dist.barrier()

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise DeadlineError(
                f"rank {self.rank}: a rank died, or did not arrive within {self.timeout_s:.0f} s: {error}"
            ) from error

    def store(self) -> dist.Store:
        """Where ranks leave words for each other without meeting. Only for more than one rank."""
        return dist.PrefixStore("croupier", dist.distributed_c10d._get_default_store())

    def close(self, orderly: bool = True) -> None:
        """Leave the group. NCCL's waits for all ranks; one that fails alone leaves at once, so that they hear of it."""
        if self.world == 1 or not dist.is_initialized():
            return
        if orderly or self.device.type != "cuda":
            dist.destroy_process_group()
        else:
            dist.distributed_c10d._abort_process_group()


def check_world(sizes: Mapping[str, int], world: int) -> None:
    """Raises :class:`ConfigError` with every number if the axes' product is not ``world``."""
    product = math.prod(sizes.values())
    if product != world:
        numbers = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise ConfigError(
            f"{numbers} = {product} ranks, but {world} were started: "
            f"use torchrun --nproc-per-node {product}, or change these sizes"
        )


def single(device: torch.device | None = None) -> Mesh:
    """A world of one."""
    return Mesh({}, 0, device or torch.device("cpu"))


def held_rows(ids: Tensor, rows: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """Where ids lie in this rank's ``rows`` of a table that ``axis`` cuts, and whether they are there at all."""
    local = ids - axis.rank * rows
    return local.clamp(0, rows - 1), (local >= 0) & (local < rows)


def spread(total: int, parts: int, index: int) -> tuple[int, int]:
    """[first, last) of part ``index`` when ``total`` items go to ``parts`` as evenly as they will."""
    each, more = divmod(total, parts)
    first = index * each + min(index, more)
    return first, first + each + int(index < more)
