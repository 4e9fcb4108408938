"""One optimizer step over one packed shard, on any mesh.

::

    micro-batches -> pipeline(stage -> head -> loss -> backward) -> reduce -> clip -> AdamW
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.objective import Anchor
from learner.logprobs import Head, loss_through_head, target_positions
from learner.losses import LossStats, balance_loss, policy_loss, router_z_loss
from learner.mesh import Mesh
from learner.model.decoder import Decoder
from learner.model.packing import Pack
from learner.optim import Optimizer
from learner.parallel.pipeline import StageResult, run_pipeline


@dataclass
class StepBatch:
    """This rank's share; per-token tensors ``[N]`` aligned at the token they describe."""

    token_ids: Tensor  # i64
    cu_seqlens: NDArray[np.int32]  # [B+1], on the host
    trainable: Tensor  # u8
    accept: Tensor  # u8
    advantages: Tensor  # f32
    weights: Tensor  # f32, what a token's loss is multiplied by; holds the denominator
    log_q: Tensor  # f32
    log_m: Tensor  # f32
    log_p_v: Tensor  # f32
    tokens_global: int  # tokens of the whole batch, over all ranks
    experts: Tensor | None = None  # i64 [N, L, k] of the rollout, -1 where not recorded


@dataclass(frozen=True)
class StepSettings:
    """Everything the step takes from the configuration."""

    anchor: Anchor
    clip_low: float
    clip_high: float
    weight_cap: float | None
    balance: float
    router_z: float
    temperature: float
    micro_batch_tokens: int
    logprob_mb: float
    expert_bias_rate: float = 0.0
    head_float32: bool = False
    compiled: bool = False


# Added up over micro-batches and ranks; policy_loss explains the last seven.
SUMMED = (
    "policy", "balance", "router_z", "entropy", "scored", "replayed", "rerouted",
    "accepted", "faulty", "clipped", "ratio", "weight", "weight_squared", "kl",
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
) -> tuple[dict[str, float], Tensor]:
    """Train once on ``batch``; returns metrics over all ranks and this step's expert fractions ``[L, E]``.

    A rank without tokens takes part in every collective; a batch without an accepted token moves
    the weights by the routers' losses alone.
    """
    optimizer.zero_grad()
    work = _Work(model, batch, expert_fraction, settings)
    run_pipeline(model.mesh, work.shapes, model.dtype, work.run_stage)
    lr = optimizer.lr
    grad_norm = optimizer.step()
    sums = model.mesh.sum_floats(dict(zip(SUMMED, work.sums.tolist(), strict=True)))
    counts = model.mesh.sum(work.counts)
    if settings.expert_bias_rate > 0 and math.isfinite(grad_norm):
        model.move_expert_bias(counts, settings.expert_bias_rate)
    metrics = _metrics(sums, counts, settings)
    metrics |= {"grad_norm": grad_norm, "lr": lr, "skipped_updates": float(optimizer.skipped)}
    return metrics, _fractions(counts, expert_fraction)


class _Work:
    """One step's micro-batches and what they add up to on this rank."""

    def __init__(self, model: Decoder, batch: StepBatch, expert_fraction: Tensor, settings: StepSettings) -> None:
        self.model, self.batch, self.settings = model, batch, settings
        self.expert_fraction = expert_fraction
        self.ranges = _equal_count(model.mesh, list(micro_batches(batch.cu_seqlens, settings.micro_batch_tokens)))
        tokens = [int(batch.cu_seqlens[last] - batch.cu_seqlens[first]) for first, last in self.ranges]
        self.shapes = [(-(-n // model.mesh.tp.size), model.config.hidden_size) for n in tokens]
        self.sums = torch.zeros(len(SUMMED), dtype=torch.float64, device=model.device)
        self.counts = torch.zeros(expert_fraction.shape, dtype=torch.int64, device=model.device)

    def run_stage(self, index: int, received: Tensor | None) -> StageResult:
        """Forward of one micro-batch; metrics are added to :attr:`sums`."""
        first, last = self.ranges[index]
        batch, model = self.batch, self.model
        tokens = slice(int(batch.cu_seqlens[first]), int(batch.cu_seqlens[last]))
        offsets = batch.cu_seqlens[first : last + 1] - tokens.start
        experts = None if batch.experts is None else batch.experts[tokens]
        pack = model.pack(batch.token_ids[tokens], offsets, experts)
        x, routing = model.stage(pack, received)
        balance = balance_loss(routing.prob_sums_LE, batch.tokens_global, self.expert_fraction)
        router_z = router_z_loss(routing.z_sums_L, batch.tokens_global)
        loss = self.settings.balance * balance + self.settings.router_z * router_z
        self.counts += routing.counts_LE
        sums = {"balance": balance, "router_z": router_z, "replayed": routing.replayed, "rerouted": routing.rerouted}
        if model.mesh.is_last_stage:
            policy, more = self._policy(x, pack, tokens, offsets)
            loss = loss + policy
            if model.mesh.at["tp"] == 0:  # its neighbours found the same
                sums |= more
        nothing = torch.zeros((), device=model.device)
        self.sums += torch.stack([sums.get(name, nothing).detach().double() for name in SUMMED])
        return StageResult(None if model.mesh.is_last_stage else x, loss)

    def _policy(
        self, x: Tensor, pack: Pack, tokens: slice, offsets: NDArray[np.int32]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        batch, model, settings = self.batch, self.model, self.settings
        at = torch.from_numpy(target_positions(offsets, batch.trainable[tokens].cpu().numpy())).to(model.device)
        log_q, log_m, log_p_v, advantages, accept, weights = (
            per_token[tokens][at]
            for per_token in (batch.log_q, batch.log_m, batch.log_p_v, batch.advantages, batch.accept, batch.weights)
        )
        found: list[LossStats] = []

        def per_token(logp: Tensor, part: slice) -> Tensor:
            loss, stats = policy_loss(
                logp, log_q[part], log_m[part], log_p_v[part], None, advantages[part], accept[part],
                weights[part], anchor=settings.anchor, clip_low=settings.clip_low,
                clip_high=settings.clip_high, weight_cap=settings.weight_cap,
            )  # fmt: skip
            found.append(stats)
            return loss

        head = Head(
            model.head, settings.temperature, settings.logprob_mb, model.mesh.tp, settings.head_float32,
            settings.compiled,
        )  # fmt: skip
        loss, _, entropy = loss_through_head(model.whole(x, pack)[at - 1], head, pack.token_ids[at], per_token)
        scored = torch.tensor(float(len(at)), device=model.device)
        sums = {"policy": loss, "entropy": entropy.sum(), "scored": scored}
        for stats in found:
            for name, value in vars(stats).items():
                sums[name] = sums[name] + value if name in sums else value
        return loss, sums


def _equal_count(mesh: Mesh, ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same number of micro-batches on every rank: those without data run empty ones."""
    end = ranges[-1][1] if ranges else 0
    return ranges + [(end, end)] * (mesh.max_int(len(ranges)) - len(ranges))


def _fractions(counts: Tensor, previous: Tensor) -> Tensor:
    totals = counts.sum(dim=1, keepdim=True)
    return torch.where(totals > 0, counts / totals.clamp_min(1), previous)


def _metrics(sums: dict[str, float], counts: Tensor, settings: StepSettings) -> dict[str, float]:
    accepted = max(1.0, sums["accepted"])
    squared = accepted * sums["weight_squared"]
    load = counts.float()
    busiest = (load.max(dim=1).values / load.mean(dim=1).clamp_min(1e-9)).max() if load.numel() else torch.tensor(0.0)
    return {
        "loss": sums["policy"] + settings.balance * sums["balance"] + settings.router_z * sums["router_z"],
        "policy_loss": sums["policy"],
        "balance_loss": sums["balance"],
        "router_z_loss": sums["router_z"],
        "entropy": sums["entropy"] / max(1.0, sums["scored"]),
        "clip_fraction": sums["clipped"] / accepted,
        "ratio_mean": sums["ratio"] / accepted,
        "weight_mean": sums["weight"] / accepted,
        "weight_ess": sums["weight"] ** 2 / squared if squared > 0 else 0.0,
        "kl_to_behaviour": sums["kl"] / accepted,
        "expert_load_max": float(busiest),
        "faulty_tokens": sums["faulty"],
        "routing_disagreement": sums["rerouted"] / max(1.0, sums["replayed"]),
    }
