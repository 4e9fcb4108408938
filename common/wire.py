"""Every message that two processes exchange, with a shape beside each array.

::

    peer   -> broker   Hello, Heartbeat, Bye
    broker -> peer     Welcome, Refused, WhoAreYou, Pong, Stop
    actor  -> broker   Trajectories, GroupFailed, EvaluationResult
    broker -> actor    Grant, Ack
    broker -> replica  ScoreRequest                 replica -> broker   ScoreResult
    learner-> broker   Fetch, Commit, Checkpointed  broker -> learner   Shard, Waiting, KeepBest
    weights            learner: Publish, Published, PublishFailed · broker: Prepare, Go, Resync, PublishDone
                       receiver (actor, replica): Ready, Applied, ReceiveFailed

All travel over one ROUTER (the broker's) and a DEALER per peer. Per-token arrays are aligned at
the token that they describe: ``log_q[t]`` belongs to ``token_ids[t]``. ``N`` counts tokens, ``B``
trajectories, ``k`` the alternatives of ``rollout.top_logprobs`` (0 where none were asked for), ``R``
the experts that one token is routed to (0 without ``rollout.routing_replay``): those of the first
sparse layer in the engine's order of decreasing weight, then those of the next. Row t of ``experts``
belongs to the pass that read token t, prompt tokens included; a token that was never read (the last
one) has a row of UNROUTED.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from common.codec import array
from common.errors import DataError
from common.ragged import count, least

FINISH_REASONS = ("stop", "length")
LOG_Q_TOLERANCE = 1e-6
NEVER = (1 << 31) - 1  # a version that no policy has
EXPERT = 3  # in ``trainable``: a token that a human exemplar brought: trained, but nobody sampled it
STARTS = 2  # in ``trainable``: a token before which a new segment begins, which what lies before is no context of
UNROUTED = (1 << 16) - 1  # in the whole row of a token whose experts nobody recorded
MAX_TEXT = 256  # characters of a peer's name, host and the like
MAX_FACTS, MAX_FACT = 8, 512  # of a peer's model
MAX_RANKS = 4096  # of one receiver
NO_ANSWER = 0  # of an evaluation's answers: none could be read
MAX_COUNTERS = 256  # of a heartbeat
MAX_BLOCKS = 256  # blocks of one trajectory

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]
UInt16 = NDArray[np.uint16]


class _Unchecked:
    """Messages whose fields cannot contradict each other."""

    def check(self) -> None:
        """Nothing to check."""


class _Routed:
    """Messages with an expert record; one that is made without has ``R = 0``."""

    token_ids: Int32
    experts: Any  # UInt16 [N, R], or None for none

    def __post_init__(self) -> None:
        """Fill in the empty record."""
        if self.experts is None:
            self.experts = np.zeros((len(self.token_ids), 0), np.uint16)


def check_offsets(tag: str, cu_seqlens: Int32 | Int64, total: int) -> None:
    """``cu_seqlens[B+1]`` must rise from 0 to ``total``."""
    if (
        len(cu_seqlens) == 0
        or cu_seqlens[0] != 0
        or cu_seqlens[-1] != total
        or (cu_seqlens[1:] < cu_seqlens[:-1]).any()
    ):
        raise DataError(f"{tag}: offsets must rise from 0 to {total}, got {cu_seqlens[:4]}...{cu_seqlens[-1:]}")


def check_lengths(tag: str, **lengths: int) -> None:
    """All the named lengths must be equal."""
    if len(set(lengths.values())) > 1:
        raise DataError(f"{tag}: " + ", ".join(f"{k} {v}" for k, v in lengths.items()) + " must be equally long")


def _are_log_probabilities(values: Float32) -> bool:
    """Finite and not above 0; NaN is not below anything."""
    return bool(values.max() <= LOG_Q_TOLERANCE and values.min() > -math.inf)


def _are_below(ids: Int32, size: int) -> bool:
    """``0 <= ids < size``; read as unsigned, negative ones are the largest."""
    return bool(ids.view(np.uint32).max() < size)


# ---- every peer ---------------------------------------------------------------------------------


@dataclass
class Hello:
    """First message of a peer, and again after the broker was lost."""

    TAG: ClassVar[str] = "hello"
    role: str  # "actor" | "replica" | "learner"
    name: str  # unique among live peers
    run_id: str  # "" if the peer has not met this run yet
    session: str  # one process start (one launch of all ranks, for the learner)
    rank: int
    world: int
    version: int  # the weights it holds
    capacity: int  # actors: groups decoded together
    host: str
    pid: int
    model: dict[str, str] = field(default_factory=dict)  # common.identity of its model directory
    serves: str = ""  # replicas: the frozen model that it scores under, "" for the policy
    questions: list[int] = field(default_factory=list)  # actors: training questions of each task, 0 for no end of them

    def check(self) -> None:
        """Texts end in log lines and status.json, so they are short and printable."""
        said = ("name", "role", "session", "host", "serves")
        for what, text in ((what, getattr(self, what)) for what in said):
            if len(text) > MAX_TEXT or not text.isprintable():
                raise DataError(f"hello: {what} {text[:40]!r} needs at most {MAX_TEXT} printable characters")
        if len(self.model) > MAX_FACTS or any(len(fact) > MAX_FACT or not fact.isprintable()
                                              for fact in (*self.model, *self.model.values())):  # fmt: skip
            raise DataError(f"hello: at most {MAX_FACTS} facts of a model, of {MAX_FACT} printable characters")
        if not self.name or not 0 <= self.rank < self.world or self.capacity < 0:
            raise DataError("hello: needs a name, a rank below its world, and no negative capacity")


@dataclass
class Welcome(_Unchecked):
    """The broker takes the peer in."""

    TAG: ClassVar[str] = "welcome"
    run_id: str
    version: int  # the newest version published so far
    heartbeat_s: float


@dataclass
class Refused(_Unchecked):
    """The broker does not take the peer in; the peer ends with this reason."""

    TAG: ClassVar[str] = "refused"
    reason: str


@dataclass
class WhoAreYou(_Unchecked):
    """The broker (perhaps a restarted one) does not know the sender, who should say Hello."""

    TAG: ClassVar[str] = "who_are_you"


@dataclass
class Heartbeat:
    """I live. Answered by Pong."""

    TAG: ClassVar[str] = "heartbeat"
    version: int
    counters: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict)  # in each state of common.trace.STATES since its start
    sent_ns: int = 0  # by the sender's clock

    def check(self) -> None:
        """Counters are kept as long as the peer is."""
        for kept in (self.counters, self.seconds):
            if len(kept) > MAX_COUNTERS or any(len(name) > MAX_TEXT for name in kept):
                raise DataError(f"heartbeat: at most {MAX_COUNTERS} counters with names of {MAX_TEXT} characters")


@dataclass
class Pong(_Unchecked):
    """The broker lives; in answer to a heartbeat also its clock (:class:`common.trace.ClockOffset`)."""

    TAG: ClassVar[str] = "pong"
    version: int
    echo_ns: int = 0  # ``sent_ns`` of the heartbeat, by the peer's clock; 0 where it answers none
    received_ns: int = 0  # when it came, by the broker's clock
    sent_ns: int = 0  # by the broker's clock


@dataclass
class Bye(_Unchecked):
    """An orderly leave."""

    TAG: ClassVar[str] = "bye"
    reason: str


@dataclass
class Stop(_Unchecked):
    """The run is over: finish and leave."""

    TAG: ClassVar[str] = "stop"
    reason: str


# ---- actors -------------------------------------------------------------------------------------


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
class Trajectories(_Routed):
    """Finished trajectories, packed: trajectory b owns tokens ``cu_seqlens[b]:cu_seqlens[b+1]``."""

    TAG: ClassVar[str] = "trajectories"
    run_id: str
    channel_names: list[str]  # C names
    groups: Int64 = array("i8", 1)  # [B]
    siblings: Int32 = array("i4", 1)  # [B]
    rewards: Float32 = array("f4", 1)  # [B] combined
    channels: Float32 = array("f4", 2)  # [B, C]
    finish: Bytes = array("u1", 1)  # [B] index in FINISH_REASONS
    cu_seqlens: Int32 = array("i4", 1)  # [B+1]
    token_ids: Int32 = array("i4", 1)  # [N]
    trainable: Bytes = array("u1", 1)  # [N] 1 where the policy sampled the token; else 0, STARTS or EXPERT
    log_q: Float32 = array("f4", 1)  # [N] under the distribution really sampled; 0 where not sampled
    versions: Int32 = array("i4", 1)  # [N] weight version of each sampled token; -1 where not sampled
    topk_ids: Int32 = array("i4", 2)  # [N, k]
    topk_log_q: Float32 = array("f4", 2)  # [N, k]
    experts: UInt16 = array("u2", 2, None)  # [N, R]
    blocks: Any = array("i4", 2, None)  # [K, 5] trajectory, which block, outcome before it, first token, end
    block_rewards: Any = array("f4", 1, None)  # [K]

    def __post_init__(self) -> None:
        """Fill in the records that were not given: they are empty."""
        super().__post_init__()
        if self.blocks is None:
            self.blocks, self.block_rewards = np.zeros((0, 5), np.int32), np.zeros(0, np.float32)

    def check(self) -> None:
        """Structure only; :meth:`faults` looks at the contents of each trajectory."""
        b, n = len(self.groups), len(self.token_ids)
        check_lengths(
            "trajectories per trajectory",
            groups=b, siblings=len(self.siblings), rewards=len(self.rewards), channels=len(self.channels),
            finish=len(self.finish), offsets=len(self.cu_seqlens) - 1,
        )  # fmt: skip
        check_lengths(
            "trajectories per token",
            token_ids=n, trainable=len(self.trainable), log_q=len(self.log_q), versions=len(self.versions),
            topk_ids=len(self.topk_ids), topk_log_q=len(self.topk_log_q), experts=len(self.experts),
        )  # fmt: skip
        check_offsets("trajectories", self.cu_seqlens, n)
        if self.channels.shape[1] != len(self.channel_names):
            raise DataError(f"trajectories: {self.channels.shape[1]} reward channels, {len(self.channel_names)} names")
        if self.topk_ids.shape != self.topk_log_q.shape:
            raise DataError(
                f"trajectories: topk_ids {self.topk_ids.shape} and topk_log_q {self.topk_log_q.shape} differ"
            )
        self._check_blocks()

    def _check_blocks(self) -> None:
        """Blocks belong to a trajectory, in its order, and lie within it without overlap."""
        check_lengths("trajectories per block", blocks=len(self.blocks), block_rewards=len(self.block_rewards))
        if not self.blocks.size:
            return
        if self.blocks.shape[1] != 5:
            raise DataError(f"trajectories: blocks {self.blocks.shape} must have five columns")
        owner, number, _, first, end = self.blocks.T
        if owner.min() < 0 or owner.max() >= len(self.groups) or number.min() < 0 or number.max() >= MAX_BLOCKS:
            raise DataError("trajectories: a block of no trajectory, or with an impossible number")
        lengths = np.diff(self.cu_seqlens)[owner]
        together = owner[1:] == owner[:-1]
        ordered = (owner[1:] > owner[:-1]) | (together & (first[1:] >= end[:-1]) & (number[1:] > number[:-1]))
        if (first < 0).any() or (end <= first).any() or (end > lengths).any() or not ordered.all():
            raise DataError("trajectories: blocks must lie within their trajectory, in order and apart")

    @cached_property
    def cuts(self) -> list[int]:
        """``cu_seqlens`` as numbers."""
        cuts: list[int] = self.cu_seqlens.tolist()
        return cuts

    @cached_property
    def sampled(self) -> NDArray[np.bool_]:
        """``[N]``: tokens that the policy sampled."""
        if len(self.trainable) and self.highest_role == 1:
            return self.trainable.view(np.bool_)
        return np.asarray(self.trainable == 1, np.bool_)

    @cached_property
    def single_version(self) -> int:
        """The version that sampled every sampled token and that no other token has; -1 if there is none such."""
        if not len(self.versions):
            return -1
        newest = int(self.versions.max())
        return newest if newest >= 0 and not ((self.versions == newest) != self.sampled).any() else -1

    @cached_property
    def is_plain(self) -> bool:
        """Whether what is not sampled is given and no more, and what is sampled is of one version."""
        if not len(self.trainable) or self.highest_role > 1 or self.single_version < 0:
            return False
        return not ((self.log_q != 0) > self.sampled).any()

    @cached_property
    def summary(self) -> tuple[list[int], list[int]]:
        """Each trajectory's oldest version (of a sampled token) and its count of sampled tokens, ``[B]`` each.

        A trajectory without a sampled token has the oldest version NEVER.
        """
        counts = count(self.sampled, self.cu_seqlens).tolist()
        if self.single_version >= 0:
            return [self.single_version if n else NEVER for n in counts], counts
        versions = np.where(self.sampled, self.versions, np.int32(NEVER))
        return least(versions, self.cu_seqlens, NEVER).tolist(), counts

    def faults(self, vocab_size: int, newest_version: int, expert_count: int = 0) -> dict[int, str]:
        """What is wrong with the contents, by trajectory; an empty dict if nothing is.

        ``expert_count`` of a layer; 0 leaves the expert record unread.
        """
        if self._is_sound(vocab_size, newest_version) and self._has_sound_experts(expert_count):
            return {}
        return self._find_faults(vocab_size, newest_version, expert_count)

    def _has_sound_experts(self, expert_count: int) -> bool:
        """Every row of the record within the model, or UNROUTED throughout."""
        if not expert_count or not self.experts.size:
            return True
        outside = self.experts.max(axis=1) >= expert_count
        return bool((self.experts[outside] == UNROUTED).all())

    def _is_sound(self, vocab_size: int, newest_version: int) -> bool:
        """Every check in as few passes as will do; extremes carry NaN and infinity along."""
        if not len(self.token_ids):
            return False
        oldest, _ = self.summary
        starts, role = self.cu_seqlens[:-1], self.highest_role
        return bool(
            math.isfinite(sum(self.rewards.tolist()) + float(self.channels.sum()))
            and _are_log_probabilities(self.log_q)
            and _are_below(self.token_ids, vocab_size)
            and role <= EXPERT
            and (max(oldest) < NEVER or bool(self._exemplar_tokens()[np.array(oldest) == NEVER].all()))
            and min(oldest) >= 0
            and self.versions.max() <= newest_version
            and self.cuts[-2] < len(self.token_ids)
            and not self.trainable[starts].any()
            and (role < EXPERT or not self._is_dated(self.trainable == EXPERT).any())
            and (
                self.topk_ids.size == 0
                or (_are_log_probabilities(self.topk_log_q) and _are_below(self.topk_ids, vocab_size))
            )
        )

    def with_exemplars(self) -> list[int]:
        """Trajectories that hold an exemplar's token."""
        if not len(self.trainable) or self.highest_role < EXPERT:
            return []
        return [int(b) for b in np.flatnonzero(self._exemplar_tokens())]

    @cached_property
    def highest_role(self) -> int:
        """The largest value of ``trainable``, of which there is one."""
        return int(self.trainable.max())

    def _exemplar_tokens(self) -> Int64:
        """Of each trajectory ``[B]``."""
        return count(self.trainable == EXPERT, self.cu_seqlens)

    def _is_dated(self, expert: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """``[N]``: an exemplar's token that claims to be sampled."""
        return np.asarray(expert & ((self.versions != -1) | (self.log_q != 0)), np.bool_)

    def _find_faults(self, vocab_size: int, newest_version: int, expert_count: int) -> dict[int, str]:
        on = self.sampled
        lengths = np.diff(self.cu_seqlens)
        owner = np.repeat(np.arange(len(self.groups)), lengths)
        found: dict[int, str] = {}

        def note(bad: NDArray[np.bool_], text: str) -> None:
            for b in np.unique(owner[bad]):
                found.setdefault(int(b), text)

        note(~np.isfinite(self.log_q), "log_q is NaN or infinite")
        note(self.log_q > LOG_Q_TOLERANCE, "log_q is positive: no log-probability")
        outside = f"token id outside the vocabulary of {vocab_size}"
        note((self.token_ids < 0) | (self.token_ids >= vocab_size), outside)
        note(self.trainable > EXPERT, f"trainable must be 0, 1, {STARTS} where a segment starts, or {EXPERT}")
        note(self._is_dated(self.trainable == EXPERT), "an exemplar's token has a version or a log_q")
        note(on & (self.versions < 0), "a sampled token has no version")
        note(on & (self.versions > newest_version), f"version from the future (newest is {newest_version})")
        if self.topk_log_q.shape[1]:
            note(np.asarray(~np.isfinite(self.topk_log_q).all(axis=1)), "topk_log_q is NaN or infinite")
            note(np.asarray((self.topk_log_q > LOG_Q_TOLERANCE).any(axis=1)), "topk_log_q is above 0")
            note(np.asarray(((self.topk_ids < 0) | (self.topk_ids >= vocab_size)).any(axis=1)), outside)
        if expert_count and self.experts.size:
            missing = self.experts == UNROUTED
            note(np.asarray(missing.any(axis=1) != missing.all(axis=1)), "expert record of a token is torn")
            beyond = (self.experts >= expert_count) & ~missing
            note(np.asarray(beyond.any(axis=1)), f"expert outside the {expert_count} of a layer")
        for b in np.flatnonzero(~np.isfinite(self.rewards) | ~np.isfinite(self.channels).all(axis=1)):
            found.setdefault(int(b), "reward is NaN or infinite")
        for b in np.flatnonzero((np.array(self.summary[1]) == 0) & (self._exemplar_tokens() == 0)):
            found.setdefault(int(b), "no sampled token")
        for b in np.flatnonzero(lengths):
            if self.trainable[self.cu_seqlens[b]]:
                found.setdefault(int(b), "the first token is sampled from nothing: a prompt is needed")
        return found


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
class GroupFailed(_Unchecked):
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


# ---- replica ------------------------------------------------------------------------------------


@dataclass
class ScoreRequest(_Routed):
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


# ---- learner ------------------------------------------------------------------------------------


@dataclass
class Fetch(_Unchecked):
    """The shard of ``rank`` for training step ``step``; answered by Shard, or by Waiting meanwhile."""

    TAG: ClassVar[str] = "fetch"
    step: int
    rank: int
    world: int


@dataclass
class Waiting(_Unchecked):
    """Step not ready; ``detail`` says what it waits for."""

    TAG: ClassVar[str] = "waiting"
    step: int
    detail: str


@dataclass
class Shard(_Routed):
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
class Commit(_Unchecked):
    """Step trained; its shards are only kept for a learner that resumes."""

    TAG: ClassVar[str] = "commit"
    step: int
    version: int  # step + 1
    metrics: dict[str, float]


@dataclass
class Checkpointed(_Unchecked):
    """Steps up to ``step`` can never be asked for again."""

    TAG: ClassVar[str] = "checkpointed"
    step: int


@dataclass
class KeepBest(_Unchecked):
    """Broker to learner: of the checkpoints made to be evaluated, these two are wanted; -1 for none.

    Those of versions above ``decided`` may be wanted yet, the others are not.
    """

    TAG: ClassVar[str] = "keep_best"
    version: int  # with the best held-out reward so far; 0 is the starting model
    reward: float  # its mean
    pending: int  # that is being evaluated
    decided: int  # up to which it is known what is evaluated


# ---- weights ------------------------------------------------------------------------------------


@dataclass
class Publish(_Unchecked):
    """The learner offers a version. ``tensors`` lists (HF name, dtype, shape) in the order sent."""

    TAG: ClassVar[str] = "publish"
    version: int
    host: str
    port: int  # of the learner's TCPStore
    backend: str  # "gloo" | "nccl"
    bucket_bytes: int
    tensors: list[list[Any]]
    seconds: float = 0.0  # that so many bytes may take, beside weights.deadline_s
    stream: str = "policy"  # whose weights they are: the policy's, or the rollout model's of a run that has one


@dataclass
class Prepare(_Unchecked):
    """Broker to a receiver: be ready to receive ``version`` in group ``epoch`` as ``[rank, rank + ranks)``."""

    TAG: ClassVar[str] = "prepare"
    epoch: int
    rank: int  # its first; the learner is 0
    ranks: int  # as many as its last Ready said, one at first
    world: int
    publish: dict[str, Any]  # the Publish, field by field


@dataclass
class Ready:
    """The receiver will enter the collective as soon as it is told Go, if ``ranks`` are what Prepare said.

    If they are not, the broker forms another group. None means: not this time.
    """

    TAG: ClassVar[str] = "ready"
    epoch: int
    version: int
    ranks: int = 1  # processes that receive: the ranks of its SGLang servers, or itself

    def check(self) -> None:
        """Groups stay small."""
        if not 0 <= self.ranks <= MAX_RANKS:
            raise DataError(f"ready: {self.ranks} ranks, must lie in [0, {MAX_RANKS}]")


@dataclass
class Go(_Unchecked):
    """Broker to learner and receivers: everyone in ``members`` (rank order) said Ready."""

    TAG: ClassVar[str] = "go"
    epoch: int
    version: int
    members: list[str]
    world: int  # ranks of them all, and the learner's
    stream: str = "policy"


@dataclass
class Published(_Unchecked):
    """Learner: the collective is done. ``digest`` is over the bytes sent."""

    TAG: ClassVar[str] = "published"
    epoch: int
    version: int
    digest: str
    seconds: float


@dataclass
class PublishFailed(_Unchecked):
    """Learner: the collective broke; the version must be offered again in a new epoch."""

    TAG: ClassVar[str] = "publish_failed"
    epoch: int
    version: int
    reason: str


@dataclass
class Applied(_Unchecked):
    """Receiver: the version is in use from now on."""

    TAG: ClassVar[str] = "applied"
    epoch: int
    version: int
    digest: str


@dataclass
class ReceiveFailed(_Unchecked):
    """Receiver: the collective or the digest failed; it still serves its old version."""

    TAG: ClassVar[str] = "receive_failed"
    epoch: int
    version: int
    reason: str


@dataclass
class PublishDone(_Unchecked):
    """Broker to learner: the publish is settled; ``dropped`` receivers did not take it."""

    TAG: ClassVar[str] = "publish_done"
    version: int
    applied: list[str]
    dropped: list[str]
    stream: str = "policy"


@dataclass
class Resync(_Unchecked):
    """Broker to learner: publish your current version of ``stream`` again, ``reason`` says for whom."""

    TAG: ClassVar[str] = "resync"
    reason: str
    stream: str = "policy"


TO_BROKER: dict[str, type[Any]] = {
    m.TAG: m
    for m in (
        Hello, Heartbeat, Bye, Trajectories, GroupFailed, EvaluationResult, ScoreResult, Fetch, Commit, Checkpointed,
        Publish, Published, PublishFailed, Ready, Applied, ReceiveFailed,
    )
}  # fmt: skip
FROM_BROKER: dict[str, type[Any]] = {
    m.TAG: m
    for m in (
        Welcome, Refused, WhoAreYou, Pong, Stop, Grant, Ack, ScoreRequest, Shard, Waiting, KeepBest, Prepare, Go,
        PublishDone, Resync,
    )
}  # fmt: skip
