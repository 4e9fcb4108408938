"""A leaner forward for transformers' sparse blocks, on the same parameters, and a record of where they route.

transformers' own expert loops spend most of a decode step in Python. Here assignments are sorted
by expert and two grouped GEMMs do all of them.

Legend: N tokens, C hidden width, E experts, k experts a token, I expert width, A = N k assignments,
R = k times the sparse layers.
"""

from functools import partial
from itertools import accumulate
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from common.weights import EXPERT_BIAS

FEW_ROWS = 6  # mean rows an expert up to which MKL is faster with the result transposed (measured, fp32)
GROUPED_ALIGNMENT = 16  # bytes: grouped GEMMs refuse rows whose stride is not a multiple


def use_lean_experts(model: Any) -> int:
    """Bind :func:`sparse_forward` to every Qwen3-MoE block of ``model``; returns how many."""
    bound = 0
    for module in model.modules():
        if _is_sparse(module) and _fits(module.experts):
            module.forward = MethodType(sparse_forward, module)
            bound += 1
    return bound


def use_expert_bias(model: Any) -> dict[str, Tensor]:
    """Give every router a bias that takes part in choosing experts and not in their weights (2408.15664).

    Zeros, float32; returns them by checkpoint name. They then belong to the model's parameters, so
    they are published like any other tensor.
    """
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if _is_sparse(module):
            bias = torch.nn.Parameter(torch.zeros(module.gate.num_experts), requires_grad=False)
            module.gate.register_parameter(EXPERT_BIAS, bias)
            module.gate.forward = MethodType(_biased_route, module.gate)
            found[f"{name}.gate.{EXPERT_BIAS}"] = bias.data
    return found


def _biased_route(router: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """transformers' router with a bias on the choice: logits ``[N, E]``, gates ``[N, k]``, experts ``[N, k]``."""
    logits_NE = F.linear(hidden_states.reshape(-1, router.hidden_dim), router.weight)
    probs_NE = logits_NE.softmax(dim=-1, dtype=torch.float32)
    experts_Nk = (probs_NE + router.e_score_correction_bias).topk(router.top_k, dim=-1).indices
    gates_Nk = probs_NE.gather(1, experts_Nk)
    if router.norm_topk_prob:
        gates_Nk = gates_Nk / gates_Nk.sum(dim=-1, keepdim=True)
    return logits_NE, gates_Nk.to(logits_NE.dtype), experts_Nk


class ExpertRecorder:
    """Which experts the routers of ``model`` chose in its latest forward pass, by a hook on each."""

    def __init__(self, model: Any) -> None:
        routers = [module.gate for module in model.modules() if _is_sparse(module)]  # in the order of the layers
        self.width = sum(router.top_k for router in routers)  # R; 0 if the model has no experts
        self._chosen: list[Any] = [None] * len(routers)  # i64 [N, k] of each sparse layer
        for layer, router in enumerate(routers):
            router.register_forward_hook(partial(self._note, layer))

    def _note(self, layer: int, _router: Any, _inputs: Any, outputs: Any) -> None:
        self._chosen[layer] = outputs[2]

    def latest(self) -> NDArray[np.uint16]:
        """``[N, R]``, a row for each token of the latest pass."""
        record: NDArray[np.uint16] = torch.cat(self._chosen, dim=1).numpy().astype(np.uint16)
        return record


def _is_sparse(module: Any) -> bool:
    return type(module).__name__ == "Qwen3MoeSparseMoeBlock"


def _fits(experts: Any) -> bool:
    widths = (experts.gate_up_proj.shape[2], experts.down_proj.shape[2])
    aligned = all(width * experts.down_proj.element_size() % GROUPED_ALIGNMENT == 0 for width in widths)
    return aligned and isinstance(experts.act_fn, torch.nn.SiLU | type(_silu()))


def _silu() -> Any:
    from transformers.activations import ACT2FN

    return ACT2FN["silu"]


def sparse_forward(block: Any, hidden_states: Tensor) -> Tensor:
    """``[B, T, C] -> [B, T, C]``, equal to the block's own forward to rounding."""
    x_NC = hidden_states.reshape(-1, hidden_states.shape[-1])
    router, experts = block.gate, block.experts
    _, gates_Nk, experts_Nk = router(x_NC)
    experts_A = experts_Nk.view(-1)
    order_A = experts_A.argsort()
    counts_E = experts_A.bincount(minlength=router.num_experts)
    sorted_AC = x_NC[order_A // router.top_k]
    if len(order_A) <= FEW_ROWS * router.num_experts:
        sorted_AC = _few_rows(experts, sorted_AC, counts_E.tolist())
    else:
        sorted_AC = _grouped(experts, sorted_AC, counts_E.cumsum(0).to(torch.int32))
    out_AC = torch.empty_like(sorted_AC)
    out_AC[order_A] = sorted_AC
    out_NkC = out_AC.view(len(x_NC), router.top_k, -1)
    return torch.bmm(gates_Nk.to(x_NC.dtype).unsqueeze(1), out_NkC).view_as(hidden_states)


def _grouped(experts: Any, sorted_AC: Tensor, ends_E: Tensor) -> Tensor:
    """Two grouped GEMMs; expert e works on rows ``[ends[e - 1], ends[e])``."""
    gate_AI, up_AI = F.grouped_mm(sorted_AC, experts.gate_up_proj.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate_AI) * up_AI, experts.down_proj.transpose(1, 2), offs=ends_E)


def _few_rows(experts: Any, sorted_AC: Tensor, counts: list[int]) -> Tensor:
    """The same with results transposed, ``weight @ x.T``: half the time of a GEMM with a few rows."""
    gate_up_EJC, down_ECI = experts.gate_up_proj, experts.down_proj
    hidden_JA = sorted_AC.new_empty(gate_up_EJC.shape[1], len(sorted_AC))
    out_CA = sorted_AC.new_empty(down_ECI.shape[1], len(sorted_AC))
    ends = list(accumulate(counts))
    spans = [(e, end - count, end) for e, (count, end) in enumerate(zip(counts, ends, strict=True)) if count]
    for e, start, end in spans:
        torch.mm(gate_up_EJC[e], sorted_AC[start:end].t(), out=hidden_JA[:, start:end])
    gate_IA, up_IA = hidden_JA.chunk(2)
    active_AI = (F.silu(gate_IA) * up_IA).t().contiguous()
    for e, start, end in spans:
        torch.mm(down_ECI[e], active_AI[start:end].t(), out=out_CA[:, start:end])
    return out_CA.t().contiguous()
