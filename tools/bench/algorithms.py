"""Every loss at [64, 4096] beside a bare PPO clip on the same arrays; advantages of 100,000 samples.

The reference is what a person writes in a notebook: ratio, clip, minimum, mask, denominator, and
torch's own backward. Ours are the losses of a run, with their weights, masks and counted figures.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from broker.advantages import group_advantages
from broker.blocks import block_advantages
from common.objective import AdvantageSection, LossSection
from learner.losses.corrections import by_sequence, m2po, needs_sequences
from learner.losses.policy import policy_loss
from learner.losses.tokens import Tokens
from tools.bench.harness import Row, interleave, rate

SEQUENCES, LENGTH = 64, 4096
SAMPLES, GROUP = 100_000, 8
LOW, HIGH = 0.2, 0.28

LOSSES = {
    "ppo": LossSection(clip_low=LOW, clip_high=HIGH),
    "ppo, capped, proximal": LossSection(anchor="proximal", weight_cap=2.0),
    "Jackpot as in the paper": LossSection(anchor="proximal", target="policy", weight_cap=2.0, anchor_cap=2.0),
    "reinforce (TIS)": LossSection(kind="reinforce", anchor="none", weight_cap=2.0),
    "cispo": LossSection(kind="cispo", clip_low=1.0, clip_high=4.0),
    "gspo": LossSection(kind="gspo", clip_low=3e-4, clip_high=4e-4, aggregate="sequence_mean"),
    "double-sided": LossSection(kind="double_sided", clip_low=LOW, clip_high=HIGH),
    "dppo_tv": LossSection(kind="dppo_tv", ratio_penalty=1e-3),
    "icepop": LossSection(anchor="proximal", correction="icepop", correction_high=5.0),
    "mask_sequence": LossSection(anchor="proximal", correction="mask_sequence", correction_high=3.0),
    "mask_geometric": LossSection(anchor="proximal", correction="mask_geometric", correction_low=0.99,
                                  correction_high=1.01),
    "opsm": LossSection(opsm=0.1),
    "kl k3 to a reference": LossSection(kl=0.01),
    "distillation": LossSection(distill=1.0),
    "m2po": LossSection(kind="m2po"),
}  # fmt: skip


def _tokens() -> tuple[Tensor, Tensor, Tokens]:
    n = SEQUENCES * LENGTH
    g = torch.Generator().manual_seed(0)
    log_q = -torch.rand(n, generator=g) * 3 - 0.01
    log_p = (log_q + 0.1 * torch.randn(n, generator=g)).clamp_max(-1e-3)
    log_m = torch.minimum(log_q, log_p)
    accept = (torch.rand(n, generator=g) < (log_p - log_q).exp().clamp(max=1)).to(torch.uint8)
    advantages = torch.randn(SEQUENCES, generator=g).repeat_interleave(LENGTH)
    weights = torch.full((n,), 1 / n)
    tokens = Tokens(log_q, log_m, log_p, advantages, weights, accept)
    return log_p + 0.02 * torch.randn(n, generator=g), torch.rand(n, generator=g), tokens


def bare_ppo(log_p: Tensor, log_old: Tensor, advantages: Tensor, mask: Tensor, count: int) -> Tensor:
    """The gradient of the clipped surrogate, by autograd."""
    own = log_p.detach().requires_grad_()
    ratio = torch.exp(own - log_old)
    surrogate = torch.minimum(ratio * advantages, torch.clamp(ratio, 1 - LOW, 1 + HIGH) * advantages)
    loss = -(surrogate * mask).sum() / count
    loss.backward()
    assert own.grad is not None
    return own.grad


def _losses(reps: int) -> list[Row]:
    log_p, entropy, tokens = _tokens()
    mask, n = tokens.accept.float(), len(log_p)
    lengths = torch.full((SEQUENCES,), LENGTH)

    def ours(section: LossSection) -> float:
        given = tokens[:]
        if section.kl:
            given.log_reference = tokens.log_p_v
        if section.distill:
            given.log_teacher = tokens.log_p_v

        def work() -> None:
            used = given
            if section.kind == "m2po":
                used = m2po(log_p, used, section.m2_threshold, lambda sums: sums)
            if needs_sequences(section):
                used = by_sequence(log_p, used, lengths, section)
            policy_loss(log_p, entropy, used, section)

        return 1 / rate(work, 1)

    bare = "bare PPO clip, autograd"
    contestants = {bare: lambda: 1 / rate(lambda: bare_ppo(log_p, tokens.log_q, tokens.advantages, mask, n), 1)}
    contestants |= {name: partial(ours, section) for name, section in LOSSES.items()}
    interleave(contestants, 1)
    found = interleave(contestants, reps)
    return [
        Row("algorithms", f"loss {name}, [64, 4096]", 1e3 * found[name], "ms", bare, 1e3 * found[bare], reps)
        for name in LOSSES
    ]


def _by_group(rewards: list[float], size: int) -> list[float]:
    """What a loop over groups costs, as peers write it."""
    out = []
    for start in range(0, len(rewards), size):
        group = np.array(rewards[start : start + size])
        out += ((group - group.mean()) / (group.std() + 1e-6)).tolist()
    return out


def _advantages(reps: int) -> list[Row]:
    rng = np.random.default_rng(0)
    rewards = rng.integers(0, 2, SAMPLES).astype(np.float32)
    sizes = np.full(SAMPLES // GROUP, GROUP)
    groups = np.repeat(np.arange(SAMPLES // GROUP), GROUP)
    as_list = rewards.tolist()
    outcome = rewards.astype(np.int64)
    ones = np.ones(SAMPLES, np.int64)
    section = AdvantageSection()
    loop = "Python loop over groups, numpy inside"
    contestants = {
        loop: lambda: 1 / rate(lambda: _by_group(as_list, GROUP), 1),
        "grpo": lambda: 1 / rate(lambda: group_advantages(rewards, sizes, GROUP, section), 1),
        "ocb": lambda: 1 / rate(
            lambda: block_advantages(rewards.astype(np.float64), groups, ones, outcome, "ocb", True), 1
        ),
    }  # fmt: skip
    found = interleave(contestants, reps)
    return [
        Row("algorithms", f"advantages {name}, 100,000 samples", 1e3 * found[name], "ms", loop, 1e3 * found[loop], reps)
        for name in ("grpo", "ocb")
    ]


def run(reps: int) -> list[Row]:
    """Time as a ratio: smaller is better."""
    torch.set_num_threads(1)
    return _losses(reps) + _advantages(reps)
