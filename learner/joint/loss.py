"""The rollout model's own policy loss: PPO on everything that it sampled, no coin asked (algorithms.md 1.12)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from learner.losses.families import ppo
from learner.losses.tokens import exp_ratio


@dataclass
class RolloutStats:
    """Sums over sampled tokens, so that ranks add up exactly."""

    policy: Tensor  # the loss
    sampled: Tensor
    faulty: Tensor  # tokens whose behaviour density is not finite: left out
    clipped: Tensor  # tokens whose gradient the clip took away
    ratio: Tensor


@torch.no_grad()
def rollout_loss(
    logp: Tensor, log_q: Tensor, advantages: Tensor, weights: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, RolloutStats]:
    """``-sum_t W_t min(rho_t A_t, clip(rho_t) A_t)``, rho = present over sampled; its slope in ``logp[n]``, its sums.

    All arguments ``[n]``, tokens that the model sampled. Behaviour is the anchor: its density is
    what the engine reported, so there is one gap and one ratio. ``weights`` W hold the denominator.
    """
    on = log_q.isfinite() & logp.isfinite()
    ratio = exp_ratio(torch.where(on, logp - log_q, 0.0))
    gain, slope, clipped = ppo(ratio, advantages, clip_low, clip_high)
    used = weights * on
    stats = RolloutStats(
        policy=-torch.dot(used, gain),
        sampled=on.sum(),
        faulty=(~on).sum(),
        clipped=(clipped & on).sum(),
        ratio=(ratio * on).sum(),
    )
    return -used * slope, stats
