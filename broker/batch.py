"""One training step's data: chosen groups collated, all arrays packed in canonical order.

Canonical order is by group, then sibling, so a batch is a function of which groups it holds and
not of when they arrived.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from broker.advantages import group_advantages, overlong_penalty, without_signal
from broker.blocks import block_advantages
from broker.mixing import Mixed, Scales, mix
from broker.trajectories import Piece, Trajectory, gather, pieces_of
from common.config import RunConfig
from common.objective import AdvantageSection
from common.ragged import count
from common.wire import EXPERT, STARTS


@dataclass
class Batch:
    """``B`` trajectories, ``N`` tokens."""

    step: int
    group_size: int
    groups: NDArray[np.int64]  # [B] ascending
    sizes: NDArray[np.int64]  # [P] members of each group, in order
    siblings: NDArray[np.int32]  # [B]
    prompts: NDArray[np.int64]  # [B] that each group was granted for
    tasks: NDArray[np.int64]  # [B] whose prompt that is: a number of ``labels``
    labels: tuple[str, ...]  # of the tasks that are mixed (task.mix)
    rewards: NDArray[np.float32]  # [B] as the actors sent them
    mixed: Mixed  # what advantages are taken of: the same, or the channels gated and normalised
    scales: Scales  # of channels that are normalised by earlier steps too
    advantages: NDArray[np.float32]  # [B] of the whole trajectory
    spans: NDArray[np.int64]  # [S+1] cuts the tokens where the advantage or the weight changes: by trajectory or block
    span_advantages: NDArray[np.float32]  # [S]
    span_scale: NDArray[np.float64] | None  # [S] of a block's loss, 0 for what is in none; None without blocks
    truncated: NDArray[np.bool_]  # [B]
    muted: NDArray[np.bool_]  # [B] weigh nothing in the loss
    cu_seqlens: NDArray[np.int64]  # [B+1]
    segments: NDArray[np.int64]  # [S+1] the same with every trajectory cut where another segment of it starts
    trainable: NDArray[np.uint8]  # [N] 1 where sampled, EXPERT where an exemplar's, else 0
    whole: bool  # every sampled token is in the loss
    plain: bool  # so is every trajectory (:attr:`Trajectory.plain`), and whole
    members: list[Trajectory]  # [B]; what is not copied together stays in the frames that it arrived in
    pieces: list[Piece]  # where their tokens lie
    actors: list[str]  # [B] who sampled each
    sources: list[tuple[int, int]]  # [B] where the journal holds each trajectory

    def channel_means(self) -> dict[str, float]:
        """Mean of each reward channel over the sampled trajectories that have it."""
        sampled = [trajectory.channels for trajectory in self.members if trajectory.sampled_tokens]
        names = sorted(set(chain.from_iterable(sampled)))
        return {name: float(np.mean([channels[name] for channels in sampled if name in channels])) for name in names}

    def count_tasks(self) -> dict[str, int]:
        """Trajectories of each task that has any."""
        counts = np.bincount(self.tasks, minlength=len(self.labels)).tolist()
        return {label: count for label, count in zip(self.labels, counts, strict=True) if count}

    @property
    def tokens(self) -> int:
        """N."""
        return len(self.trainable)

    @cached_property
    def token_ids(self) -> NDArray[np.int32]:
        """``[N]``."""
        return gather(self.pieces, "token_ids")

    @cached_property
    def log_q(self) -> NDArray[np.float32]:
        """``[N]``."""
        return gather(self.pieces, "log_q")

    @cached_property
    def versions(self) -> NDArray[np.int32]:
        """``[N]``."""
        return gather(self.pieces, "versions")

    def forget_copies(self) -> None:
        """Free what was copied together, and can be again."""
        for name in ("token_ids", "log_q", "versions", "own_log_q", "on", "_runs"):
            self.__dict__.pop(name, None)

    def pieces_of(self, members: NDArray[np.int64]) -> list[Piece]:
        """Where the tokens of trajectories ``members``, ascending, lie."""
        if len(members) == len(self.members):
            return self.pieces
        return pieces_of(map(self.members.__getitem__, members.tolist()))

    @cached_property
    def on(self) -> NDArray[np.bool_]:
        """``[N]``: sampled tokens in the loss."""
        if self.plain:
            return self.trainable.view(np.bool_)
        return np.asarray(self.trainable == 1, np.bool_)

    @cached_property
    def sampled_tokens(self) -> NDArray[np.int64]:
        """Sampled tokens in the loss, of each trajectory ``[B]``."""
        if self.whole:
            return self.lengths
        return count(self.on, self.cu_seqlens)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens that the policy sampled of each trajectory ``[B]``, in the loss or taken out of it."""
        return np.array([t.sampled_tokens for t in self.members], np.int64)

    @cached_property
    def counted_tokens(self) -> NDArray[np.int64]:
        """Tokens in the loss, of each trajectory ``[B]``: the sampled, and exemplars'."""
        if self.plain or self.trainable.max(initial=0) <= 1:
            return self.sampled_tokens
        return count(self.trainable > 0, self.cu_seqlens)

    @cached_property
    def own_log_q(self) -> NDArray[np.float32]:
        """``[N]``: log q of sampled tokens in the loss, 0 elsewhere."""
        if self.plain:
            return self.log_q
        return np.where(self.on, self.log_q, np.float32(0))

    @cached_property
    def lags(self) -> NDArray[np.int64]:
        """How many sampled tokens in the loss have lag 0, 1, ..."""
        lag, offsets = self._runs
        return _histogram(lag, self.sampled_tokens if self.plain else np.diff(offsets))

    def by_lag(self, flags: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """``(lag [C], tokens [C], flagged [C])``: one row a lag of a trajectory; ``flags[N]`` are in the loss."""
        lag, offsets = self._runs
        tokens = self.sampled_tokens if self.plain else np.diff(offsets)
        on, width = lag >= 0, len(self.lags)
        of, row = np.unique(self.owners(offsets)[on] * width + lag[on], return_inverse=True)
        sums = [np.bincount(row, of_run[on], len(of)).astype(np.int64) for of_run in (tokens, count(flags, offsets))]
        return of % max(1, width), sums[0], sums[1]

    @cached_property
    def _runs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``(lag [R], offsets [R+1])``: stretches of one version; -1 for what is not sampled or not in the loss.

        A plain trajectory is one stretch, whatever of it was not sampled.
        """
        if self.plain:
            lags = [self.step - t.oldest_version if t.sampled_tokens else -1 for t in self.members]
            return np.array(lags, np.int64), self.cu_seqlens
        edges = np.flatnonzero((self.versions[1:] != self.versions[:-1]) | (self.on[1:] != self.on[:-1])) + 1
        offsets = np.concatenate(([0], edges, [len(self.on)]))
        at = offsets[:-1]
        return np.where(self.on[at], self.step - self.versions[at].astype(np.int64), -1), offsets

    @cached_property
    def sampled(self) -> NDArray[np.bool_]:
        """``[B]``: the policy sampled something in it; false of a human exemplar."""
        return np.array([t.sampled_tokens > 0 for t in self.members], np.bool_)

    @cached_property
    def copies(self) -> NDArray[np.float64]:
        """See :func:`copies_of`."""
        return copies_of(self.sizes, self.group_size)

    @property
    def owner(self) -> NDArray[np.int64]:
        """Which trajectory each token belongs to ``[N]``."""
        return np.repeat(np.arange(len(self.groups)), np.diff(self.cu_seqlens))

    def owners(self, cuts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which trajectory each piece between ``cuts`` (as fine as ``cu_seqlens`` or finer) belongs to."""
        if cuts is self.cu_seqlens:
            return np.arange(len(self.members))
        return np.searchsorted(self.cu_seqlens, cuts[:-1], side="right") - 1

    @cached_property
    def nbytes(self) -> int:
        """Bytes held; asked for at every grant."""
        return sum(t.nbytes for t in self.members)

    @property
    def topk_ids(self) -> NDArray[np.int32]:
        """``[N, k]``, copied together at every call."""
        return gather(self.pieces, "topk_ids")

    @property
    def topk_log_q(self) -> NDArray[np.float32]:
        """``[N, k]``, copied together at every call."""
        return gather(self.pieces, "topk_log_q")

    @property
    def alternatives(self) -> int:
        """k."""
        return self.members[0].message.topk_ids.shape[1] if self.members else 0

    @property
    def experts(self) -> NDArray[np.uint16]:
        """``[N, R]``, copied together at every call."""
        return gather(self.pieces, "experts")


def _histogram(keys: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sums of ``counts`` by ``keys`` 0, 1, ...; those below 0 are left out."""
    on = keys >= 0
    return np.bincount(keys[on], counts[on]).astype(np.int64)  # by way of float64, exact below 2 ** 53


def copies_of(sizes: NDArray[np.int64], group_size: int) -> NDArray[np.float64]:
    """How often each trajectory of groups of ``sizes[P]`` counts ``[B]``: ``group_size / n`` where ``n`` are valid."""
    return np.repeat(group_size / sizes, sizes)


def collate(step: int, members: Sequence[Trajectory], config: RunConfig, scales: Scales | None = None) -> Batch:
    """Pack whole groups, their advantages computed before any rejection; ``scales``: see :mod:`broker.mixing`."""
    ordered = sorted(members, key=attrgetter("group", "sibling"))
    pieces = pieces_of(ordered)
    section = config.advantage
    rewards = np.array([t.reward for t in ordered], np.float32)
    groups = np.array([t.group for t in ordered], np.int64)
    sizes = np.diff(np.flatnonzero(np.diff(groups, prepend=-1, append=-1)))
    prompts = np.array([t.prompt for t in ordered], np.int64)
    truncated = np.array([t.truncated for t in ordered], np.bool_)
    mixed = mix(ordered, config, scales or {})
    shaped = mixed.rewards
    if section.overlong_buffer:
        lengths = np.array([t.sampled_tokens for t in ordered], np.int64)
        shaped = shaped + overlong_penalty(lengths, config.rollout.max_sampled, section.overlong_buffer)
    advantages = group_advantages(shaped, sizes, config.rollout.group_size, section)
    sampled = gather(pieces, "trainable")
    trainable = _trainable(sampled, ordered, mixed.rewards, sizes, truncated, section)
    cu_seqlens = np.array([0, *accumulate([t.length for t in ordered])], np.int64)
    plain = trainable is sampled and all(t.plain for t in ordered)
    starts = np.zeros(0, np.int64) if plain else np.flatnonzero(trainable == STARTS)
    spans, span_advantages, span_scale = cu_seqlens, advantages, None
    if section.blocks != "off":
        spans, span_advantages, span_scale = _block_spans(ordered, sampled, cu_seqlens, groups, sizes, config)
    return Batch(
        step=step,
        group_size=config.rollout.group_size,
        groups=groups,
        sizes=sizes,
        siblings=np.array([t.sibling for t in ordered], np.int32),
        prompts=prompts,
        tasks=config.task.mixture.places(prompts)[0],
        labels=config.task.labels,
        rewards=rewards,
        mixed=mixed,
        scales=scales or {},
        advantages=advantages,
        spans=spans,
        span_advantages=span_advantages,
        span_scale=span_scale,
        truncated=truncated,
        muted=truncated & section.overlong_filter,
        cu_seqlens=cu_seqlens,
        segments=np.union1d(cu_seqlens, starts) if len(starts) else cu_seqlens,
        trainable=np.where(trainable == STARTS, np.uint8(0), trainable) if len(starts) else trainable,
        whole=trainable is sampled,
        plain=plain,
        members=ordered,
        pieces=pieces,
        actors=[t.actor for t in ordered],
        sources=[(t.event, t.index) for t in ordered],
    )


def _trainable(
    trainable: NDArray[np.uint8],
    ordered: Sequence[Trajectory],
    rewards: NDArray[np.float32],
    sizes: NDArray[np.int64],
    truncated: NDArray[np.bool_],
    section: AdvantageSection,
) -> NDArray[np.uint8]:
    """``[N]``: what is in the loss and its denominator; ``trainable`` itself if that is all of it.

    ``advantage.zero_signal=mask`` takes groups of equal ``rewards`` out of both, whatever their lengths cost,
    and ``advantage.overlong_filter`` truncated trajectories; where that would be all of them they stay here,
    so that there is a batch, and those that are truncated weigh nothing (:attr:`Batch.muted`).
    """
    unwanted = np.zeros(len(ordered), np.bool_)
    if section.zero_signal == "mask":
        unwanted |= np.repeat(without_signal(rewards, sizes), sizes)
    if section.overlong_filter:
        unwanted |= truncated
    if not unwanted.any() or not any(t.sampled_tokens and not off for t, off in zip(ordered, unwanted, strict=True)):
        return trainable
    off = np.repeat(unwanted, [t.length for t in ordered]) & (trainable != STARTS)
    return np.where(off, np.uint8(0), trainable)


def _block_spans(
    ordered: Sequence[Trajectory],
    trainable: NDArray[np.uint8],
    cu_seqlens: NDArray[np.int64],
    groups: NDArray[np.int64],
    sizes: NDArray[np.int64],
    config: RunConfig,
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float64]]:
    """``(spans [S+1], advantages [S], scale [S])``: a span a block, and those between, which count 0.

    A block without a token that is trained belongs to no stratum (algorithms.md 2.3).
    """
    section = config.advantage
    counts = np.array([len(t.blocks) for t in ordered])
    owner = np.repeat(np.arange(len(ordered)), counts)
    table = np.concatenate([t.blocks for t in ordered]).astype(np.int64)
    rewards = np.concatenate([t.block_rewards for t in ordered]).astype(np.float64)
    taught = np.concatenate(([0], np.cumsum((trainable == 1) | (trainable == EXPERT))))
    begin = cu_seqlens[owner]
    full = taught[begin + table[:, 3]] > taught[begin + table[:, 2]]
    owner, table, rewards = owner[full], table[full], rewards[full]
    number, outcome, first, end = table.T
    found = block_advantages(
        rewards,
        groups[owner],
        number,
        outcome,
        section.blocks,
        section.leave_one_out,
        section.shrinkage,
        copies_of(sizes, config.rollout.group_size)[owner],
    )
    named = np.array(section.block_weights + (1.0,) * (int(number.max(initial=0)) + 1), np.float64)
    spans = np.union1d(cu_seqlens, np.concatenate((cu_seqlens[owner] + first, cu_seqlens[owner] + end)))
    at = np.searchsorted(spans, cu_seqlens[owner] + first)
    advantages, scale = np.zeros(len(spans) - 1, np.float32), np.zeros(len(spans) - 1)
    advantages[at] = found
    scale[at] = named[number]
    return spans, advantages, scale
