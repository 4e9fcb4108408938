"""What only a GPU can show: bf16 beside transformers, grouped GEMM, NCCL, memory through the head, a short run.

Run with ``make gpu`` (or, on a machine without this project's environment, as CONTRIBUTING.md says).
Needs torch 2.11 and transformers 5.17 or newer; skips without a CUDA device.
"""

import itertools
import os
import socket
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = torch.device("cuda", 0)
SHAPE = {
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "num_experts": 16, "num_experts_per_tok": 4,
    "moe_intermediate_size": 128, "norm_topk_prob": True, "max_position_embeddings": 1024,
}  # fmt: skip
LENGTHS = (200, 1, 77, 512, 33)
OFFSETS = np.concatenate(([0], np.cumsum(LENGTHS)))


@pytest.fixture(scope="module", autouse=True)
def as_the_learner_picks_it():
    """Without cuDNN's attention, whatever test comes first."""
    from learner.device import pick_device

    assert pick_device() == CUDA


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("model")
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, initializer_range=0.05)).save_pretrained(where)
    return where


def decoder(directory, dtype, device=CUDA):
    from learner.hf import load_hf
    from learner.model.config import ModelConfig
    from learner.model.decoder import Decoder

    model = Decoder(ModelConfig.from_hf_dir(directory)).to(device=device, dtype=dtype)
    model.prepare(compiled=False)
    load_hf(directory, model)
    return model


def tokens():
    return torch.randint(0, SHAPE["vocab_size"], (int(OFFSETS[-1]),), generator=torch.Generator().manual_seed(1)).to(
        CUDA
    )


def test_bfloat16_is_no_further_from_float32_than_transformers_is(directory):
    from transformers import AutoModelForCausalLM

    ids = tokens()
    with torch.no_grad():
        exact = decoder(directory, torch.float32)
        expected = exact.hidden(ids, OFFSETS) @ exact.head.T
        ours = decoder(directory, torch.bfloat16)
        found = (ours.hidden(ids, OFFSETS) @ ours.head.T).float()
        hf = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).to(CUDA)
        theirs = torch.cat([hf(ids[None, a:b]).logits[0].float() for a, b in itertools.pairwise(OFFSETS)])
    our_error, their_error = ((x - expected).norm() / expected.norm() for x in (found, theirs))
    assert our_error < 1.5 * their_error + 1e-3, (our_error, their_error)


def test_a_grouped_product_is_what_taking_turns_gives(directory):
    from learner.model.experts import ExpertSettings

    results = []
    for grouped in (False, True):
        model = decoder(directory, torch.bfloat16)
        model.use_experts(ExpertSettings(grouped=grouped))
        hidden = model.hidden(tokens(), OFFSETS)
        hidden.float().square().mean().backward()
        results.append((hidden.detach().float(), [p.grad.float() for p in model.parameters() if p.grad is not None]))
    assert (results[0][0] - results[1][0]).norm() / results[0][0].norm() < 0.02
    for turn, group in zip(results[0][1], results[1][1], strict=True):
        assert (turn - group).norm() / (turn.norm() + 1e-9) < 0.05


def test_attention_is_not_cudnns_where_the_learner_picks_its_device():
    """It would make a plan for every new shape of a bucket, and packs come in ever new ones."""
    from torch.nn.attention import SDPBackend

    from learner.device import pick_device

    assert pick_device() == CUDA
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    q, k = (torch.randn(3, heads, 77, 128, device=CUDA, dtype=torch.bfloat16) for heads in (8, 4))
    assert torch._fused_sdp_choice(q, k, k, is_causal=True, enable_gqa=True) == SDPBackend.FLASH_ATTENTION.value


def test_grouped_queries_in_float32_never_hold_every_score():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from learner.model.packing import PackPlan

    plan, on_host = PackPlan.of(OFFSETS, CUDA), PackPlan.of(OFFSETS, torch.device("cpu"))
    g = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(int(OFFSETS[-1]), heads, 64, generator=g).requires_grad_() for heads in (8, 4, 4))
    there = [t.detach().to(CUDA).requires_grad_() for t in (q, k, v)]
    expected = on_host.attend(q, k, v)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):  # raises where that cannot be used
        found = plan.attend(*there)
    for out in (expected, found):
        out.square().sum().backward()
    pairs = [(found, expected), *((ours.grad, theirs.grad) for ours, theirs in zip(there, (q, k, v), strict=True))]
    assert all((on_gpu.cpu() - on_cpu).norm() < 1e-3 * on_cpu.norm() for on_gpu, on_cpu in pairs)


@pytest.mark.parametrize("rows", [96, 0])
def test_idle_experts_and_an_empty_pack_leave_zeros(rows):
    from learner.model.experts import Assignment, ExpertSettings, run_experts

    experts, width, inner = 8, 256, 128
    results = []
    for grouped in (False, True):
        g = torch.Generator().manual_seed(3)
        x, gate_up, down = (
            (torch.randn(shape, generator=g) * 0.3).to(CUDA, torch.bfloat16).requires_grad_()
            for shape in ((rows, width), (experts, 2 * inner, width), (experts, width, inner))
        )
        busy = torch.tensor([0, 2, 3, 6])  # the last is idle, and two neighbours
        chosen = busy[torch.rand((rows, 4), generator=g).argsort(dim=1)[:, :2]].to(CUDA)
        weights = torch.rand(2 * rows, generator=g).to(CUDA, torch.bfloat16).requires_grad_()
        torch.full((1 << 24,), float("nan"), device=CUDA)  # what freed memory holds is seen if it is not written
        out = run_experts(x, weights, gate_up, down, Assignment.of(chosen, experts), ExpertSettings(grouped=grouped))
        out.float().square().sum().backward()
        results.append([out.detach(), x.grad, weights.grad, gate_up.grad, down.grad])
        for grad in (gate_up.grad, down.grad):
            assert not grad[[1, 4, 5, 7]].any()
    for turn, group in zip(*results, strict=True):
        assert turn.shape == group.shape
        assert (turn.float() - group.float()).norm() <= 0.05 * turn.float().norm()


def test_the_same_step_twice_gives_the_same_bits(directory):
    """The combine adds in a fixed order; nothing in a layer races."""
    grads = []
    for _ in range(2):
        model = decoder(directory, torch.bfloat16)
        mlp = model.layers["0"].mlp
        x = torch.randn(513, SHAPE["hidden_size"], generator=torch.Generator().manual_seed(2)).to(CUDA, torch.bfloat16)
        x.requires_grad_()
        out, _ = mlp(x, 0, model.pack(torch.zeros(513, dtype=torch.int64, device=CUDA), [0, 513]))
        out.float().square().sum().backward()
        grads.append((out.detach(), x.grad, mlp.gate_up.grad, mlp.down.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_way_through_the_head_takes_a_tenth_of_the_memory(dtype):
    from learner.logprobs import Head, by_autograd, loss_through_head

    n, width, vocab = 4096, 256, 151_936
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, width, generator=g).to(CUDA, dtype).requires_grad_()
    weight = (torch.randn(vocab, width, generator=g) * 0.05).to(CUDA, dtype).requires_grad_()
    targets = torch.randint(vocab, (n,), generator=g).to(CUDA)

    def peak(run):
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = run()
        loss.backward()
        torch.cuda.synchronize()
        return float(loss), torch.cuda.max_memory_allocated() - before, hidden.grad.float().clone()

    def ours():
        return loss_through_head(
            hidden, Head(weight, chunk_mb=128.0), targets, by_autograd(lambda logp, _: logp.sum())
        )[0]

    def naive():
        return (hidden.float() @ weight.float().T).log_softmax(-1).gather(1, targets[:, None]).sum()

    (ours_loss, ours_peak, ours_grad), (loss, naive_peak, grad) = peak(ours), peak(naive)
    assert ours_peak < naive_peak / 10
    assert ours_loss == pytest.approx(loss, rel=1e-3)
    assert (ours_grad - grad).norm() / grad.norm() < (1e-4 if dtype is torch.float32 else 2e-2)


def test_sums_on_the_gpu_are_those_on_the_host():
    from common.weights import block_sums
    from learner.weights.group import tensor_sums

    data = torch.randint(0, 256, (3 * 2**20 + 48,), dtype=torch.uint8)
    assert tensor_sums(data.to(CUDA)) == block_sums(data.numpy())


def test_weights_go_round_an_nccl_group():
    """One rank, as NCCL takes no GPU twice: what lies there afterwards, its sums beside the host's, the digest."""
    import torch.distributed as dist

    from common.deadlines import NO_WATCHDOG
    from common.weights import WeightDigest, block_sums
    from learner.weights.group import WeightGroup

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    before = dict(os.environ)
    group = WeightGroup(store, 1, 0, 1, "nccl", 30.0, CUDA)
    assert {name: os.environ.get(name) for name in NO_WATCHDOG} == {name: before.get(name) for name in NO_WATCHDOG}
    digest, expected = WeightDigest(), WeightDigest()
    for nbytes in (3 * 2**20 + 48, 2**20):
        host = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(nbytes))
        room = group.allocate(nbytes)
        room.copy_(host)
        work = group.start(room)
        sums = group.sums(room)
        work.wait()
        assert sums == block_sums(host.numpy())
        assert torch.equal(room.cpu(), host)
        digest.update(sums)
        expected.update(block_sums(host.numpy()))
    group.send_digest(digest.hex(), 7)
    assert group.receive_digest(7) == expected.hex()
    group.close()


class Gather:
    """Two tensors that arrived on rank 0's GPU, each in memory of its own: one bucket."""

    def __init__(self):
        from common.weights import plan_buckets

        self.whole = {"a": torch.arange(1.0, 9.0, device=CUDA), "b": torch.arange(9.0, 13.0, device=CUDA)}
        self.listing = [[name, "float32", list(tensor.shape)] for name, tensor in self.whole.items()]
        self.buckets = plan_buckets(self.listing, 1 << 20)
        self.mesh, self.is_local = SimpleNamespace(rank=0), False

    def __iter__(self):
        yield self.buckets[0], self.whole


def test_a_gathered_bucket_is_sent_from_the_gpu_and_kept_on_the_host():
    from learner.weights.gather import Snapshot
    from learner.weights.pack import as_one

    gather, host = Gather(), torch.device("cpu")
    snapshot = Snapshot(gather)
    fresh, again = (as_one(gather.buckets[0], snapshot.tensors(0, CUDA), CUDA) for _ in range(2))
    kept = as_one(gather.buckets[0], snapshot.tensors(0, host), host)
    assert kept.view(torch.float32).tolist() == [float(n) for n in range(1, 13)]
    assert torch.equal(fresh.cpu(), kept) and torch.equal(again.cpu(), kept)
    assert fresh.data_ptr() != again.data_ptr()  # the first was laid out there, the second came from the host


def test_the_benchmark_measures_nccl():
    from tools.bench import nccl

    assert all(row.value > 0 and "over NCCL" in row.name for row in nccl.run(1))


def a_run(directory, phase=None):
    """Eight updates on one batch; yields the policy's loss of each, and at the end checks that none was skipped."""
    from common.config import OptimSection
    from common.objective import LossSection
    from common.trace import no_phase
    from learner.optim import Optimizer
    from learner.step import StepBatch, StepSettings, train_step

    model = decoder(directory, torch.bfloat16)
    optimizer = Optimizer(model, OptimSection(lr=3e-4), 20)
    n = int(OFFSETS[-1])
    on = np.ones(n, np.uint8)
    on[OFFSETS[:-1]] = 0
    log_q = torch.full((n,), -7.0, device=CUDA)
    batch = StepBatch(
        tokens(), OFFSETS.astype(np.int32), on, torch.from_numpy(on).to(CUDA), torch.ones(n, device=CUDA),
        torch.full((n,), 1 / n, device=CUDA), log_q, log_q, log_q, n,
    )  # fmt: skip
    loss = LossSection(clip_low=0.2, clip_high=1e9, balance=0.01, router_z=0.001)
    settings = StepSettings(loss, temperature=1.0, micro_batch_tokens=400, logprob_mb=64.0)
    fraction = model.uniform_expert_fraction()
    for _ in range(8):
        metrics, fraction = train_step(model, optimizer, batch, fraction, settings, phase or no_phase)
        yield metrics["policy_loss"]
    assert optimizer.skipped == 0


def test_a_short_run_in_bfloat16_learns(directory):
    losses = list(a_run(directory))
    assert losses[-1] < losses[0] - 0.1


def test_the_host_never_waits_between_a_step_s_first_forward_and_its_last_backward(directory):
    """Where there is one product for all experts: taking turns looks where each expert's rows end."""
    from learner.model.experts import has_grouped_kernel

    if not has_grouped_kernel(CUDA, torch.bfloat16):
        pytest.skip("experts take turns here, and each waits for the host")

    def phase(name):
        torch.cuda.set_sync_debug_mode("error" if name in ("forward", "backward") else "default")

    try:
        assert len(list(a_run(directory, phase))) == 8
    finally:
        torch.cuda.set_sync_debug_mode("default")
