"""Feed-forward layers: dense SwiGLU, and routed experts without capacity limits.

Legend: N tokens, C hidden width, E experts, k experts a token, I expert width, A = N*k assignments.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learner.model.config import ModelConfig


@dataclass
class RouterStats:
    """What one layer's router did to a pack."""

    prob_sums_E: Tensor  # probabilities summed over tokens, with gradient
    counts_E: Tensor  # assignments, no gradient


class DenseMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_NC: Tensor) -> tuple[Tensor, None]:
        """``[N, C] -> [N, C]``; no router, so no statistics."""
        return self.down_proj(F.silu(self.gate_proj(x_NC)) * self.up_proj(x_NC)), None


class SparseMLP(nn.Module):
    """Top-k softmax router over SwiGLU experts; dropless, with a deterministic combine.

    Tokens are sorted by expert, each expert works on one contiguous slice (or all at once in a
    grouped GEMM), and results return by the inverse permutation, so no two writes ever race.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k, self.experts = config.num_experts_per_tok, config.num_experts
        self.norm_topk_prob = config.norm_topk_prob
        width, inner = config.hidden_size, config.moe_intermediate_size
        self.router = nn.Linear(width, self.experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(self.experts, 2 * inner, width))
        self.down = nn.Parameter(torch.empty(self.experts, width, inner))
        self.grouped = False  # grouped GEMM instead of slices; chosen by device, see Decoder

    def forward(self, x_NC: Tensor) -> tuple[Tensor, RouterStats]:
        """``[N, C] -> [N, C]`` and the router's statistics."""
        probs_NE = F.softmax(self.router(x_NC).float(), dim=-1)
        gates_Nk, chosen_Nk = probs_NE.topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            gates_Nk = gates_Nk / gates_Nk.sum(dim=-1, keepdim=True)
        assigned_A = chosen_Nk.reshape(-1)
        order_A = assigned_A.argsort(stable=True)
        counts_E = torch.bincount(assigned_A, minlength=self.experts)
        inputs_AC = x_NC.index_select(0, order_A // self.top_k)
        outputs_AC = self._grouped(inputs_AC, counts_E) if self.grouped else self._sliced(inputs_AC, counts_E)
        inverse_A = torch.empty_like(order_A)
        inverse_A[order_A] = torch.arange(len(order_A), device=order_A.device)
        outputs_NkC = outputs_AC.index_select(0, inverse_A).unflatten(0, (-1, self.top_k))
        mixed = (outputs_NkC * gates_Nk.to(x_NC.dtype)[..., None]).sum(dim=1)
        return mixed, RouterStats(probs_NE.sum(dim=0), counts_E)

    def _sliced(self, inputs_AC: Tensor, counts_E: Tensor) -> Tensor:
        parts = inputs_AC.split(counts_E.tolist())
        outputs = []
        for part, gate_up, down in zip(parts, self.gate_up.unbind(0), self.down.unbind(0), strict=True):
            if len(part):
                gate, up = F.linear(part, gate_up).chunk(2, dim=-1)
                outputs.append(F.linear(F.silu(gate) * up, down))
        return torch.cat(outputs) if outputs else inputs_AC

    def _grouped(self, inputs_AC: Tensor, counts_E: Tensor) -> Tensor:
        ends_E = counts_E.cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(inputs_AC, self.gate_up.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
        return F.grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), offs=ends_E)
