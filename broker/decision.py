"""What rejection makes of a batch: one coin a token, under the policy's scores (algorithms.md 1.4 to 1.6, 1.11)."""

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from broker.batch import Batch
from common.errors import DataError
from common.obrs import Divergence, Thinning, coins, divergence, effective_sample_size, thin
from common.ragged import count
from common.zbounds import enumerated_acceptance, interpolate, kappa, without_impossible, z_bounds

ZWeight = Literal["none", "context", "batch"]


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
    accept = batch.trainable if batch.plain else batch.on.view(np.uint8)
    return Decision(-1, accept, log_q, log_q, proposed, proposed, 0, None, denominator)


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
    n = batch.tokens
    accept = np.zeros(n, np.uint8)
    log_m, log_p = np.zeros(n, np.float32), np.zeros(n, np.float32)
    accept[on] = thinning.accept
    log_m[on] = np.where(thinning.accept, thinning.log_m, np.float32(0))
    log_p[on] = np.where(thinning.accept, scores, np.float32(0))
    denominator = loss_denominator(batch, batch.counted_tokens)
    return Decision(version, accept, log_m, log_p, len(on), int(thinning.accept.sum()), unscorable, None, denominator)
