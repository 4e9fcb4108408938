"""Rotary position embeddings and the ways in which configurations stretch them.

``default`` (RoPE, arXiv 2104.09864), ``linear`` (position interpolation, 2306.15595), ``llama3``
(Llama 3.1's by wavelength) and ``yarn`` (2309.00071). Tables are float32.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.errors import ModelError

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """What a configuration says of its positions."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_positions: int = 0  # the context length of pre-training
    low_frequency: float = 1.0  # llama3
    high_frequency: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    attention_factor: float = 1.0  # scales cos and sin
    truncate: bool = True

    @classmethod
    def from_dict(cls, hf: dict[str, Any], source: str) -> "RopeConfig":
        """From a config.json, old layout (``rope_theta``, ``rope_scaling``) or new (``rope_parameters``)."""
        rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
        kind = str(rope.get("rope_type", rope.get("type", "default")))
        theta = float(rope.get("rope_theta", hf.get("rope_theta", 10000.0)))
        if kind not in ROPE_TYPES:
            raise ModelError(
                f"{source}: rope_type={kind!r} is not supported; this learner knows {', '.join(ROPE_TYPES)}"
            )
        if float(rope.get("partial_rotary_factor", hf.get("partial_rotary_factor")) or 1.0) != 1.0:
            raise ModelError(f"{source}: partial_rotary_factor is not supported; use a checkpoint without it")
        if kind == "default":
            return cls(theta).checked(source)
        positions = int(rope.get("original_max_position_embeddings") or hf.get("max_position_embeddings") or 0)
        factor = rope.get("factor")
        if factor is None and kind == "yarn" and rope.get("original_max_position_embeddings"):
            factor = float(hf["max_position_embeddings"]) / positions
        if factor is None:
            raise ModelError(f"{source}: rope_type={kind!r} needs a factor; the configuration is incomplete")
        return cls(
            theta, kind, float(factor), positions,
            low_frequency=float(rope.get("low_freq_factor", 1.0)),
            high_frequency=float(rope.get("high_freq_factor", 4.0)),
            beta_fast=float(rope.get("beta_fast") or 32),
            beta_slow=float(rope.get("beta_slow") or 1),
            attention_factor=_attention_factor(rope, float(factor)) if kind == "yarn" else 1.0,
            truncate=bool(rope.get("truncate", True)),
        ).checked(source)  # fmt: skip

    def checked(self, source: str) -> "RopeConfig":
        """This. Raises :class:`ModelError` with the number of what no rotation can be made of."""
        least = {"rope_theta": (self.theta, 1.0), "factor": (self.factor, 0.0)}
        if self.kind in ("llama3", "yarn"):
            least["original_max_position_embeddings"] = (self.original_positions, 0)
        if self.kind == "llama3":
            least["high_freq_factor"] = (self.high_frequency, self.low_frequency)
        if self.kind == "yarn":
            least |= {"beta_fast": (self.beta_fast, 0.0), "beta_slow": (self.beta_slow, 0.0)}
        for key, (value, bound) in least.items():
            if not bound < value < math.inf:
                also = ", its low_freq_factor" if key == "high_freq_factor" else ""
                raise ModelError(f"{source}: {key}={value:g} must be a number above {bound:g}{also}")
        return self


def _attention_factor(rope: dict[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(float(rope["mscale"])) / scale(float(rope["mscale_all_dim"]))
    return scale(1.0)


def frequencies(config: RopeConfig, head_dim: int, device: torch.device) -> Tensor:
    """Radians per position, ``[D/2]``."""
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    plain = 1.0 / config.theta**exponent
    if config.kind == "linear":
        return plain / config.factor
    if config.kind == "llama3":
        turns = config.original_positions * plain / (2 * math.pi)  # within the old context
        smooth = (turns - config.low_frequency) / (config.high_frequency - config.low_frequency)
        smooth = smooth.clamp(0.0, 1.0)
        return plain * smooth + plain / config.factor * (1.0 - smooth)
    if config.kind == "yarn":
        low, high = (_yarn_dim(config, head_dim, turns) for turns in (config.beta_fast, config.beta_slow))
        if config.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001
        ramp = ((torch.arange(head_dim // 2, device=device, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
        return plain / config.factor * ramp + plain * (1.0 - ramp)
    return plain


def _yarn_dim(config: RopeConfig, head_dim: int, turns: float) -> float:
    """The dimension that makes ``turns`` rotations within the old context."""
    return head_dim * math.log(config.original_positions / (turns * 2 * math.pi)) / (2 * math.log(config.theta))


def rotary(positions: Tensor, config: RopeConfig, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin ``[N, 1, D]`` (transformers' half-split layout)."""
    angles = positions.float()[:, None] * frequencies(config, head_dim, positions.device)[None, :]
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos() * config.attention_factor, angles.sin() * config.attention_factor


def rotate(x_NHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embeddings."""
    first, second = x_NHD.chunk(2, dim=-1)
    return x_NHD * cos + torch.cat((-second, first), dim=-1) * sin
