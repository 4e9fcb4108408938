"""AdamW over flat, sharded parameters, with global gradient clipping, a warm-up and a decay."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from common.config import OptimSection
from common.trace import Phase, no_phase
from learner.mesh import ALONE
from learner.model.decoder import Decoder
from learner.parallel.flat import FlatParameters, Sharing, room_for

MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch's AdamW names them
TP_WHOLE = ("norm", "router", "o_bias", "down_bias", "shared.")  # every tp rank holds these whole


def learning_rate(config: OptimSection, update: int, total: int) -> float:
    """The rate of update ``update`` (from 0) of ``total``: linear warm-up, then ``optim.schedule``."""
    if update < config.warmup_steps:
        return config.lr * (update + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (update - config.warmup_steps) / max(1, total - 1 - config.warmup_steps))
    left = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * left)


def sharing_of(name: str, model: Decoder) -> Sharing:
    """Who else holds the parameter ``name``.

    ======== ========================= ============================
    kind     cut over                  the same on
    ======== ========================= ============================
    experts  pp, ep, tp                dp
    cut      pp, tp                    dp, ep
    whole    pp                        dp, ep, tp
    table    tp                        dp, ep, first and last stage
    ======== ========================= ============================
    """
    mesh = model.mesh
    leads = mesh.at["dp_replicate"] == 0
    if ".mlp.gate_up" in name or ".mlp.down" in name:
        layer = model.layers[name.split(".")[1]]
        if hasattr(layer.mlp, "router") and not name.endswith("_bias"):
            return Sharing("experts", mesh.dp_shard, mesh.dp_replicate, ALONE, leads)
    if any(part in name for part in TP_WHOLE):
        return Sharing("whole", mesh.dense_shard, mesh.dp_replicate, mesh.tp, leads and mesh.at["tp"] == 0)
    if name == "embed" and model.config.tie_word_embeddings:
        return Sharing("table", mesh.dense_shard, mesh.dp_replicate, mesh.ends, leads and mesh.is_first_stage)
    return Sharing("cut", mesh.dense_shard, mesh.dp_replicate, ALONE, leads)


class Optimizer:
    """AdamW over a model's parameters, which it moves into flat buffers."""

    def __init__(self, model: Decoder, config: OptimSection, total_steps: int) -> None:
        self.config, self.total_steps, self.mesh = config, total_steps, model.mesh
        self.steps = 0  # updates applied
        self.skipped = 0  # updates refused because a gradient was not finite
        self.flats = list(_flatten(model, config.weight_decay))
        groups: list[dict[str, Any]] = [{"params": [flat.master], "weight_decay": flat.decay} for flat in self.flats]
        idle = nn.Parameter(torch.zeros(0, device=model.device))  # where all of a stage is frozen
        self._adam = torch.optim.AdamW(
            [*groups, {"params": [idle]}],
            lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True,
        )  # fmt: skip

    @property
    def age(self) -> int:
        """Updates that the moments have seen: all, or those since the last reset (``optim.reset_every``)."""
        every = self.config.reset_every
        return self.steps % every if every else self.steps

    def reset(self) -> None:
        """Forget both moments (GLM-5, 2602.15763: new weights in the fleet are a new problem)."""
        for flat in self.flats:
            for moment in self.moments(flat).values():
                moment.zero_()
            self._adam.state[flat.master]["step"].zero_()

    @property
    def lr(self) -> float:
        """The rate of the next update."""
        return learning_rate(self.config, self.steps, self.total_steps)

    def zero_grad(self) -> None:
        """Before the first micro-batch."""
        for flat in self.flats:
            flat.zero_grad()

    def step(self, phase: Phase = no_phase) -> float:
        """Sum gradients over the mesh, clip to ``optim.max_grad_norm``, update; the norm before clipping.

        A norm that is not finite changes nothing, on any rank, and is counted in ``skipped``.
        ``phase`` is told "reduce", then "optimizer".
        """
        phase("reduce")
        for flat in self.flats:
            flat.reduce()
        squares = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for flat in self.flats:
            squares += flat.squared_norm()
        norm = math.sqrt(float(self.mesh.sum(squares)))
        phase("optimizer")
        if not math.isfinite(norm):
            self.skipped += 1
            return norm
        if self.steps and self.age == 0:
            self.reset()
        scale = min(1.0, self.config.max_grad_norm / (norm + 1e-6))
        for flat, group in zip(self.flats, self._adam.param_groups, strict=False):
            group["lr"] = self.lr
            flat.master.grad = flat.own_grads if scale == 1.0 else flat.own_grads.mul_(scale)
        self._adam.step()
        for flat in self.flats:
            flat.publish()
        self.steps += 1
        return norm

    def moments(self, flat: FlatParameters) -> dict[str, Tensor]:
        """This rank's shard of AdamW's two moments, made if no update was applied yet."""
        state = self._adam.state[flat.master]
        for name in MOMENTS:
            if name not in state:
                state[name] = torch.zeros_like(flat.master)
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.master.device)
        return {name: state[name] for name in MOMENTS}

    def set_steps(self, steps: int, skipped: int) -> None:
        """After moments were loaded: how many updates they have seen."""
        self.steps, self.skipped = steps, skipped
        for flat in self.flats:
            self.moments(flat)
            self._adam.state[flat.master]["step"].fill_(self.age)


def _flatten(model: Decoder, weight_decay: float) -> Iterator[FlatParameters]:
    """One buffer for each kind of sharing, and norms and biases apart: they do not decay."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    sharings: dict[str, Sharing] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        sharing = sharing_of(name, model)
        sharings[sharing.name] = sharing
        groups.setdefault((sharing.name, parameter.ndim > 1), []).append(parameter)
    sizes = [room_for(parameters, sharings[kind]) for (kind, _), parameters in groups.items()]
    arena = torch.zeros(sum(sizes), dtype=model.dtype, device=model.device)  # one, as buckets of a publish may span two
    for ((kind, decays), parameters), weights in zip(groups.items(), arena.split(sizes), strict=True):
        yield FlatParameters(parameters, sharings[kind], weight_decay if decays else 0.0, weights)
