"""One optimizer step over one packed shard, on any mesh.

::

    micro-batches -> pipeline(stage -> head -> loss -> backward) -> reduce -> clip -> AdamW
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.objective import LossSection
from common.trace import Phase, no_phase
from learner.device import to_device
from learner.logprobs import Head, Share, loss_through_head, score_tokens, target_positions
from learner.losses.corrections import by_sequence, m2po, needs_sequences
from learner.losses.policy import policy_loss
from learner.losses.router import balance_loss, router_z_loss
from learner.losses.tokens import LossStats, Tokens
from learner.mesh import Mesh
from learner.model.decoder import Decoder
from learner.model.packing import Pack
from learner.optim import Optimizer
from learner.parallel.pipeline import StageResult, run_forward, run_pipeline


@dataclass
class StepBatch:
    """This rank's share; per-token tensors ``[N]`` aligned at the token they describe."""

    token_ids: Tensor  # i64
    cu_seqlens: NDArray[np.int32]  # [B+1], on the host
    trainable: NDArray[np.uint8]  # on the host too: it says which positions are scored
    accept: Tensor  # u8
    advantages: Tensor  # f32
    weights: Tensor  # f32, what a token's loss is multiplied by; holds the denominator
    log_q: Tensor  # f32
    log_m: Tensor  # f32
    log_p_v: Tensor  # f32
    tokens_global: int  # tokens of the whole batch, over all ranks
    experts: Tensor | None = None  # i16 [N, L, k] of the rollout, -1 where not recorded
    trajectories: NDArray[np.int64] | None = None  # [B] which each sequence belongs to, rising; None: its own
    log_reference: Tensor | None = None  # f32 [N] under the reference model
    log_teacher: Tensor | None = None  # f32 [N] under the teacher, NaN where there is none


@dataclass(frozen=True)
class StepSettings:
    """Everything the step takes from the configuration."""

    loss: LossSection
    temperature: float
    micro_batch_tokens: int
    logprob_mb: float
    head_float32: bool = False
    compiled: bool = False


# Added up over micro-batches and ranks; LossStats explains the last ones.
SUMMED = (
    "policy", "balance", "router_z", "entropy", "scored", "replayed", "rerouted",
    *(field.name for field in fields(LossStats)),
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
    phase: Phase = no_phase,
) -> tuple[dict[str, float], Tensor]:
    """Train once on ``batch``; returns metrics over all ranks and this step's expert fractions ``[L, E]``.

    A rank without tokens takes part in every collective; a batch without an accepted token moves
    the weights by the routers' losses alone. ``phase`` is told what is done: forward, backward,
    reduce, optimizer.
    """
    optimizer.zero_grad()
    work = _Work(model, batch, expert_fraction, settings)
    if settings.loss.kind == "m2po":
        work.mask_batch(phase)
    run_pipeline(model.mesh, work.shapes, model.dtype, work.run_stage, phase)
    lr, age = optimizer.lr, optimizer.age
    grad_norm = optimizer.step(phase)
    phase("reduce")
    sums = model.mesh.sum_floats(dict(zip(SUMMED, work.sums.tolist(), strict=True)))
    counts = model.mesh.sum(work.counts)
    if settings.loss.expert_bias_rate > 0 and math.isfinite(grad_norm):
        model.move_expert_bias(counts, settings.loss.expert_bias_rate)
    metrics = _metrics(sums, counts, settings.loss)
    metrics |= {"grad_norm": grad_norm, "lr": lr, "skipped_updates": float(optimizer.skipped)}
    if optimizer.config.reset_every:
        metrics["moments_age"] = float(age)
    return metrics, expert_fractions(counts, expert_fraction)


class _Work:
    """One step's micro-batches and what they add up to on this rank."""

    def __init__(self, model: Decoder, batch: StepBatch, expert_fraction: Tensor, settings: StepSettings) -> None:
        self.model, self.batch, self.settings = model, batch, settings
        self.expert_fraction = expert_fraction
        self.ranges = _equal_count(model.mesh, self._ranges())
        tokens = [int(batch.cu_seqlens[last] - batch.cu_seqlens[first]) for first, last in self.ranges]
        self.shapes = [(-(-n // model.mesh.tp.size), model.config.hidden_size) for n in tokens]
        self.sums = torch.zeros(len(SUMMED), dtype=torch.float64, device=model.device)
        self.counts = torch.zeros(expert_fraction.shape, dtype=torch.int64, device=model.device)
        self.factor: Tensor | None = None  # [N] that the whole batch decides

    @cached_property
    def head(self) -> Head:
        """Of the last stage."""
        model, settings = self.model, self.settings
        return Head(
            model.head, settings.temperature, settings.logprob_mb, model.mesh.tp, settings.head_float32,
            settings.compiled,
        )  # fmt: skip

    def _ranges(self) -> list[tuple[int, int]]:
        """Micro-batches of sequences; of whole trajectories where their tokens are tied together."""
        batch, limit = self.batch, self.settings.micro_batch_tokens
        if batch.trajectories is None or not needs_sequences(self.settings.loss):
            return list(micro_batches(batch.cu_seqlens, limit))
        first = np.flatnonzero(np.diff(batch.trajectories, prepend=-1))
        rows = np.append(first, len(batch.trajectories))
        return [(int(rows[a]), int(rows[b])) for a, b in micro_batches(batch.cu_seqlens[rows], limit)]

    def _pack(self, index: int) -> tuple[Pack, slice, Tensor]:
        """Micro-batch ``index``, its place in the batch and the positions within it that are scored."""
        first, last = self.ranges[index]
        batch, model = self.batch, self.model
        tokens = slice(int(batch.cu_seqlens[first]), int(batch.cu_seqlens[last]))
        offsets = batch.cu_seqlens[first : last + 1] - tokens.start
        experts = None if batch.experts is None else batch.experts[tokens]
        pack = model.pack(batch.token_ids[tokens], offsets, experts)
        at = to_device(target_positions(offsets, batch.trainable[tokens]), model.device)
        return pack, tokens, at

    def run_stage(self, index: int, received: Tensor | None) -> StageResult:
        """Forward of one micro-batch; metrics are added to :attr:`sums`."""
        model, loss_of = self.model, self.settings.loss
        pack, tokens, at = self._pack(index)
        x, routing = model.stage(pack, received)
        balance = balance_loss(routing.prob_sums_LE, self.batch.tokens_global, self.expert_fraction)
        router_z = router_z_loss(routing.z_sums_L, self.batch.tokens_global)
        loss = loss_of.balance * balance + loss_of.router_z * router_z
        self.counts += routing.counts_LE
        sums = {"balance": balance, "router_z": router_z, "replayed": routing.replayed, "rerouted": routing.rerouted}
        if model.mesh.is_last_stage:
            about, lengths = self._tokens(tokens, at), self._lengths(index)
            policy, more = self._policy(model.whole(x, pack)[at - 1], pack.token_ids[at], about, lengths)
            loss = loss + policy
            if model.mesh.at["tp"] == 0:  # its neighbours found the same
                sums |= more
        nothing = torch.zeros((), device=model.device)
        self.sums += torch.stack([sums.get(name, nothing).detach().double() for name in SUMMED])
        return StageResult(None if model.mesh.is_last_stage else x, loss)

    def _tokens(self, tokens: slice, at: Tensor) -> Tokens:
        """What the loss is given of the scored positions ``at`` of the batch's ``tokens``."""
        whole = self._whole()
        whole.log_reference, whole.log_teacher = self.batch.log_reference, self.batch.log_teacher
        whole.factor = self.factor
        return whole[tokens][at]

    def _lengths(self, index: int) -> Tensor | None:
        """Scored tokens of each trajectory of micro-batch ``index``, where some loss asks for whole ones."""
        if not needs_sequences(self.settings.loss):
            return None
        batch, (first, last) = self.batch, self.ranges[index]
        rows = np.arange(last - first) if batch.trajectories is None else batch.trajectories[first:last]
        offsets = batch.cu_seqlens[first : last + 1]
        owner = np.repeat(np.unique(rows, return_inverse=True)[1], np.diff(offsets))
        scored = batch.trainable[offsets[0] : offsets[-1]] > 0
        return to_device(np.bincount(owner[scored], minlength=1), self.model.device)

    def _whole(self) -> Tokens:
        """What the loss looks at of every token of the batch."""
        batch = self.batch
        return Tokens(batch.log_q, batch.log_m, batch.log_p_v, batch.advantages, batch.weights, batch.accept)

    def _policy(
        self, hidden: Tensor, targets: Tensor, tokens: Tokens, lengths: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if lengths is not None:  # the head twice: every token's ratio is wanted before any token's loss
            tokens = by_sequence(self._log_p(hidden.detach(), targets), tokens, lengths, self.settings.loss)
        found: list[LossStats] = []

        def per_token(log_p: Tensor, entropy: Tensor, part: slice) -> Share:
            share, stats = policy_loss(log_p, entropy, tokens[part], self.settings.loss)
            found.append(stats)
            return share

        loss, _, entropy = loss_through_head(hidden, self.head, targets, per_token)
        scored = torch.full((), float(len(targets)), device=hidden.device)
        sums = {"policy": loss, "entropy": entropy.sum(), "scored": scored}
        for stats in found:
            for name, value in vars(stats).items():
                sums[name] = sums[name] + value if name in sums else value
        return loss, sums

    def _log_p(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return score_tokens(hidden, self.head, targets, targets.new_zeros((len(targets), 0))).logp

    @torch.no_grad()
    def mask_batch(self, phase: Phase) -> None:
        """Leave out what the whole batch decides (M2PO): one forward pass before the one that trains."""
        mesh, batch = self.model.mesh, self.batch
        log_p = torch.zeros_like(batch.log_q)

        def stage(index: int, received: Tensor | None) -> Tensor | None:
            pack, tokens, at = self._pack(index)
            x, _ = self.model.stage(pack, received)
            if not mesh.is_last_stage:
                return x
            log_p[tokens.start + at] = self._log_p(self.model.whole(x, pack)[at - 1], pack.token_ids[at])
            return None

        run_forward(mesh, self.shapes, self.model.dtype, stage, phase)
        if mesh.is_last_stage:
            whole = self._whole()
            whole.accept = torch.where(to_device(batch.trainable == 1, mesh.device), batch.accept, 0)
        else:
            whole, log_p = self._whole()[:0], log_p[:0]
        masked = m2po(log_p, whole, self.settings.loss.m2_threshold, mesh.sum)
        self.factor = masked.factor if mesh.is_last_stage else None


def _equal_count(mesh: Mesh, ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same number of micro-batches on every rank: those without data run empty ones."""
    end = ranges[-1][1] if ranges else 0
    return ranges + [(end, end)] * (mesh.max_int(len(ranges)) - len(ranges))


def expert_fractions(counts: Tensor, previous: Tensor) -> Tensor:
    """Each expert's share of a step's assignments ``[L, E]``; what it was where a layer had none."""
    totals = counts.sum(dim=1, keepdim=True)
    return torch.where(totals > 0, counts / totals.clamp_min(1), previous)


def _metrics(sums: dict[str, float], counts: Tensor, loss: LossSection) -> dict[str, float]:
    accepted = max(1.0, sums["accepted"])
    squared = accepted * sums["weight_squared"]
    load = counts.float()
    busiest = (load.max(dim=1).values / load.mean(dim=1).clamp_min(1e-9)).max() if load.numel() else torch.tensor(0.0)
    metrics = {
        "loss": sums["policy"] + loss.balance * sums["balance"] + loss.router_z * sums["router_z"],
        "policy_loss": sums["policy"],
        "balance_loss": sums["balance"],
        "router_z_loss": sums["router_z"],
        "entropy": sums["entropy"] / max(1.0, sums["scored"]),
        "clip_fraction": sums["clipped"] / accepted,
        "masked_positive": sums["masked_positive"] / accepted,
        "masked_negative": sums["masked_negative"] / accepted,
        "ratio_mean": sums["ratio"] / accepted,
        "weight_mean": sums["weight"] / accepted,
        "weight_ess": sums["weight"] ** 2 / squared if squared > 0 else 0.0,
        "kl_to_behaviour": sums["kl"] / accepted,
        "expert_load_max": float(busiest),
        "faulty_tokens": sums["faulty"],
        "routing_disagreement": sums["rerouted"] / max(1.0, sums["replayed"]),
    }
    if loss.kl > 0:
        metrics["kl_to_reference"] = sums["kl_reference"] / accepted
    if sums["taught"]:
        metrics["teacher_gap"] = sums["teacher"] / sums["taught"]
    if sums["exemplars"]:
        metrics["exemplar_tokens"] = sums["exemplars"]
    return metrics
