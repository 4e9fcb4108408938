"""What a mixture-of-experts adds to the loss for its routers."""

from torch import Tensor


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
