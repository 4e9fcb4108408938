"""What is asked and sampled: model, tasks, rollouts, evaluation."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from common.config.units import bytes_per_token
from common.errors import ConfigError
from common.mixture import Mixture, mixture
from common.objective import require

MAX_HELD_OUT = 1 << 24  # prompts of one evaluation
SORT_TASKS = {"sort6", "sort6_confidence", "sort6_twice"}  # each has a warm start of its own
LEAST_TEMPERATURE = 1e-4  # logits of thousands divided by it are still sampled and scored exactly in float32
MAX_TASKS, MAX_LABEL = 64, 64  # tasks that are mixed; characters of a label


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

    name: str = "sort6"  # one of docs/environments.md, or "gym:<reasoning-gym data set>"
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
            LEAST_TEMPERATURE <= self.temperature < math.inf,
            "rollout.temperature",
            self.temperature,
            f"must be at least {LEAST_TEMPERATURE:g}: a greedy rollout has no density to correct (algorithms.md 1.10)",
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

    def largest_trajectory(self, routed: int = 0) -> int:
        """Bytes of the longest possible trajectory; ``routed`` experts are recorded of a token."""
        return self.max_length * bytes_per_token(self.top_logprobs, routed)

    def largest_group(self, routed: int = 0) -> int:
        """Bytes of a group whose every sibling is as long as it may be."""
        return self.group_size * self.largest_trajectory(routed)


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
        require(
            self.every >= 1,
            "evaluation.every",
            self.every,
            "must be at least 1; evaluation.prompts=0 evaluates nothing",
        )
        require(
            self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature < math.inf,
            "evaluation.temperature",
            self.temperature,
            f"must be 0 (greedy), or at least {LEAST_TEMPERATURE:g} and finite",
        )
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
