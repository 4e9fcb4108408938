"""One forward, one backward: micro-batches through the pipeline's stages (1F1B, arXiv 2006.09503).

::

    stage 0   F0 F1 F2    B0 F3 B1 ...          a stage holds at most pp - stage micro-batches
    stage 1      F0 F1 B0 F2 B1 ...             activations at a time; the last runs F, B, F, B
    stage 2         F0 B0 F1 B1 ...

With one stage this is the plain loop over micro-batches. Packs have any size: every stage reads the
same shard, so all know the shape of what comes next.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from common.trace import Phase, no_phase
from learner.mesh import Mesh


@dataclass
class StageResult:
    """What a stage made of a micro-batch."""

    output: Tensor | None  # for the next stage; None on the last
    loss: Tensor  # this stage's own: balance terms, and the policy loss on the last


class RunStage(Protocol):
    """Runs micro-batch ``index`` on this stage; ``received`` is None on the first."""

    def __call__(self, index: int, received: Tensor | None) -> StageResult:
        """Forward only."""


class _Neighbours:
    """Sends and receives between stages; what is exchanged in both directions goes in one batch."""

    def __init__(self, mesh: Mesh, dtype: torch.dtype, shapes: Sequence[tuple[int, int]], phase: Phase) -> None:
        self.mesh, self.dtype, self.shapes, self.phase = mesh, dtype, shapes, phase
        at, stage = dict(mesh.at), mesh.at["pp"]
        self.before = None if mesh.is_first_stage else mesh.rank_of(**{**at, "pp": stage - 1})
        self.after = None if mesh.is_last_stage else mesh.rank_of(**{**at, "pp": stage + 1})

    def exchange(
        self, *, forward: tuple[Tensor | None, int | None], backward: tuple[Tensor | None, int | None]
    ) -> tuple[Tensor | None, Tensor | None]:
        """``forward``: (output to the next stage, micro-batch to receive from the one before), and so ``backward``.

        Returns the received input and the received gradient.
        """
        (output, receive_input), (grad, receive_grad) = forward, backward
        ops: list[dist.P2POp] = []
        taken = self._take(ops, receive_input, self.before), self._take(ops, receive_grad, self.after)
        for tensor, peer in ((output, self.after), (grad, self.before)):
            if tensor is not None and peer is not None:
                ops.append(dist.P2POp(dist.isend, tensor.contiguous(), peer))
        if ops:
            self.phase("idle.ranks")
            for work in dist.batch_isend_irecv(ops):
                work.wait()
        return taken

    def _take(self, ops: list[dist.P2POp], index: int | None, peer: int | None) -> Tensor | None:
        if index is None or peer is None:
            return None
        tensor = torch.empty(self.shapes[index], dtype=self.dtype, device=self.mesh.device)
        ops.append(dist.P2POp(dist.irecv, tensor, peer))
        return tensor


def run_pipeline(
    mesh: Mesh,
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    run_stage: RunStage,
    phase: Phase = no_phase,
) -> None:
    """Forward and backward of ``len(shapes)`` micro-batches; ``shapes[i]`` is what stages exchange for i.

    Gradients accumulate in the parameters. Every rank must bring the same number of micro-batches.
    ``phase`` is told "forward", "backward", and "idle.ranks" while a neighbour is waited for.
    """
    count = len(shapes)
    between = _Neighbours(mesh, dtype, shapes, phase)
    ahead = min(mesh.sizes["pp"] - mesh.at["pp"] - 1, count)
    held: list[tuple[Tensor | None, StageResult]] = []

    def forward(index: int, received: Tensor | None) -> Tensor | None:
        if received is not None:
            received.requires_grad_()
        phase("forward")
        result = run_stage(index, received)
        held.append((received, result))
        return None if result.output is None else result.output.detach()

    def backward(grad_output: Tensor | None) -> Tensor | None:
        received, result = held.pop(0)
        phase("backward")
        if result.output is None:
            result.loss.backward()
        else:
            assert grad_output is not None
            ends = [(result.output, grad_output), (result.loss, None)]
            ends = [(tensor, grad) for tensor, grad in ends if tensor.requires_grad]
            if ends:  # else all of this stage and of those before is frozen
                torch.autograd.backward([tensor for tensor, _ in ends], [grad for _, grad in ends])
        if received is None:
            return None
        return torch.zeros_like(received) if received.grad is None else received.grad

    nothing = (None, None)
    for index in range(ahead):
        received, _ = between.exchange(forward=(None, index), backward=nothing)
        between.exchange(forward=(forward(index, received), None), backward=nothing)
    received = between.exchange(forward=(None, ahead), backward=nothing)[0] if ahead < count else None
    for index in range(ahead, count):
        output = forward(index, received)
        _, grad_output = between.exchange(forward=(output, None), backward=(None, index - ahead))
        grad = backward(grad_output)
        following = index + 1 if index + 1 < count else None
        received, _ = between.exchange(forward=(None, following), backward=(grad, None))
    for index in range(count - ahead, count):
        _, grad_output = between.exchange(forward=nothing, backward=(None, index))
        between.exchange(forward=nothing, backward=(backward(grad_output), None))


def run_forward(
    mesh: Mesh,
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    stage: Callable[[int, Tensor | None], Tensor | None],
    phase: Phase = no_phase,
) -> None:
    """Forward alone: ``stage(i, received)`` returns what the next stage is sent, None on the last."""
    between, nothing = _Neighbours(mesh, dtype, shapes, phase), (None, None)
    for index in range(len(shapes)):
        received, _ = between.exchange(forward=(None, index), backward=nothing)
        phase("forward")
        between.exchange(forward=(stage(index, received), None), backward=nothing)
