"""The embedded engine's larger products by oneDNN where that is the faster library (:mod:`common.onednn`).

Rows of a decode step come down one by one, so shapes come again; a prompt's first pass may meet new ones, for which
oneDNN takes half a millisecond each, beside many times that for the pass itself. Asked for by name, not through a
setting of the process: a reward model may run in another thread.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.onednn import LEAST, onednn_is_faster

TOLERANCE = 1e-3  # of sums of 256 products


def use_fast_products(model: Any) -> int:
    """Bind :func:`linear_forward` to every float32 linear layer of ``model``; returns how many."""
    if not (onednn_is_faster(torch) and _is_there()):
        return 0
    layers = [m for m in model.modules() if type(m) is torch.nn.Linear and m.weight.dtype == torch.float32]
    for layer in layers:
        layer.forward = MethodType(linear_forward, layer)  # type: ignore[method-assign]
    return len(layers)


def linear_forward(layer: torch.nn.Linear, x: Tensor) -> Tensor:
    """The layer's own, ``[..., k] -> [..., m]``."""
    if x.numel() * layer.out_features < LEAST:
        return F.linear(x, layer.weight, layer.bias)
    return _linear(x, layer.weight, layer.bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def _is_there() -> bool:
    """Whether this torch has the product, of which its documentation does not speak, and it is right."""
    x, weight = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    try:
        found = _linear(x[None], weight, x[0])[0]
    except (AttributeError, RuntimeError, TypeError):  # what torch raises for an operator it lacks or has otherwise
        return False
    exact = F.linear(x.double(), weight.double(), x[0].double())
    return found.shape == exact.shape and bool((found.double() - exact).abs().max() < TOLERANCE)
