"""One YAML is one run: the schema, and how a file and ``key=value`` overrides become it.

::

    RUN.yaml + ["staleness.budget=4", ...]  ->  load()  ->  RunConfig (frozen dataclasses)

Every process reads the same file and takes its own section and the shared ones. Unknown keys and
sections are errors that suggest the near name; values are validated here, once, so the code
behind sees only what can be run. There is no interpolation and no default outside this file.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.errors import ConfigError
from common.frozen import POLICY, REFERENCE, FrozenModel, ReferenceSection, TeacherEntry, check_teachers
from common.joint import JointSection as JointSection
from common.joint import WarmstartSection as WarmstartSection
from common.mixture import Mixture, mixture
from common.near import suggest
from common.objective import ALGORITHMS, AdvantageSection, LossSection, check_stacking, require
from common.observe import AlertSection, MetricsSection, TraceSection
from common.rewards import RewardSection


def _is_loopback(url: str) -> bool:
    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")


MEGABYTE = 1 << 20
MAX_HELD_OUT = 1 << 24  # prompts of one evaluation
SORT_TASKS = {"sort6", "sort6_confidence", "sort6_twice"}  # each has a warm start of its own
MAX_TASKS, MAX_LABEL = 64, 64  # tasks that are mixed; characters of a label
BYTES_PER_TOKEN = 13  # of a queued trajectory: ids, flag, log q and version
BYTES_PER_ALTERNATIVE = 8  # id and log q
BYTES_PER_EXPERT = 2  # of an expert record
BYTES_SERVED = 18  # a token of a shard without its expert record: ids, two flags, log q, log m and log p
BYTES_JOURNALED = 1.5  # written for a byte of trajectory: scores, tables and padding on top
BYTES_FROZEN = 4  # a token of one frozen model's scores, journaled and served

# Least and greatest values that mean something, where a rule needs no more words than its numbers.
RANGES: dict[str, tuple[float, float]] = {
    "advantage.epsilon": (0, 1), "obrs.rethin_below": (0, 1),
    "optim.beta1": (0, 0.999999), "optim.beta2": (0, 0.999999), "optim.eps": (0, 1), "optim.weight_decay": (0, 10),
    "broker.journal_mb": (0, 1e9), "broker.retain_mb": (0, 1e9), "broker.queue_mb": (0, 1e9),
    "broker.score_timeout_s": (0.1, 1e6), "broker.peer_timeout_s": (0.1, 1e6), "broker.verify_rate": (0, 1),
    "actor.slowdown": (1, 1000), "learner.slowdown": (1, 1000), "actor.pace_s": (0, 3600), "learner.pace_s": (0, 3600),
    "actor.threads": (1, 4096), "actor.unacked_mb": (0.01, 1e9), "actor.wait_s": (0, 1e6),
    "rollout.oversample": (1, 4), "rollout.max_turns": (1, 1000), "rollout.max_reply_tokens": (0, 1e6),
    "engine.tp": (1, 4096), "engine.concurrency": (0, 1e6), "engine.restarts": (0, 1e6),
    "engine.backoff_s": (0, 3600), "engine.start_timeout_s": (1, 1e6), "engine.request_timeout_s": (1, 1e6),
    "engine.attempts": (1, 100),
    "optim.reset_every": (0, 2**31),
    "learner.logprob_mb": (0.0001, 1e6), "loss.router_z": (0, 1e3), "loss.expert_bias_rate": (0, 1),
    "learner.pp": (1, 4096), "learner.dp_replicate": (1, 4096), "learner.dp_shard": (1, 4096), "learner.ep": (1, 4096),
    "learner.tp": (1, 4096), "learner.write_timeout_s": (0.1, 1e6),
    "learner.threads": (1, 4096), "learner.checkpoint_every": (0, 2**31),
    "learner.wait_s": (0, 1e6),
    "weights.least_mb_s": (0.001, 1e9),
    "replica.count": (0, 4096), "replica.ep": (1, 4096), "replica.tp": (1, 4096), "replica.batch_tokens": (1, 2**31),
    "replica.threads": (1, 4096), "replica.wait_s": (0, 1e6),
    "warmstart.layers": (1, 1000), "warmstart.hidden": (1, 1e6), "warmstart.heads": (1, 1000),
    "warmstart.kv_heads": (1, 1000), "warmstart.experts": (1, 10_000), "warmstart.experts_per_token": (1, 10_000),
    "warmstart.expert_width": (1, 1e6), "warmstart.lr": (0, 1), "warmstart.batch": (1, 1e6),
    "warmstart.target_reward": (0, 1), "warmstart.max_steps": (1, 1e9),
}  # fmt: skip
RANGES |= {f"joint.{key}": bounds for key, bounds in RANGES.items() if key.startswith("warmstart.")}


@dataclass(frozen=True)
class RunSection:
    """Which run this is and where it leaves its files."""

    name: str = "run"
    dir: str = "runs"  # the run's files lie in <dir>/<name>
    seed: int = 0
    steps: int = 100  # optimizer steps; the final policy version equals this

    def __post_init__(self) -> None:
        """Validate."""
        plain = self.name not in ("", ".", "..") and "/" not in self.name
        require(plain, "run.name", self.name, "needs a plain name")
        require(0 <= self.seed < 2**31, "run.seed", self.seed, "must lie in [0, 2**31)")
        require(self.steps >= 1, "run.steps", self.steps, "must be at least 1")

    @property
    def path(self) -> Path:
        """The run's directory."""
        return Path(self.dir) / self.name


@dataclass(frozen=True)
class ModelSection:
    """The starting model, a Hugging Face directory."""

    path: str = "models/sort6"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the embedded engine; learner.dtype is the learner's


@dataclass(frozen=True)
class TaskEntry:
    """One of several tasks that are trained together."""

    name: str = ""  # as task.name; "" takes the label
    ratio: float = 1.0  # of the prompts, beside those of the others
    params: dict[str, Any] = field(default_factory=dict)
    reward_weights: dict[str, float] = field(default_factory=dict)  # of channels; none given: {correct: 1}


@dataclass(frozen=True)
class TaskSection:
    """What the policy is trained on."""

    name: str = "sort6"  # "sort6" or "gym:<reasoning-gym data set>"
    params: dict[str, Any] = field(default_factory=dict)  # handed to the task
    reward_weights: dict[str, float] = field(default_factory=dict)  # of channels; none given: {correct: 1}
    mix: dict[str, TaskEntry] = field(default_factory=dict)  # label -> task: several at once, instead of the above

    def __post_init__(self) -> None:
        """Validate the mixture."""
        if not self.mix:
            return
        require(len(self.mix) <= MAX_TASKS, "task.mix", list(self.mix), f"holds at most {MAX_TASKS} tasks")
        for label in self.mix:
            plain = 0 < len(label) <= MAX_LABEL and label.isprintable()
            require(plain, "task.mix", label, f"a label needs at most {MAX_LABEL} printable characters")
        unused = {"name": "sort6", "params": {}, "reward_weights": {}}
        for key, default in unused.items():
            given = getattr(self, key)
            require(given == default, f"task.{key}", given, "each task of task.mix has its own; remove one of the two")
        try:
            mixture(self.ratios)
        except ConfigError as error:
            raise ConfigError(f"task.mix: {error}") from error

    @property
    def entries(self) -> dict[str, TaskEntry]:
        """label -> task, in the order in which they are numbered; one that is not mixed is its own label."""
        found = {label: replace(entry, name=entry.name or label) for label, entry in self.mix.items()}
        found = found or {self.name: TaskEntry(self.name, 1.0, self.params, self.reward_weights)}
        usual = {"correct": 1.0}
        return {label: replace(e, reward_weights=e.reward_weights or usual) for label, e in found.items()}

    @property
    def labels(self) -> tuple[str, ...]:
        """Of the tasks by number."""
        return tuple(self.mix) or (self.name,)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Of the tasks by number."""
        return tuple(entry.ratio for entry in self.mix.values()) or (1.0,)

    @property
    def mixture(self) -> Mixture:
        """Which task each prompt belongs to."""
        return mixture(self.ratios)

    @property
    def sorting(self) -> TaskEntry:
        """The task that the warm start makes a model for, where :attr:`in_small_alphabet`."""
        return next(entry for entry in self.entries.values() if entry.name in SORT_TASKS)

    @property
    def in_small_alphabet(self) -> bool:
        """Whether the quick start's tiny model, which the warm start makes, can be trained on it."""
        names = {entry.name for entry in self.entries.values()}
        return len(names & SORT_TASKS) == 1 and names <= SORT_TASKS | {"guess"}


@dataclass(frozen=True)
class RolloutSection:
    """How trajectories are sampled. Temperature is the only knob under which log q stays exact."""

    groups_per_step: int = 32
    group_size: int = 8
    max_tokens: int = 8  # per completion, that is per turn
    max_prompt_tokens: int = 8
    max_turns: int = 1  # of a conversation with a task that answers
    max_reply_tokens: int = 0  # of what the environment says between two turns
    oversample: float = 1.0  # siblings started for one wanted, the first to end are kept: faster, but favours the short
    temperature: float = 1.0
    top_logprobs: int = 0  # ids and log q of the k likeliest tokens, beside the sampled one
    ignore_eos: bool = False  # sample max_tokens always (throughput measurements)
    exemplars: int = 0  # siblings of a group, the last ones, that are answers written by people (reward.exemplars)
    routing_replay: bool = False  # record each token's experts; replica and learner route by them (algorithms.md 7)

    def __post_init__(self) -> None:
        """Validate."""
        require(self.groups_per_step >= 1, "rollout.groups_per_step", self.groups_per_step, "must be at least 1")
        require(self.group_size >= 1, "rollout.group_size", self.group_size, "must be at least 1")
        require(self.max_tokens >= 1, "rollout.max_tokens", self.max_tokens, "must be at least 1")
        require(self.max_prompt_tokens >= 1, "rollout.max_prompt_tokens", self.max_prompt_tokens, "must be at least 1")
        require(
            0 < self.temperature < math.inf,
            "rollout.temperature",
            self.temperature,
            "must be positive: a greedy rollout has no density to correct (algorithms.md 1.10)",
        )
        require(
            0 <= self.exemplars < self.group_size,
            "rollout.exemplars",
            self.exemplars,
            f"must leave something to sample of rollout.group_size={self.group_size}",
        )
        require(0 <= self.top_logprobs <= 128, "rollout.top_logprobs", self.top_logprobs, "must lie in [0, 128]")

    @property
    def max_length(self) -> int:
        """Tokens of the longest possible trajectory, prompt included."""
        turns = self.max_turns * self.max_tokens + (self.max_turns - 1) * self.max_reply_tokens
        return self.max_prompt_tokens + turns

    @property
    def max_sampled(self) -> int:
        """Tokens that the policy may sample in one trajectory."""
        return self.max_turns * self.max_tokens

    @property
    def started(self) -> int:
        """Siblings that are started for a group."""
        return self.started_beside(0)

    def started_beside(self, exemplars: int) -> int:
        """Siblings that are sampled for a group in which ``exemplars`` are not."""
        return math.ceil((self.group_size - exemplars) * self.oversample)

    def largest_group(self, routed: int = 0) -> int:
        """Bytes of a group whose every sibling is as long as it may be; ``routed`` experts are recorded of a token."""
        per_token = BYTES_PER_TOKEN + BYTES_PER_ALTERNATIVE * self.top_logprobs + BYTES_PER_EXPERT * routed
        return self.group_size * self.max_length * per_token


@dataclass(frozen=True)
class StalenessSection:
    """The staleness budget: no trained token has a lag above it, in policy versions.

    ``auto`` moves the budget while the run goes (broker.governor): up while somebody idles for want of it
    and the targets hold, down where it costs more than it buys.
    """

    budget: int | str = 2  # versions, or auto
    start: int = 2  # auto: where it begins
    most: int = 16  # auto: what it never exceeds
    every: int = 8  # auto: steps between two moves
    kl_target: float = 0.05  # auto: nats a token after rejection that a move up must stay below
    ess_target: float = 0.5  # auto: normalised ESS of the learner's weights that a move up must stay above

    def __post_init__(self) -> None:
        """Validate."""
        sound = self.budget == "auto" if isinstance(self.budget, str) else self.budget >= 0
        require(sound, "staleness.budget", self.budget, "must be 0 (synchronous) or more, or auto")
        require(0 <= self.start <= self.most, "staleness.start", self.start, f"must lie in [0, most={self.most}]")
        require(1 <= self.most <= 1024, "staleness.most", self.most, "must lie in [1, 1024] versions")
        require(self.every >= 2, "staleness.every", self.every, "must be at least 2 steps")
        require(self.kl_target > 0, "staleness.kl_target", self.kl_target, "must be positive")
        require(0 <= self.ess_target < 1, "staleness.ess_target", self.ess_target, "must lie in [0, 1)")

    @property
    def auto(self) -> bool:
        """Whether the broker moves the budget."""
        return self.budget == "auto"

    @property
    def limit(self) -> int:
        """What the budget never exceeds."""
        return self.budget if isinstance(self.budget, int) else self.most

    @property
    def first(self) -> int:
        """The budget at the beginning."""
        return self.budget if isinstance(self.budget, int) else self.start


@dataclass(frozen=True)
class ObrsSection:
    """Optimal budgeted rejection (algorithms.md 1). ``off`` accepts all and needs no replica."""

    mode: Literal["off", "threshold", "budget", "ess"] = "threshold"
    threshold: float = 1.0  # mode threshold: the paper's lambda
    budget: float = 0.9  # mode budget: the share of tokens to accept; lambda follows, one step behind
    target_ess: float = 0.9  # mode ess: normalised ESS of the learner's weights a trained token; lambda follows
    window: int = 1  # modes budget and ess: steps that lambda is estimated from
    z_weight: Literal["none", "context", "batch"] = "none"  # none is exact; context is the paper's loss
    rethin_below: float = 0.0  # a step is thinned again before it is served if the learner's last ESS was less
    z_kappa: bool = False  # z_weight context: the paper's debias of Z instead of interpolating between bounds

    def __post_init__(self) -> None:
        """Validate."""
        require(
            0.01 <= self.threshold <= 100, "obrs.threshold", self.threshold, "must lie in [0.01, 100]; 1 is the default"
        )
        require(0 < self.budget <= 1, "obrs.budget", self.budget, "is a share of the tokens: above 0, at most 1")
        require(
            0 < self.target_ess < 1,
            "obrs.target_ess",
            self.target_ess,
            "is a normalised effective sample size: above 0, below 1",
        )
        require(
            self.mode != "ess" or self.z_weight != "context",
            "obrs.z_weight",
            self.z_weight,
            "weighs tokens by their context's acceptance, which obrs.mode=ess does not reckon with; set it to none or "
            "batch, or obrs.mode=budget",
        )
        require(
            self.rethin_below == 0 or (self.z_weight == "none" and self.mode != "off"),
            "obrs.rethin_below",
            self.rethin_below,
            "needs rejection (obrs.mode) and its exact form (obrs.z_weight=none); set it to 0",
        )
        require(
            not self.z_kappa or self.z_weight == "context",
            "obrs.z_kappa",
            self.z_kappa,
            "debiases the Z of obrs.z_weight=context; set that, or false",
        )
        require(1 <= self.window <= 64, "obrs.window", self.window, "must lie in [1, 64] steps")


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
class BrokerSection:
    """The broker's address and bounds."""

    address: str = "tcp://127.0.0.1:5700"
    queue_mb: float = 256.0  # trajectories waiting to be trained; a full queue stops the grants
    journal_mb: float = 2048.0  # on disk in the run directory, before anything is acknowledged; 0 keeps no journal
    retain_mb: float = 256.0  # committed shards kept for a learner that resumes
    heartbeat_s: float = 1.0
    peer_timeout_s: float = 15.0  # a silent peer is dropped and its groups are granted again
    assemble_ahead: int = 1  # versions between scoring and training; 0 scores with the learner's own, at its pace
    score_timeout_s: float = 60.0
    verify_rate: float = 0.25  # share of the trajectories whose claimed probabilities are checked against the scores
    quarantine_after: int = 20  # offences of one peer within a minute, after which it is not listened to for a while
    quarantine_s: float = 60.0
    max_message_mb: float = 256.0  # of one message, either way; what is larger is refused before it is read
    keys: str = ""  # directory of the keys that `python -m tools.keys` makes; needed unless the address is local

    def __post_init__(self) -> None:
        """Validate."""
        require(
            self.address.startswith(("tcp://", "ipc://")),
            "broker.address",
            self.address,
            "must start with tcp:// or ipc://",
        )
        require(self.queue_mb > 0, "broker.queue_mb", self.queue_mb, "must be positive")
        require(
            self.peer_timeout_s > 2 * self.heartbeat_s > 0,
            "broker.peer_timeout_s",
            self.peer_timeout_s,
            f"must exceed two heartbeats (broker.heartbeat_s={self.heartbeat_s})",
        )
        require(0 <= self.assemble_ahead <= 8, "broker.assemble_ahead", self.assemble_ahead, "must lie in [0, 8]")
        require(self.quarantine_after >= 1, "broker.quarantine_after", self.quarantine_after, "must be at least 1")
        require(self.quarantine_s >= 0, "broker.quarantine_s", self.quarantine_s, "must not be negative")
        require(
            1 <= self.max_message_mb <= 65536,
            "broker.max_message_mb",
            self.max_message_mb,
            "must lie in [1, 65536] megabytes",
        )

    @property
    def max_message_bytes(self) -> int:
        """``max_message_mb`` in bytes."""
        return int(self.max_message_mb * MEGABYTE)


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
    logprob_mb: float = 256.0  # of float32 logits that exist at once
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


@dataclass(frozen=True)
class EvaluationSection:
    """Held-out evaluation by the fleet: at version 0, every ``every`` versions and at the end."""

    prompts: int = 512  # 0 switches evaluation off
    every: int = 50
    temperature: float = 1.0  # 0 is greedy
    samples: int = 1  # completions of each prompt: n of pass@k, and the voters
    pass_at: tuple[int, ...] = ()  # k of each pass@k that is reported
    keep_best: bool = False  # the learner keeps the checkpoint of the version with the best reward

    def __post_init__(self) -> None:
        """Validate."""
        require(
            0 <= self.prompts < MAX_HELD_OUT, "evaluation.prompts", self.prompts, f"must lie in [0, {MAX_HELD_OUT})"
        )
        require(self.every >= 1, "evaluation.every", self.every, "must be at least 1")
        require(self.temperature >= 0, "evaluation.temperature", self.temperature, "must be 0 (greedy) or more")
        require(self.samples >= 1, "evaluation.samples", self.samples, "must be at least 1")
        require(
            self.samples == 1 or self.temperature > 0,
            "evaluation.samples",
            self.samples,
            "greedy completions of one prompt are all alike; set it to 1 or evaluation.temperature above 0",
        )
        require(
            all(1 <= k <= self.samples for k in self.pass_at),
            "evaluation.pass_at",
            self.pass_at,
            f"each k must lie in [1, evaluation.samples={self.samples}]",
        )
        require(
            not self.keep_best or self.prompts > 0,
            "evaluation.keep_best",
            self.keep_best,
            "evaluation is switched off; set evaluation.prompts above 0",
        )


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    algorithm: str = ""  # a recipe of common.objective.ALGORITHMS: values for keys that this file does not set
    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    joint: JointSection = field(default_factory=JointSection)
    task: TaskSection = field(default_factory=TaskSection)
    reward: RewardSection = field(default_factory=RewardSection)
    rollout: RolloutSection = field(default_factory=RolloutSection)
    staleness: StalenessSection = field(default_factory=StalenessSection)
    obrs: ObrsSection = field(default_factory=ObrsSection)
    advantage: AdvantageSection = field(default_factory=AdvantageSection)
    loss: LossSection = field(default_factory=LossSection)
    optim: OptimSection = field(default_factory=OptimSection)
    broker: BrokerSection = field(default_factory=BrokerSection)
    actor: ActorSection = field(default_factory=ActorSection)
    engine: EngineSection = field(default_factory=EngineSection)
    learner: LearnerSection = field(default_factory=LearnerSection)
    replica: ReplicaSection = field(default_factory=ReplicaSection)
    reference: ReferenceSection = field(default_factory=ReferenceSection)
    teachers: dict[str, TeacherEntry] = field(default_factory=dict)
    weights: WeightsSection = field(default_factory=WeightsSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    warmstart: WarmstartSection = field(default_factory=WarmstartSection)
    trace: TraceSection = field(default_factory=TraceSection)
    metrics: MetricsSection = field(default_factory=MetricsSection)
    alerts: AlertSection = field(default_factory=AlertSection)

    def __post_init__(self) -> None:
        """Validate ranges and what spans sections."""
        for key, (low, high) in RANGES.items():
            value = attrgetter(key)(self)
            require(low <= value <= high, key, value, f"must lie in [{low:g}, {high:g}]")
        self._check_frozen()
        self._check_blocks()
        self.check_room()
        for name in self.reward.models:
            require(
                any(name in entry.reward_weights for entry in self.task.entries.values()),
                "reward.models",
                name,
                f"no task weighs it, so nobody would ask it; set task.reward_weights.{name} (0 records it alone)",
            )
        require(
            self.rollout.exemplars == 0 or bool(self.reward.exemplars),
            "rollout.exemplars",
            self.rollout.exemplars,
            "needs answers to put into groups; name their JSONL file in reward.exemplars",
        )
        require(
            self.replica.count >= 1 or self.obrs.mode == "off",
            "replica.count",
            self.replica.count,
            "rejection needs a policy replica; start one or set obrs.mode=off",
        )
        require(
            self.obrs.z_weight != "context" or self.rollout.top_logprobs > 0,
            "obrs.z_weight",
            self.obrs.z_weight,
            "the acceptance of a context is bounded from its alternatives; set rollout.top_logprobs (20, say)",
        )
        check_stacking(
            self.obrs.mode,
            self.obrs.z_weight,
            self.advantage,
            self.loss,
            self.rollout.group_size,
            self.rollout.max_sampled,
        )
        require(
            self.actor.max_sequences >= self.rollout.started,
            "actor.max_sequences",
            self.actor.max_sequences,
            f"must hold one whole group (rollout.group_size={self.rollout.group_size}, with rollout.oversample)",
        )
        require(
            self.actor.max_sequences >= self.evaluation.samples,
            "evaluation.samples",
            self.evaluation.samples,
            f"the completions of a prompt are sampled together; raise actor.max_sequences={self.actor.max_sequences}",
        )
        require(
            self.weights.route != "direct" or self.actor.engine == "sglang",
            "weights.route",
            self.weights.route,
            f"actor.engine={self.actor.engine} is itself what receives; set it to auto",
        )
        require(
            self.weights.backend != "nccl" or self.actor.engine == "local" or self.route == "direct",
            "weights.backend",
            self.weights.backend,
            "an actor has no GPU of its own to pass weights on from; set weights.route=direct or weights.backend=gloo",
        )
        require(
            self.actor.engine == "local" or not self.engine.addresses or self.actor.count == 1,
            "actor.count",
            self.actor.count,
            "two actors would give the same servers weights; with engine.addresses set it to 1, and start further "
            "actors with addresses of their own",
        )
        require(
            self.actor.engine == "local" or self.route == "direct" or all(map(_is_loopback, self.engine.addresses)),
            "engine.addresses",
            self.engine.addresses,
            "an actor passes weights on over loopback alone; run it beside its servers, or set weights.route=direct",
        )
        own_pace = self.actor.engine == "local"
        for key, value, off in (("slowdown", self.actor.slowdown, 1), ("pace_s", self.actor.pace_s, 0)):
            why = (
                f"actor.engine={self.actor.engine} samples at its servers' pace; set it to {off} or actor.engine=local"
            )
            require(value == off or own_pace, f"actor.{key}", value, why)
        require(
            self.loss.expert_bias_rate == 0 or self.actor.engine == "local",
            "loss.expert_bias_rate",
            self.loss.expert_bias_rate,
            f"actor.engine={self.actor.engine} cannot take a bias of the experts; set it to 0 or actor.engine=local",
        )
        self._check_joint()

    def _check_joint(self) -> None:
        """What a rollout model of its own cannot stand beside."""
        learner = self.learner
        require(
            not self.joint.path or not self.rollout.routing_replay,
            "rollout.routing_replay",
            self.rollout.routing_replay,
            f"records the experts of joint.path={self.joint.path}, and the policy has others; set it to false",
        )
        require(
            not self.joint.trains or self.obrs.z_weight != "batch",
            "obrs.z_weight",
            self.obrs.z_weight,
            "divides by the accepted tokens, and joint.path trains the rollout model on all of them; set it to none or "
            "context",
        )
        require(
            not self.joint.path or not self.evaluation.keep_best,
            "evaluation.keep_best",
            self.evaluation.keep_best,
            "actors run joint.path, so held-out prompts say which rollout model is best and not which policy; set it "
            "to false and choose by `python -m tools.evaluate`",
        )
        for name in ("pp", "tp", "ep"):
            require(
                not self.joint.trains or getattr(learner, name) == 1,
                f"learner.{name}",
                getattr(learner, name),
                "joint.path trains two models on the same ranks, and each rank must hold both whole to compare their "
                f"distributions; set learner.{name}=1 and use learner.dp_replicate or learner.dp_shard",
            )

    @property
    def rollout_path(self) -> str:
        """The directory of the model that actors run."""
        return self.joint.path or self.model.path

    @property
    def rollout_frozen(self) -> tuple[str, ...]:
        """Patterns of the tensors that versions for the actors come without."""
        return () if self.joint.path else self.optim.freeze

    @property
    def rollout_bias(self) -> bool:
        """Whether the routers of the model that actors run have a bias that moves."""
        return self.loss.expert_bias_rate > 0 and not self.joint.path

    def _check_frozen(self) -> None:
        check_teachers(self.teachers, self.task.labels)
        require(
            self.loss.distill == 0 or bool(self.teachers),
            "loss.distill",
            self.loss.distill,
            "there is nobody to learn from; name a model under teachers, as configs/distill.yaml does, or set it to 0",
        )
        require(
            self.loss.distill == 0 or self.advantage.zero_signal == "keep",
            "advantage.zero_signal",
            self.advantage.zero_signal,
            "a group of equal rewards still has a teacher (loss.distill); set it to keep",
        )

    @cached_property
    def frozen(self) -> dict[str, FrozenModel]:
        """The frozen models that the loss needs, by name; the reference first."""
        found = []
        if self.loss.kl > 0:
            path, key = (
                self.reference.path or self.model.path,
                "reference.path" if self.reference.path else "model.path",
            )
            found.append(FrozenModel(REFERENCE, key, path, self.reference.count))
        for name, teacher in self.teachers.items() if self.loss.distill > 0 else ():
            tasks = tuple(self.task.labels.index(label) for label in teacher.tasks) or None
            found.append(FrozenModel(name, f"teachers.{name}.path", teacher.path, teacher.count, tasks))
        return {model.name: model for model in found}

    @property
    def scorers(self) -> tuple[str, ...]:
        """Who is asked about every batch: the policy unless rejection is off, and the frozen models."""
        return ((POLICY,) if self.obrs.mode != "off" else ()) + tuple(self.frozen)

    @property
    def scores_per_token(self) -> int:
        """Frozen scores that a token has at most: the reference's, and its teacher's."""
        return int(self.loss.kl > 0) + int(self.loss.distill > 0)

    @property
    def bytes_journaled(self) -> float:
        """Bytes of the journal for a byte of trajectory."""
        return BYTES_JOURNALED + BYTES_FROZEN * self.scores_per_token / BYTES_PER_TOKEN

    @property
    def route(self) -> Literal["relay", "direct"]:
        """``weights.route``, decided: SGLang servers on GPUs take weights from the learner itself."""
        asked = self.weights.route
        if asked != "auto":
            return asked
        direct = self.actor.engine == "sglang" and self.engine.device != "cpu" and self.weights.backend != "gloo"
        return "direct" if direct else "relay"

    def _check_blocks(self) -> None:
        """Raise :class:`ConfigError` for what shapes a whole trajectory's reward where blocks have their own."""
        if self.advantage.blocks == "off":
            return
        weighed = {name for entry in self.task.entries.values() for name, w in entry.reward_weights.items() if w}
        for key, on in (
            ("reward.normalise", self.reward.mixes), ("reward.models", bool(weighed & set(self.reward.models))),
        ):  # fmt: skip
            require(
                not on,
                key,
                getattr(self.reward, key.partition(".")[2]),
                "goes into the whole trajectory's reward, and advantage.blocks trains on those of its blocks; leave "
                "reward.normalise, .gate and weighed reward models out, or set advantage.blocks=off",
            )

    def check_room(self, routed: int = 0) -> None:
        """Raise :class:`ConfigError` unless queue, journal and messages hold the largest step that rollout allows.

        ``routed`` experts are recorded of a token: only the model says how many, so those who read it ask again.
        """
        step_mb = self.rollout.groups_per_step * self.rollout.largest_group(routed) / MEGABYTE
        beside = f" with the {routed} experts that rollout.routing_replay records of a token" if routed else ""
        require(
            self.broker.queue_mb >= step_mb,
            "broker.queue_mb",
            self.broker.queue_mb,
            f"must hold the largest step that rollout allows, {step_mb:.3g} MB{beside}",
        )
        journal_mb = self.bytes_journaled * (self.staleness.limit + 2) * step_mb
        require(
            self.broker.journal_mb == 0 or self.broker.journal_mb >= journal_mb,
            "broker.journal_mb",
            self.broker.journal_mb,
            f"must hold staleness.budget + 2 (auto: most + 2) of the largest steps that rollout allows, "
            f"{journal_mb:.3g} MB{beside}, or be 0",
        )
        tokens = self.rollout.groups_per_step * self.rollout.group_size * self.rollout.max_length
        served = BYTES_SERVED + BYTES_FROZEN * self.scores_per_token
        message_mb = tokens * (served + 4 * self.rollout.top_logprobs + BYTES_PER_EXPERT * routed) / MEGABYTE
        require(
            not routed or self.broker.max_message_mb >= message_mb,
            "broker.max_message_mb",
            self.broker.max_message_mb,
            f"must hold the largest step that rollout allows, {message_mb:.3g} MB{beside}: it is scored in one piece",
        )


def _check_keys(given: Mapping[Any, Any], schema: Any, prefix: str, source: str) -> None:
    known = {f.name: f for f in fields(schema)}
    for key, value in given.items():
        if key not in known:
            kind = "section" if not prefix else "key"
            raise ConfigError(f"{source}: unknown {kind} {prefix}{key!s}; {suggest(str(key), sorted(known))}")
        child, name = known[key].type, f"{prefix}{key}"
        if is_dataclass(child):
            _check_section(value, child, name, source)
        elif get_origin(child) is dict and is_dataclass(entry := get_args(child)[1]) and isinstance(value, Mapping):
            for label, section in value.items():
                _check_section(section, entry, f"{name}.{label}", source)


def _check_section(given: Any, schema: Any, name: str, source: str) -> None:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{source}: {name} is a section and needs keys, not {given!r}")
    _check_keys(given, schema, f"{name}.", source)


def _spell_off(given: DictConfig, schema: Any) -> None:
    """YAML reads a bare ``off`` as false; where the schema knows "off", that was meant."""
    for f in fields(schema):
        if f.name in given and is_dataclass(f.type):
            _spell_off(given[f.name], f.type)
        elif f.name in given and given[f.name] is False and "off" in get_args(f.type):
            given[f.name] = "off"


def _read(path: Path) -> DictConfig:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; configs/ holds the examples")
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # yaml's own error classes have no common public base
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: must hold sections, not a {type(loaded).__name__}")
    return loaded


def _recipe(name: Any) -> dict[str, Any]:
    """The values that ``algorithm`` stands for. Raises :class:`ConfigError` that suggests the near name."""
    if not name:
        return {}
    if name not in ALGORITHMS:
        raise ConfigError(f"algorithm={name!r}: no such recipe; {suggest(str(name), sorted(ALGORITHMS))}")
    return ALGORITHMS[name]


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read ``path``, apply ``section.key=value`` overrides and validate.

    Raises :class:`ConfigError` naming the file or override, the key and the near name.
    """
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r}: must read section.key=value")
    file = _read(Path(path))
    dotlist = OmegaConf.from_dotlist(list(overrides))
    for key in (o.partition("=")[0] for o in overrides if o.partition("=")[2].lstrip().startswith("{")):
        if key.endswith("reward_weights") and OmegaConf.select(file, key) is not None:
            OmegaConf.update(file, key, {}, merge=False)  # weights that are given whole stand for those of the file
    for part, source in ((file, str(path)), (dotlist, "override")):
        _check_keys(OmegaConf.to_container(part), RunConfig, "", source)  # type: ignore[arg-type]
        _spell_off(part, RunConfig)
    recipe = _recipe(dotlist.get("algorithm", file.get("algorithm", "")))
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), recipe, file, dotlist)
        config = OmegaConf.to_object(merged)
    except ConfigError:
        raise
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise ConfigError(f"{path}: {key}: {str(error).splitlines()[0]}") from error
    if not isinstance(config, RunConfig):
        raise ConfigError(f"{path}: did not load as a run configuration")
    return config


def to_yaml(config: RunConfig) -> str:
    """The complete configuration as YAML, so that a run directory says what was run."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
