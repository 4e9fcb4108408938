"""AdamW with global gradient clipping and a linear warm-up."""

import math

import torch
from torch import Tensor, nn


class Optimizer:
    """AdamW over a model's named parameters; :meth:`step` expects gradients summed over ranks."""

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        warmup_steps: int,
    ) -> None:
        self.names = [name for name, _ in model.named_parameters()]
        self.parameters = [parameter for _, parameter in model.named_parameters()]
        self.lr, self.warmup_steps = lr, warmup_steps
        self.steps = 0  # updates applied
        self.skipped = 0  # updates refused because a gradient was not finite
        self._adam = torch.optim.AdamW(self.parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

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

    def step(self, max_grad_norm: float) -> float:
        """Clip to ``max_grad_norm`` and update; returns the norm before clipping.

        A norm that is not finite changes nothing and is counted in ``skipped``.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, max_grad_norm)
        value = float(norm)
        if not math.isfinite(value):
            self.skipped += 1
            return value
        scale = min(1.0, (self.steps + 1) / self.warmup_steps) if self.warmup_steps > 0 else 1.0
        for group in self._adam.param_groups:
            group["lr"] = self.lr * scale
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
