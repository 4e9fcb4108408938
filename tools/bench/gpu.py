"""The learner's figures on a GPU: model FLOPs utilisation in bfloat16, memory, weights over NCCL.

MFU counts 6 FLOPs a parameter that a token meets, and attention, over the rate of one large bfloat16
product measured in the same run.
"""

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from common.config import OptimSection
from common.errors import ConfigError
from learner.device import pick_device
from learner.logprobs import Head, by_autograd, loss_through_head
from learner.model.config import ModelConfig
from learner.model.decoder import Decoder
from learner.optim import Optimizer
from tools.bench import moe, nccl
from tools.bench.harness import Row, interleave

CONFIG = ModelConfig(
    vocab_size=151_936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=12, num_attention_heads=32,
    num_key_value_heads=4, head_dim=128, rms_norm_eps=1e-6, tie_word_embeddings=False, num_experts=64,
    num_experts_per_tok=8, moe_intermediate_size=768,
)  # fmt: skip  # twelve layers of Qwen3-30B-A3B with half its experts
SEQUENCES, LENGTH = 16, 2048
SIGMA = 0.8  # of lognormal lengths
SQUARE = 8192  # of the reference product


def run(reps: int) -> list[Row]:
    """Raises :class:`ConfigError` without a CUDA device."""
    if not torch.cuda.is_available():
        raise ConfigError("--gpu: no CUDA device here; leave it out for the CPU's figures")
    device = pick_device()
    torch.manual_seed(0)
    return [*_model(reps, device), *_head(device), *moe.run(reps, device), *nccl.run(reps)]


def _seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _model(reps: int, device: torch.device) -> list[Row]:
    model = Decoder(CONFIG, recompute=False).to(device=device, dtype=torch.bfloat16)
    model.prepare(compiled=False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    optimizer = Optimizer(model, OptimSection(), 1000)
    tokens = torch.randint(CONFIG.vocab_size, (SEQUENCES * LENGTH,), device=device)
    fixed, rng = np.arange(0, len(tokens) + 1, LENGTH), np.random.default_rng(0)
    left, right = (torch.randn(SQUARE, SQUARE, device=device, dtype=torch.bfloat16) for _ in range(2))

    def step(offsets: NDArray[np.int64], at: torch.Tensor) -> None:
        optimizer.zero_grad()
        hidden = model.hidden(tokens, offsets)
        loss_through_head(hidden[at - 1], Head(model.head), tokens[at], by_autograd(lambda logp, _: -logp.mean()))[
            0
        ].backward()
        optimizer.step()

    def rate(offsets: NDArray[np.int64]) -> float:
        at = torch.from_numpy(np.setdiff1d(np.arange(len(tokens)), offsets)).to(device)
        return _flops(np.diff(offsets)) / _seconds(lambda: step(offsets, at)) / 1e12

    def fresh() -> NDArray[np.int64]:
        ends = rng.lognormal(np.log(LENGTH / 2), SIGMA, len(tokens)).clip(16, 4 * LENGTH).astype(np.int64).cumsum()
        return np.concatenate(([0], ends[ends < len(tokens)], [len(tokens)]))

    contestants = {
        "step": lambda: rate(fixed),
        "fresh": lambda: rate(fresh()),
        "product": lambda: 2 * SQUARE**3 * 10 / _seconds(lambda: [left @ right for _ in range(10)]) / 1e12,
    }
    interleave(contestants, 1)
    torch.cuda.reset_peak_memory_stats()
    rate(fixed)
    peak = torch.cuda.max_memory_allocated() / 1e9
    found = interleave(contestants, reps)
    held = sum(p.numel() for p in model.parameters()) * (2 + 4 + 4 + 8) / 1e9  # weights, gradients, masters, moments
    return [
        Row(
            "learner",
            "GPU, a whole step in bf16 (MFU)",
            found["step"],
            "TFLOP/s",
            "one product",
            found["product"],
            reps,
        ),
        Row(
            "learner",
            "GPU, the same, new lognormal lengths in every step",
            found["fresh"],
            "TFLOP/s",
            "one product",
            found["product"],
            reps,
        ),
        Row("learner", "GPU, peak memory of a step", peak, "GB", "weights, gradients, optimizer", held, reps),
    ]


def _both_ways(way: Callable[[], torch.Tensor]) -> None:
    way().backward()


def _flops(lengths: NDArray[np.int64]) -> float:
    """Of a forward and backward pass over sequences of these ``lengths``."""
    c = CONFIG
    attention = c.hidden_size * c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
    experts = 3 * c.hidden_size * c.moe_intermediate_size * c.num_experts_per_tok + c.hidden_size * c.num_experts
    met = c.num_hidden_layers * (attention + experts) + c.vocab_size * c.hidden_size
    scores = c.num_hidden_layers * c.num_attention_heads * c.head_dim  # a pair; causal: half of both products
    return 6.0 * (met * float(lengths.sum()) + scores * float(np.square(lengths).sum()))


def _head(device: torch.device) -> list[Row]:
    rows = []
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        hidden = torch.randn(8192, 1024, device=device, dtype=dtype, requires_grad=True)
        weight = (torch.randn(CONFIG.vocab_size, 1024, device=device, dtype=dtype) * 0.05).requires_grad_()
        targets = torch.randint(CONFIG.vocab_size, (8192,), device=device)

        def ours(
            hidden: torch.Tensor = hidden, weight: torch.Tensor = weight, targets: torch.Tensor = targets
        ) -> torch.Tensor:
            return loss_through_head(hidden, Head(weight), targets, by_autograd(lambda logp, _: logp.sum()))[0]

        def naive(
            hidden: torch.Tensor = hidden, weight: torch.Tensor = weight, targets: torch.Tensor = targets
        ) -> torch.Tensor:
            return (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None]).sum()

        found = {}
        for label, way in (("ours", ours), ("all logits at once", naive)):
            _both_ways(way)
            hidden.grad = weight.grad = None
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            seconds = _seconds(partial(_both_ways, way))
            found[label] = (len(targets) / seconds, (torch.cuda.max_memory_allocated() - before) / 1e9)
            hidden.grad = weight.grad = None
        for index, (what, unit) in enumerate((("head", "tokens/s"), ("head, peak", "GB"))):
            mine, theirs = found["ours"][index], found["all logits at once"][index]
            rows.append(Row("learner", f"GPU, {what} {name}", mine, unit, "all logits at once", theirs, 1))
    return rows
