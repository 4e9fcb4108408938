"""The policy loss: one weight from what was sampled to the anchor, one ratio from there to the policy.

::

    loss = sum_t W_t ( - M_t f_t w_t gain(rho_t, A_t)  +  kl terms  -  entropy )

    q --OBRS, importance weight--> anchor --ratio family--> pi
        w = anchor / m                rho = pi / anchor          (algorithms.md 9: one correction a gap)

Gradients are written down, not recorded: a loss costs a few passes over ``[n]`` floats.
"""

import torch
from torch import Tensor

from common.objective import LossSection
from common.wire import EXPERT
from learner.logprobs import Share
from learner.losses import families
from learner.losses.corrections import icepop
from learner.losses.families import Terms
from learner.losses.tokens import MAX_LOG_RATIO, LossStats, Tokens, exp_ratio, k3


@torch.no_grad()
def policy_loss(log_p: Tensor, entropy: Tensor, tokens: Tokens, section: LossSection) -> tuple[Share, LossStats]:
    """The loss of ``tokens`` under ``log_p[n]`` and ``entropy[n]`` of the trained policy, its slopes and its sums.

    An accepted token whose densities are not finite is a fault of the data: it is left out and
    counted (algorithms.md 0.4). The anchor ``proximal`` is the policy before this update, that is
    the present one, detached: a batch is one update (docs/decisions/0007).
    """
    accepted = tokens.accept == 1
    on = accepted & (tokens.log_q + tokens.log_m).isfinite()
    if section.anchor == "broker":
        on &= tokens.log_p_v.isfinite()
    log_q, log_m = torch.where(on, tokens.log_q, 0.0), torch.where(on, tokens.log_m, 0.0)
    own = torch.where(on, log_p, 0.0)
    anchor = own
    if section.anchor == "behaviour":
        anchor = log_q
    elif section.anchor == "broker":
        anchor = torch.where(on, tokens.log_p_v, 0.0)
    advantages = _advantages(own, tokens, section, on)
    weight = _weight(own, log_q, log_m, anchor, section)
    log_ratio = own - anchor
    ratio = torch.ones_like(own) if anchor is own else exp_ratio(log_ratio.clone())
    gain, slope = _family(own, log_q, ratio, log_ratio, advantages, tokens, section)
    used = weight * on
    if section.correction == "icepop":
        used *= icepop(anchor - log_q, section.correction_low, section.correction_high)
    if tokens.factor is not None:
        used *= tokens.factor
    stats = _stats(own, log_q, weight, ratio, slope, used, advantages, accepted, on)
    used *= tokens.weights
    loss, slope = -torch.dot(used, gain), -slope * used
    weight *= on
    weight *= tokens.weights
    loss = loss + _penalties(own, log_q, tokens, section, weight, slope, stats, on)
    loss = loss + _exemplars(log_p, tokens, section, slope, stats)
    entropy_slope = None
    if section.entropy > 0:
        share = torch.where(tokens.accept == EXPERT, 0.0, tokens.weights) * section.entropy
        loss, entropy_slope = loss - torch.dot(share, entropy), -share
    return Share(loss, slope, entropy_slope), stats


def _advantages(own: Tensor, tokens: Tokens, section: LossSection, on: Tensor) -> Tensor:
    """``A``, with the teacher's word on each token (algorithms.md 3.6) and the k1 penalty in it."""
    advantages = tokens.advantages
    if section.distill > 0 and tokens.log_teacher is not None:
        gap = (tokens.log_teacher - own).clamp(-section.distill_clip, section.distill_clip)
        advantages = advantages + section.distill * torch.where(on & ~gap.isnan(), gap, 0.0)
    if section.kl > 0 and section.kl_estimator == "k1" and tokens.log_reference is not None:
        advantages = advantages + section.kl * _away(own, tokens.log_reference, on)
    return advantages


def _away(own: Tensor, log_reference: Tensor, on: Tensor) -> Tensor:
    """``log reference - log policy``; 0 where the reference could not say, cut where it calls a token impossible."""
    away = torch.where(on & ~log_reference.isnan(), log_reference - own, 0.0)
    return away.clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _weight(own: Tensor, log_q: Tensor, log_m: Tensor, anchor: Tensor, section: LossSection) -> Tensor:
    """``[n]`` from inclusion density to anchor, capped: ``min(anchor / m, C)``; no gradient.

    - ``target=policy`` is Jackpot's: ``min(pi / m, c1) min(anchor / pi, c2)`` (2602.06107, algorithm 1);
    - ``uncorrected``: 1, as if the anchor had sampled everything, for comparison;
    - ``cap_sequence``: the sequence's factor stands for the anchor, so the weight undoes rejection alone.
    """
    if section.correction == "uncorrected":
        return torch.ones_like(own)
    target = anchor
    if section.target == "policy":
        target = own
    elif section.correction == "cap_sequence":
        target = log_q
    weight = exp_ratio(target - log_m)
    if section.weight_cap is not None:
        weight.clamp_(max=section.weight_cap)
    if section.target == "policy":
        to_anchor = exp_ratio(anchor - own)
        weight *= to_anchor if section.anchor_cap is None else to_anchor.clamp_(max=section.anchor_cap)
    return weight


def _family(
    own: Tensor,
    log_q: Tensor,
    ratio: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    tokens: Tokens,
    section: LossSection,
) -> Terms:
    low, high = section.clip_low, section.clip_high
    if section.anchor == "none":
        return families.reinforce(own, advantages)
    match section.kind:
        case "cispo":
            cap = 1 + high if section.ratio_cap is None else section.ratio_cap
            return families.cispo(ratio, own, advantages, low, cap)
        case "gspo":
            assert tokens.sequence_ratio is not None, "learner.losses.corrections.by_sequence comes first"
            return families.gspo(tokens.sequence_ratio, advantages, low, high)
        case "double_sided":
            return families.double_sided(ratio, log_ratio, advantages, low, high)
        case "m2po":
            return families.unclipped(ratio, advantages)
        case "dppo_tv":
            return families.dppo_tv(ratio, own, log_q, advantages, section.tv_threshold)
        case _:
            return families.ppo(ratio, advantages, low, high)


def _stats(
    own: Tensor,
    log_q: Tensor,
    weight: Tensor,
    ratio: Tensor,
    slope: Tensor,
    used: Tensor,
    advantages: Tensor,
    accepted: Tensor,
    on: Tensor,
) -> LossStats:
    mask = on.to(own.dtype)
    full = weight * ratio
    full *= mask
    silent = (slope == 0) & (advantages != 0) & on
    masked = (used == 0) & on
    zero = torch.zeros((), device=own.device)
    count = mask.sum()
    return LossStats(
        accepted=count,
        faulty=accepted.sum() - count,
        clipped=(silent & ~masked).sum().to(own.dtype),
        ratio=torch.dot(mask, ratio),
        weight=full.sum(),
        weight_squared=torch.dot(full, full),
        kl=torch.dot(k3(own - log_q), mask),
        masked_positive=(masked & (advantages > 0)).sum().to(own.dtype),
        masked_negative=(masked & (advantages < 0)).sum().to(own.dtype),
        kl_reference=zero,
        teacher=zero,
        taught=zero,
        exemplars=zero,
    )


def _penalties(
    own: Tensor,
    log_q: Tensor,
    tokens: Tokens,
    section: LossSection,
    weight: Tensor,
    slope: Tensor,
    stats: LossStats,
    on: Tensor,
) -> Tensor:
    """Divergence from the reference (k2, k3) and from the behaviour; ``slope`` is added to in place.

    ``weight[n]`` undoes the rejection, so that the penalties are means under the anchor.
    """
    loss = torch.zeros((), device=own.device)
    if tokens.log_teacher is not None:
        gap = tokens.log_teacher - own
        taught = on & gap.isfinite()
        stats.teacher, stats.taught = torch.where(taught, gap, 0.0).sum(), taught.sum().to(own.dtype)
    if tokens.log_reference is not None:
        away = _away(own, tokens.log_reference, on)
        terms = k3(away)
        stats.kl_reference = terms.sum()
        if section.kl > 0 and section.kl_estimator != "k1":
            if section.kl_estimator == "k2":
                terms, change = 0.5 * away.square(), -away
            else:
                change = -torch.expm1(away)
            loss = loss + section.kl * torch.dot(weight, terms)
            slope += section.kl * weight * change
    if section.ratio_penalty > 0:
        moved = own - log_q
        loss = loss + section.ratio_penalty * torch.dot(weight, moved.square())
        slope += 2 * section.ratio_penalty * weight * moved
    return loss


def _exemplars(log_p: Tensor, tokens: Tokens, section: LossSection, slope: Tensor, stats: LossStats) -> Tensor:
    """Their share of the loss; ``slope`` is set in place."""
    at = torch.nonzero(tokens.accept == EXPERT).squeeze(1)
    if not len(at):
        return torch.zeros((), device=log_p.device)
    gain, change = families.exemplar(log_p[at], tokens.advantages[at], section.exemplar_shape)
    slope[at] = -tokens.weights[at] * change
    stats.exemplars = torch.tensor(float(len(at)), device=log_p.device)
    return -torch.dot(tokens.weights[at], gain)
