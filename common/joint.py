"""The small models of a run: a rollout model of its own, and the warm start that makes tiny ones."""

import math
from dataclasses import dataclass, field
from typing import Literal

from common.objective import require

Direction = Literal["forward", "reverse"]

POLICY_STREAM, ROLLOUT_STREAM = "policy", "rollout"  # the streams of weights that a run may have


@dataclass(frozen=True)
class WarmstartSection:
    """``tools.warmstart``: the tiny mixture-of-experts that the quick start begins from."""

    layers: int = 2
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 4
    experts: int = 8
    experts_per_token: int = 2
    expert_width: int = 64
    lr: float = 2e-3
    batch: int = 256
    target_reward: float = 0.2  # sampled, on held-out prompts
    max_steps: int = 3000


def _smaller() -> WarmstartSection:
    return WarmstartSection(hidden=32, experts=4, expert_width=40)


@dataclass(frozen=True)
class JointSection:
    """A rollout model of its own: actors sample from it, and it is trained beside the policy (algorithms.md 1.12)."""

    path: str = ""  # its Hugging Face directory, with the policy's tokenizer; "": actors run the policy itself
    train: bool = True  # false: it stays as it came, and actors are sent nothing
    lr: float = 3e-4  # its other settings are those of `optim`, but that nothing of it is frozen
    kl: float = 1.0  # weight of the divergence between the policy and it in its loss: the paper's lambda_distill
    direction: Direction = "forward"  # forward: the policy first, as in the paper's eq. 7
    top_k: int = 0  # tokens of the policy that the divergence tells apart, all others are one; 0: the whole vocabulary
    clip_low: float = 0.2  # of its own policy loss, anchored at what it sampled with
    clip_high: float = 0.2
    warmstart: WarmstartSection = field(default_factory=_smaller)  # what tools.warmstart makes where path is missing

    def __post_init__(self) -> None:
        """Validate."""
        require(0 < self.lr < math.inf, "joint.lr", self.lr, "must be positive")
        require(0 <= self.kl < math.inf, "joint.kl", self.kl, "must not be negative")
        require(self.top_k >= 0, "joint.top_k", self.top_k, "must not be negative; 0 is the whole vocabulary")
        require(0 <= self.clip_low <= 1, "joint.clip_low", self.clip_low, "must lie in [0, 1]; 1 has no lower bound")
        require(self.clip_high >= 0, "joint.clip_high", self.clip_high, "must not be negative")

    @property
    def trains(self) -> bool:
        """Whether there is a second model for the learner."""
        return bool(self.path) and self.train

    @property
    def stays(self) -> bool:
        """Whether actors run a model of their own that never changes."""
        return bool(self.path) and not self.train
