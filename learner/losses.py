"""Losses, pure. They know nothing of rejection beyond a mask and a density (algorithms.md 1.4)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.objective import Anchor

MAX_LOG_RATIO = 20.0  # clamp before exp (algorithms.md 0.4)


@dataclass
class LossStats:
    """Sums over this rank's accepted tokens, so that ranks add up exactly."""

    accepted: Tensor
    faulty: Tensor  # accepted tokens that were left out: a density was not finite
    clipped: Tensor  # tokens whose gradient the clip took away
    ratio: Tensor  # of the trained policy to the anchor
    weight: Tensor  # trained policy over inclusion density, what a token really counts for
    weight_squared: Tensor
    kl: Tensor  # k3 estimate of KL(behaviour || trained policy)


def policy_loss(
    logp: Tensor,
    log_q: Tensor,
    log_m: Tensor,
    log_p_v: Tensor,
    log_prox: Tensor | None,
    advantages: Tensor,
    accept: Tensor,
    weights: Tensor,
    *,
    anchor: Anchor,
    clip_low: float,
    clip_high: float,
    weight_cap: float | None,
) -> tuple[Tensor, LossStats]:
    """Clipped policy gradient on accepted tokens, all arguments ``[N]``.

    ``-sum_t W M sg[min(pi_anchor/m, C)] min(rho A, clip(rho, 1-low, 1+high) A)`` with
    ``rho = pi_theta / pi_anchor``. The anchor is the behaviour policy (``log_q``), the broker's
    scoring version (``log_p_v``) or the policy before this update (``log_prox``; None means the
    present one, detached). ``weights`` W hold the denominator, which the broker counts over the whole
    batch before rejection. Values of rejected tokens are never looked at; an accepted token whose
    densities are not finite is a fault of the data: it is left out and counted (algorithms.md 0.4).
    """
    accepted = accept > 0
    reference = {"behaviour": log_q, "broker": log_p_v, "proximal": logp.detach() if log_prox is None else log_prox}
    on = accepted & log_q.isfinite() & log_m.isfinite() & (log_p_v.isfinite() | (anchor != "broker"))
    zero = torch.zeros_like(logp)
    log_anchor = torch.where(on, reference[anchor], zero)
    log_m = torch.where(on, log_m, zero)
    kept = torch.where(on, logp, zero)
    weight = (log_anchor - log_m).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if weight_cap is not None:
        weight = weight.clamp_max(weight_cap)
    ratio = (kept - log_anchor).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    gain = ratio * advantages
    clipped_gain = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    per_token = torch.where(on, -weight * torch.minimum(gain, clipped_gain), zero)
    loss = (per_token * weights).sum()
    with torch.no_grad():
        mask = on.float()
        full = weight * ratio * mask
        log_ratio_q = torch.where(on, kept - torch.where(on, log_q, zero), zero)
        stats = LossStats(
            accepted=mask.sum(),
            faulty=(accepted & ~on).float().sum(),
            clipped=((clipped_gain < gain) & on).float().sum(),
            ratio=(ratio * mask).sum(),
            weight=full.sum(),
            weight_squared=full.square().sum(),
            kl=((log_ratio_q.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() - 1 - log_ratio_q) * mask).sum(),
        )
    return loss, stats


def balance_loss(prob_sums: Tensor, tokens: int, expert_fraction: Tensor) -> Tensor:
    """Load balancing: ``E * mean over layers of sum_e f_e P_e`` (Switch Transformer, eq. 4).

    ``prob_sums[L, E]`` are router probabilities summed over this rank's tokens, with gradient, and
    ``tokens`` counts the whole batch's, so the ranks' values add up. ``expert_fraction[L, E]``, each
    expert's share of the assignments (sums to 1), comes from the previous step: it is a constant
    either way, and so the loss does not depend on how a batch is cut into ranks and micro-batches.
    With f of the same batch, times k, this is transformers' ``load_balancing_loss_func`` of one layer.
    """
    if prob_sums.numel() == 0:
        return prob_sums.sum()
    experts = prob_sums.shape[1]
    return experts * (expert_fraction * prob_sums / tokens).sum(dim=1).mean()


def router_z_loss(z_sums: Tensor, tokens: int) -> Tensor:
    """``mean over layers and tokens of logsumexp(router logits)^2`` (ST-MoE, 2202.08906, eq. 5).

    ``z_sums[L]`` are this rank's sums over tokens, ``tokens`` counts the whole batch's.
    """
    return z_sums.sum() if z_sums.numel() == 0 else (z_sums / tokens).mean()
