"""The ratio families: what a token gains, and how its gain changes with its log-probability.

Each function returns ``(gain [n], slope [n], stopped [n] or None)`` for ratio ``rho = pi / anchor`` and
advantage ``A``; ``stopped`` are the tokens whose gradient it takes away, ``slope = d gain / d log pi``
with every stop-gradient of its formula already in it, so that the loss is ``-sum W w gain`` and its
gradient ``-W w slope`` (W the denominator, w the weight from the inclusion density to the anchor). A
weight that stands under a stop-gradient is a slope alone.
"""

import torch
from torch import Tensor

Terms = tuple[Tensor, Tensor, Tensor | None]


def ppo(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """``min(rho A, clip(rho, 1 - low, 1 + high) A)``; bounds apart are DAPO's (2503.14476)."""
    gain = ratio * advantages
    clipped = ratio.clamp(1 - low, 1 + high).mul_(advantages)
    stopped = clipped < gain
    return torch.minimum(gain, clipped, out=clipped), gain.masked_fill_(stopped, 0.0), stopped


def reinforce(log_p: Tensor, advantages: Tensor) -> Terms:
    """``A log pi``, for a weight that goes all the way to the trained policy (PipelineRL; bypass of verl)."""
    return advantages * log_p, advantages, None


def cispo(ratio: Tensor, log_p: Tensor, advantages: Tensor, low: float, cap: float) -> Terms:
    """``sg[clip(rho, 1 - low, cap)] A log pi`` (MiniMax-M1, 2506.13585); ``cap`` is absolute.

    TRL and ScaleRL name the cap itself (eps_max = 5), verl and slime what is above 1 (eps_high = 4).
    """
    slope = ratio.clamp(1 - low, cap).mul_(advantages)
    return slope * log_p, slope, None


def gspo(sequence_ratio: Tensor, advantages: Tensor, low: float, high: float) -> Terms:
    """``min(s A, clip(s) A)``, one decision for a sequence: GSPO-token (2507.18071, eq. 14), value and gradient.

    ``s = exp(mean over the sequence of log rho)``; its gradient by a token is ``s / T``, and 1/T is in the weight.
    """
    return ppo(sequence_ratio, advantages, low, high)


def double_sided(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Terms:
    """``f(r) A``, ``f(r) = r`` where ``1 - low < r < 1 + high`` (open), else 0 (GLM-5, 2602.15763, section 4.1).

    The report's ``sg[f(r)] A log pi`` has the same gradient, ``r A`` inside.
    """
    stopped = (ratio <= 1 - low) | (ratio >= 1 + high)
    slope = (ratio * advantages).masked_fill_(stopped, 0.0)
    return slope, slope, stopped


def unclipped(ratio: Tensor, advantages: Tensor) -> Terms:
    """``rho A``: what M2PO's mask leaves (2510.01161)."""
    gain = ratio * advantages
    return gain, gain, None


def dppo_tv(ratio: Tensor, log_p: Tensor, log_q: Tensor, advantages: Tensor, threshold: float) -> Terms:
    """``rho A`` unless the probability moved by more than ``threshold`` the way A pushes it (prime-rl)."""
    moved = log_p.exp().sub_(log_q.exp()).mul_(advantages.sign())
    stopped = moved > threshold
    slope = (ratio * advantages).masked_fill_(stopped, 0.0)
    return slope, slope, stopped


def exemplar(log_p: Tensor, advantages: Tensor, shape: float) -> tuple[Tensor, Tensor]:
    """``A pi / (pi + shape)``: tokens that nobody sampled have no ratio (LUFFY, 2504.14945, eq. 6)."""
    p = log_p.exp()
    shaped = p / (p + shape)
    return shaped * advantages, shaped * (shape / (p + shape)) * advantages
