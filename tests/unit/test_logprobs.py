"""Chunked log-probabilities against the whole softmax."""

import numpy as np
import pytest
import torch

from common.errors import DataError
from learner.logprobs import score_tokens, target_positions, token_logprobs

N, C, V = 37, 16, 53


def inputs():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, C, generator=g, requires_grad=True)
    head = torch.randn(V, C, generator=g, requires_grad=True)
    return hidden, head, torch.randint(0, V, (N,), generator=g)


@pytest.mark.parametrize("chunk", [1, 8, 37, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_entropy_and_gradients_are_those_of_a_whole_softmax(chunk, temperature):
    hidden, head, targets = inputs()
    logp, entropy = token_logprobs(hidden, head, targets, temperature, chunk)
    whole = torch.log_softmax(hidden @ head.T / temperature, dim=1)
    expected = whole.gather(1, targets[:, None])[:, 0]
    assert torch.allclose(logp, expected, atol=1e-6)
    assert torch.allclose(entropy, -(whole.exp() * whole).sum(1), atol=1e-5)
    weights = torch.randn(N, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((logp * weights).sum(), (hidden, head))
    for ours, theirs in zip(grads, torch.autograd.grad((expected * weights).sum(), (hidden, head)), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_no_tokens_give_no_gradient():
    hidden, head, _ = inputs()
    logp, _ = token_logprobs(hidden[:0], head, torch.zeros(0, dtype=torch.int64), 1.0, 8)
    logp.sum().backward()
    assert not head.grad.any()


def test_scores_at_alternatives_and_the_rest():
    hidden, head, targets = inputs()
    ids = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(i))[:5] for i in range(N)])
    logp, at, rest = score_tokens(hidden, head, targets, ids, 0.9, 8)
    whole = torch.softmax((hidden @ head.T / 0.9).double(), dim=1)
    assert torch.allclose(logp.double(), whole.gather(1, targets[:, None])[:, 0].log(), atol=1e-6)
    assert torch.allclose(at.double(), whole.gather(1, ids).log(), atol=1e-6)
    assert torch.allclose(rest.double().exp(), 1 - whole.gather(1, ids).sum(1), atol=1e-6)
    _, _, none_left = score_tokens(hidden, head, targets, torch.arange(V).expand(N, V), 1.0, 8)
    assert (none_left.exp() < 1e-5).all()


def test_a_first_token_has_no_logprob():
    offsets = np.array([0, 3, 3, 5], np.int32)
    assert target_positions(offsets, np.array([0, 1, 1, 0, 1], np.uint8)).tolist() == [1, 2, 4]
    for first in (0, 3):
        wanted = np.zeros(5, np.uint8)
        wanted[first] = 1
        with pytest.raises(DataError, match="first token"):
            target_positions(offsets, wanted)
