"""How wide an expert record is: the mixture of experts of a run, read from its model's config.json."""

import json
from dataclasses import dataclass
from pathlib import Path

from common.config import RunConfig
from common.errors import ModelError
from common.wire import UNROUTED

MODEL_TYPE = "qwen3_moe"  # the family whose routing can be recorded and replayed
REMEDY = "set rollout.routing_replay=false or name a Qwen3-MoE directory in model.path"


@dataclass(frozen=True)
class Routing:
    """Sizes of a model's mixture of experts."""

    sparse: tuple[int, ...]  # the layers that have experts, counted from 0
    experts: int  # of a layer
    per_token: int  # experts of a layer that read one token

    @property
    def layers(self) -> int:
        """How many layers have experts."""
        return len(self.sparse)

    @property
    def width(self) -> int:
        """``R``, the numbers that an expert record holds of a token."""
        return self.layers * self.per_token


def read_routing(config: RunConfig) -> Routing | None:
    """What ``rollout.routing_replay`` records; None where it is off.

    Raises :class:`ModelError` if the model has no experts or its config.json cannot be read.
    """
    if not config.rollout.routing_replay:
        return None
    path = Path(config.model.path) / "config.json"
    try:
        hf = json.loads(path.read_text())
        routing = _routing(hf) if hf["model_type"] == MODEL_TYPE else Routing((), 0, 0)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); the directory may be half written") from error
    if not routing.width:
        raise ModelError(
            f"rollout.routing_replay=true: {path} (model_type={hf['model_type']!r}) has no experts; {REMEDY}"
        )
    if routing.experts > UNROUTED:
        raise ModelError(
            f"rollout.routing_replay=true: {path} has {routing.experts} experts a layer, a record numbers at most "
            f"{UNROUTED}; {REMEDY}"
        )
    return routing


def _routing(hf: dict[str, object]) -> Routing:
    def number(key: str, otherwise: object = 0) -> int:
        return int(str(hf.get(key) or otherwise))

    experts, every = number("num_experts", hf.get("num_local_experts") or 0), number("decoder_sparse_step", 1)
    dense = hf.get("mlp_only_layers") or ()
    if not isinstance(dense, list | tuple):
        raise TypeError(f"mlp_only_layers={dense!r} is no list")
    sparse = (i for i in range(number("num_hidden_layers")) if i not in dense and (i + 1) % every == 0)
    return Routing(tuple(sparse) if experts else (), experts, number("num_experts_per_tok"))
