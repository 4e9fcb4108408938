"""AdamW with global gradient clipping, a warm-up and a decay."""

import math

import torch
from torch import Tensor, nn

from common.config import OptimSection


def learning_rate(config: OptimSection, update: int, total: int) -> float:
    """The rate of update ``update`` (from 0) of ``total``: linear warm-up, then ``optim.schedule``."""
    if update < config.warmup_steps:
        return config.lr * (update + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (update - config.warmup_steps) / max(1, total - 1 - config.warmup_steps))
    left = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * left)


class Optimizer:
    """AdamW over a model's named parameters; :meth:`step` expects gradients summed over ranks."""

    def __init__(self, model: nn.Module, config: OptimSection, total_steps: int) -> None:
        self.names = [name for name, _ in model.named_parameters()]
        self.parameters = [parameter for _, parameter in model.named_parameters()]
        self.config, self.total_steps = config, total_steps
        self.steps = 0  # updates applied
        self.skipped = 0  # updates refused because a gradient was not finite
        self._adam = torch.optim.AdamW(
            self.parameters,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
        )

    @property
    def lr(self) -> float:
        """The rate of the next update."""
        return learning_rate(self.config, self.steps, self.total_steps)

    def zero_grad(self) -> None:
        """Gradients that no token reaches stay zeros, so that all ranks reduce the same tensors."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad.zero_()

    def grads(self) -> list[Tensor]:
        """Every gradient, in parameter order."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def step(self) -> float:
        """Clip to ``optim.max_grad_norm`` and update; returns the norm before clipping.

        A norm that is not finite changes nothing and is counted in ``skipped``.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        value = float(norm)
        if not math.isfinite(value):
            self.skipped += 1
            return value
        for group in self._adam.param_groups:
            group["lr"] = self.lr
        self._adam.step()
        self.steps += 1
        return value

    def state(self) -> dict[str, Tensor]:
        """``{moment}.{parameter}`` tensors, for a checkpoint."""
        state = {}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            for key, value in self._adam.state.get(parameter, {}).items():
                state[f"{key}.{name}"] = value
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`; names and shapes were checked by the checkpoint."""
        self._adam.state.clear()
        by_name = dict(zip(self.names, self.parameters, strict=True))
        for full, value in state.items():
            key, name = full.split(".", 1)
            parameter = by_name[name]
            target = value if key == "step" else value.to(parameter.device)
            self._adam.state[parameter][key] = target
