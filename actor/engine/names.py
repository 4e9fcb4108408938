"""Checkpoint names of a live transformers model's tensors.

transformers stacks a layer's experts into two parameters; checkpoints, and so the wire, have one
tensor per expert and projection. Every checkpoint name maps to a view of the live parameter.
"""

import torch
from torch import nn

STACKED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def weight_views(model: nn.Module) -> dict[str, torch.Tensor]:
    """Checkpoint name -> view, in the model's own order; tied tensors appear once, under the first name."""
    views: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        if name.endswith(STACKED[0]):
            prefix = name.removesuffix("gate_up_proj")
            inner = parameter.shape[1] // 2
            for expert in range(parameter.shape[0]):
                views[f"{prefix}{expert}.gate_proj.weight"] = parameter.data[expert, :inner]
                views[f"{prefix}{expert}.up_proj.weight"] = parameter.data[expert, inner:]
        elif name.endswith(STACKED[1]):
            prefix = name.removesuffix("down_proj")
            for expert in range(parameter.shape[0]):
                views[f"{prefix}{expert}.down_proj.weight"] = parameter.data[expert]
        else:
            views[name] = parameter.data
    return views
