"""The rollout model's step against its loss written out densely, on one process and on two; its checkpoints."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from common.config import LearnerSection, OptimSection, RolloutSection, RunConfig, RunSection
from common.errors import CheckpointError
from common.joint import JointSection
from common.objective import LossSection
from common.wire import EXPERT
from learner import checkpoint
from learner.checkpoint import TrainingState
from learner.joint.trainer import RolloutTrainer
from learner.losses.router import balance_loss, router_z_loss
from learner.mesh import Mesh, single
from learner.model.config import ModelConfig
from learner.optim import Optimizer
from learner.retention import Retention
from learner.saving import CheckpointWriter
from learner.weights.gather import WeightGather
from tests.unit.test_mesh import LENGTHS, model_of, split
from tests.unit.test_step import batch_of

TEMPERATURE = 0.9
COMMON = {"vocab_size": 20, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "intermediate_size": 24}
POLICY = ModelConfig(**COMMON, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
                     head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)  # fmt: skip
SMALL = ModelConfig(**COMMON, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                    head_dim=4, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=12)  # fmt: skip
STEPS = 2
EVERYTHING = tuple(range(len(LENGTHS)))


def run_config(micro_batch_tokens=1000, **joint):
    return RunConfig(
        run=RunSection(steps=STEPS),
        joint=JointSection(path="small", **{"lr": 1e-2, "kl": 0.7, "clip_low": 0.1, "clip_high": 0.2, **joint}),
        rollout=RolloutSection(temperature=TEMPERATURE),
        loss=LossSection(balance=0.05, router_z=0.01),
        optim=OptimSection(eps=1e-3, freeze=("model.layers.0.*",)),  # freeze is the policy's
        learner=LearnerSection(micro_batch_tokens=micro_batch_tokens, logprob_mb=7 * 20 * 4 * 4 / 2**20),
    )


def data(step, sequences=EVERYTHING):
    """Accepted or not, every sampled token counts; one is an exemplar's and one has no density."""
    batch = batch_of(step, list(sequences), 0.5, POLICY, LENGTHS)
    if 0 in sequences:
        batch.trainable[3] = EXPERT
        batch.log_q[4] = -torch.inf
    return batch


def train(config, mesh, sequences=EVERYTHING, steps=STEPS, trainer=None):
    policy = model_of(POLICY, mesh)
    trainer = trainer or RolloutTrainer(config, model_of(SMALL, mesh))
    history = [trainer.step(policy, data(step, sequences)) for step in range(steps)]
    return trainer, history


def dense_step(policy, model, optimizer, fraction, batch, config):
    """Everything at once, with torch's own gradients; the loss's parts."""
    joint, loss = config.joint, config.loss
    at = torch.from_numpy(np.flatnonzero(batch.trainable == 1))
    x, routing = model.stage(model.pack(batch.token_ids, batch.cu_seqlens), None)
    with torch.no_grad():
        theirs = policy.hidden(batch.token_ids, batch.cu_seqlens)[at - 1].double() @ policy.head.double().T
    log_t = torch.log_softmax(theirs / TEMPERATURE, dim=1)
    log_s = torch.log_softmax(x[at - 1].double() @ model.head.double().T / TEMPERATURE, dim=1)
    kl = (log_t.exp() * (log_t - log_s)).sum(dim=1).mean()
    known = batch.log_q[at].isfinite()
    log_q, advantages, weights = (x[at][known] for x in (batch.log_q, batch.advantages, batch.weights))
    ratio = (log_s.gather(1, batch.token_ids[at, None])[known, 0] - log_q).exp()
    clipped = ratio.clamp(1 - joint.clip_low, 1 + joint.clip_high)
    policy_loss = -(weights * torch.minimum(ratio * advantages, clipped * advantages)).sum()
    balance = balance_loss(routing.prob_sums_LE, batch.tokens_global, fraction)
    router_z = router_z_loss(routing.z_sums_L, batch.tokens_global)
    optimizer.zero_grad()
    (policy_loss + joint.kl * kl + loss.balance * balance + loss.router_z * router_z).backward()
    norm = optimizer.step()
    counts = routing.counts_LE
    return {"joint_policy_loss": policy_loss.item(), "joint_kl": kl.item(), "joint_grad_norm": norm}, (
        counts / counts.sum(dim=1, keepdim=True)
    )


def weights_of(model):
    return dict(WeightGather(model, 2000).tensors())


def assert_same(ours, theirs):
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=2e-5), name


def test_it_takes_the_step_of_its_loss_written_out():
    config = run_config()
    policy, model = model_of(POLICY, single()), model_of(SMALL, single())
    before = weights_of(model_of(SMALL, single()))
    optimizer = Optimizer(model, dataclasses.replace(config.optim, lr=config.joint.lr, freeze=()), STEPS)
    fraction, expected = model.uniform_expert_fraction(), []
    for step in range(STEPS):
        values, fraction = dense_step(policy, model, optimizer, fraction, data(step), config)
        expected.append(values)
    for tokens in (1000, 12):  # at once, and a sequence or two at a time
        trainer, history = train(run_config(tokens), single())
        for ours, theirs in zip(history, expected, strict=True):
            assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-4, abs=1e-6)
            assert ours["joint_faulty_tokens"] == 1 and 0 < ours["joint_clip_fraction"] < 1
        assert torch.allclose(trainer.expert_fraction, fraction)
        assert_same(weights_of(trainer.model), weights_of(model))
        moved = {name for name, tensor in weights_of(trainer.model).items() if not torch.equal(tensor, before[name])}
        assert moved == set(before)  # the policy's freeze is not its own


def test_distillation_alone_brings_it_closer_to_the_policy():
    for direction in ("forward", "reverse"):
        config = run_config(direction=direction, kl=100.0, top_k=5, lr=3e-3)
        trainer = RolloutTrainer(config, model_of(SMALL, single()))
        policy, batch = model_of(POLICY, single()), data(0)
        batch.advantages.zero_()
        history = [trainer.step(policy, batch) for _ in range(3)]
        kl = [values["joint_kl"] for values in history]
        assert kl[-1] < 0.95 * kl[0]
        for now, following in zip(history, kl[1:], strict=False):  # what the update did is what the next step finds
            assert now["joint_kl"] - now["joint_kl_drop"] == pytest.approx(following, rel=1e-3)


def test_a_batch_without_a_sampled_token_moves_nothing_but_the_routers():
    trainer = RolloutTrainer(run_config(), model_of(SMALL, single()))
    batch = data(0)
    batch.trainable[:] = 0
    values = trainer.step(model_of(POLICY, single()), batch)
    assert values["joint_kl"] == values["joint_policy_loss"] == 0 and values["joint_grad_norm"] > 0


def worker(rank, world, directory):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=world)
    mesh = Mesh({"dp_replicate": 2} if directory.name == "replicate" else {"dp_shard": 2}, rank, torch.device("cpu"))
    for how in ("uneven", "empty"):
        shares = split({"uneven": "last", "empty": "first"}[how], 2)
        trainer, history = train(run_config(12), mesh, shares[mesh.data_rank])
        tensors = weights_of(trainer.model)
        if rank == 0:
            torch.save((tensors, history), directory / how)
    mesh.close()


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["replicate", "shard"])
def test_two_data_ranks_train_as_one_does(tmp_path, axis):
    directory = tmp_path / axis
    directory.mkdir()
    mp.spawn(worker, (2, directory), nprocs=2)
    trainer, history = train(run_config(), single())
    for how in ("uneven", "empty"):
        tensors, theirs = torch.load(directory / how)
        assert_same(tensors, weights_of(trainer.model))
        for ours, other in zip(history, theirs, strict=True):
            for name in set(ours) - {"seconds_joint", "joint_kl_drop"}:  # the drop is that of first micro-batches
                assert other[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-6), name


def test_a_checkpoint_holds_both_models_and_a_run_goes_on_as_if_never_stopped(tmp_path):
    config = run_config()
    whole, _ = train(config, single(), steps=2)
    first, _ = train(config, single(), steps=1)
    policy = model_of(POLICY, single())
    optimizer = Optimizer(policy, OptimSection(), STEPS)
    writer = CheckpointWriter(tmp_path, single(), Retention(tmp_path, 2), 20.0)
    writer.start(policy, optimizer, TrainingState(1, 1, "run", 0, 0, rollout=first.state()), first.trained)
    writer.wait()
    other = model_of(POLICY, single())
    resumed = RolloutTrainer(config, model_of(SMALL, single()))
    with torch.no_grad():
        for parameter in [*other.parameters(), *resumed.model.parameters()]:
            parameter.fill_(7.0)
    state = checkpoint.load(checkpoint.latest(tmp_path), other, Optimizer(other, OptimSection(), 2), frozenset(),
                            resumed.trained)  # fmt: skip
    resumed.restore(state.rollout)
    assert_same(weights_of(other), weights_of(policy))
    resumed.step(model_of(POLICY, single()), data(1))
    for name, tensor in weights_of(whole.model).items():
        assert torch.equal(weights_of(resumed.model)[name], tensor), name
    with pytest.raises(CheckpointError, match="a rollout model was trained beside the policy then"):
        checkpoint.load(checkpoint.latest(tmp_path), other, Optimizer(other, OptimSection(), 2))
    writer.start(policy, optimizer, TrainingState(2, 2, "run", 0, 0))
    writer.wait()
    with pytest.raises(CheckpointError, match="was not trained beside"):
        checkpoint.load(checkpoint.latest(tmp_path), other, Optimizer(other, OptimSection(), 2), beside=resumed.trained)
