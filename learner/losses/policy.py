"""The policy loss: one weight from what was sampled to the anchor, one ratio from there to the policy.

::

    loss = sum_t W_t ( - M_t f_t w_t gain(rho_t, A_t)  +  kl terms  -  entropy )

    q --OBRS, importance weight--> anchor --ratio family--> pi
        w = anchor / m                rho = pi / anchor          (algorithms.md 9: one correction a gap)

Gradients are written down, not recorded: a loss costs a few passes over ``[n]`` floats.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from common.objective import LossSection
from common.wire import EXPERT
from learner.logprobs import Share
from learner.losses import families
from learner.losses.corrections import icepop
from learner.losses.families import Terms
from learner.losses.tokens import MAX_LOG_RATIO, LossStats, Tokens, exp_ratio

CACHED = 1 << 15  # tokens whose every intermediate result stays in a CPU's cache


@torch.no_grad()
def policy_loss(log_p: Tensor, entropy: Tensor, tokens: Tokens, section: LossSection) -> tuple[Share, LossStats]:
    """The loss of ``tokens`` under ``log_p[n]`` and ``entropy[n]`` of the trained policy, its slopes and its sums.

    An accepted token whose densities are not finite is a fault of the data: it is left out and
    counted (algorithms.md 0.4). The anchor ``proximal`` is the policy before this update, that is
    the present one, detached: a batch is one update (docs/decisions/0007).
    """
    if log_p.is_cuda or len(log_p) <= CACHED:
        return _policy_loss(log_p, entropy, tokens, section)
    shares, stats = [], []
    for start in range(0, len(log_p), CACHED):
        part = slice(start, start + CACHED)
        share, its = _policy_loss(log_p[part], entropy[part], tokens[part], section)
        shares.append(share)
        stats.append(its)
    of_entropy = [share.entropy_slope for share in shares if share.entropy_slope is not None]
    whole = Share(
        torch.stack([share.loss for share in shares]).sum(),
        torch.cat([share.slope for share in shares]),
        torch.cat(of_entropy) if of_entropy else None,
    )
    return whole, LossStats(*(torch.stack(one).sum() for one in zip(*(vars(s).values() for s in stats), strict=True)))


def _policy_loss(log_p: Tensor, entropy: Tensor, tokens: Tokens, section: LossSection) -> tuple[Share, LossStats]:
    about = _Densities.of(log_p, tokens, section)
    own, log_q, mask = about.own, about.log_q, about.mask
    advantages = _advantages(own, tokens, section)
    weight = _weight(about, section)
    ratio = torch.ones_like(own) if about.anchor is own else exp_ratio(own - about.anchor)
    gain, slope, stopped = _family(about, ratio, advantages, tokens, section)
    factor = tokens.factor
    if section.correction == "icepop":
        near = icepop(about.anchor - log_q, section.correction_low, section.correction_high).to(own.dtype)
        factor = near if factor is None else factor * near
    stats = _stats(about, weight, ratio, stopped, factor, advantages)
    weight *= mask
    weight *= tokens.weights
    used = weight if factor is None else weight * factor
    loss, slope = -torch.dot(used, gain), (slope * used).neg_()
    loss = loss + _penalties(about, tokens, section, weight, slope, stats)
    loss = loss + _exemplars(log_p, tokens, section, slope, stats)
    entropy_slope = None
    if section.entropy > 0:
        share = torch.where(tokens.accept == EXPERT, 0.0, tokens.weights) * section.entropy
        loss, entropy_slope = loss - torch.dot(share, entropy), -share
    return Share(loss, slope, entropy_slope), stats


@dataclass
class _Densities:
    """Log-densities of every token, numbers also where nothing is to be looked at."""

    on: Tensor  # [n] bool: accepted, and its densities are finite
    mask: Tensor  # [n] the same as 0 and 1
    faulty: Tensor  # [] accepted ones that are not
    own: Tensor  # trained policy
    log_q: Tensor
    log_m: Tensor
    anchor: Tensor

    @classmethod
    def of(cls, log_p: Tensor, tokens: Tokens, section: LossSection) -> "_Densities":
        on = tokens.accept == 1
        given = [log_p, tokens.log_q, tokens.log_m]
        if section.anchor == "broker":
            given.append(tokens.log_p_v)
        faulty = torch.zeros((), device=log_p.device)
        if log_p.is_cuda or not math.isfinite(sum(float(x.sum()) for x in given)):  # a look costs less than a repair
            accepted, total = on, given[1] + given[2]
            on = on & (total if len(given) == 3 else total + given[3]).isfinite()
            faulty = (accepted.sum() - on.sum()).to(log_p.dtype)
            given = [torch.where(on, x, 0.0) for x in given]
        own, log_q, log_m = given[:3]
        anchor = {"behaviour": log_q, "broker": given[-1], "proximal": own, "none": own}[section.anchor]
        return cls(on, on.to(log_p.dtype), faulty, own, log_q, log_m, anchor)


def _advantages(own: Tensor, tokens: Tokens, section: LossSection) -> Tensor:
    """``A``, with the teacher's word on each token (algorithms.md 3.6) and the k1 penalty in it."""
    advantages = tokens.advantages
    if section.distill > 0 and tokens.log_teacher is not None:
        gap = (tokens.log_teacher - own).clamp_(-section.distill_clip, section.distill_clip).nan_to_num_(0.0)
        advantages = torch.add(advantages, gap, alpha=section.distill)
    if section.kl > 0 and section.kl_estimator == "k1" and tokens.log_reference is not None:
        advantages = torch.add(advantages, _away(own, tokens.log_reference), alpha=section.kl)
    return advantages


def _away(own: Tensor, log_reference: Tensor) -> Tensor:
    """``log reference - log policy``; 0 where the reference could not say, cut where it calls a token impossible."""
    return (log_reference - own).clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO).nan_to_num_(0.0)


def _weight(about: _Densities, section: LossSection) -> Tensor:
    """``[n]`` from inclusion density to anchor, capped: ``min(anchor / m, C)``; no gradient.

    - ``target=policy`` is Jackpot's: ``min(pi / m, c1) min(anchor / pi, c2)`` (2602.06107, algorithm 1);
    - ``uncorrected``: 1, as if the anchor had sampled everything, for comparison;
    - ``cap_sequence``: the sequence's factor stands for the anchor, so the weight undoes rejection alone.
    """
    if section.correction == "uncorrected":
        return torch.ones_like(about.own)
    target = about.anchor
    if section.target == "policy":
        target = about.own
    elif section.correction == "cap_sequence":
        target = about.log_q
    weight = exp_ratio(target - about.log_m)
    if section.weight_cap is not None:
        weight.clamp_(max=section.weight_cap)
    if section.target == "policy" and about.anchor is not about.own:
        to_anchor = exp_ratio(about.anchor - about.own)
        weight *= to_anchor if section.anchor_cap is None else to_anchor.clamp_(max=section.anchor_cap)
    return weight


def _family(about: _Densities, ratio: Tensor, advantages: Tensor, tokens: Tokens, section: LossSection) -> Terms:
    low, high = section.clip_low, section.clip_high
    if section.anchor == "none":
        return families.reinforce(about.own, advantages)
    match section.kind:
        case "cispo":
            cap = 1 + high if section.ratio_cap is None else section.ratio_cap
            return families.cispo(ratio, about.own, advantages, low, cap)
        case "gspo":
            assert tokens.sequence_ratio is not None, "learner.losses.corrections.by_sequence comes first"
            return families.gspo(tokens.sequence_ratio, advantages, low, high)
        case "double_sided":
            return families.double_sided(ratio, advantages, low, high)
        case "m2po":
            return families.unclipped(ratio, advantages)
        case "dppo_tv":
            return families.dppo_tv(ratio, about.own, about.log_q, advantages, section.tv_threshold)
        case _:
            return families.ppo(ratio, advantages, low, high)


def _stats(
    about: _Densities,
    weight: Tensor,
    ratio: Tensor,
    stopped: Tensor | None,
    factor: Tensor | None,
    advantages: Tensor,
) -> LossStats:
    mask, zero = about.mask, torch.zeros((), device=about.mask.device)
    count, full = mask.sum(), (weight * ratio).mul_(mask)
    to_policy = about.own - about.log_q
    if about.anchor is about.log_q:
        raised = torch.dot(ratio, mask)  # sum of exp(to_policy)
    else:
        raised = torch.dot(to_policy.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp_(), mask)
    clipped = positive = negative = zero
    if stopped is not None:
        clipped = (stopped & about.on).sum().to(mask.dtype)
    if factor is not None:
        stopped = factor == 0 if stopped is None else stopped | (factor == 0)
    if stopped is not None:
        stopped = stopped & about.on
        positive = (stopped & (advantages > 0)).sum().to(mask.dtype)
        negative = stopped.sum().to(mask.dtype) - positive
    return LossStats(
        accepted=count,
        faulty=about.faulty,
        clipped=clipped,
        ratio=torch.dot(mask, ratio),
        weight=full.sum(),
        weight_squared=torch.dot(full, full),
        kl=raised - count - torch.dot(to_policy, mask),
        masked_positive=positive,
        masked_negative=negative,
        kl_reference=zero,
        teacher=zero,
        taught=zero,
        exemplars=zero,
    )


def _penalties(
    about: _Densities, tokens: Tokens, section: LossSection, weight: Tensor, slope: Tensor, stats: LossStats
) -> Tensor:
    """Divergence from the reference (k2, k3) and from the behaviour; ``slope`` is added to in place.

    ``weight[n]`` undoes the rejection, so that the penalties are means under the anchor.
    """
    own = about.own
    loss = torch.zeros((), device=own.device)
    if tokens.log_teacher is not None:
        gap = tokens.log_teacher - own
        taught = (gap.isfinite() & about.on).to(own.dtype)
        stats.teacher, stats.taught = torch.dot(taught, gap.nan_to_num_(0.0, 0.0, 0.0)), taught.sum()
    if tokens.log_reference is not None:
        away = _away(own, tokens.log_reference)
        raised = torch.expm1(away)
        terms = raised - away  # k3
        stats.kl_reference = torch.dot(terms, about.mask)
        if section.kl > 0 and section.kl_estimator != "k1":
            if section.kl_estimator == "k2":
                terms, change = 0.5 * away.square(), -away
            else:
                change = raised.neg_()
            loss = loss + section.kl * torch.dot(weight, terms)
            slope.addcmul_(weight, change, value=section.kl)
    if section.ratio_penalty > 0:
        moved = own - about.log_q
        loss = loss + section.ratio_penalty * torch.dot(weight, moved.square())
        slope.addcmul_(weight, moved, value=2 * section.ratio_penalty)
    return loss


def _exemplars(log_p: Tensor, tokens: Tokens, section: LossSection, slope: Tensor, stats: LossStats) -> Tensor:
    """Their share of the loss; ``slope`` is set in place."""
    theirs = tokens.accept == EXPERT
    if not log_p.is_cuda and not theirs.any():  # there a look costs more than it saves
        return torch.zeros((), device=log_p.device)
    gain, change = families.exemplar(log_p, tokens.advantages, section.exemplar_shape)
    slope.copy_(torch.where(theirs, -tokens.weights * change, slope))
    stats.exemplars = theirs.sum().to(log_p.dtype)
    return -torch.dot(tokens.weights, torch.where(theirs, gain, 0.0))
