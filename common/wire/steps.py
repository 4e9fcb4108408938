"""Messages of a step: its scores, its shards, and that it is trained."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from common.codec import array
from common.wire.fields import (
    Bytes,
    Float32,
    Int32,
    Int64,
    Routed,
    UInt16,
    Unchecked,
    check_lengths,
    check_offsets,
)


@dataclass
class ScoreRequest(Routed):
    """Score these tokens under weights no older than ``min_version``."""

    TAG: ClassVar[str] = "score_request"
    request: int
    min_version: int
    temperature: float
    cu_seqlens: Int32 = array("i4", 1)  # [B+1]
    token_ids: Int32 = array("i4", 1)  # [N]
    wanted: Bytes = array("u1", 1)  # [N] 1 where a score is wanted
    topk_ids: Int32 = array("i4", 2)  # [N, k]
    experts: UInt16 = array("u2", 2, None)  # [N, R]

    def check(self) -> None:
        """Validate."""
        n = len(self.token_ids)
        check_lengths(
            "score_request",
            token_ids=n, wanted=len(self.wanted), topk_ids=len(self.topk_ids), experts=len(self.experts),
        )  # fmt: skip
        check_offsets("score_request", self.cu_seqlens, n)


@dataclass
class ScoreResult:
    """Log-densities under the replica's policy; 0 where not wanted."""

    TAG: ClassVar[str] = "score_result"
    request: int
    version: int
    seconds: float
    log_p: Float32 = array("f4", 1)  # [N] of the token itself
    topk_log_p: Float32 = array("f4", 2)  # [N, k] at the asked ids

    def check(self) -> None:
        """Validate."""
        check_lengths("score_result", log_p=len(self.log_p), topk_log_p=len(self.topk_log_p))


@dataclass
class ScoreFailed(Unchecked):
    """Replica: the request cannot be scored, now or later; another process may be able to."""

    TAG: ClassVar[str] = "score_failed"
    request: int
    reason: str


@dataclass
class Fetch(Unchecked):
    """The shard of ``rank`` for training step ``step``; answered by Shard, or by Waiting meanwhile."""

    TAG: ClassVar[str] = "fetch"
    step: int
    rank: int
    world: int


@dataclass
class Waiting(Unchecked):
    """Step not ready; ``detail`` says what it waits for."""

    TAG: ClassVar[str] = "waiting"
    step: int
    detail: str


@dataclass
class Shard(Routed):
    """One rank's share of one training step, packed. Rejected tokens travel too: they are context.

    A *span* is a stretch of tokens with one advantage and one weight: a whole trajectory, or a block
    of one. ``weights`` are what a token's loss is multiplied by before all are added up, over all
    ranks; they hold the loss's denominator, counted before any rejection (algorithms.md 0.3).
    """

    TAG: ClassVar[str] = "shard"
    step: int
    rank: int
    world: int
    tokens_global: int  # tokens of the whole batch, over all ranks
    temperature: float
    groups: Int64 = array("i8", 1)  # [B]
    siblings: Int32 = array("i4", 1)  # [B]
    cu_seqlens: Int32 = array("i4", 1)  # [B+1]
    spans: Int32 = array("i4", 1)  # [S+1] cuts the tokens as cu_seqlens does, or finer
    advantages: Float32 = array("f4", 1)  # [S]
    weights: Float32 = array("f4", 1)  # [S]
    token_ids: Int32 = array("i4", 1)  # [N]
    trainable: Bytes = array("u1", 1)  # [N] 1 where sampled, EXPERT where an exemplar's
    accept: Bytes = array("u1", 1)  # [N] 1 where sampled and accepted, EXPERT where an exemplar's
    log_q: Float32 = array("f4", 1)  # [N] behaviour, 0 where not sampled
    log_m: Float32 = array("f4", 1)  # [N] inclusion density, 0 where not accepted
    log_p: Float32 = array("f4", 1)  # [N] under the broker's version, 0 where not accepted
    experts: UInt16 = array("u2", 2, None)  # [N, R]
    log_reference: Any = array("f4", 1, None)  # [N] under the reference model; empty without one
    log_teacher: Any = array("f4", 1, None)  # [N] under the teacher, NaN where it has none; empty without any

    def __post_init__(self) -> None:
        """Fill in the records that were not given: they are empty."""
        super().__post_init__()
        for name in ("log_reference", "log_teacher"):
            if getattr(self, name) is None:
                setattr(self, name, np.zeros(0, np.float32))

    def check(self) -> None:
        """Validate."""
        b, n = len(self.groups), len(self.token_ids)
        check_lengths("shard per trajectory", groups=b, siblings=len(self.siblings), offsets=len(self.cu_seqlens) - 1)
        check_lengths(
            "shard per span",
            advantages=len(self.advantages), weights=len(self.weights), spans=len(self.spans) - 1,
        )  # fmt: skip
        check_lengths(
            "shard per token",
            token_ids=n, trainable=len(self.trainable), accept=len(self.accept), log_q=len(self.log_q),
            log_m=len(self.log_m), log_p=len(self.log_p), experts=len(self.experts),
            log_reference=len(self.log_reference) or n, log_teacher=len(self.log_teacher) or n,
        )  # fmt: skip
        check_offsets("shard", self.cu_seqlens, n)
        check_offsets("shard spans", self.spans, n)


@dataclass
class Commit(Unchecked):
    """Step trained; its shards are only kept for a learner that resumes."""

    TAG: ClassVar[str] = "commit"
    step: int
    version: int  # step + 1
    metrics: dict[str, float]


@dataclass
class Checkpointed(Unchecked):
    """Steps up to ``step`` can never be asked for again."""

    TAG: ClassVar[str] = "checkpointed"
    step: int


@dataclass
class KeepBest(Unchecked):
    """Broker to learner: of the checkpoints made to be evaluated, these two are wanted; -1 for none.

    Those of versions above ``decided`` may be wanted yet, the others are not.
    """

    TAG: ClassVar[str] = "keep_best"
    version: int  # with the best held-out reward so far; 0 is the starting model
    reward: float  # its mean
    pending: int  # that is being evaluated
    decided: int  # up to which it is known what is evaluated
