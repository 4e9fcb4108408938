"""Finished trajectories, and what can be said of them without knowing the run: structure, faults, ages."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, combinations
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from common.codec import array
from common.errors import DataError
from common.ragged import count, least
from common.wire.fields import (
    EXPERT,
    NEVER,
    STARTS,
    UNROUTED,
    Bytes,
    Float32,
    Int32,
    Int64,
    Routed,
    UInt16,
    check_lengths,
    check_offsets,
)

LOG_Q_TOLERANCE = 1e-6
MAX_BLOCKS = 256  # blocks of one trajectory
MAX_MEMBERS = 8192  # trajectories of one message: its Ack says something of each


def _greatest(values: NDArray[Any]) -> Any:
    """Of some values: :meth:`max` without its Python."""
    return np.maximum.reduce(values, axis=None)


def _are_log_probabilities(values: Float32) -> bool:
    """Finite and not above 0; NaN is not below anything."""
    return bool(_greatest(values) <= LOG_Q_TOLERANCE and np.minimum.reduce(values, axis=None) > -math.inf)


def _are_below(ids: Int32, size: int) -> bool:
    """``0 <= ids < size``; read as unsigned, negative ones are the largest."""
    return bool(_greatest(ids.view(np.uint32)) < size)


@dataclass
class Trajectories(Routed):
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
        if b > MAX_MEMBERS:
            raise DataError(f"trajectories: {b} in one message, at most {MAX_MEMBERS}; send them in several")
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
        if self.blocks.shape[1] != 5:
            raise DataError(f"trajectories: blocks {self.blocks.shape} must have five columns")
        if not len(self.blocks):
            return
        owner, number, _, first, end = self.blocks.T
        if owner.min() < 0 or owner.max() >= len(self.groups) or number.min() < 0 or number.max() >= MAX_BLOCKS:
            raise DataError("trajectories: a block of no trajectory, or with an impossible number")
        lengths = np.diff(self.cu_seqlens)[owner]
        together = owner[1:] == owner[:-1]
        ordered = (owner[1:] > owner[:-1]) | (together & (first[1:] >= end[:-1]) & (number[1:] > number[:-1]))
        if (first < 0).any() or (end <= first).any() or (end > lengths).any() or not ordered.all():
            raise DataError("trajectories: blocks must lie within their trajectory, in order and apart")

    def part(self, members: Sequence[int]) -> "Trajectories":
        """A message of trajectories ``members``, ascending, in memory of their own."""
        rows = np.asarray(members, np.int64)
        lengths = np.diff(self.cu_seqlens)[rows]
        at = np.concatenate([np.arange(self.cuts[i], self.cuts[i + 1]) for i in members] or [rows])
        by_token = ("token_ids", "trainable", "log_q", "versions", "topk_ids", "topk_log_q", "experts")
        by_member = ("groups", "siblings", "rewards", "channels", "finish")
        kept = np.isin(self.blocks[:, 0], rows)
        blocks = self.blocks[kept]
        blocks[:, 0] = np.searchsorted(rows, blocks[:, 0])
        return Trajectories(
            self.run_id,
            self.channel_names,
            cu_seqlens=np.concatenate(([0], np.cumsum(lengths))).astype(np.int32),
            blocks=blocks,
            block_rewards=self.block_rewards[kept],
            **{name: getattr(self, name)[at] for name in by_token},
            **{name: getattr(self, name)[rows] for name in by_member},
        )

    @cached_property
    def sole_group(self) -> int | None:
        """The group of all trajectories; None if they are of several, or none."""
        groups = self.groups.tolist()
        return groups[0] if groups and groups.count(groups[0]) == len(groups) else None

    @cached_property
    def block_cuts(self) -> list[int]:
        """``[B+1]`` numbers: trajectory b owns blocks ``block_cuts[b]:block_cuts[b+1]``."""
        if not len(self.blocks):
            return [0] * (len(self.groups) + 1)
        cuts: list[int] = np.searchsorted(self.blocks[:, 0], np.arange(len(self.groups) + 1)).tolist()
        return cuts

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

    def forget_checks(self) -> None:
        """Free what was made to check the contents and is as long as they are."""
        self.__dict__.pop("sampled", None)

    @cached_property
    def single_version(self) -> int:
        """The version that sampled every sampled token and that no other token has; -1 if there is none such."""
        if not len(self.versions):
            return -1
        newest = self.newest_version
        return newest if newest >= 0 and not ((self.versions == newest) != self.sampled).any() else -1

    @cached_property
    def newest_version(self) -> int:
        """Of any token, of which there is one."""
        return int(_greatest(self.versions))

    @cached_property
    def is_plain(self) -> bool:
        """Whether what is not sampled is given and no more, and what is sampled is of one version."""
        if not len(self.trainable) or self.highest_role > 1 or self.single_version < 0:
            return False
        return not ((self.log_q.view(np.uint32) != 0) > self.sampled).any()  # bit for bit: -0 is not 0

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

    def faults(
        self, vocab_size: int, newest_version: int, expert_count: int = 0, experts_per_token: int = 1
    ) -> dict[int, str]:
        """What is wrong with the contents, by trajectory; an empty dict if nothing is.

        ``expert_count`` of a layer, of which ``experts_per_token`` read a token; 0 leaves the expert record unread.
        """
        if self._is_sound(vocab_size, newest_version) and self._has_sound_experts(expert_count, experts_per_token):
            return {}
        return self._find_faults(vocab_size, newest_version, expert_count, experts_per_token)

    def _has_sound_experts(self, expert_count: int, per_token: int) -> bool:
        """Every row of the record within the model and no expert twice in a layer, or UNROUTED throughout."""
        if not expert_count or not self.experts.size:
            return True
        outside = self.experts.max(axis=1) >= expert_count
        return bool((self.experts[outside] == UNROUTED).all()) and not self._repeated_experts(per_token).any()

    def _repeated_experts(self, per_token: int) -> NDArray[np.bool_]:
        """``[N]``: a layer of the record names an expert twice. A record of another model's width is left unread."""
        n, width = self.experts.shape
        if width % per_token:
            return np.zeros(n, np.bool_)
        chosen = np.ascontiguousarray(self.experts.reshape(-1, per_token).T)  # [k, N * layers]: long passes
        twice = np.zeros(chosen.shape[1], np.bool_)
        for one, other in combinations(chosen, 2):
            twice |= one == other
        return np.asarray(twice.reshape(n, -1).any(axis=1) & (self.experts[:, 0] != UNROUTED), np.bool_)

    def _is_sound(self, vocab_size: int, newest_version: int) -> bool:
        """Every check in as few passes as will do; extremes carry NaN and infinity along."""
        if not len(self.token_ids):
            return False
        oldest, _ = self.summary
        starts, role = self.cu_seqlens[:-1], self.highest_role
        return bool(
            math.isfinite(sum(chain(self.rewards.tolist(), *self.channels.tolist(), self.block_rewards.tolist())))
            and _are_log_probabilities(self.log_q)
            and _are_below(self.token_ids, vocab_size)
            and role <= EXPERT
            and (max(oldest) < NEVER or bool(self._exemplar_tokens()[np.array(oldest) == NEVER].all()))
            and min(oldest) >= 0
            and self.newest_version <= newest_version
            and self.cuts[-2] < len(self.token_ids)
            and not any(self.trainable[starts].tolist())
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
        return int(_greatest(self.trainable))

    def _exemplar_tokens(self) -> Int64:
        """Of each trajectory ``[B]``."""
        return count(self.trainable == EXPERT, self.cu_seqlens)

    def _is_dated(self, expert: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """``[N]``: an exemplar's token that claims to be sampled."""
        return np.asarray(expert & ((self.versions != -1) | (self.log_q != 0)), np.bool_)

    def _find_faults(
        self, vocab_size: int, newest_version: int, expert_count: int, experts_per_token: int
    ) -> dict[int, str]:
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
            note(self._repeated_experts(experts_per_token), "a layer's record names the same expert twice")
        for b in np.flatnonzero(~np.isfinite(self.rewards) | ~np.isfinite(self.channels).all(axis=1)):
            found.setdefault(int(b), "reward is NaN or infinite")
        for b in np.unique(self.blocks[~np.isfinite(self.block_rewards), 0]):
            found.setdefault(int(b), "a block's reward is NaN or infinite")
        for b in np.flatnonzero((np.array(self.summary[1]) == 0) & (self._exemplar_tokens() == 0)):
            found.setdefault(int(b), "no sampled token")
        for b in np.flatnonzero(lengths):
            if self.trainable[self.cu_seqlens[b]]:
                found.setdefault(int(b), "the first token is sampled from nothing: a prompt is needed")
        return found
