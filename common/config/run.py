"""The whole of a run's configuration: its sections, their ranges, and what spans several of them."""

from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from common.config.deciding import BrokerSection, ObrsSection, StalenessSection
from common.config.processes import (
    ActorSection,
    EngineSection,
    LearnerSection,
    OptimSection,
    ReplicaSection,
    WeightsSection,
)
from common.config.sampling import EvaluationSection, ModelSection, RolloutSection, TaskSection
from common.config.units import (
    BYTES_BESIDE,
    BYTES_FROZEN,
    BYTES_JOURNALED,
    BYTES_PER_EXPERT,
    BYTES_PER_TOKEN,
    BYTES_SERVED,
    MEGABYTE,
)
from common.frozen import POLICY, REFERENCE, FrozenModel, ReferenceSection, TeacherEntry, check_teachers
from common.joint import JointSection, WarmstartSection
from common.objective import AdvantageSection, LossSection, check_stacking, require
from common.observe import AlertSection, MetricsSection, TraceSection
from common.rewards import RewardSection

# Least and greatest values that mean something, where a rule needs no more words than its numbers.
RANGES: dict[str, tuple[float, float]] = {
    "advantage.epsilon": (0, 1), "obrs.rethin_below": (0, 1),
    "optim.beta1": (0, 0.999999), "optim.beta2": (0, 0.999999), "optim.weight_decay": (0, 10),
    "optim.eps": (1e-20, 1),  # an update is m / (sqrt(v) + eps), and float32 squares below 1e-22 are 0
    "broker.journal_mb": (0, 1e9), "broker.retain_mb": (0, 1e9), "broker.queue_mb": (0, 1e9),
    "broker.score_timeout_s": (0.1, 1e6), "broker.group_timeout_s": (0.1, 1e7),
    "broker.peer_timeout_s": (0.1, 1e6), "broker.verify_rate": (0, 1),
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
        require(1 <= self.steps < 2**31, "run.steps", self.steps, "must lie in [1, 2**31): versions are of 32 bits")

    @property
    def path(self) -> Path:
        """The run's directory."""
        return Path(self.dir) / self.name


def _is_loopback(url: str) -> bool:
    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")


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

    def weight_backend(self, on_gpus: bool) -> str:
        """What ``weights.backend`` comes to where the learner is ``on_gpus``.

        nccl needs a GPU on both ends, and the embedded engine has none.
        """
        if self.weights.backend != "auto":
            return self.weights.backend
        return "nccl" if on_gpus and self.route == "direct" else "gloo"

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
        tokens = self.rollout.groups_per_step * self.rollout.group_size * self.rollout.max_length
        snapshot_mb = 4 * tokens * (self.obrs.window - 1) / MEGABYTE if self.obrs.mode in ("budget", "ess") else 0.0
        and_snapshots = f" and two snapshots of obrs.window={self.obrs.window}" if snapshot_mb else ""
        journal_mb = self.bytes_journaled * (self.staleness.limit + 2) * step_mb + 2 * snapshot_mb
        require(
            self.broker.journal_mb == 0 or self.broker.journal_mb >= journal_mb,
            "broker.journal_mb",
            self.broker.journal_mb,
            f"must hold staleness.budget + 2 (auto: most + 2) of the largest steps that rollout allows{and_snapshots}, "
            f"{journal_mb:.3g} MB{beside}, or be 0",
        )
        longest_mb = (self.rollout.largest_trajectory(routed) + BYTES_BESIDE) / MEGABYTE
        require(
            self.broker.max_message_mb >= longest_mb,
            "broker.max_message_mb",
            self.broker.max_message_mb,
            f"must hold the longest trajectory that rollout.max_prompt_tokens, .max_turns, .max_tokens, "
            f".max_reply_tokens and .top_logprobs allow, {longest_mb:.3g} MB{beside}; raise it, or lower those",
        )
        served = BYTES_SERVED + BYTES_FROZEN * self.scores_per_token
        message_mb = tokens * (served + 4 * self.rollout.top_logprobs + BYTES_PER_EXPERT * routed) / MEGABYTE
        require(
            not routed or self.broker.max_message_mb >= message_mb,
            "broker.max_message_mb",
            self.broker.max_message_mb,
            f"must hold the largest step that rollout allows, {message_mb:.3g} MB{beside}: it is scored in one piece",
        )
