"""Messages between the broker and an actor, but for what it brings (:mod:`common.wire.trajectories`)."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from common.codec import array
from common.errors import DataError
from common.wire.fields import Float32, Int32, Int64, Unchecked, check_lengths

NO_ANSWER = 0  # of an evaluation's answers: none could be read


@dataclass
class Grant:
    """Credits: start these groups, with weights no older than ``min_version``; run this evaluation.

    Everything in one grant is started together, held-out prompts first, as many as there is room for.
    """

    TAG: ClassVar[str] = "grant"
    min_version: int
    evaluation: int  # id of the evaluation to run first, -1 for none
    evaluation_prompts: int  # held-out prompts [0, n)
    groups: Int64 = array("i8", 1)  # [n] group ids
    prompts: Int64 = array("i8", 1)  # [n] index of each group's prompt in the task's training split
    evaluation_samples: int = 1  # completions of each held-out prompt

    def check(self) -> None:
        """Validate."""
        check_lengths("grant", groups=len(self.groups), prompts=len(self.prompts))


@dataclass
class Ack:
    """What became of trajectories, by group and sibling. Acknowledged ones may be forgotten."""

    TAG: ClassVar[str] = "ack"
    reasons: list[str]  # [n] "" where accepted, else why it was refused
    groups: Int64 = array("i8", 1)  # [n]
    siblings: Int32 = array("i4", 1)  # [n]

    def check(self) -> None:
        """Validate."""
        check_lengths("ack", reasons=len(self.reasons), groups=len(self.groups), siblings=len(self.siblings))


@dataclass
class GroupFailed(Unchecked):
    """Trajectories that will never come, through no fault of the policy (environment or engine failure)."""

    TAG: ClassVar[str] = "group_failed"
    group: int
    reason: str
    sibling: int = -1  # -1: all that are missing


@dataclass
class EvaluationResult:
    """What held-out prompts were worth: ``n`` = prompts x samples completions, a prompt's samples side by side."""

    TAG: ClassVar[str] = "evaluation_result"
    evaluation: int
    version_min: int  # of the sampled tokens
    version_max: int
    rewards: Float32 = array("f4", 1)  # [n] combined
    lengths: Int32 = array("i4", 1)  # [n] completion tokens
    samples: int = 1  # completions of each prompt
    channel_names: list[str] = field(default_factory=list)  # C names; of mixed tasks all that any of them has
    channels: Any = array("f4", 2, None)  # [n, C] NaN where the prompt's task has no such channel
    answers: Any = array("i8", 1, None)  # [n] equal for equal answers to one prompt, NO_ANSWER for none

    def __post_init__(self) -> None:
        """Fill in the records that were not given: they are empty."""
        if self.channels is None:
            self.channels = np.zeros((len(self.rewards), len(self.channel_names)), np.float32)
        if self.answers is None:
            self.answers = np.zeros(len(self.rewards), np.int64)

    def check(self) -> None:
        """Validate."""
        n = len(self.rewards)
        check_lengths(
            "evaluation_result",
            rewards=n, lengths=len(self.lengths), channels=len(self.channels), answers=len(self.answers),
        )  # fmt: skip
        if not np.isfinite(self.rewards).all() or np.isinf(self.channels).any():
            raise DataError("evaluation_result: rewards must be finite")
        if self.samples < 1 or n % self.samples or self.channels.shape[1] != len(self.channel_names):
            raise DataError(
                f"evaluation_result: {n} completions in channels {self.channels.shape} named {self.channel_names}, "
                f"{self.samples} a prompt"
            )
