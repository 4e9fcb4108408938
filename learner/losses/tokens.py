"""What a policy loss is given about each token, and what it counts."""

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from common.wire import EXPERT

MAX_LOG_RATIO = 20.0  # clamp before exp; masks look at what is not clamped (algorithms.md 0.4)


@dataclass
class Tokens:
    """Scored tokens, per-token tensors ``[n]``; values of rejected tokens are never looked at."""

    log_q: Tensor  # behaviour policy
    log_m: Tensor  # inclusion density
    log_p_v: Tensor  # the broker's scoring version
    advantages: Tensor
    weights: Tensor  # of a token's loss; they hold the denominator
    accept: Tensor  # u8: 1 sampled and accepted, 0 rejected, EXPERT an exemplar's
    log_reference: Tensor | None = None  # NaN where it could not say
    log_teacher: Tensor | None = None  # NaN where there is none
    factor: Tensor | None = None  # fixed before the loss: masks and caps by sequence and by batch
    sequence_ratio: Tensor | None = None  # GSPO's s of each token's trajectory

    def __getitem__(self, at: slice | Tensor) -> "Tokens":
        """Some of them."""
        values: Any = {f.name: None if (v := getattr(self, f.name)) is None else v[at] for f in fields(self)}
        return Tokens(**values)

    @property
    def sampled(self) -> Tensor:
        """``[n]`` bool: sampled with a density that is one, accepted or not."""
        return (self.accept != EXPERT) & self.log_q.isfinite()


@dataclass
class LossStats:
    """Sums over this rank's accepted tokens, so that ranks add up exactly."""

    accepted: Tensor
    faulty: Tensor  # accepted tokens that were left out: a density was not finite
    clipped: Tensor  # tokens whose gradient the ratio family took away
    ratio: Tensor  # of the trained policy to the anchor
    weight: Tensor  # trained policy over inclusion density, what a token really counts for
    weight_squared: Tensor
    kl: Tensor  # k3 estimate of KL(behaviour || trained policy)
    masked_positive: Tensor  # tokens with positive advantage that clip or mask took out
    masked_negative: Tensor  # the others that they did
    kl_reference: Tensor  # k3 estimate of KL(trained policy || reference)
    teacher: Tensor  # log teacher - log policy
    taught: Tensor  # tokens with a teacher
    exemplars: Tensor  # tokens of exemplars


def exp_ratio(log_ratio: Tensor) -> Tensor:
    """``exp`` of a clamped log-ratio, in place."""
    return log_ratio.clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp_()
