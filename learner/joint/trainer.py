"""One step of the rollout model on the shard that the policy has just been trained on.

::

    micro-batch -> policy, as it is now (no gradient) -> hidden states ---+
                -> rollout model ------------------------> hidden states -+-> PPO + kl * KL -> backward
    all of them -> reduce -> clip -> AdamW

``L(omega) = L_PPO(omega) + joint.kl * E_q[KL(policy || omega)]`` (algorithms.md 1.12): both parts see
every token that was sampled, and the policy's last update is in what is distilled. Each data rank
holds both models whole, so no forward pass of theirs needs another rank.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.config import RunConfig
from common.identity import check_same_tokens
from learner.device import to_device
from learner.hf import load_model
from learner.joint.kl import Distilled, Divergence, distill_through_heads, divergence_of
from learner.joint.loss import RolloutStats, rollout_loss
from learner.logprobs import Head, target_positions
from learner.losses.router import balance_loss, router_z_loss
from learner.mesh import Mesh
from learner.model.decoder import Decoder
from learner.optim import Optimizer
from learner.step import StepBatch, expert_fractions, micro_batches

SUMMED = ("policy", "balance", "router_z", "sampled", "faulty", "clipped", "ratio", "kl", "probed", "before", "after")
HEADS = 4  # chunks of logits that live at once where a plain loss has one


@dataclass
class _Part:
    """One micro-batch; N tokens, of which n were sampled."""

    token_ids: Tensor  # [N]
    offsets: NDArray[np.int32]
    at: Tensor  # [n] the sampled ones
    taught: Tensor  # [n, C] the policy's hidden states that predict them


class RolloutTrainer:
    """The rollout model, its optimizer, and the step of both."""

    def __init__(self, config: RunConfig, model: Decoder) -> None:
        self.config, self.model, self.mesh = config, model, model.mesh
        optim = replace(config.optim, lr=config.joint.lr, freeze=())
        self.optimizer = Optimizer(self.model, optim, config.run.steps)
        self.expert_fraction = self.model.uniform_expert_fraction()  # [L, E] of the last step
        self.how = Divergence(config.joint.direction, config.joint.top_k)

    @classmethod
    def load(cls, config: RunConfig, mesh: Mesh) -> "RolloutTrainer":
        """With the model at ``joint.path``. Raises :class:`ModelError` for another vocabulary than the policy's."""
        check_same_tokens(config.model.path, config.joint.path)
        return cls(config, load_model(config, mesh, recompute=config.learner.recompute, path=config.joint.path))

    def step(self, policy: Decoder, batch: StepBatch) -> dict[str, float]:
        """Train once on ``batch``, towards ``policy`` as it is; metrics over all ranks. Collective."""
        began = time.perf_counter()
        self.optimizer.zero_grad()
        counts = torch.zeros(self.expert_fraction.shape, dtype=torch.int64, device=self.model.device)
        total = max(1, int(self.mesh.sum_floats({"sampled": float((batch.trainable == 1).sum())})["sampled"]))
        sums = torch.zeros((len(SUMMED),), dtype=torch.float64, device=self.model.device)
        probe: tuple[_Part, Distilled] | None = None
        for first, last in micro_batches(batch.cu_seqlens, self.config.learner.micro_batch_tokens):
            tokens = slice(int(batch.cu_seqlens[first]), int(batch.cu_seqlens[last]))
            part = self._part(policy, batch, tokens, batch.cu_seqlens[first : last + 1] - tokens.start)
            found, more = self._backward(policy, part, batch, tokens, total, counts)
            sums += more
            probe = probe or (part, found)
        lr, grad_norm = self.optimizer.lr, self.optimizer.step()
        if probe is not None:
            sums += self._probe(policy, *probe)
        self.expert_fraction = expert_fractions(self.mesh.sum(counts), self.expert_fraction)
        return self._metrics(dict(zip(SUMMED, self.mesh.sum(sums).tolist(), strict=True))) | {
            "joint_grad_norm": grad_norm, "joint_lr": lr, "joint_skipped_updates": float(self.optimizer.skipped),
            "seconds_joint": time.perf_counter() - began,
        }  # fmt: skip

    def _part(self, policy: Decoder, batch: StepBatch, tokens: slice, offsets: NDArray[np.int32]) -> _Part:
        at = to_device(target_positions(offsets, batch.trainable[tokens] == 1), self.model.device)
        token_ids = batch.token_ids[tokens]
        with torch.no_grad():
            taught = policy.hidden(token_ids, offsets)[at - 1]
        return _Part(token_ids, offsets, at, taught)

    def _backward(
        self, policy: Decoder, part: _Part, batch: StepBatch, tokens: slice, total: int, counts: Tensor
    ) -> tuple[Distilled, Tensor]:
        """Gradients of one micro-batch; adds to ``counts`` and returns what adds to the step's sums."""
        joint, loss, model = self.config.joint, self.config.loss, self.model
        log_q, advantages, weights = (x[tokens][part.at] for x in (batch.log_q, batch.advantages, batch.weights))
        stats: list[RolloutStats] = []

        def per_token(logp: Tensor, which: slice) -> tuple[Tensor, Tensor]:
            slope, more = rollout_loss(
                logp, log_q[which], advantages[which], weights[which], joint.clip_low, joint.clip_high
            )
            stats.append(more)
            return more.policy, slope

        x, routing = model.stage(model.pack(part.token_ids, part.offsets), None)
        counts += routing.counts_LE
        balance = balance_loss(routing.prob_sums_LE, batch.tokens_global, self.expert_fraction)
        router_z = router_z_loss(routing.z_sums_L, batch.tokens_global)
        pull = torch.full((len(part.at),), joint.kl / total, device=model.device)
        own, distilled = distill_through_heads(
            x[part.at - 1], self._head(model), (part.taught, self._head(policy)), part.token_ids[part.at], pull,
            per_token, self.how,
        )  # fmt: skip
        (own + loss.balance * balance + loss.router_z * router_z).backward()
        found = _row(balance=balance, router_z=router_z, kl=distilled.divergence.sum())
        return distilled, sum((_row(**vars(one)) for one in stats), found)

    @torch.no_grad()
    def _probe(self, policy: Decoder, part: _Part, before: Distilled) -> Tensor:
        """What the update did to the divergence, on a rank's first micro-batch."""
        hidden = self.model.hidden(part.token_ids, part.offsets)[part.at - 1]
        after = divergence_of(hidden, self._head(self.model), (part.taught, self._head(policy)), self.how)
        return _row(probed=torch.ones_like(after).sum(), before=before.divergence.sum(), after=after.sum())

    def _head(self, model: Decoder) -> Head:
        learner = self.config.learner
        temperature = self.config.rollout.temperature
        return Head(model.head, temperature, learner.logprob_mb / HEADS, in_float32=learner.head_float32)

    def _metrics(self, sums: dict[str, float]) -> dict[str, float]:
        joint, loss = self.config.joint, self.config.loss
        sampled, probed = max(1.0, sums["sampled"]), max(1.0, sums["probed"])
        seen = max(1.0, sums["sampled"] + sums["faulty"])
        kl = sums["kl"] / seen
        return {
            "joint_loss": sums["policy"] + joint.kl * kl
            + loss.balance * sums["balance"] + loss.router_z * sums["router_z"],
            "joint_policy_loss": sums["policy"],
            "joint_kl": kl,
            "joint_kl_drop": (sums["before"] - sums["after"]) / probed,
            "joint_balance_loss": sums["balance"],
            "joint_clip_fraction": sums["clipped"] / sampled,
            "joint_ratio_mean": sums["ratio"] / sampled,
            "joint_faulty_tokens": sums["faulty"],
        }  # fmt: skip

    # ---- checkpoints ----------------------------------------------------------------------------

    @property
    def trained(self) -> tuple[Decoder, Optimizer]:
        """What a checkpoint keeps the tensors of."""
        return self.model, self.optimizer

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it beside its tensors."""
        return {
            "updates": self.optimizer.steps,
            "skipped_updates": self.optimizer.skipped,
            "expert_fraction": self.expert_fraction.tolist(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """After its tensors were loaded."""
        self.optimizer.set_steps(int(state["updates"]), int(state["skipped_updates"]))
        fraction = torch.tensor(state["expert_fraction"], device=self.model.device)
        self.expert_fraction = fraction.view(self.expert_fraction.shape)


def _row(**values: Tensor) -> Tensor:
    """Named sums ``[]`` as a row in the order of SUMMED."""
    nothing = torch.zeros_like(next(iter(values.values())), dtype=torch.float64)
    return torch.stack([values[name].detach().double() if name in values else nothing for name in SUMMED])
