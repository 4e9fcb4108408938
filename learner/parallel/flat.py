"""Parameters in flat buffers: one reduce-scatter for their gradients, one gather for their update.

::

    grads [P] --reduce-scatter over ``shard``--> [P/s] --all-reduce over ``replicate``--> AdamW --gather--> weights [P]

Every rank keeps 1/s of the optimizer's state (ZeRO stage 1, arXiv 1910.02054): float32 weights and
two moments. Parameters and gradients are views of the buffers, so nothing is copied together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from learner.mesh import Axis
from learner.parallel.collectives import gather_into, reduce_scatter_into, sum_over

ALIGNMENT = 64  # elements; a shard starts at a multiple
NORM_CHUNK = 1 << 22  # elements squared at once: their squares are 16 MB, where those of all are a second gradient


@dataclass(frozen=True)
class Sharing:
    """Which ranks hold the same parameters, and which of them answers for what."""

    name: str
    shard: Axis  # the optimizer's state is cut over these
    replicate: Axis  # and repeated over these
    partial: Axis  # ranks that hold the same parameter and see other tokens, beside the data ranks
    counts: bool  # whether this rank's shard counts in norms and checkpoints (others hold the same)


def room_for(parameters: Sequence[nn.Parameter], sharing: Sharing) -> int:
    """Elements that the buffer of ``parameters`` has."""
    unit = ALIGNMENT * sharing.shard.size
    return -(-sum(p.numel() for p in parameters) // unit) * unit


class FlatParameters:
    """The parameters of one sharing, flat, with this rank's shard of the optimizer's state."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], sharing: Sharing, decay: float, weights: Tensor | None = None
    ) -> None:
        """``weights``: zeros, as many as :func:`room_for` says, to move the parameters into."""
        self.sharing, self.decay = sharing, decay
        self.parameters = list(parameters)
        like = self.parameters[0]
        padded = room_for(self.parameters, sharing)
        self.weights = torch.zeros(padded, dtype=like.dtype, device=like.device) if weights is None else weights
        self.grads = torch.zeros(padded, dtype=torch.float32, device=like.device)
        self._adopt(like.dtype == torch.float32)
        size = padded // sharing.shard.size
        self.range = range(sharing.shard.rank * size, (sharing.shard.rank + 1) * size)
        self._own = slice(self.range.start, self.range.stop)
        mine = self.weights[self._own]
        self.master = nn.Parameter(mine if like.dtype == torch.float32 else mine.float())
        self.own_grads = self.grads[self._own]  # valid after :meth:`reduce`

    def _adopt(self, exact: bool) -> None:
        """Move the parameters into the buffer; float32 gradients are written in place by autograd."""
        start = 0
        for parameter in self.parameters:
            end = start + parameter.numel()
            self.weights[start:end].copy_(parameter.data.reshape(-1))
            parameter.data = self.weights[start:end].view(parameter.shape)
            grad = self.grads[start:end].view(parameter.shape)
            if exact:
                parameter.grad = grad
            else:
                parameter.register_post_accumulate_grad_hook(_Into(grad))
            start = end

    def zero_grad(self) -> None:
        """Gradients that no token reaches stay zeros, so that all ranks reduce the same buffer."""
        self.grads.zero_()

    def reduce(self) -> None:
        """Sum the gradients over all who hold these parameters; each rank ends with its shard's."""
        sharing = self.sharing
        sum_over(self.grads, sharing.partial)
        if sharing.shard.size > 1:
            self.own_grads = torch.empty(len(self.range), device=self.grads.device)
            reduce_scatter_into(self.own_grads, self.grads, group=sharing.shard.group)
        sum_over(self.own_grads, sharing.replicate)

    def squared_norm(self) -> Tensor:
        """Of the shard, where it counts; float64.

        Not by ``torch.linalg.vector_norm``, whose square on a CPU is 2 % off over 1e8 elements.
        """
        value = torch.zeros((), dtype=torch.float64, device=self.own_grads.device)
        for chunk in self.own_grads.split(NORM_CHUNK) if self.sharing.counts else ():
            value += chunk.square().sum()
        return value

    @torch.no_grad()
    def publish(self) -> None:
        """Everyone gets the updated weights."""
        if self.weights.dtype != torch.float32:
            self.weights[self._own].copy_(self.master)
        if self.sharing.shard.size > 1:
            gather_into(self.weights, self.weights[self._own].clone(), group=self.sharing.shard.group)


class _Into:
    """Adds a parameter's gradient to a float32 buffer and frees it."""

    def __init__(self, grad: Tensor) -> None:
        self.grad = grad

    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.grad.add_(parameter.grad)
            parameter.grad = None
