"""Chunked log-probabilities against the whole softmax."""

import numpy as np
import pytest
import torch

from common.errors import DataError
from learner.logprobs import (
    Head,
    Share,
    by_autograd,
    loss_through_head,
    score_tokens,
    target_positions,
)

N, C, V = 37, 16, 53
TOTAL = by_autograd(lambda logp, _: logp.sum())


def inputs():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, C, generator=g, requires_grad=True)
    head = torch.randn(V, C, generator=g, requires_grad=True)
    return hidden, head, torch.randint(0, V, (N,), generator=g)


def head_of(weight, temperature, rows):
    return Head(weight, temperature, chunk_mb=rows * V * 4 / 2**20)


def whole_softmax(hidden, weight, targets, temperature):
    whole = torch.log_softmax(hidden @ weight.T / temperature, dim=1)
    return whole.gather(1, targets[:, None])[:, 0], -(whole.exp() * whole).sum(1)


@pytest.mark.parametrize("chunk", [1, 8, 37, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_entropy_and_gradients_are_those_of_a_whole_softmax(chunk, temperature):
    hidden, weight, targets = inputs()
    expected, expected_entropy = whole_softmax(hidden, weight, targets, temperature)
    weights = torch.randn(N, generator=torch.Generator().manual_seed(1))
    of_entropy = torch.randn(N, generator=torch.Generator().manual_seed(2))
    for bonus in (None, of_entropy):  # a loss of log p alone, and one with the entropy in it

        def per_token(logp, entropy, part, bonus=bonus):
            loss = (logp * weights[part]).sum()
            more = 0.0 if bonus is None else (entropy * bonus[part]).sum()
            return Share(loss + more, weights[part], None if bonus is None else bonus[part])

        loss, logp, entropy = loss_through_head(hidden, head_of(weight, temperature, chunk), targets, per_token)
        assert torch.allclose(logp, expected, atol=1e-5)
        assert torch.allclose(entropy, expected_entropy, atol=1e-5)
        reference = (expected * weights).sum() + (0.0 if bonus is None else (expected_entropy * bonus).sum())
        grads = torch.autograd.grad(loss, (hidden, weight))
        wanted = torch.autograd.grad(reference, (hidden, weight), retain_graph=True)
        for ours, theirs in zip(grads, wanted, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 8, 1000])
def test_a_loss_through_the_head_is_the_loss_of_the_log_probabilities(chunk):
    hidden, weight, targets = inputs()
    factors = torch.randn(N, generator=torch.Generator().manual_seed(1))

    def per_token(logp, part):
        return (factors[part] * logp.exp().clamp(max=0.9)).sum()  # no gradient where it is clipped

    loss, logp, entropy = loss_through_head(hidden, head_of(weight, 0.8, chunk), targets, by_autograd(per_token))
    expected, expected_entropy = whole_softmax(hidden, weight, targets, 0.8)
    reference = per_token(expected, slice(0, N))
    assert torch.allclose(loss, reference, atol=1e-5)
    assert torch.allclose(logp, expected, atol=1e-5)
    assert torch.allclose(entropy, expected_entropy, atol=1e-5)
    grads = torch.autograd.grad(3.0 * loss, (hidden, weight))
    for ours, theirs in zip(grads, torch.autograd.grad(3.0 * reference, (hidden, weight)), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_no_tokens_give_no_gradient():
    hidden, weight, _ = inputs()
    nothing = torch.zeros(0, dtype=torch.int64)
    loss, _, _ = loss_through_head(hidden[:0], head_of(weight, 1.0, 8), nothing, TOTAL)
    loss.backward()
    assert not weight.grad.any()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_sums_are_the_same():
    hidden, weight, targets = inputs()
    ids = torch.arange(5).expand(N, 5)
    plain, compiled = (
        score_tokens(hidden, Head(weight, 0.9, compiled=c), targets, ids, top=7) for c in (False, True)
    )  # fmt: skip
    for name, value in vars(plain).items():
        assert torch.allclose(value.float(), getattr(compiled, name).float(), atol=1e-5), name
    losses = [loss_through_head(hidden, Head(weight, compiled=c), targets, TOTAL)[0] for c in (False, True)]
    grads = [torch.autograd.grad(loss, (hidden, weight)) for loss in losses]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))


def test_logits_far_from_zero_are_shifted_and_their_sums_are_the_same():
    hidden, weight, targets = inputs()
    weight = torch.cat((weight, torch.ones(V, 1)), dim=1).detach()
    for offset in (-400.0, 0.0, 400.0):
        moved = torch.cat((hidden, torch.full((N, 1), offset)), dim=1).detach()
        _, logp, entropy = loss_through_head(moved, Head(weight), targets, TOTAL)
        expected, expected_entropy = whole_softmax(hidden, weight[:, :-1], targets, 1.0)
        assert torch.allclose(logp, expected, atol=2e-4)
        assert torch.allclose(entropy, expected_entropy, atol=2e-3)


def test_scores_at_alternatives_the_likeliest_and_the_rest():
    hidden, weight, targets = inputs()
    ids = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(i))[:5] for i in range(N)])
    scores = score_tokens(hidden, head_of(weight, 0.9, 8), targets, ids, top=7)
    whole = torch.softmax((hidden @ weight.T / 0.9).double(), dim=1)
    assert torch.allclose(scores.logp.double(), whole.gather(1, targets[:, None])[:, 0].log(), atol=1e-5)
    assert torch.allclose(scores.at_ids.double(), whole.gather(1, ids).log(), atol=1e-5)
    assert torch.allclose(scores.residual.double().exp(), 1 - whole.gather(1, ids).sum(1), atol=1e-5)
    assert torch.allclose(scores.entropy.double(), -(whole * whole.log()).sum(1), atol=1e-5)
    best = whole.topk(7, dim=1)
    assert torch.equal(scores.top_ids, best.indices)
    assert torch.allclose(scores.top_logp.double(), best.values.log(), atol=1e-5)
    everything = score_tokens(hidden, head_of(weight, 1.0, 8), targets, torch.arange(V).expand(N, V))
    assert (everything.residual.exp() < 1e-5).all()


def test_a_first_token_has_no_logprob():
    offsets = np.array([0, 3, 3, 5], np.int32)
    assert target_positions(offsets, np.array([0, 1, 1, 0, 1], np.uint8)).tolist() == [1, 2, 4]
    for first in (0, 3):
        wanted = np.zeros(5, np.uint8)
        wanted[first] = 1
        with pytest.raises(DataError, match="first token"):
            target_positions(offsets, wanted)
