"""Actors and their engines, the learner and its optimizer, replicas, and the way of the weights between them."""

import math
from dataclasses import dataclass
from typing import Literal

from common.objective import require


@dataclass(frozen=True)
class OptimSection:
    """AdamW."""

    lr: float = 3e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # from the warm-up's end to run.steps
    min_lr_ratio: float = 0.1  # of lr, where a schedule ends
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    reset_every: int = 0  # updates after which AdamW's moments are forgotten (GLM-5); 0: never
    freeze: tuple[str, ...] = ()  # patterns of tensor names that are not trained and never sent: model.layers.0.*

    def __post_init__(self) -> None:
        """Validate."""
        require(0 < self.lr < math.inf, "optim.lr", self.lr, "must be positive")
        require(0 <= self.min_lr_ratio <= 1, "optim.min_lr_ratio", self.min_lr_ratio, "must lie in [0, 1]")
        require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "must not be negative")
        require(self.max_grad_norm > 0, "optim.max_grad_norm", self.max_grad_norm, "must be positive")


@dataclass(frozen=True)
class ActorSection:
    """One actor process (``tools.launch`` starts ``count`` of them)."""

    count: int = 2
    engine: Literal["local", "sglang"] = "local"
    max_sequences: int = 256  # decoded together
    slowdown: float = 1.0  # sleeps, so that decoding takes so many times as long: to study other actor:learner ratios
    pace_s: float = 0.0  # sleeps, so that decoding a token of every sequence takes at least this: as a larger model's
    threads: int = 1
    unacked_mb: float = 64.0  # trajectories sent and not yet acknowledged; above it the actor starts none
    wait_s: float = 120.0  # how long to wait for a broker

    def __post_init__(self) -> None:
        """Validate."""
        require(self.count >= 1, "actor.count", self.count, "must be at least 1")
        require(self.max_sequences >= 1, "actor.max_sequences", self.max_sequences, "must be at least 1")


@dataclass(frozen=True)
class EngineSection:
    """The SGLang servers behind an actor with ``actor.engine=sglang``."""

    launch: int = 1  # servers that the actor starts itself
    addresses: tuple[str, ...] = ()  # http://HOST:PORT of servers that run already; launch=0 then
    python: str = "python"  # of the environment that sglang is installed in (tools.sglang_cpu makes one for CPUs)
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: SGLang finds it
    tp: int = 1  # tensor parallel ranks of a server that the actor starts
    args: tuple[str, ...] = ()  # more flags for a server that the actor starts
    update: Literal["retract", "in_place", "abort"] = "retract"  # what becomes of requests in flight at an update
    concurrency: int = 0  # requests sent to a server at once; 0 lets the servers' own load decide
    least_servers: int = 1  # fewer that may still come back end the actor
    restarts: int = 5  # of one server in a row, waits doubling between them; five healthy minutes forget them
    backoff_s: float = 1.0  # before the first restart
    start_timeout_s: float = 900.0  # until a server answers
    heartbeat_s: float = 1.0  # between two looks at a server's load
    server_timeout_s: float = 20.0  # a server that has not answered for so long is lost
    request_timeout_s: float = 1800.0  # for one answer
    attempts: int = 4  # of one rollout before it is reported as failed

    def __post_init__(self) -> None:
        """Validate."""
        require(self.launch >= 0, "engine.launch", self.launch, "must not be negative")
        require(
            (self.launch > 0) != bool(self.addresses),
            "engine.launch",
            self.launch,
            "either the actor starts servers, or engine.addresses names them (launch=0 then)",
        )
        for address in self.addresses:
            require(
                address.startswith(("http://", "https://")), "engine.addresses", address, "must read http://HOST:PORT"
            )
        require(
            len({address.rstrip("/") for address in self.addresses}) == len(self.addresses),
            "engine.addresses",
            self.addresses,
            "names a server twice, which would be given weights twice at once; leave one out",
        )
        require(
            1 <= self.least_servers <= max(self.launch, len(self.addresses)),
            "engine.least_servers",
            self.least_servers,
            "must lie between 1 and the number of servers",
        )
        require(
            self.server_timeout_s > 2 * self.heartbeat_s > 0,
            "engine.server_timeout_s",
            self.server_timeout_s,
            f"must exceed two heartbeats (engine.heartbeat_s={self.heartbeat_s})",
        )


@dataclass(frozen=True)
class LearnerSection:
    """The learner's mesh, its micro-batches and its checkpoints."""

    pp: int = 1  # pipeline stages; the product of these five is the number of processes
    dp_replicate: int = 1  # data parallel, everything repeated
    dp_shard: int = 1  # data parallel, optimizer state sharded
    ep: int = 1  # expert parallel; data parallel for everything but the experts
    tp: int = 1  # tensor and sequence parallel; experts lie on the ep x tp ranks
    dtype: Literal["float32", "bfloat16"] = "float32"  # of weights and activations; the optimizer keeps float32
    micro_batch_tokens: int = 16384
    logprob_mb: float = 256.0  # of float32 logits of one chunk; working on them takes up to twice as much again
    head_float32: bool = False  # multiply by the head in float32 also where dtype is bfloat16
    recompute: bool = False  # activation checkpointing: keep each layer's input, compute the rest twice
    compile: bool = False  # torch.compile between the large products; needs a C++ compiler on CPUs
    slowdown: float = 1.0  # sleeps, so that a step takes so many times as long: to study other actor:learner ratios
    pace_s: float = 0.0  # sleeps, so that a step takes at least this: as a larger model's would
    threads: int = 1
    checkpoint_every: int = 0  # steps; 0 writes only the final one
    checkpoint_keep: int = 2
    resume: bool = False
    wait_s: float = 300.0  # how long to wait for a broker, and for a shard
    write_timeout_s: float = 600.0  # for a checkpoint to be written by every rank

    @property
    def ranks(self) -> int:
        """Processes of the learner (tools.launch starts them through torchrun)."""
        return self.pp * self.tp * self.data_ranks

    @property
    def data_ranks(self) -> int:
        """Shards of a step."""
        return self.dp_replicate * self.dp_shard * self.ep

    def data_rank_of(self, rank: int) -> int:
        """Which shard a process reads: tp neighbours read the same one, and so do the pipeline's stages."""
        return rank // self.tp % self.data_ranks

    def __post_init__(self) -> None:
        """Validate."""
        require(self.micro_batch_tokens >= 1, "learner.micro_batch_tokens", self.micro_batch_tokens, "must be positive")
        require(self.checkpoint_keep >= 1, "learner.checkpoint_keep", self.checkpoint_keep, "must be at least 1")


@dataclass(frozen=True)
class ReplicaSection:
    """The policy replicas that score tokens for the broker."""

    count: int = 1
    ep: int = 1  # processes of one replica that share the experts ...
    tp: int = 1  # ... and the layers; with ep x tp above 1, torchrun starts that many for each
    batch_tokens: int = 65536  # of waiting requests that are scored together
    threads: int = 1
    wait_s: float = 120.0

    @property
    def ranks(self) -> int:
        """Processes of one replica."""
        return self.ep * self.tp


@dataclass(frozen=True)
class WeightsSection:
    """How weights travel from the learner to the fleet."""

    backend: Literal["auto", "gloo", "nccl"] = "auto"  # auto: nccl where every receiver has a GPU of its own
    route: Literal["auto", "relay", "direct"] = "auto"  # to SGLang servers: through their actor, or auto with nccl: not
    bucket_mb: float = 64.0
    deadline_s: float = 20.0  # for readiness, and again for the collective, beside what its size takes
    least_mb_s: float = 100.0  # a receiver that takes less than this is late
    host: str = "127.0.0.1"  # address of the learner's rank 0 as receivers see it

    def __post_init__(self) -> None:
        """Validate."""
        require(self.bucket_mb > 0, "weights.bucket_mb", self.bucket_mb, "must be positive")
        require(self.deadline_s > 0, "weights.deadline_s", self.deadline_s, "must be positive")
