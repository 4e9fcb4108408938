"""T9: a batch has one loss and one gradient, however the broker cuts it for ranks and a rank into micro-batches.

From trajectories of several segments through ``make_shards``, the wire, ``to_batch`` and ``train_step``,
against the same loss written out densely: one sequence at a time, all logits, torch's own gradient, and the
denominators of algorithms.md 0.3 counted by a loop.
"""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from broker.batch import collate
from broker.decision import Rule, Scores, accept_all, reject
from broker.packing import make_shards
from common.config import OptimSection, RolloutSection, RunConfig
from common.errors import DataError
from common.objective import AdvantageSection, LossSection
from common.wire import STARTS
from learner.feed import to_batch
from learner.losses.policy import policy_loss
from learner.model.decoder import Decoder
from learner.optim import Optimizer
from learner.step import StepSettings, train_step
from tests.properties.made import SHAPE, delivered, tokens_of, trajectory

T = 0.9
G, GROUPS = 3, 2
ROLES = [  # of each trajectory of each group: 1 sampled, 2 where a segment begins
    [0, 0, 1, 1, 1], [0, 1, 1, STARTS, 0, 1, 1, 1], [0, 1],
    [0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 1, STARTS, 1, 1, STARTS, 0, 1], [0, 1, 1, 1],
]  # fmt: skip
LONGEST = RolloutSection().max_sampled
LOSSES = {
    **{how: LossSection(aggregate=how, clip_low=0.1, clip_high=0.2, balance=0.0)
       for how in ("token_mean", "sequence_mean", "constant", "prompt_mean")},
    "gspo": LossSection(kind="gspo", clip_low=0.05, clip_high=0.1, aggregate="sequence_mean", balance=0.0),
    "mask_geometric": LossSection(
        anchor="proximal", correction="mask_geometric", correction_low=0.97, correction_high=1.03, balance=0.0
    ),
    "cap_sequence": LossSection(anchor="proximal", correction="cap_sequence", correction_high=1.5, balance=0.0),
    "opsm": LossSection(opsm=0.05, clip_low=0.1, clip_high=0.2, balance=0.0),
    "m2po": LossSection(kind="m2po", m2_threshold=0.02, balance=0.0),
}  # fmt: skip


def model_of():
    torch.manual_seed(3)
    model = Decoder(SHAPE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.3)
    return model


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return model_of()


@pytest.fixture(scope="module")
def optimizer(model):
    return Optimizer(model, OptimSection(lr=1e-30, max_grad_norm=1e9), 10_000)  # gradients are wanted, no steps


@torch.no_grad()
def near(model, trajectories, rng):
    """Log q of a behaviour policy close to the model's: what a rollout would have logged."""
    out = []
    for roles, ids in trajectories:
        log_q = np.zeros(len(roles))
        for first, end in rows(roles):
            log_q[first + 1 : end] = log_probs(model, ids[first:end]).numpy()
        out.append(np.minimum(-1e-3, log_q + rng.normal(0, 0.15, len(roles))))
    return out


def rows(roles):
    """Segments of one trajectory."""
    cuts = [0, *np.flatnonzero(np.asarray(roles) == STARTS).tolist(), len(roles)]
    return list(itertools.pairwise(cuts))


def log_probs(model, ids):
    """Log-probabilities of a whole sequence's tokens but the first, from all of its logits."""
    ids = torch.as_tensor(np.asarray(ids), dtype=torch.int64)
    x = model.hidden(ids, np.array([0, len(ids)], np.int32))[:-1]
    return (x.double() @ model.head.double().T / T).log_softmax(1).gather(1, ids[1:, None])[:, 0]


def made(model, loss, seed, **how):
    rng = np.random.default_rng(seed)
    config = RunConfig(
        rollout=RolloutSection(group_size=G, temperature=T),
        loss=loss,
        advantage=AdvantageSection(kind="dr_grpo"),
        **how,
    )
    ids = [rng.integers(0, SHAPE.vocab_size, len(roles)) for roles in ROLES]
    log_q = near(model, zip(ROLES, ids, strict=True), rng)
    members = [
        trajectory(i // G, i % G, rng.random(), roles, rng, ids=ids[i], log_q=log_q[i]) for i, roles in enumerate(ROLES)
    ]
    batch = collate(0, members, config)
    noise = rng.normal(0, 0.3, len(batch.log_q))
    log_p = np.where(batch.trainable == 1, np.minimum(0, batch.log_q + noise), 0).astype(np.float32)
    decision = reject(batch, Scores(1, log_p, np.zeros((len(log_p), 0), np.float32)), Rule(5, 0.0))
    assert 0 < decision.accepted < decision.proposed
    return batch, decision, config


def stepped(model, optimizer, batch, decision, config, world, limit):
    """Loss and gradient of every parameter, added up over ``world`` ranks."""
    settings = StepSettings(config.loss, T, limit, 5 * SHAPE.vocab_size * 4 / 2**20)  # five tokens of logits at once
    loss, gradient = 0.0, [torch.zeros(p.shape, dtype=torch.float64) for p in model.parameters()]
    for part in delivered(batch, decision, config, world):
        metrics, _ = train_step(model, optimizer, part, model.uniform_expert_fraction(), settings)
        loss += metrics["loss"]
        for total, parameter in zip(gradient, model.parameters(), strict=True):
            total += parameter.grad.double()
    return loss, torch.cat([g.reshape(-1) for g in gradient])


def denominators(how):
    """Weight of a token of each trajectory, counted by a loop (0.3)."""
    sampled = [sum(role == 1 for role in roles) for roles in ROLES]
    prompts = [sum(sampled[g * G : g * G + G]) for g in range(GROUPS)]
    return [
        {
            "token_mean": 1 / sum(sampled), "sequence_mean": 1 / (len(ROLES) * sampled[i]),
            "constant": 1 / (len(ROLES) * LONGEST), "prompt_mean": 1 / (GROUPS * prompts[i // G]),
        }[how]
        for i in range(len(ROLES))
    ]  # fmt: skip


def dense(model, batch, decision, section):
    """The loss, written out, its gradient by torch, and of how many tokens it is not plainly ``ratio A``."""
    weights = denominators(section.aggregate)
    whole = []
    for i, roles in enumerate(ROLES):
        start = int(batch.cu_seqlens[i])
        for first, end in rows(roles):
            own = log_probs(model, batch.token_ids[start + first : start + end])
            at = [t for t in range(first + 1, end) if roles[t] == 1]
            whole += [(i, start + t, own[t - first - 1]) for t in at]
    mates = [[(n, own.detach()) for j, n, own in whole if j == i] for i in range(len(ROLES))]
    drift = [float(np.mean([float(own) - batch.log_q[n] for n, own in m])) for m in mates]
    harmful = sorted(
        ((float(own.detach()) - float(batch.log_q[n])) ** 2, n) for i, n, own in whole
        if decision.accept[n] and (float(own.detach()) - batch.log_q[n]) * batch.advantages[i] > 0
    )  # fmt: skip
    while section.kind == "m2po" and harmful and np.mean([m for m, _ in harmful]) > section.m2_threshold:
        harmful.pop()
    total, bent = torch.zeros((), dtype=torch.float64), 0
    for i, n, own in whole:
        if not decision.accept[n]:
            continue
        now, a, log_q = own.detach(), float(batch.advantages[i]), float(batch.log_q[n])
        anchor = now if section.anchor == "proximal" else torch.tensor(log_q, dtype=torch.float64)
        weight, ratio = torch.exp(anchor - float(decision.log_m[n])), torch.exp(own - anchor)
        clipped = ratio.clamp(1 - section.clip_low, 1 + section.clip_high)
        gain = torch.minimum(ratio * a, clipped * a)
        if section.kind == "gspo":
            s = math.exp(drift[i]) * torch.exp(own - now)
            gain = torch.minimum(s * a, s.clamp(1 - section.clip_low, 1 + section.clip_high) * a)
        elif section.kind == "m2po":
            moved_as_pushed = (float(now) - log_q) * a > 0
            gain = ratio * a * (not moved_as_pushed or n in {m for _, m in harmful})
        elif section.correction == "mask_geometric":
            gain = gain * (section.correction_low <= math.exp(drift[i]) <= section.correction_high)
        elif section.correction == "cap_sequence":
            weight = math.exp(log_q - float(decision.log_m[n]))
            gain = gain * min(math.exp(drift[i] * len(mates[i])), section.correction_high)
        elif section.opsm is not None and a < 0 and -drift[i] > section.opsm:
            gain = gain * 0
        total = total - weights[i] * weight * gain
        bent += abs(float((gain - ratio * a).detach())) > 1e-6
    gradient = torch.autograd.grad(total, list(model.parameters()))
    return float(total.detach()), torch.cat([g.reshape(-1) for g in gradient]).double(), bent


@pytest.mark.parametrize("name", LOSSES)
def test_every_cut_has_the_loss_and_the_gradient_of_the_dense_sum(model, optimizer, name):
    """T9: for each denominator, and for what ties whole trajectories or the whole batch together."""
    section = LOSSES[name]
    batch, decision, config = made(model, section, seed=1)
    wanted, gradient, bent = dense(model, batch, decision, section)
    assert float(gradient.norm()) > 1e-3 and bent > 0  # the case is one
    for world, limit in ((1, 1000), (1, 1), (2, 9), (4, 1)):
        if section.kind == "m2po" and world > 1:
            continue  # its mask asks the other ranks: test_mesh
        loss, found = stepped(model, optimizer, batch, decision, config, world, limit)
        assert loss == pytest.approx(wanted, rel=1e-5, abs=1e-6)
        assert float((found - gradient).norm()) <= 1e-5 * float(gradient.norm())


@pytest.mark.parametrize("name", ["token_mean", "gspo", "m2po"])
def test_groups_of_equal_rewards_have_exactly_no_gradient(model, optimizer, name):
    """T16: bitwise zero; that every kind gives them advantages of zero is in test_advantages."""
    rng = np.random.default_rng(0)
    config = RunConfig(rollout=RolloutSection(group_size=G, temperature=T), loss=LOSSES[name])
    members = [trajectory(i // G, i % G, 0.1, roles, rng) for i, roles in enumerate(ROLES)]
    batch = collate(0, members, config)
    loss, gradient = stepped(model, optimizer, batch, accept_all(batch), config, 1, 9)
    assert loss == 0.0 and not gradient.any()


@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean", "constant", "prompt_mean"])
@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "reinforce_pp", "scalerl"])
def test_a_group_that_misses_siblings_is_trained_as_if_padded_with_copies(kind, aggregate):
    """T15: the same advantages and the same loss, penalties and the entropy's bonus included."""
    config = RunConfig(
        rollout=RolloutSection(group_size=4),
        loss=LossSection(aggregate=aggregate),
        advantage=AdvantageSection(kind=kind),
    )
    rng = np.random.default_rng(4)
    valid = [trajectory(0, s, s, [0] + [1] * n, rng) for s, n in enumerate((3, 5))]
    others = [trajectory(1, s, s % 3, [0] + [1] * n, rng) for s, n in enumerate((2, 7, 1, 4))]
    copies = [dataclasses.replace(t, sibling=t.sibling + 2) for t in valid]
    found = []
    for members in (valid + others, valid + copies + others):
        batch = collate(0, members, config)
        (sent,) = delivered(batch, accept_all(batch), config)
        tokens = tokens_of(sent)
        tokens.log_reference, tokens.log_teacher = 1.1 * tokens.log_q, 0.7 * tokens.log_q
        share, _ = policy_loss(1.2 * tokens.log_q, -tokens.log_q, tokens, LossSection(kl=0.3, entropy=0.1, distill=0.5))
        found.append((batch.advantages[[0, 1, -4, -3, -2, -1]], share.loss.item()))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


def test_a_shard_of_another_temperature_is_refused_with_both():
    config = RunConfig(rollout=RolloutSection(group_size=2, temperature=0.5))
    rng = np.random.default_rng(5)
    batch = collate(0, [trajectory(0, s, s, [0, 1, 1], rng) for s in range(2)], config)
    (shard,) = make_shards(batch, accept_all(batch), 1, config)
    assert len(to_batch(shard, torch.device("cpu"), SHAPE, 0.5).token_ids) == 6
    with pytest.raises(
        DataError, match=r"step 0, rank 0: sampled at temperature 0\.5, and rollout\.temperature=1 here"
    ):
        to_batch(shard, torch.device("cpu"), SHAPE, 1.0)
