"""One replica on several ranks: the first talks to the broker, the others do what it says.

::

    leader     SCORE + packed tokens | SWAP + layout + buckets | IDLE | STOP
    followers  the same forward      | their part of each      |      | leave

Numbers and arrays only: nothing that arrives is ever unpickled.
"""

import json
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from common.weights import StagedWeights, plan_buckets
from learner.mesh import Mesh

SCORE, SWAP, IDLE, STOP = range(4)
IDLE_S = 60.0  # followers hear of the leader at least this often; their patience is the group's timeout


@dataclass
class Packed:
    """Sequences to score."""

    token_ids: Tensor  # i64 [N]
    cu_seqlens: Tensor  # i64 [B+1], on the host
    at: Tensor  # i64 [n] packed positions of the tokens to score
    ids: Tensor  # i64 [n, k] alternatives of each
    experts: Tensor | None  # i16 [N, L, k']
    temperature: float


class Followers:
    """Carries the leader's orders. On a replica of one rank it does nothing."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    @property
    def any(self) -> bool:
        """Whether there are any."""
        return self.mesh.world > 1

    def order(self, kind: int) -> int:
        """The leader's order, on all ranks."""
        return self.mesh.broadcast_int(kind) if self.any else kind

    def share(self, packed: Packed | None) -> Packed:
        """The leader's sequences, on all ranks."""
        if not self.any:
            assert packed is not None, "the leader brings the sequences"
            return packed
        longs: list[Tensor | None] = [None] * 5
        records = None
        if packed is not None:
            temperature = torch.tensor([packed.temperature], dtype=torch.float64).view(torch.int64)
            longs = [packed.token_ids, packed.cu_seqlens, packed.at, packed.ids, temperature]
            experts = torch.zeros((0, 0, 1), dtype=torch.int16) if packed.experts is None else packed.experts
            records = experts.view(torch.uint8)  # no backend sends int16
        found = [self._array(tensor, axes) for tensor, axes in zip(longs, (1, 1, 1, 2, 1), strict=True)]
        token_ids, offsets, at, ids, temperature = found
        experts = self._array(records, 3, torch.uint8).view(torch.int16)
        degrees = float(temperature.cpu().view(torch.float64).item())
        return Packed(token_ids, offsets.cpu(), at, ids, experts if experts.numel() else None, degrees)

    def share_weights(self, staged: StagedWeights | None) -> StagedWeights:
        """The leader's received version, on all ranks."""
        if not self.any:
            assert staged is not None, "the leader brings the weights"
            return staged
        text = None
        if staged is not None:
            slots = [[[s.name, s.dtype, list(s.shape)] for s in bucket.slots] for bucket, _ in staged.buckets]
            text = torch.from_numpy(np.frombuffer(json.dumps([staged.version, slots]).encode(), np.uint8).copy()).long()
        version, slots = json.loads(self._array(text, 1).cpu().to(torch.uint8).numpy().tobytes())
        buckets = []
        for index, bucket in enumerate(plan_buckets(tensors, 1 << 62)[0] for tensors in slots):
            flat = torch.empty(bucket.nbytes, dtype=torch.uint8, device=self.mesh.device)
            if staged is not None:
                flat.copy_(staged.buckets[index][1])
            dist.broadcast(flat, 0)
            buckets.append((bucket, flat))
        return StagedWeights(0, version, "", buckets) if staged is None else staged

    def _array(self, tensor: Tensor | None, axes: int, dtype: torch.dtype = torch.int64) -> Tensor:
        shape = torch.zeros(axes, dtype=torch.int64, device=self.mesh.device)
        if tensor is not None:
            shape.copy_(torch.tensor(tensor.shape))
        dist.broadcast(shape, 0)
        if tensor is None:
            tensor = torch.empty(shape.tolist(), dtype=dtype, device=self.mesh.device)
        tensor = tensor.to(self.mesh.device).contiguous()
        dist.broadcast(tensor, 0)
        return tensor
