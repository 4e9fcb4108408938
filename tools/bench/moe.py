"""One MoE layer, forward and backward, beside transformers' Qwen3-MoE block and a dense product of the same work.

Hidden 512, 16 experts, 4 a token, expert width 256, one thread. The dense reference multiplies the
same FLOPs in two large matrices, forward and backward, without routing, by torch's own products; beside
it by ours (:mod:`learner.products`), which no layer of ours can pass. Tokens are the same in every passage,
and then others in each, so that every expert's load changes, as in training. A repeat is several passages:
the first finds the caches as another contestant left them.
"""

from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from learner.device import keep_freed_memory
from learner.model.config import ModelConfig
from learner.model.decoder import Decoder
from learner.model.experts import ExpertSettings
from learner.model.moe import SparseMLP
from learner.model.packing import Pack
from learner.products import linear
from tools.bench.harness import Row, interleave, rate

HIDDEN, EXPERTS, CHOSEN, WIDTH = 512, 16, 4, 256
ACTIVE = 3 * CHOSEN * WIDTH // 2  # rows of each dense matrix
SIZES = (1024, 8192)
LEAST_S = 0.5  # of a repeat
DRAWS = 4  # of other tokens in a repeat, at least as many as its passages of the larger size
WARM_CHANGING = 2  # repeats in which code is made for most of the lengths that come
CPU = torch.device("cpu")
HF = {
    "vocab_size": 16, "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": 1,
    "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "num_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN, "moe_intermediate_size": WIDTH, "norm_topk_prob": True,
}  # fmt: skip


def layer(how: ExpertSettings) -> tuple[SparseMLP, Decoder]:
    """Ours, initialised."""
    model = Decoder(ModelConfig.from_dict({**HF, "model_type": "qwen3_moe"}, "bench"))
    model.use_experts(how)
    mlp = model.layers["0"].mlp
    assert isinstance(mlp, SparseMLP)
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.02)
    return mlp, model


def theirs(implementation: str) -> Qwen3MoeSparseMoeBlock:
    """transformers' block with one of its expert implementations."""
    config = Qwen3MoeConfig(**HF)
    config._experts_implementation = implementation
    block = Qwen3MoeSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block


class Dense:
    """The experts' FLOPs as two products, [N, C] x [C, 1.5*k*I] and back."""

    def __init__(self, dtype: torch.dtype, device: torch.device, linear: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.linear = linear
        self.up = nn.Parameter(torch.randn(ACTIVE, HIDDEN, dtype=dtype, device=device) * 0.02)
        self.down = nn.Parameter(torch.randn(HIDDEN, ACTIVE, dtype=dtype, device=device) * 0.02)

    def __call__(self, x: Tensor) -> Tensor:
        """``[N, C] -> [N, C]``."""
        return self.linear(self.linear(x, self.up), self.down)

    def parameters(self) -> list[nn.Parameter]:
        """Both."""
        return [self.up, self.down]


def run(reps: int, device: torch.device = CPU) -> list[Row]:
    """Tokens/s forward and backward, for both sizes and number formats; memory kept, as the learner does."""
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for tokens in SIZES:
            rows += _compare(tokens, dtype, f"MoE {tokens} {name}", reps, device)
        rows += _compare(SIZES[-1], dtype, f"MoE {SIZES[-1]} {name}, changing loads", reps, device, changing=True)
    return rows


def _compare(
    tokens: int, dtype: torch.dtype, label: str, reps: int, device: torch.device, changing: bool = False
) -> list[Row]:
    def draw() -> Tensor:
        return torch.randn(tokens, HIDDEN, dtype=dtype, device=device, requires_grad=True)

    same = draw()
    weight = torch.randn(tokens, HIDDEN, dtype=dtype, device=device)
    ways = (
        ExpertSettings(), ExpertSettings(compiled=True),
        ExpertSettings(grouped=True), ExpertSettings(grouped=True, compiled=True),
    )  # fmt: skip
    (mine, model), (fused, _), (grouped, _), (both, _) = (layer(how) for how in ways)
    for module in (mine, fused, grouped, both, model):
        module.to(device=device, dtype=dtype)
    pack: Pack = model.pack(torch.zeros(tokens, dtype=torch.int64, device=device), [0, tokens])
    eager, fast = (theirs(kind).to(device=device, dtype=dtype) for kind in ("eager", "grouped_mm"))
    dense, dense_ours = Dense(dtype, device, F.linear), Dense(dtype, device, linear)

    def timed(forward: Callable[[Tensor], Any], parameters: list[nn.Parameter]) -> float:
        draws = cycle([draw() for _ in range(DRAWS)] if changing else [same])

        def once() -> None:
            x = next(draws)
            out = forward(x)
            out = out[0] if isinstance(out, tuple) else out
            (out.view(tokens, HIDDEN) * weight).sum().backward()
            for tensor in (x, *parameters):
                tensor.grad = None
            if device.type == "cuda":
                torch.cuda.synchronize()

        return rate(once, tokens, LEAST_S)

    contestants = {
        "ours": lambda: timed(lambda x: mine(x, 0, pack), list(mine.parameters())),
        "ours, compiled": lambda: timed(lambda x: fused(x, 0, pack), list(fused.parameters())),
        "ours, grouped and compiled": lambda: timed(lambda x: both(x, 0, pack), list(both.parameters())),
        "ours, grouped": lambda: timed(lambda x: grouped(x, 0, pack), list(grouped.parameters())),
        "transformers eager": lambda: timed(lambda x: eager(x[None]), list(eager.parameters())),
        "transformers grouped_mm": lambda: timed(lambda x: fast(x[None]), list(fast.parameters())),
        "dense, our products": lambda: timed(dense_ours, dense_ours.parameters()),
        "dense": lambda: timed(dense, dense.parameters()),
    }
    interleave(contestants, WARM_CHANGING if changing else 1)  # warm
    found = interleave(contestants, reps)
    best = max("transformers eager", "transformers grouped_mm", key=found.__getitem__)
    rows = [Row("learner", f"{label}: {k}", v, "tokens/s", "dense", found["dense"], reps) for k, v in found.items()]
    ours = max(value for k, value in found.items() if k.startswith("ours"))
    return [
        *rows[:-1],
        Row("learner", f"{label}: best of ours", ours, "tokens/s", f"best of transformers ({best})", found[best], reps),
    ]
