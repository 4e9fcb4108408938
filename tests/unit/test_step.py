"""One step: the same on one rank and on two, however the batch is cut; checkpoints; the optimizer."""

import json
import socket

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from common.config import ActorSection, OptimSection, RunConfig, WeightsSection
from common.errors import CheckpointError
from learner import checkpoint
from learner.model.config import ModelConfig
from learner.model.decoder import Decoder
from learner.optim import Optimizer, learning_rate
from learner.parallel.data import DataParallel
from learner.step import StepBatch, StepSettings, micro_batches, train_step
from learner.train import weight_backend

CONFIG = ModelConfig(
    vocab_size=19, hidden_size=16, intermediate_size=0, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=False,
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
)  # fmt: skip
LENGTHS = (5, 9, 3, 9, 7, 4)
CASES = {  # name -> (sequences of each of two ranks, accepted share)
    "even": (([0, 2, 4], [1, 3, 5]), 0.7),
    "uneven": (([0, 1, 2, 3, 4], [5]), 0.7),
    "empty_rank": (([0, 1, 2, 3, 4, 5], []), 0.7),
    "all_rejected": (([0, 2, 4], [1, 3, 5]), 0.0),
}
STEPS = 3
OPTIM = OptimSection(lr=1e-2, eps=1e-3)  # a small eps would turn rounding of tiny gradients into whole steps


def model_of(seed=0):
    torch.manual_seed(seed)
    model = Decoder(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    return model


def settings(**changes):
    usual = {
        "anchor": "behaviour", "clip_low": 0.2, "clip_high": 0.3, "weight_cap": None, "balance": 0.05,
        "temperature": 0.9, "micro_batch_tokens": 1000, "logprob_chunk": 8,
    }  # fmt: skip
    return StepSettings(**{**usual, **changes})


def batch_of(step, sequences, accepted):
    """These sequences of one global batch; the denominators are the whole batch's."""
    rng = np.random.default_rng(step)
    parts = []
    for length in LENGTHS:
        trainable = (np.arange(length) >= 2).astype(np.uint8)
        log_q = -rng.random(length) * 3
        log_p = np.minimum(log_q + 0.3 * rng.standard_normal(length), 0)
        advantage = rng.standard_normal()
        parts.append({
            "token_ids": rng.integers(0, CONFIG.vocab_size, length), "trainable": trainable,
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
    offsets = np.concatenate(([0], np.cumsum([LENGTHS[s] for s in sequences]))).astype(np.int32)
    return StepBatch(
        **chosen,
        cu_seqlens=offsets,
        denominator=int(sum(p["trainable"].sum() for p in parts)),
        tokens_global=sum(LENGTHS),
    )


def train(parallel, sequences, accepted, **changes):
    model = model_of()
    optimizer = Optimizer(model, OPTIM, STEPS)
    fraction = model.uniform_expert_fraction()
    history = []
    for step in range(STEPS):
        metrics, fraction = train_step(
            model, optimizer, batch_of(step, sequences, accepted), fraction, settings(**changes), parallel
        )
        history.append(metrics)
    return model, history, fraction


def alone():
    return DataParallel(0, 1, torch.device("cpu"))


def rank_main(rank, port, out):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    parallel = DataParallel(rank, 2, torch.device("cpu"))
    results = {}
    for name, (shares, accepted) in CASES.items():
        model, history, _ = train(parallel, shares[rank], accepted)
        assert parallel.differing_ranks(model) == []
        results[name] = {"history": history, "weights": {n: p.tolist() for n, p in model.named_parameters()}}
    with torch.no_grad():
        next(model.parameters()).add_(rank)
    results["differing"] = parallel.differing_ranks(model)
    (out / f"rank{rank}.json").write_text(json.dumps(results))
    parallel.close()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(rank_main, (port, out), nprocs=2)
    return [json.loads((out / f"rank{r}.json").read_text()) for r in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one(two_ranks, case):
    shares, accepted = CASES[case]
    model, history, _ = train(alone(), sorted(shares[0] + shares[1]), accepted)
    for rank in two_ranks:
        for ours, theirs in zip(history, rank[case]["history"], strict=True):
            assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-5)
        for name, parameter in model.named_parameters():
            assert torch.allclose(torch.tensor(rank[case]["weights"][name]), parameter, rtol=1e-4, atol=2e-5), name
    assert two_ranks[0][case]["weights"] == two_ranks[1][case]["weights"]
    assert (history[0]["policy_loss"] == 0) == (accepted == 0)


def test_a_rank_that_drifts_is_named(two_ranks):
    assert two_ranks[0]["differing"] == two_ranks[1]["differing"] == [1]


def test_micro_batches_and_chunks_change_nothing():
    everything = list(range(len(LENGTHS)))
    reference, history, fraction = train(alone(), everything, 0.7)
    for limit, chunk in ((1, 1), (10, 3), (16, 100)):
        model, other, its = train(alone(), everything, 0.7, micro_batch_tokens=limit, logprob_chunk=chunk)
        for ours, theirs in zip(history, other, strict=True):
            assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-5)
        for a, b in zip(reference.parameters(), model.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=2e-5)
        assert torch.allclose(fraction, its)
    assert torch.allclose(fraction.sum(1), torch.ones(2))


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
        metrics, fraction = train_step(model, optimizer, batch, fraction, settings(balance=0.0, clip_high=1e9), alone())
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


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_counted():
    model = model_of()
    optimizer = Optimizer(model, OptimSection(), 10)
    before = [p.clone() for p in model.parameters()]
    optimizer.zero_grad()
    optimizer.grads()[3].fill_(float("nan"))
    assert np.isnan(optimizer.step())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert (optimizer.steps, optimizer.skipped) == (0, 1)


def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path):
    everything = list(range(len(LENGTHS)))
    whole, _, _ = train(alone(), everything, 0.7)
    model = model_of()
    optimizer = Optimizer(model, OPTIM, STEPS)
    fraction = model.uniform_expert_fraction()
    for step in range(STEPS):
        if step == 2:
            checkpoint.save(
                tmp_path, model, optimizer, step=step, version=step, run_id="r", expert_fraction=fraction, keep=2
            )
            model = model_of(seed=9)
            optimizer = Optimizer(model, OPTIM, STEPS)
            state = checkpoint.load(checkpoint.latest(tmp_path), model, optimizer)
            assert (state.step, state.version, state.run_id) == (2, 2, "r")
            fraction = state.expert_fraction
        _, fraction = train_step(model, optimizer, batch_of(step, everything, 0.7), fraction, settings(), alone())
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))


def saved(tmp_path, step=1):
    model = model_of()
    optimizer = Optimizer(model, OptimSection(), 10)
    checkpoint.save(
        tmp_path, model, optimizer, step=step, version=step, run_id="r",
        expert_fraction=model.uniform_expert_fraction(), keep=2,
    )  # fmt: skip
    return model, optimizer


def test_the_last_finished_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 3):
        saved(tmp_path, step)
    (tmp_path / ".step-00000009.tmp").mkdir()
    (tmp_path / "step-00000008").mkdir()  # half deleted or half copied: no state.json
    assert checkpoint.latest(tmp_path).name == "step-00000003"
    assert sorted(p.name for p in tmp_path.glob("step-0000000[123]")) == ["step-00000002", "step-00000003"]
    assert checkpoint.latest(tmp_path / "nothing") is None


def test_a_damaged_or_foreign_checkpoint_is_refused_by_name(tmp_path):
    model, optimizer = saved(tmp_path)
    path = checkpoint.latest(tmp_path)
    other = Decoder(ModelConfig(**{**vars(CONFIG), "num_experts": 8}))
    with pytest.raises(CheckpointError, match=r"belongs to another model"):
        checkpoint.load(path, other, Optimizer(other, OptimSection(), 10))
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"step-00000001: damaged.*resume from an older one"):
        checkpoint.load(path, model, optimizer)


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
