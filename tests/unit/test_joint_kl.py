"""Distillation through two heads against dense distributions in float64, differentiated by autograd."""

import itertools

import pytest
import torch

from learner.joint.kl import Divergence, distill_through_heads, diverge, divergence_of
from learner.logprobs import Head

N, C, C_T, V = 37, 12, 20, 53
EVERY = [Divergence(direction, k) for direction in ("forward", "reverse") for k in (0, 1, 7, V - 1, V)]


def name_of(how):
    return f"{how.direction}-{how.top_k}"


def inputs(scale=0.6):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, C, generator=g).mul(scale).requires_grad_()
    weight = torch.randn(V, C, generator=g).requires_grad_()
    teacher = torch.randn(N, C_T, generator=g) * scale, torch.randn(V, C_T, generator=g)
    return hidden, weight, teacher, torch.randint(0, V, (N,), generator=g)


def heads(weight, teacher, temperature, rows):
    mb = rows * V * 4 / 2**20
    return Head(weight, temperature, mb), (teacher[0], Head(teacher[1], temperature, mb))


def dense(hidden, weight, teacher, temperature, how):
    """By its definition: outcomes are tokens, or the teacher's likeliest and all others together."""
    s = torch.softmax(hidden.double() @ weight.double().T / temperature, dim=1)
    t = torch.softmax(teacher[0].double() @ teacher[1].double().T / temperature, dim=1)
    if 0 < how.top_k < V:
        ids = t.topk(how.top_k, dim=1).indices
        s, t = (torch.cat((p.gather(1, ids), 1 - p.gather(1, ids).sum(1, keepdim=True)), dim=1) for p in (s, t))
    first, second = (t, s) if how.direction == "forward" else (s, t)
    return (first * (first.log() - second.log())).sum(dim=1), s


def no_loss(logp, part):
    return torch.zeros(()), torch.zeros_like(logp)


@pytest.mark.parametrize("chunk", [5, 1000])
@pytest.mark.parametrize("how", EVERY, ids=name_of)
def test_divergence_and_gradients_are_those_of_dense_distributions(how, chunk):
    hidden, weight, teacher, targets = inputs()
    pull = torch.rand(N, generator=torch.Generator().manual_seed(1))
    head, taught = heads(weight, teacher, 0.8, chunk)
    loss, found = distill_through_heads(hidden, head, taught, targets, pull, no_loss, how)
    expected, _ = dense(hidden, weight, teacher, 0.8, how)
    assert torch.allclose(found.divergence.double(), expected, atol=1e-5)
    reference = (pull * expected).sum()
    assert torch.allclose(loss.double(), reference, atol=1e-5)
    grads = torch.autograd.grad(3.0 * loss, (hidden, weight))
    for ours, theirs in zip(grads, torch.autograd.grad(3.0 * reference, (hidden, weight)), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.equal(divergence_of(hidden, head, taught, how), found.divergence)


@pytest.mark.parametrize("how", [Divergence("forward", 7), Divergence("reverse")], ids=name_of)
def test_the_students_own_loss_goes_through_the_same_logits(how):
    hidden, weight, teacher, targets = inputs()
    pull, factors = torch.rand(2, N, generator=torch.Generator().manual_seed(1))

    def per_token(logp, part):
        return (factors[part] * logp.exp()).sum(), factors[part] * logp.exp()

    expected, _ = dense(hidden, weight, teacher, 1.3, how)
    whole = torch.softmax(hidden.double() @ weight.double().T / 1.3, dim=1)
    p = whole.gather(1, targets[:, None])[:, 0]
    reference = (pull * expected).sum() + (factors * p).sum()
    theirs = torch.autograd.grad(reference, (hidden, weight))
    for chunk in (5, 1000):
        head, taught = heads(weight, teacher, 1.3, chunk)
        loss, found = distill_through_heads(hidden, head, taught, targets, pull, per_token, how)
        assert torch.allclose(loss.double(), reference, atol=1e-5)
        assert torch.allclose(found.logp.double(), p.log(), atol=1e-5)
        for ours, their in zip(torch.autograd.grad(loss, (hidden, weight)), theirs, strict=True):
            assert torch.allclose(ours, their, atol=1e-5)


@pytest.mark.parametrize("how", EVERY, ids=name_of)
def test_gradients_of_logits_are_finite_differences(how):
    g = torch.Generator().manual_seed(2)
    z, t = torch.randn(2, 3, V, generator=g, dtype=torch.float64)
    log_t = torch.log_softmax(2 * t, dim=1)

    _, grad = diverge(torch.log_softmax(z, dim=1), log_t.clone(), how)
    step = 1e-5 * torch.eye(V, dtype=torch.float64)
    for row in range(3):

        def value(moved, row=row):  # [V], a logit moved in each
            return diverge(torch.log_softmax(z[row] + moved, dim=1), log_t[row].expand(V, V).clone(), how)[0]

        assert torch.allclose(grad[row], (value(step) - value(-step)) / 2e-5, atol=1e-8)


def test_divergences_are_ordered_and_vanish_where_both_agree():
    hidden, weight, teacher, _ = inputs()
    for direction in ("forward", "reverse"):
        head, taught = heads(weight, teacher, 1.0, 100)
        by_k = [divergence_of(hidden, head, taught, Divergence(direction, k)) for k in (1, 4, 16, 48, 0)]
        assert all((a <= b + 1e-5).all() for a, b in itertools.pairwise(by_k))  # finer outcomes tell more
        assert (by_k[0] > 0).any()
        for k in (0, 5):
            same = divergence_of(hidden, head, (hidden, head), Divergence(direction, k))
            assert same.abs().max() < 1e-6


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_tail_without_mass_gives_finite_gradients(direction):
    """A teacher that is certain leaves nothing in the bucket; a student that is certain of another token, nearly so."""
    sure, other = torch.full((2, 1, V), -200.0).unbind(0)
    sure[0, 3], other[0, 5] = 200.0, 200.0
    for s, t in ((sure, other), (other, sure), (sure, sure), (torch.zeros(1, V), sure), (sure, torch.zeros(1, V))):
        for k in (0, 1, 4):
            value, grad = diverge(*(torch.log_softmax(z, dim=1) for z in (s, t)), Divergence(direction, k))
            assert value.isfinite().all() and grad.isfinite().all()
            assert value.min() >= -1e-6


def test_no_tokens_give_no_gradient():
    hidden, weight, teacher, _ = inputs()
    head, _ = heads(weight, teacher, 1.0, 8)
    none = teacher[0][:0], Head(teacher[1])
    loss, found = distill_through_heads(
        hidden[:0], head, none, torch.zeros(0, dtype=torch.int64), torch.zeros(0), no_loss, Divergence()
    )
    loss.backward()
    assert not weight.grad.any() and found.logp.shape == (0,)
    assert divergence_of(hidden[:0], head, none, Divergence()).shape == (0,)
