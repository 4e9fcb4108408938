"""A slot cache: rows of different lengths decode together, live rows stay at the front.

Shapes: per layer keys and values ``[slots, kv_heads, max_length, head_dim]``. transformers'
attention calls :meth:`SlotCache.update`; what it writes where is set by the engine before.
"""

import torch
from torch import Tensor


class SlotCache:
    """Keys and values of every slot and layer."""

    def __init__(self, layers: int, slots: int, heads: int, length: int, width: int, dtype: torch.dtype) -> None:
        shape = (layers, slots, heads, length, width)
        self.keys = torch.zeros(shape, dtype=dtype)
        self.values = torch.zeros(shape, dtype=dtype)
        self._rows = torch.arange(slots)
        self._positions: Tensor | None = None  # decoding: where each live row writes
        self._uniform = -1  # decoding: the same position for all, if they agree
        self._live = 0
        self._longest = 0
        self._slots: Tensor | None = None  # prefill: slots in sibling order
        self._source: Tensor | None = None  # prefill: prompt of each slot

    def begin_prefill(self, slots: Tensor, source: Tensor) -> None:
        """The next forward computes unique prompts; prompt ``source[i]`` goes to slot ``slots[i]``."""
        self._slots, self._source = slots, source

    def begin_decode(self, positions: Tensor, longest: int, uniform: bool) -> None:
        """The next forward computes one token for each live row, at ``positions[live]``."""
        self._slots = None
        self._positions, self._live, self._longest = positions, len(positions), longest
        self._uniform = longest - 1 if uniform else -1

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Store this forward's keys and values ``[b, heads, T, D]``; returns what to attend to."""
        if self._slots is not None:
            length = keys.shape[2]
            self.keys[layer][self._slots, :, :length] = keys[self._source]
            self.values[layer][self._slots, :, :length] = values[self._source]
            return keys, values
        live = slice(0, self._live)
        if self._uniform >= 0:
            self.keys[layer, live, :, self._uniform] = keys[:, :, 0]
            self.values[layer, live, :, self._uniform] = values[:, :, 0]
        else:
            self.keys[layer][self._rows[live], :, self._positions] = keys[:, :, 0]
            self.values[layer][self._rows[live], :, self._positions] = values[:, :, 0]
        return self.keys[layer, live, :, : self._longest], self.values[layer, live, :, : self._longest]

    def move(self, source: Tensor, target: Tensor, length: int) -> None:
        """Rows ``source`` move to ``target`` (disjoint), ``length`` positions of them."""
        self.keys[:, target, :, :length] = self.keys[:, source, :, :length]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]
