"""One optimizer step over one packed shard.

::

    micro-batches -> hidden -> log p -> loss -> backward ... -> all-reduce -> clip -> AdamW
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.logprobs import target_positions, token_logprobs
from learner.losses import Anchor, balance_loss, policy_loss
from learner.model.decoder import Decoder
from learner.optim import Optimizer
from learner.parallel.data import DataParallel


@dataclass
class StepBatch:
    """This rank's share; per-token tensors ``[N]`` aligned at the token they describe."""

    token_ids: Tensor  # i64
    cu_seqlens: NDArray[np.int32]  # [B+1], on the host
    trainable: Tensor  # u8
    accept: Tensor  # u8
    advantages: Tensor  # f32
    log_q: Tensor  # f32
    log_m: Tensor  # f32
    log_p_v: Tensor  # f32
    denominator: int  # trainable tokens of the whole batch before rejection, over all ranks
    tokens_global: int  # tokens of the whole batch, over all ranks


@dataclass(frozen=True)
class StepSettings:
    """Everything the step takes from the configuration."""

    anchor: Anchor
    clip_low: float
    clip_high: float
    weight_cap: float | None
    balance: float
    temperature: float
    micro_batch_tokens: int
    logprob_chunk: int


# Added up over micro-batches and ranks; policy_loss explains the last six.
SUMMED = (
    "policy", "balance", "entropy", "scored",
    "accepted", "clipped", "ratio", "weight", "weight_squared", "kl",
)  # fmt: skip


def micro_batches(cu_seqlens: NDArray[np.int32], limit: int) -> Iterator[tuple[int, int]]:
    """Ranges of sequences of at most ``limit`` tokens each (a longer sequence stands alone)."""
    lengths = np.diff(cu_seqlens)
    start, held = 0, 0
    for index, length in enumerate(lengths.tolist()):
        if index > start and held + length > limit:
            yield start, index
            start, held = index, 0
        held += length
    if start < len(lengths):
        yield start, len(lengths)


def train_step(
    model: Decoder,
    optimizer: Optimizer,
    batch: StepBatch,
    expert_fraction: Tensor,
    settings: StepSettings,
    parallel: DataParallel,
) -> tuple[dict[str, float], Tensor]:
    """Train once on ``batch``; returns metrics over all ranks and this step's expert fractions ``[L, E]``.

    A rank without tokens takes part in every collective; a batch without an accepted token moves
    the weights by the balance loss alone.
    """
    optimizer.zero_grad()
    sums = dict.fromkeys(SUMMED, 0.0)
    counts = torch.zeros(expert_fraction.shape, dtype=torch.int64, device=model.device)
    for first, last in micro_batches(batch.cu_seqlens, settings.micro_batch_tokens):
        loss, part, part_counts = _forward(model, batch, first, last, expert_fraction, settings)
        loss.backward()
        counts += part_counts
        for name, value in part.items():
            sums[name] += value
    parallel.all_reduce_sum([*optimizer.grads(), counts])
    lr = optimizer.lr
    grad_norm = optimizer.step()
    sums = parallel.sum_floats(sums)
    metrics = _metrics(sums, counts, settings)
    metrics |= {"grad_norm": grad_norm, "lr": lr, "skipped_updates": float(optimizer.skipped)}
    return metrics, _fractions(counts, expert_fraction)


def _forward(
    model: Decoder, batch: StepBatch, first: int, last: int, expert_fraction: Tensor, settings: StepSettings
) -> tuple[Tensor, dict[str, float], Tensor]:
    start, end = int(batch.cu_seqlens[first]), int(batch.cu_seqlens[last])
    offsets = batch.cu_seqlens[first : last + 1] - start
    tokens = slice(start, end)
    token_ids = batch.token_ids[tokens]
    at = torch.from_numpy(target_positions(offsets, batch.trainable[tokens].cpu().numpy())).to(model.device)
    forward = model.hidden(token_ids, offsets)
    logp, entropy = token_logprobs(
        forward.hidden[at - 1], model.head, token_ids[at], settings.temperature, settings.logprob_chunk
    )
    loss, stats = policy_loss(
        logp,
        batch.log_q[tokens][at],
        batch.log_m[tokens][at],
        batch.log_p_v[tokens][at],
        None,
        batch.advantages[tokens][at],
        batch.accept[tokens][at],
        batch.denominator,
        anchor=settings.anchor,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        weight_cap=settings.weight_cap,
    )
    balance = balance_loss(forward.prob_sums_LE, batch.tokens_global, expert_fraction)
    sums = {
        "policy": float(loss.detach()),
        "balance": float(balance.detach()),
        "entropy": float(entropy.sum()),
        "scored": float(len(at)),
        **{name: float(value) for name, value in vars(stats).items()},
    }
    return loss + settings.balance * balance, sums, forward.counts_LE


def _fractions(counts: Tensor, previous: Tensor) -> Tensor:
    totals = counts.sum(dim=1, keepdim=True)
    return torch.where(totals > 0, counts / totals.clamp_min(1), previous)


def _metrics(sums: dict[str, float], counts: Tensor, settings: StepSettings) -> dict[str, float]:
    accepted = max(1.0, sums["accepted"])
    squared = accepted * sums["weight_squared"]
    load = counts.float()
    busiest = (load.max(dim=1).values / load.mean(dim=1).clamp_min(1e-9)).max() if load.numel() else torch.tensor(0.0)
    return {
        "loss": sums["policy"] + settings.balance * sums["balance"],
        "policy_loss": sums["policy"],
        "balance_loss": sums["balance"],
        "entropy": sums["entropy"] / max(1.0, sums["scored"]),
        "clip_fraction": sums["clipped"] / accepted,
        "ratio_mean": sums["ratio"] / accepted,
        "weight_mean": sums["weight"] / accepted,
        "weight_ess": sums["weight"] ** 2 / squared if squared > 0 else 0.0,
        "kl_to_behaviour": sums["kl"] / accepted,
        "expert_load_max": float(busiest),
    }
