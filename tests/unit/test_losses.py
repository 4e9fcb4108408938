"""The loss of algorithms.md 1.4 against a loop over tokens that follows the page."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.losses import balance_loss, policy_loss

ANCHORS = ("behaviour", "broker", "proximal")


def batch(seed, n=24, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    log_q = -torch.rand(n, generator=g) * 3
    log_p_v = (log_q + spread * torch.randn(n, generator=g)).clamp_max(0)
    logp = (log_p_v + 0.3 * spread * torch.randn(n, generator=g)).clamp_max(0)
    log_m = torch.minimum(log_q, log_p_v - 0.1)
    accept = (torch.rand(n, generator=g) < 0.7).to(torch.uint8)
    return logp, log_q, log_m, log_p_v, torch.randn(n, generator=g), accept


def naive(logp, log_q, log_m, log_p_v, log_prox, advantages, accept, denominator, anchor, low, high, cap):
    total, gradient = 0.0, []
    for t in range(len(logp)):
        if not accept[t]:
            gradient.append(0.0)
            continue
        reference = {"behaviour": log_q, "broker": log_p_v, "proximal": log_prox}[anchor][t].item()
        weight = math.exp(reference - log_m[t].item())
        if cap is not None:
            weight = min(weight, cap)
        rho, a = math.exp(logp[t].item() - reference), advantages[t].item()
        clipped = min(max(rho, 1 - low), 1 + high)
        total -= weight * min(rho * a, clipped * a) / denominator
        acts = clipped * a < rho * a
        gradient.append(0.0 if acts else -weight * rho * a / denominator)
    return total, gradient


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from(ANCHORS),
    st.floats(0.0, 0.5),
    st.floats(0.0, 0.8),
    st.sampled_from([None, 1.0, 1.5]),
    st.floats(0.0, 2.0),
)
def test_loss_and_gradient_are_those_of_a_loop(seed, anchor, low, high, cap, spread):
    logp, log_q, log_m, log_p_v, advantages, accept = batch(seed, spread=spread)
    log_prox = (logp + 0.2 * torch.randn(len(logp), generator=torch.Generator().manual_seed(seed + 1))).clamp_max(0)
    leaf = logp.clone().requires_grad_()
    loss, stats = policy_loss(
        leaf, log_q, log_m, log_p_v, log_prox, advantages, accept, torch.full((24,), 1 / 31),
        anchor=anchor, clip_low=low, clip_high=high, weight_cap=cap,
    )  # fmt: skip
    loss.backward()
    expected, gradient = naive(
        logp, log_q, log_m, log_p_v, log_prox, advantages, accept, 31, anchor, low, high, cap
    )  # fmt: skip
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    reference = {"behaviour": log_q, "broker": log_p_v, "proximal": log_prox}[anchor]
    rho = (logp - reference).exp()
    at_a_kink = ((rho - (1 - low)).abs() < 1e-4) | ((rho - (1 + high)).abs() < 1e-4)  # either side is right there
    for ours, theirs, kink in zip(leaf.grad.tolist(), gradient, at_a_kink.tolist(), strict=True):
        assert kink or ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    assert stats.accepted.item() == accept.sum().item()


def test_values_of_rejected_tokens_are_never_looked_at():
    logp, log_q, log_m, log_p_v, advantages, accept = batch(3)
    hole = accept == 0
    results = []
    for poison in (None, float("nan"), float("inf"), -float("inf")):
        fields = [x.clone() for x in (logp, log_q, log_m, log_p_v)]
        if poison is not None:
            for field in fields[1:]:
                field[hole] = poison
        leaf = fields[0].requires_grad_()
        loss, _ = policy_loss(
            leaf, *fields[1:], None, advantages, accept, torch.full((24,), 1 / 24),
            anchor="behaviour", clip_low=0.2, clip_high=0.2, weight_cap=None,
        )  # fmt: skip
        loss.backward()
        results.append((loss.item(), leaf.grad.tolist()))
    assert all(r == results[0] for r in results)


def test_everything_rejected_is_a_loss_of_zero_with_gradient_zero():
    logp, log_q, log_m, log_p_v, advantages, accept = batch(4)
    leaf = logp.clone().requires_grad_()
    loss, stats = policy_loss(
        leaf, log_q, log_m, log_p_v, None, advantages, torch.zeros_like(accept), torch.full((24,), 1 / 24),
        anchor="broker", clip_low=0.2, clip_high=0.2, weight_cap=None,
    )  # fmt: skip
    loss.backward()
    assert loss.item() == 0
    assert not leaf.grad.any()
    assert stats.accepted.item() == stats.weight.item() == 0


def test_on_policy_the_gradient_is_the_policy_gradient():
    logp, *_, advantages, _ = batch(5)
    leaf = logp.clone().requires_grad_()
    loss, _ = policy_loss(
        leaf, logp, logp, logp, None, advantages, torch.ones(24, dtype=torch.uint8), torch.full((24,), 1 / 24),
        anchor="behaviour", clip_low=0.2, clip_high=0.2, weight_cap=None,
    )  # fmt: skip
    loss.backward()
    assert torch.allclose(leaf.grad, -advantages / 24, atol=1e-6)


def test_a_proximal_anchor_at_the_present_policy_never_clips():
    logp, log_q, log_m, log_p_v, advantages, accept = batch(6, spread=2.0)
    _, stats = policy_loss(
        logp, log_q, log_m, log_p_v, None, advantages, accept, torch.full((24,), 1 / 24),
        anchor="proximal", clip_low=0.1, clip_high=0.1, weight_cap=None,
    )  # fmt: skip
    assert stats.clipped.item() == 0
    _, stats = policy_loss(
        logp, log_q, log_m, log_p_v, None, advantages, accept, torch.full((24,), 1 / 24),
        anchor="behaviour", clip_low=0.1, clip_high=0.1, weight_cap=None,
    )  # fmt: skip
    assert stats.clipped.item() > 0


def test_balance_loss_is_that_of_transformers_and_adds_up_over_shards():
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    g = torch.Generator().manual_seed(0)
    experts, k, n = 6, 2, 40
    logits = torch.randn(n, experts, generator=g)
    probs = logits.softmax(1)
    chosen = probs.topk(k, dim=1).indices
    fraction = torch.nn.functional.one_hot(chosen, experts).sum((0, 1)) / (n * k)
    ours = balance_loss(probs.sum(0)[None], n, fraction[None].float())
    theirs = load_balancing_loss_func((logits,), experts, k)
    assert ours.item() * k == pytest.approx(theirs.item(), rel=1e-5)
    parts = [balance_loss(p.sum(0)[None], n, fraction[None].float()).item() for p in probs.split([13, 0, 27])]
    assert sum(parts) == pytest.approx(ours.item(), rel=1e-5)
    assert balance_loss(torch.zeros(0, 0), n, torch.zeros(0, 0)).item() == 0  # a dense model
