"""Samples answers to many questions at once, with a cache of keys and values, from the learner's own model."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from learner.mesh import ALONE
from learner.model.decoder import Decoder
from learner.model.packing import Pack
from learner.model.rope import rotary


@dataclass
class CachedPlan:
    """Stands for a pack's plan: ``b`` sequences side by side, each with everything before it in a cache."""

    sequences: int
    keys: list[Tensor] = field(default_factory=list)  # by layer, [b, H, T, D]
    values: list[Tensor] = field(default_factory=list)
    layer: int = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q[b*t, Hq, D]``, ``k, v[b*t, Hk, D]`` of the next t tokens of each sequence -> ``[b*t, Hq*D]``."""
        q, k, v = (x.unflatten(0, (self.sequences, -1)).transpose(1, 2) for x in (q, k, v))
        first = len(self.keys) == self.layer
        if first:
            self.keys.append(k)
            self.values.append(v)
        else:
            self.keys[self.layer] = torch.cat((self.keys[self.layer], k), dim=2)
            self.values[self.layer] = torch.cat((self.values[self.layer], v), dim=2)
        k, v = self.keys[self.layer], self.values[self.layer]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=first, enable_gqa=q.shape[1] != k.shape[1])
        self.layer += 1
        return out.transpose(1, 2).flatten(0, 1).flatten(1)


@dataclass
class Samples:
    """``b`` completions, padded to ``T``."""

    ids: Tensor  # i64 [b, T]
    log_q: Tensor  # f32 [b, T, V] the whole distribution at each position
    lengths: Tensor  # i64 [b] the end token included


@torch.no_grad()
def sample(model: Decoder, prompts: Tensor, tokens: int, eos: int, generator: torch.Generator) -> Samples:
    """``tokens`` at most after each of ``prompts[b, P]`` (i64, of one length), at temperature 1."""
    count, start = prompts.shape
    plan = CachedPlan(count)
    ids, densities = [], []
    ended = torch.zeros(count, dtype=torch.bool)
    lengths = torch.full((count,), tokens)
    given, position = prompts, torch.arange(start)
    for t in range(tokens):
        cos, sin = rotary(position.repeat(count), model.config.rope, model.config.head_dim)
        plan.layer = 0
        pack = Pack(given.reshape(-1), plan, cos, sin, ALONE)  # type: ignore[arg-type]  # attends as a plan does
        hidden, _ = model.stage(pack, None)
        last = hidden.unflatten(0, (count, -1))[:, -1]
        log_q = (last @ model.head.T).log_softmax(dim=1)
        noise = torch.empty_like(log_q).exponential_(generator=generator)
        chosen = (log_q - noise.log()).argmax(dim=1)
        ids.append(chosen)
        densities.append(log_q)
        lengths = torch.where(~ended & (chosen == eos), t + 1, lengths)
        ended |= chosen == eos
        given, position = chosen[:, None], torch.tensor([start + t])
        if ended.all():
            break
    return Samples(torch.stack(ids, dim=1), torch.stack(densities, dim=1), lengths.clamp_max(len(ids)))
