"""One training step's data, from chosen groups to shards; all arrays packed in canonical order.

Canonical order is by group, then sibling, so a batch is a function of which groups it holds and
not of when they arrived.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from broker.advantages import group_advantages, overlong_penalty, without_signal
from broker.aggregation import block_weights, span_weights
from broker.blocks import block_advantages
from broker.groups import Trajectory
from broker.mixing import Mixed, Scales, mix
from broker.packing import balance, runs
from common.config import RunConfig
from common.errors import DataError
from common.objective import AdvantageSection, Aggregate
from common.obrs import Divergence, Thinning, coins, divergence, effective_sample_size, thin
from common.ragged import count
from common.wire import EXPERT, STARTS, Shard
from common.zbounds import enumerated_acceptance, interpolate, kappa, without_impossible, z_bounds

ZWeight = Literal["none", "context", "batch"]


@dataclass
class Batch:
    """``B`` trajectories, ``N`` tokens."""

    step: int
    group_size: int
    groups: NDArray[np.int64]  # [B]
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
    token_ids: NDArray[np.int32]  # [N]
    trainable: NDArray[np.uint8]  # [N] 1 where sampled, EXPERT where an exemplar's, else 0
    whole: bool  # every sampled token is in the loss
    log_q: NDArray[np.float32]  # [N]
    versions: NDArray[np.int32]  # [N]
    members: list[Trajectory]  # [B]; alternatives and expert records stay in the frames that they arrived in
    actors: list[str]  # [B] who sampled each
    sources: list[tuple[int, int]]  # [B] where the journal holds each trajectory

    def channel_means(self) -> dict[str, float]:
        """Mean of each reward channel over the sampled trajectories that have it."""
        found: dict[str, list[float]] = {}
        for trajectory in self.members:
            if not trajectory.sampled_tokens:
                continue
            for name, value in trajectory.channels.items():
                found.setdefault(name, []).append(value)
        return {name: float(np.mean(values)) for name, values in sorted(found.items())}

    def count_tasks(self) -> dict[str, int]:
        """Trajectories of each task that has any."""
        counts = np.bincount(self.tasks, minlength=len(self.labels)).tolist()
        return {label: count for label, count in zip(self.labels, counts, strict=True) if count}

    @cached_property
    def on(self) -> NDArray[np.bool_]:
        """``[N]``: sampled tokens in the loss."""
        return np.asarray(self.trainable == 1, np.bool_)

    @cached_property
    def sampled_tokens(self) -> NDArray[np.int64]:
        """Sampled tokens in the loss, of each trajectory ``[B]``."""
        if self.whole:
            return np.array([t.sampled_tokens for t in self.members], np.int64)
        return count(self.on, self.cu_seqlens)

    @cached_property
    def counted_tokens(self) -> NDArray[np.int64]:
        """Tokens in the loss, of each trajectory ``[B]``: the sampled, and exemplars'."""
        if self.trainable.max(initial=0) <= 1:
            return self.sampled_tokens
        return count(self.trainable > 0, self.cu_seqlens)

    @cached_property
    def own_log_q(self) -> NDArray[np.float32]:
        """``[N]``: log q of sampled tokens in the loss, 0 elsewhere."""
        return np.where(self.on, self.log_q, np.float32(0))

    @cached_property
    def lags(self) -> NDArray[np.int64]:
        """How many sampled tokens in the loss have lag 0, 1, ..."""
        lag, offsets = self._runs
        return _histogram(lag, np.diff(offsets))

    def lags_of(self, flags: NDArray[np.bool_]) -> NDArray[np.int64]:
        """How many tokens of ``flags[N]``, all of them sampled, have lag 0, 1, ..., as long as :attr:`lags`."""
        lag, offsets = self._runs
        return _histogram(lag, count(flags, offsets))

    @cached_property
    def _runs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``(lag [R], offsets [R+1])``: stretches of one version; -1 for what is not sampled or not in the loss."""
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
        return copies_of(self.groups, self.group_size)

    @property
    def owner(self) -> NDArray[np.int64]:
        """Which trajectory each token belongs to ``[N]``."""
        return np.repeat(np.arange(len(self.groups)), np.diff(self.cu_seqlens))

    @cached_property
    def nbytes(self) -> int:
        """Bytes held; asked for at every grant."""
        arrays = (self.token_ids, self.trainable, self.log_q, self.versions)
        beside = sum(t.topk_ids.nbytes + t.topk_log_q.nbytes + t.experts.nbytes for t in self.members)
        return sum(a.nbytes for a in arrays) + beside

    @property
    def topk_ids(self) -> NDArray[np.int32]:
        """``[N, k]``, copied together at every call."""
        return np.concatenate([t.topk_ids for t in self.members])

    @property
    def topk_log_q(self) -> NDArray[np.float32]:
        """``[N, k]``, copied together at every call."""
        return np.concatenate([t.topk_log_q for t in self.members])

    @property
    def alternatives(self) -> int:
        """k."""
        return self.members[0].topk_ids.shape[1] if self.members else 0

    def experts(self, members: NDArray[np.int64]) -> NDArray[np.uint16]:
        """Records of trajectories ``members`` end to end, ``[their tokens, R]``, copied together at every call."""
        routed = self.members[0].experts.shape[1] if self.members else 0
        if routed and len(members):
            return np.concatenate([self.members[i].experts for i in members])
        return np.zeros((int(np.diff(self.cu_seqlens)[members].sum()), routed), np.uint16)


def _histogram(keys: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sums of ``counts`` by ``keys`` 0, 1, ...; those below 0 are left out."""
    found = np.zeros(int(keys.max(initial=-1)) + 1, np.int64)
    np.add.at(found, keys[keys >= 0], counts[keys >= 0])
    return found


def copies_of(groups: NDArray[np.int64], group_size: int) -> NDArray[np.float64]:
    """How often each trajectory of ``groups[B]`` counts ``[B]``: ``group_size / n`` where only ``n`` are valid."""
    _, owner, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    return np.asarray((group_size / sizes)[owner], np.float64)


def collate(step: int, members: Sequence[Trajectory], config: RunConfig, scales: Scales | None = None) -> Batch:
    """Pack whole groups, their advantages computed before any rejection; ``scales``: see :mod:`broker.mixing`."""
    ordered = sorted(members, key=lambda t: (t.group, t.sibling))
    section = config.advantage
    rewards = np.array([t.reward for t in ordered], np.float32)
    groups = np.array([t.group for t in ordered], np.int64)
    sizes = np.unique(groups, return_counts=True)[1]
    prompts = np.array([t.prompt for t in ordered], np.int64)
    truncated = np.array([t.truncated for t in ordered], np.bool_)
    mixed = mix(ordered, config, scales or {})
    shaped = mixed.rewards
    if section.overlong_buffer:
        lengths = np.array([t.sampled_tokens for t in ordered], np.int64)
        shaped = shaped + overlong_penalty(lengths, config.rollout.max_sampled, section.overlong_buffer)
    advantages = group_advantages(shaped, sizes, config.rollout.group_size, section)
    sampled = np.concatenate([t.trainable for t in ordered])
    trainable = _trainable(sampled, ordered, shaped, sizes, truncated, section)
    cu_seqlens = np.concatenate(([0], np.cumsum([len(t.token_ids) for t in ordered], dtype=np.int64)))
    starts = np.flatnonzero(trainable == STARTS)
    spans, span_advantages, span_scale = cu_seqlens, advantages, None
    if section.blocks != "off":
        spans, span_advantages, span_scale = _block_spans(ordered, cu_seqlens, groups, config)
    return Batch(
        step=step,
        group_size=config.rollout.group_size,
        groups=groups,
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
        token_ids=np.concatenate([t.token_ids for t in ordered]),
        trainable=np.where(trainable == STARTS, np.uint8(0), trainable) if len(starts) else trainable,
        whole=trainable is sampled,
        log_q=np.concatenate([t.log_q for t in ordered]),
        versions=np.concatenate([t.versions for t in ordered]),
        members=ordered,
        actors=[t.actor for t in ordered],
        sources=[t.source for t in ordered],
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

    ``advantage.zero_signal=mask`` takes groups without signal out of both, ``advantage.overlong_filter``
    truncated trajectories; where that would be all of them they stay here, so that there is a batch, and
    those that are truncated weigh nothing (:attr:`Batch.muted`).
    """
    unwanted = np.zeros(len(ordered), np.bool_)
    if section.zero_signal == "mask":
        unwanted |= np.repeat(without_signal(rewards, sizes), sizes)
    if section.overlong_filter:
        unwanted |= truncated
    if not unwanted.any() or not any(t.sampled_tokens and not off for t, off in zip(ordered, unwanted, strict=True)):
        return trainable
    off = np.repeat(unwanted, [len(t.token_ids) for t in ordered]) & (trainable != STARTS)
    return np.where(off, np.uint8(0), trainable)


def _block_spans(
    ordered: Sequence[Trajectory], cu_seqlens: NDArray[np.int64], groups: NDArray[np.int64], config: RunConfig
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float64]]:
    """``(spans [S+1], advantages [S], scale [S])``: a span a block, and those between, which count 0."""
    section = config.advantage
    counts = np.array([len(t.blocks) for t in ordered])
    owner = np.repeat(np.arange(len(ordered)), counts)
    table = np.concatenate([t.blocks for t in ordered]).astype(np.int64)
    rewards = np.concatenate([t.block_rewards for t in ordered]).astype(np.float64)
    number, outcome, first, end = table.T
    found = block_advantages(
        rewards,
        groups[owner],
        number,
        outcome,
        section.blocks,
        section.leave_one_out,
        section.shrinkage,
        copies_of(groups, config.rollout.group_size)[owner],
    )
    named = np.array(section.block_weights + (1.0,) * (int(number.max(initial=0)) + 1), np.float64)
    spans = np.union1d(cu_seqlens, np.concatenate((cu_seqlens[owner] + first, cu_seqlens[owner] + end)))
    at = np.searchsorted(spans, cu_seqlens[owner] + first)
    advantages, scale = np.zeros(len(spans) - 1, np.float32), np.zeros(len(spans) - 1)
    advantages[at] = found
    scale[at] = named[number]
    return spans, advantages, scale


@dataclass
class Decision:
    """What rejection did to a batch, aligned with its tokens."""

    version: int  # that scored; -1 with rejection off
    accept: NDArray[np.uint8]  # [N]
    log_m: NDArray[np.float32]  # [N] 0 where not accepted
    log_p: NDArray[np.float32]  # [N] 0 where not accepted
    proposed: int
    accepted: int
    unscorable: int  # NaN scores of the replica, treated as rejected
    divergence: Divergence | None  # None with rejection off
    denominator: int  # tokens that the loss of loss.aggregate=token_mean is divided by
    accepted_only: bool = False  # whether the loss counts accepted tokens alone (obrs.z_weight=batch)
    z: dict[str, float] = field(default_factory=dict)  # means of the acceptance bounds, where alternatives are known


def loss_denominator(batch: Batch, tokens: NDArray[np.int64]) -> int:
    """``tokens[B]`` of each trajectory; where a group misses siblings they count as if copies made up for those."""
    return max(1, round(float((tokens * batch.copies).sum())))


def accept_all(batch: Batch) -> Decision:
    """Rejection off: every token is accepted with the density that it was sampled from."""
    proposed, log_q = int(batch.sampled_tokens.sum()), batch.own_log_q
    denominator = loss_denominator(batch, batch.counted_tokens)
    return Decision(-1, batch.on.view(np.uint8), log_q, log_q, proposed, proposed, 0, None, denominator)


@dataclass(frozen=True)
class Scores:
    """What the policy replica said of a batch."""

    version: int
    log_p: NDArray[np.float32]  # [N]
    topk_log_p: NDArray[np.float32]  # [N, k] at the batch's alternatives

    def at(self, on: NDArray[np.int64]) -> tuple[NDArray[np.float32], int]:
        """``log p`` at positions ``on`` and how many of them were NaN (made -inf: rejected)."""
        log_p = np.minimum(self.log_p[on], np.float32(0))  # rounding may lift a certain token above 0
        nan = np.isnan(log_p)
        return np.where(nan, np.float32(-np.inf), log_p), int(nan.sum())


@dataclass(frozen=True)
class Rule:
    """How a batch is thinned."""

    seed: int
    log_threshold: float
    z_weight: ZWeight = "none"
    kappa: bool = False  # the paper's debias of Z instead of interpolation between its bounds


def trainable_scores(batch: Batch, scores: Scores) -> tuple[NDArray[np.float32], NDArray[np.float32], int]:
    """``(log p, log q)`` of the trainable tokens and how many scores were NaN (made -inf: rejected)."""
    on = np.flatnonzero(batch.on)
    log_p, unscorable = scores.at(on)
    return log_p, batch.log_q[on], unscorable


def reject(batch: Batch, scored: Scores, rule: Rule) -> Decision:
    """Optimal budgeted rejection of every trainable token (algorithms.md 1.4, 1.11).

    With a Z weight the shipped ``log m`` is ``log m - log Z``, so that a learner that weighs by
    ``pi / m`` weighs by ``Z pi / m`` without knowing of it; ``batch`` divides by the accepted
    tokens instead of all (algorithms.md 1.4, 1.6).
    """
    on = np.flatnonzero(batch.on)
    version, seed, log_threshold = scored.version, rule.seed, rule.log_threshold
    scores, log_q, unscorable = trainable_scores(batch, scored)
    uniforms = coins(seed, batch.groups, batch.siblings, np.diff(batch.cu_seqlens), version)[on]
    thinning = thin(scores, log_q, uniforms, log_threshold)
    decision = _spread(batch, on, thinning, scores, version, unscorable)
    decision.divergence = divergence(scores, log_q, thinning)
    z = _bounds(batch, scored, on, scores, log_q, rule, decision)
    if rule.z_weight == "context":
        _divide(decision, on, z)
    elif rule.z_weight == "batch" and decision.accepted:
        _divide(decision, on, np.full(len(on), decision.divergence.expected_acceptance, np.float32))
        decision.denominator = loss_denominator(batch, count(decision.accept == 1, batch.cu_seqlens))
        decision.accepted_only = True
    return decision


def thin_again(batch: Batch, first: Decision, scored: Scores, rule: Rule) -> Decision:
    """A second thinning of what the first accepted, under a later policy p' (algorithms.md 1.4).

    Survivors are draws of density m, so the same rule applies with m for q: accept with
    ``min(1, p'/(lam m))``, after which ``log m' = min(log m, log p' - log lam)``. Coins are those of
    the later version, which are independent of the first. The estimator stays exact; the receipt's
    divergences remain those of the first thinning, the ESS is of ``p'/m'``.
    """
    on = np.flatnonzero(first.accept)
    log_p, unscorable = scored.at(on)
    uniforms = coins(rule.seed, batch.groups, batch.siblings, np.diff(batch.cu_seqlens), scored.version)[on]
    thinning = thin(log_p, first.log_m[on], uniforms, rule.log_threshold)
    decision = _spread(batch, on, thinning, log_p, scored.version, first.unscorable + unscorable)
    decision.proposed, decision.z, decision.divergence = first.proposed, first.z, first.divergence
    weight = np.exp((log_p - thinning.log_m)[thinning.accept].astype(np.float64))
    if first.divergence is not None and len(weight):
        decision.divergence = replace(first.divergence, ess=effective_sample_size(weight, len(weight)))
    return decision


def _divide(decision: Decision, on: NDArray[np.int64], z: NDArray[np.float32]) -> None:
    """``log m -= log z`` on accepted tokens."""
    log_z = np.log(np.maximum(z, np.float32(1e-30)))
    decision.log_m[on] -= np.where(decision.accept[on] == 1, log_z, np.float32(0))


def _bounds(
    batch: Batch,
    scored: Scores,
    on: NDArray[np.int64],
    log_p: NDArray[np.float32],
    log_q: NDArray[np.float32],
    rule: Rule,
    decision: Decision,
) -> NDArray[np.float32]:
    """Z of each trainable token from its alternatives (algorithms.md 1.5, 1.6); ones where there are none."""
    if not batch.alternatives or not len(on) or decision.divergence is None:
        return np.ones(len(on), np.float32)
    inside = (batch.topk_ids[on] == batch.token_ids[on][:, None]).any(axis=1)
    topk_log_q, topk_log_p = batch.topk_log_q[on], np.minimum(scored.topk_log_p[on], np.float32(0))
    topk_log_p = np.where(np.isnan(topk_log_p), np.float32(-np.inf), topk_log_p)
    ignored = 0
    try:
        bounds = z_bounds(topk_log_q, topk_log_p, log_q, log_p, inside, rule.log_threshold)
    except DataError:  # some alternatives cannot be what they claim: do without those
        topk_log_q, topk_log_p, ignored = without_impossible(topk_log_q, topk_log_p, log_q, log_p, inside)
        bounds = z_bounds(topk_log_q, topk_log_p, log_q, log_p, inside, rule.log_threshold)
    expected = decision.divergence.expected_acceptance
    z, theta = interpolate(bounds.core, bounds.upper, expected)
    paper, factor = kappa(bounds.core, expected)
    decision.z = {
        "z_lower": float(bounds.core.mean()),
        "z_upper": float(bounds.upper.mean()),
        "topk_ignored": float(ignored),
        "topk_missing_mass": float(bounds.missing_q.mean()),
        "z_theta": float(theta),
        "z_kappa": float(factor),
        "acceptance_enumerated": enumerated_acceptance(
            topk_log_q, topk_log_p, log_q, log_p, inside, rule.log_threshold
        ),
    }
    return paper if rule.kappa else z


def _spread(
    batch: Batch, on: NDArray[np.int64], thinning: Thinning, scores: NDArray[np.float32], version: int, unscorable: int
) -> Decision:
    n = len(batch.token_ids)
    accept = np.zeros(n, np.uint8)
    log_m, log_p = np.zeros(n, np.float32), np.zeros(n, np.float32)
    accept[on] = thinning.accept
    log_m[on] = np.where(thinning.accept, thinning.log_m, np.float32(0))
    log_p[on] = np.where(thinning.accept, scores, np.float32(0))
    denominator = loss_denominator(batch, batch.counted_tokens)
    return Decision(version, accept, log_m, log_p, len(on), int(thinning.accept.sum()), unscorable, None, denominator)


def weights_of(batch: Batch, decision: Decision, aggregate: Aggregate, longest: int) -> NDArray[np.float32]:
    """The weight of a token of each span ``[S]`` (:func:`broker.aggregation.span_weights`)."""
    if decision.accepted_only:
        tokens = count(decision.accept == 1, batch.spans)
    elif batch.spans is batch.cu_seqlens:
        tokens = batch.counted_tokens
    else:
        tokens = count(batch.trainable > 0, batch.spans)
    owner = np.searchsorted(batch.cu_seqlens, batch.spans[:-1], side="right") - 1
    if batch.span_scale is not None:
        weights = block_weights(tokens, owner, batch.copies, batch.span_scale)
    else:
        weights = span_weights(aggregate, tokens, owner, batch.groups, batch.copies, longest)
    return np.where(batch.muted[owner], np.float32(0), weights)


def make_shards(
    batch: Batch,
    decision: Decision,
    world: int,
    config: RunConfig,
    log_reference: NDArray[np.float32] | None = None,
    log_teacher: NDArray[np.float32] | None = None,
) -> list[Shard]:
    """One shard a rank, balanced by tokens. What the loss is divided by counts the whole batch (algorithms.md 1.8).

    A shard's rows are segments; those of one trajectory share its rank. ``log_reference[N]`` and
    ``log_teacher[N]`` travel along where there are any.
    """
    accept = decision.accept
    if batch.counted_tokens is not batch.sampled_tokens:
        accept = np.where(batch.trainable == EXPERT, np.uint8(EXPERT), accept)
    weights = weights_of(batch, decision, config.loss.aggregate, config.rollout.max_sampled)
    lengths = np.diff(batch.cu_seqlens)
    shards = []
    for rank, members in enumerate(balance(lengths, world)):
        ranges = [(int(batch.cu_seqlens[a]), int(batch.cu_seqlens[b])) for a, b in runs(members)]

        made: dict[int, NDArray[Any]] = {}  # by identity: with rejection off three arrays are one

        def part(
            array: NDArray[Any], ranges: list[tuple[int, int]] = ranges, made: dict[int, NDArray[Any]] = made
        ) -> NDArray[Any]:
            if id(array) not in made:
                made[id(array)] = _pieces(array, ranges)
            return made[id(array)]

        segments, rows = _cut(batch.segments, batch.cu_seqlens, members)
        spans, inside = _cut(batch.spans, batch.cu_seqlens, members, which=True)
        shards.append(
            Shard(
                step=batch.step,
                rank=rank,
                world=world,
                tokens_global=len(batch.token_ids),
                temperature=config.rollout.temperature,
                groups=batch.groups[rows],
                siblings=batch.siblings[rows],
                cu_seqlens=segments,
                spans=spans,
                advantages=batch.span_advantages[inside],
                weights=weights[inside],
                token_ids=part(batch.token_ids),
                trainable=part(batch.trainable),
                accept=part(accept),
                log_q=part(batch.own_log_q),
                log_m=part(decision.log_m),
                log_p=part(decision.log_p),
                experts=batch.experts(members),
                log_reference=None if log_reference is None else part(log_reference),
                log_teacher=None if log_teacher is None else part(log_teacher),
            )
        )
    return shards


def _pieces(array: NDArray[Any], ranges: list[tuple[int, int]]) -> NDArray[Any]:
    """``array[a:b]`` of each range end to end; a view where there is one range."""
    if len(ranges) == 1:
        return array[ranges[0][0] : ranges[0][1]]
    return np.concatenate([array[a:b] for a, b in ranges]) if ranges else array[:0]


def _cut(
    cuts: NDArray[np.int64], cu_seqlens: NDArray[np.int64], members: NDArray[np.int64], which: bool = False
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Pieces ``cuts`` (as fine as ``cu_seqlens`` or finer) of trajectories ``members``, end to end.

    Returns their offsets and the trajectory of each, or with ``which`` its own number.
    """
    owner = np.searchsorted(cu_seqlens, cuts[:-1], side="right") - 1
    inner = members if len(owner) == len(cu_seqlens) - 1 else np.flatnonzero(np.isin(owner, members))
    offsets = np.concatenate(([0], np.cumsum(np.diff(cuts)[inner]))).astype(np.int32)
    return offsets, inner if which else owner[inner]
