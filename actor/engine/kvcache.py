"""Keys and values of all slots, where rows of different lengths decode together.

Live rows are contiguous from slot 0, so a step reads ``[:rows, :longest]`` and nothing else. The
engine says before a forward pass what it is (:meth:`SlotCache.begin_prefill` or
:meth:`SlotCache.begin_decode`); each attention layer then calls ``update`` once.

Legend: S slots, L maximum length, H key-value heads, D head width, n live rows, U unique prompts.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """One layer's ``[S, H, L, D]`` keys and values, seen through transformers' interface."""

    def __init__(self, owner: "SlotCache", keys_SHLD: Tensor, values_SHLD: Tensor) -> None:
        super().__init__()
        self._owner = owner
        self._keys, self._values = keys_SHLD, values_SHLD
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: allocated at construction."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store ``[rows, H, T, D]`` and return what to attend to, in the same layout."""
        owner = self._owner
        if owner.sources is not None:  # prefill: attend to the prompt itself, keep it for every sibling
            rows, length = slice(owner.first, owner.first + len(owner.sources)), key_states.shape[2]
            self._keys[rows, :, :length] = key_states[owner.sources]
            self._values[rows, :, :length] = value_states[owner.sources]
            return key_states, value_states
        rows, length = slice(owner.rows), owner.length
        self._keys[owner.row_ids, :, owner.positions] = key_states.squeeze(2)
        self._values[owner.row_ids, :, owner.positions] = value_states.squeeze(2)
        return self._keys[rows, :, :length], self._values[rows, :, :length]

    def get_seq_length(self) -> int:
        """Tokens of the longest live row."""
        return self._owner.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the keys; the engine makes its own masks."""
        return self._owner.length, 0

    def get_max_length(self) -> int:
        """L."""
        return self._keys.shape[2]


class SlotCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """A transformers ``Cache`` of a fixed number of slots."""

    def __init__(self, layers: int, slots: int, max_length: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self._all = torch.zeros(2, layers, slots, heads, max_length, head_dim, dtype=dtype)
        self._slots = torch.arange(slots)
        self.sources: Tensor | None = None  # i64 [n'] unique prompt of each new row, while a prefill runs
        self.first = 0  # slot of the first new row
        self.positions = self.row_ids = self._slots[:0]  # i64 [n] where each row writes
        self.rows = 0
        self.length = 0
        super().__init__(layers=[_SlotLayer(self, self._all[0, i], self._all[1, i]) for i in range(layers)])

    def begin_prefill(self, first: int, sources: Tensor) -> None:
        """The next pass reads U prompts; slot ``first + i`` keeps a copy of prompt ``sources[i]``."""
        self.first, self.sources = first, sources

    def begin_decode(self, positions: Tensor, longest: int) -> None:
        """The next pass reads one token a row, at ``positions`` (i64 ``[n]``), all below ``longest``."""
        self.sources = None
        self.rows, self.length = len(positions), longest
        self.row_ids, self.positions = self._slots[: self.rows], positions

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Copy the first ``length`` positions of rows ``sources`` over rows ``targets`` (i64, disjoint)."""
        self._all[:, :, targets, :, :length] = self._all[:, :, sources, :, :length]

    def clear(self) -> None:
        """Zero everything, so that non-finite leftovers cannot leak through a mask (0 * nan)."""
        self._all.zero_()
