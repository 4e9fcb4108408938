"""Logits -> sampled tokens and the log-probabilities they were sampled with. Pure.

Legend: n rows, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Sampled(NamedTuple):
    """One token a row."""

    ids: Tensor  # i64 [n]
    logprobs: Tensor  # f32 [n] log q of ids
    logprobs_nV: Tensor  # f32 [n, V] log q


def sample(logits_nV: Tensor, temperatures: Tensor, uniforms: Tensor) -> Sampled:
    """Sample each row by inverse CDF, or take its argmax where the temperature is 0.

    ``temperatures`` f32 ``[n]``, ``uniforms`` f64 ``[n]`` in (0, 1). Nothing is truncated; log q is
    ``log_softmax(logits / temperature)`` in float32, at temperature 1 for greedy rows. An id whose
    float32 probability is zero is never sampled.
    """
    greedy = temperatures == 0.0
    scale = torch.where(greedy, 1.0, temperatures)
    logits_nV = logits_nV.float()
    logprobs_nV = (logits_nV / scale.unsqueeze(1)).log_softmax(-1)
    cdf_nV = logprobs_nV.exp().cumsum(-1, dtype=torch.float64)
    total_n1 = cdf_nV[:, -1:].contiguous()
    ids = torch.searchsorted(cdf_nV, uniforms.unsqueeze(1) * total_n1, right=True)
    # uniform * total may round up to the total: the last id with a positive probability ends the range.
    ids = torch.minimum(ids, torch.searchsorted(cdf_nV, total_n1)).squeeze(1)
    if greedy.any():
        ids = torch.where(greedy, logits_nV.argmax(-1), ids)
    return Sampled(ids, logprobs_nV.gather(1, ids.unsqueeze(1)).squeeze(1), logprobs_nV)
