"""A leaner forward for transformers' sparse blocks, on the same parameters.

transformers' own expert loops spend most of a decode step in Python. Here assignments are sorted
by expert and two grouped GEMMs do all of them.

Legend: N tokens, C hidden width, E experts, k experts a token, I expert width, A = N k assignments.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPED_ALIGNMENT = 16  # bytes: grouped GEMMs refuse rows whose stride is not a multiple


def use_lean_experts(model: Any) -> int:
    """Bind :func:`sparse_forward` to every Qwen3-MoE block of ``model``; returns how many."""
    bound = 0
    for module in model.modules():
        if type(module).__name__ == "Qwen3MoeSparseMoeBlock" and _fits(module.experts):
            module.forward = MethodType(sparse_forward, module)
            bound += 1
    return bound


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
    gates_NE = F.linear(x_NC, router.weight).softmax(-1, dtype=torch.float32)
    gates_Nk, experts_Nk = gates_NE.topk(router.top_k, dim=-1)
    if router.norm_topk_prob:
        gates_Nk = gates_Nk / gates_Nk.sum(-1, keepdim=True)
    experts_A = experts_Nk.view(-1)
    order_A = experts_A.argsort()
    ends_E = experts_A.bincount(minlength=router.num_experts).cumsum(0).to(torch.int32)
    sorted_AC = x_NC[order_A // router.top_k]
    gate_AI, up_AI = F.grouped_mm(sorted_AC, experts.gate_up_proj.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
    sorted_AC = F.grouped_mm(F.silu(gate_AI) * up_AI, experts.down_proj.transpose(1, 2), offs=ends_E)
    out_AC = torch.empty_like(sorted_AC)
    out_AC[order_A] = sorted_AC
    out_NkC = out_AC.view(len(x_NC), router.top_k, -1)
    return torch.bmm(gates_Nk.to(x_NC.dtype).unsqueeze(1), out_NkC).view_as(hidden_states)
