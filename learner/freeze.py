"""Parameters that stay as they came: ``optim.freeze`` names them by patterns of tensor names.

Biases of experts are no parameters: they move by ``loss.expert_bias_rate`` whatever is frozen.
"""

import re
from collections.abc import Sequence

from common.errors import ConfigError
from common.weights import is_frozen
from learner.layout import places, views
from learner.model.decoder import Decoder


def _trained_as(name: str) -> str:
    """The same for all tensors that are one parameter."""
    name = re.sub(r"\b[qkv]_proj", "qkv", name)
    return re.sub(r"experts\.\d+", "experts", re.sub(r"\b(gate|up)_proj", "gate_up", name))


def freeze(model: Decoder, patterns: Sequence[str]) -> frozenset[str]:
    """Switch off the gradients of what ``patterns`` match; returns their names, those of other ranks included.

    Raises :class:`ConfigError` for a pattern that matches nothing, or a part of tensors that are
    one parameter here (q, k and v; gate and up; the experts of a layer), and for patterns that match all.
    """
    names = [place.name for place in places(model.config) if not place.optional]
    for pattern in patterns:
        if not any(is_frozen(name, (pattern,)) for name in names):
            raise ConfigError(f"optim.freeze: {pattern!r} matches no tensor; names look like {names[1]}")
    chosen: dict[str, dict[bool, str]] = {}
    for name in names:  # of all ranks, so that all of them agree
        chosen.setdefault(_trained_as(name), {})[is_frozen(name, patterns)] = name
    for both in chosen.values():
        if len(both) == 2:
            raise ConfigError(f"optim.freeze: {both[True]} is frozen but {both[False]} is not; they are trained as one")
    frozen = frozenset(name for name in names if is_frozen(name, patterns))
    if len(frozen) == len(names):
        raise ConfigError(f"optim.freeze={list(patterns)}: no tensor is left to train; leave a pattern out")
    owner = {view.untyped_storage().data_ptr(): name for name, view in views(model).items()}
    for parameter in model.parameters():
        parameter.requires_grad_(not is_frozen(owner[parameter.untyped_storage().data_ptr()], patterns))
    return frozen
