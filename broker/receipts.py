"""The receipt of a batch: what it was, how old, what rejection took from it and what that bought."""

from typing import Any

import numpy as np

from broker.advantages import without_signal
from broker.audit import audit
from broker.batch import Batch
from broker.decision import Decision
from common.obrs import wilson_interval


def receipt(batch: Batch, decision: Decision, threshold: float) -> dict[str, Any]:
    """One JSON object; rates are None with rejection off. Lags are in policy versions, per token."""
    lags = batch.lags
    lengths = batch.lengths[batch.sampled]
    sizes = batch.sizes
    scored = decision.divergence is not None
    own = batch.sampled  # the policy's, without exemplars
    rewards, mixed, advantages = batch.rewards[own], batch.mixed.rewards[own], batch.advantages[own]
    low, high = wilson_interval(decision.accepted, decision.proposed)
    line: dict[str, Any] = {
        "step": batch.step,
        "trajectories": len(batch.groups),
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "reward_channels": batch.channel_means(),
        "reward_mixed": float(mixed.mean()),
        "reward_mixed_std": float(mixed.std()),
        "channels_missing": batch.mixed.missing,
        "channels_gated": batch.mixed.shut,
        "exemplars": len(own) - len(rewards),
        "groups_padded": int((sizes < batch.group_size).sum()),
        "groups_without_signal": int(without_signal(batch.mixed.rewards, sizes).sum()),
        "advantage_positive": float((advantages > 0).mean()),
        "advantage_negative": float((advantages < 0).mean()),
        "lag_mean": float(lags @ np.arange(len(lags)) / lags.sum()),
        "lag_max": len(lags) - 1,
        "lag_histogram": {str(k): int(v) for k, v in enumerate(lags) if v},
        "length_mean": float(lengths.mean()),
        "length_max": int(lengths.max()),
        "truncated": float(batch.truncated[own].mean()),
        "tokens": batch.tokens,
        "tokens_proposed": decision.proposed,
        "tokens_accepted": decision.accepted,
        "scored_by_version": decision.version if scored else None,
        "threshold": threshold if scored else None,
        "acceptance": decision.accepted / decision.proposed if decision.proposed else None,
        "acceptance_low": low,
        "acceptance_high": high,
        "unscorable": decision.unscorable,
    }
    estimates = decision.divergence
    line["acceptance_expected"] = estimates.expected_acceptance if estimates else None
    line["kl_before"] = estimates.kl_before if estimates else None
    line["kl_after"] = estimates.kl_after if estimates else None
    line["kl_before_se"] = estimates.kl_before_se if estimates else None
    line["kl_after_se"] = estimates.kl_after_se if estimates else None
    line["ess"] = estimates.ess if estimates else None
    line["audit"] = audit(batch, decision) if scored else None
    line["tasks"] = _by_task(batch) if len(batch.labels) > 1 else None
    line["denominator"] = decision.denominator
    for name in ("z_lower", "z_upper", "z_theta", "z_kappa", "acceptance_enumerated", "topk_missing_mass"):
        line[name] = decision.z.get(name)
    return line


def _by_task(batch: Batch) -> dict[str, dict[str, float]]:
    """``label -> figures`` of each task of a mixture that the batch has trajectories of."""
    lengths, sizes = batch.lengths, batch.sizes
    silent = np.repeat(without_signal(batch.mixed.rewards, sizes), sizes)
    found = {}
    for number, label in enumerate(batch.labels):
        of = batch.tasks == number
        own = of & batch.sampled
        if own.any():
            found[label] = {
                "trajectories": int(of.sum()),
                "groups": len(np.unique(batch.groups[of])),
                "groups_without_signal": len(np.unique(batch.groups[of & silent])),
                "reward": float(batch.rewards[own].mean()),
                "reward_std": float(batch.rewards[own].std()),
                "length_mean": float(lengths[own].mean()),
                "truncated": float(batch.truncated[own].mean()),
            }
    return found
