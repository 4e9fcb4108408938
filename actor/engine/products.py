"""The embedded engine's larger products by oneDNN where that is the faster library (:mod:`common.onednn`).

Rows of a decode step come down one by one, so shapes come again; a prompt's first pass may meet new ones, for which
oneDNN takes half a millisecond each, beside many times that for the pass itself.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.onednn import LEAST, by_onednn, onednn_is_faster


def use_fast_products(model: Any) -> int:
    """Bind :func:`linear_forward` to every float32 linear layer of ``model``; returns how many."""
    if not onednn_is_faster(torch):
        return 0
    layers = [m for m in model.modules() if type(m) is torch.nn.Linear and m.weight.dtype == torch.float32]
    for layer in layers:
        layer.forward = MethodType(linear_forward, layer)  # type: ignore[method-assign]
    return len(layers)


def linear_forward(layer: torch.nn.Linear, x: Tensor) -> Tensor:
    """The layer's own, ``[..., k] -> [..., m]``."""
    if x.numel() * layer.out_features < LEAST:
        return F.linear(x, layer.weight, layer.bias)
    return by_onednn(torch, lambda: F.linear(x, layer.weight, layer.bias))
