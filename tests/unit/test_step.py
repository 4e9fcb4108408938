"""One step: the same however the batch is cut; the optimizer. (On meshes: test_mesh; resumed: test_checkpoint.)"""

import dataclasses

import numpy as np
import pytest
import torch

from common.config import ActorSection, OptimSection, RunConfig, WeightsSection
from common.objective import LossSection
from learner.mesh import ALONE
from learner.model.config import ModelConfig
from learner.model.decoder import Decoder
from learner.optim import Optimizer, learning_rate
from learner.parallel.flat import FlatParameters, Sharing
from learner.step import StepBatch, StepSettings, micro_batches, train_step
from learner.train import weight_backend
from tests.unit.live import Live

CONFIG = ModelConfig(
    vocab_size=19, hidden_size=16, intermediate_size=0, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6, tie_word_embeddings=False,
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
)  # fmt: skip
LENGTHS = (5, 9, 3, 9, 7, 4)
STEPS = 3
OPTIM = OptimSection(lr=1e-2, eps=1e-3)  # a small eps would turn rounding of tiny gradients into whole steps


def model_of(seed=0):
    torch.manual_seed(seed)
    model = Decoder(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    return model


def settings(micro_batch_tokens=1000, logprob_mb=256.0, **changes):
    usual = {"anchor": "behaviour", "clip_low": 0.2, "clip_high": 0.3, "balance": 0.05, "router_z": 0.01}
    return StepSettings(LossSection(**{**usual, **changes}), 0.9, micro_batch_tokens, logprob_mb)


def batch_of(step, sequences, accepted, config=CONFIG, lengths=LENGTHS, recorded=None):
    """These sequences of one global batch; weights are the whole batch's. ``recorded``: each token's experts."""
    rng = np.random.default_rng(step)
    parts = []
    for length in lengths:
        trainable = (np.arange(length) >= 2).astype(np.uint8)
        log_q = -rng.random(length) * 3
        log_p = np.minimum(log_q + 0.3 * rng.standard_normal(length), 0)
        advantage = rng.standard_normal()
        parts.append({
            "token_ids": rng.integers(0, config.vocab_size, length), "trainable": trainable,
            "accept": (rng.random(length) < accepted) * trainable, "log_q": log_q, "log_p_v": log_p,
            "log_m": np.minimum(log_q, log_p), "advantages": np.full(length, advantage),
        })  # fmt: skip
    kinds = {"token_ids": torch.int64, "trainable": torch.uint8, "accept": torch.uint8}
    chosen = {
        name: torch.from_numpy(np.concatenate([parts[s][name] for s in sequences] or [np.zeros(0)])).to(
            kinds.get(name, torch.float32)
        )
        for name in parts[0]
    }
    chosen["trainable"] = chosen["trainable"].numpy()
    offsets = np.concatenate(([0], np.cumsum([lengths[s] for s in sequences]))).astype(np.int32)
    experts = None
    if recorded is not None:
        experts = torch.tensor(recorded).expand(int(offsets[-1]), len(config.sparse_layers), len(recorded))
    return StepBatch(
        **chosen,
        cu_seqlens=offsets,
        weights=torch.full((int(offsets[-1]),), 1 / int(sum(p["trainable"].sum() for p in parts))),
        tokens_global=sum(lengths),
        experts=experts,
    )


def train(sequences, accepted, **changes):
    model = model_of()
    optimizer = Optimizer(model, OPTIM, STEPS)
    fraction = model.uniform_expert_fraction()
    history = []
    for step in range(STEPS):
        metrics, fraction = train_step(
            model, optimizer, batch_of(step, sequences, accepted), fraction, settings(**changes)
        )
        history.append(metrics)
    return model, history, fraction


def test_micro_batches_and_chunks_change_nothing():
    everything = list(range(len(LENGTHS)))
    reference, history, fraction = train(everything, 0.7)
    for limit, chunk in ((1, 1), (10, 3), (16, 100)):
        model, other, its = train(everything, 0.7, micro_batch_tokens=limit, logprob_mb=chunk * 19 * 4 / 2**20)
        for ours, theirs in zip(history, other, strict=True):
            assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-5)
        for a, b in zip(reference.parameters(), model.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=2e-5)
        assert torch.allclose(fraction, its)
    assert torch.allclose(fraction.sum(1), torch.ones(2))


def test_a_step_names_what_it_does():
    model = model_of()
    optimizer, fraction, told = Optimizer(model, OPTIM, STEPS), model.uniform_expert_fraction(), []
    work = batch_of(0, [0, 1, 2], 0.7)
    train_step(model, optimizer, work, fraction, settings(micro_batch_tokens=1), told.append)
    assert told == ["forward", "backward"] * 3 + ["reduce", "optimizer", "reduce"]


def test_micro_batches_hold_whole_sequences_within_the_limit():
    offsets = np.concatenate(([0], np.cumsum(LENGTHS))).astype(np.int32)
    cuts = list(micro_batches(offsets, 12))
    assert [i for a, b in cuts for i in range(a, b)] == list(range(len(LENGTHS)))
    assert all(offsets[b] - offsets[a] <= 12 for a, b in cuts)
    assert list(micro_batches(offsets, 1)) == [(i, i + 1) for i in range(len(LENGTHS))]
    assert list(micro_batches(np.zeros(1, np.int32), 5)) == []


def test_training_raises_the_probability_of_what_was_rewarded():
    model = model_of()
    optimizer = Optimizer(model, OptimSection(lr=3e-3), 30)
    fraction = model.uniform_expert_fraction()
    batch = batch_of(0, [1], 1.0)
    batch.advantages.fill_(1.0)
    batch.log_q = batch.log_m = batch.log_p_v = torch.full_like(batch.log_q, -3.0)
    values = []
    for _ in range(30):
        metrics, fraction = train_step(model, optimizer, batch, fraction, settings(balance=0.0, clip_high=1e9))
        values.append(metrics["policy_loss"])
    assert values[-1] < 2 * values[0] < 0


# ---- optimizer and checkpoints ------------------------------------------------------------------


def test_rates_warm_up_and_decay():
    config = OptimSection(lr=1.0, warmup_steps=4, schedule="linear", min_lr_ratio=0.1)
    rates = [learning_rate(config, u, 14) for u in range(16)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[13] == rates[15] == pytest.approx(0.1)
    assert np.diff(rates[4:14]).tolist() == pytest.approx([-0.1] * 9)
    cosine = OptimSection(lr=2.0, schedule="cosine", min_lr_ratio=0.0)
    assert [learning_rate(cosine, u, 5) for u in range(5)] == pytest.approx([2.0, 1 + 2**-0.5, 1.0, 1 - 2**-0.5, 0.0])
    assert learning_rate(OptimSection(lr=0.5), 99, 100) == 0.5


def test_moments_are_forgotten_when_asked_and_a_resumed_optimizer_agrees():
    def weights(every, resumed_at=None):
        model = model_of()
        optimizer = Optimizer(model, dataclasses.replace(OPTIM, reset_every=every), 6)
        fraction, ages = model.uniform_expert_fraction(), []
        for step in range(5):
            if step == resumed_at:
                moments = [{k: v.clone() for k, v in optimizer.moments(flat).items()} for flat in optimizer.flats]
                optimizer = Optimizer(model, optimizer.config, 6)
                optimizer.set_steps(step, 0)
                for flat, its in zip(optimizer.flats, moments, strict=True):
                    for name, value in optimizer.moments(flat).items():
                        value.copy_(its[name])
            metrics, fraction = train_step(model, optimizer, batch_of(step, [0, 1, 2], 1.0), fraction, settings())
            ages.append(metrics.get("moments_age"))
        return [p.clone() for p in model.parameters()], ages

    never, _ = weights(0)
    twice, ages = weights(2)
    assert ages == [0, 1, 0, 1, 0]
    assert any(not torch.equal(a, b) for a, b in zip(never, twice, strict=True))
    for resumed_at in (2, 3):
        again, _ = weights(2, resumed_at)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(twice, again, strict=True))


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_counted():
    model = model_of()
    optimizer = Optimizer(model, OptimSection(), 10)
    before = [p.clone() for p in model.parameters()]
    optimizer.zero_grad()
    next(iter(model.parameters())).grad[3].fill_(float("nan"))
    assert np.isnan(optimizer.step())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert (optimizer.steps, optimizer.skipped) == (0, 1)


@pytest.mark.parametrize(
    ("device", "engine", "asked", "found"),
    [
        ("cpu", "local", "auto", "gloo"), ("cuda", "local", "auto", "gloo"), ("cuda", "sglang", "auto", "nccl"),
        ("cpu", "sglang", "auto", "gloo"), ("cuda", "local", "nccl", "nccl"), ("cuda", "sglang", "gloo", "gloo"),
    ],
)  # fmt: skip
def test_weights_go_by_nccl_only_where_both_ends_have_a_gpu(device, engine, asked, found):
    config = RunConfig(actor=ActorSection(engine=engine), weights=WeightsSection(backend=asked))
    assert weight_backend(config, torch.device(device)) == found


@pytest.mark.parametrize("n", [1000, 10_000_001])
def test_the_gradients_norm_is_exact_and_makes_no_second_gradient(n):
    parameter = torch.nn.Parameter(torch.zeros(n))
    flat = FlatParameters([parameter], Sharing("whole", ALONE, ALONE, ALONE, True), 0.0)
    flat.own_grads[:n] = torch.randn(n, generator=torch.Generator().manual_seed(0)).exp_() * 1e-3
    with Live(flat.own_grads) as live:
        found = flat.squared_norm()
    assert float(found) == pytest.approx(float(flat.own_grads.double().square().sum()), rel=1e-6)
    assert live.peak < 4 * n / 2 or n == 1000
    elsewhere = FlatParameters([parameter], Sharing("whole", ALONE, ALONE, ALONE, False), 0.0)
    elsewhere.own_grads.fill_(1.0)
    assert float(elsewhere.squared_norm()) == 0
