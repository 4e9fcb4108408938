"""Checkpoint names -> views of live parameters.

transformers 5 fuses a layer's experts into two parameters; checkpoints and our wire keep one
tensor an expert. A fused expert is ``gate`` above ``up``, both ``[I, C]``, as in transformers'
``conversion_mapping`` (MergeModulelist over experts, then Concatenate over rows).

Legend: E experts, I expert width, C hidden width.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

GATE_UP = "mlp.experts.gate_up_proj"  # [E, 2 I, C]
DOWN = "mlp.experts.down_proj"  # [E, C, I]


def checkpoint_views(model: Any) -> dict[str, Tensor]:
    """Every trainable tensor of ``model`` (a transformers causal LM) under its checkpoint name.

    The views share memory with the parameters. A head tied to the embedding is not listed, as in
    checkpoints.
    """
    views: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        views.update(_split(name, parameter.data))
    return views


def _split(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if name.endswith(GATE_UP):
        prefix = name.removesuffix("gate_up_proj")
        width = tensor.shape[1] // 2
        for expert, rows in enumerate(tensor):
            yield f"{prefix}{expert}.gate_proj.weight", rows[:width]
            yield f"{prefix}{expert}.up_proj.weight", rows[width:]
    elif name.endswith(DOWN):
        prefix = name.removesuffix("down_proj")
        for expert, matrix in enumerate(tensor):
            yield f"{prefix}{expert}.down_proj.weight", matrix
    else:
        yield name, tensor
