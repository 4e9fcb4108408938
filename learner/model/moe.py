"""Feed-forward layers: dense SwiGLU, and routed experts without capacity limits.

::

    router -> top k (or the experts of the rollout) -> to the experts' ranks -> experts -> back -> sum

Legend: n tokens of this rank, C hidden width, E experts, k experts a token, I expert width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learner.mesh import Axis
from learner.model.attention import pad_rows
from learner.model.config import ModelConfig
from learner.model.experts import Assignment, ExpertSettings, combine, count_each, run_experts, take_rows
from learner.model.packing import Pack
from learner.parallel.collectives import exchange, exchange_counts, gather_tokens, scatter_tokens
from learner.products import linear


@dataclass
class RouterStats:
    """What one layer's router did to this rank's tokens. Sums, so that ranks and micro-batches add up."""

    prob_sums_E: Tensor  # probabilities summed over tokens, with gradient
    z_sum: Tensor  # squared log-sum-exp of the logits, summed over tokens, with gradient
    counts_E: Tensor  # assignments by the router's own choice, no gradient
    replayed: Tensor  # assignments that came from the rollout
    rerouted: Tensor  # those among them that the router would not have chosen


class DenseMLP(nn.Module):
    """SwiGLU; the inner width is cut over tp."""

    def __init__(self, config: ModelConfig, tp: int) -> None:
        super().__init__()
        inner = config.intermediate_size // tp
        self.gate_up = nn.Parameter(torch.empty(2 * inner, config.hidden_size))
        self.gate_up_bias = nn.Parameter(torch.empty(2 * inner)) if config.mlp_bias else None
        self.down = nn.Parameter(torch.empty(config.hidden_size, inner))
        self.down_bias = nn.Parameter(torch.empty(config.hidden_size)) if config.mlp_bias else None

    def forward(self, x_nC: Tensor, _layer: int, pack: Pack) -> tuple[Tensor, None]:
        """``[n, C] -> [n, C]``; no router, so no statistics."""
        gate, up = linear(gather_tokens(x_nC, pack.tp), self.gate_up, self.gate_up_bias).chunk(2, dim=-1)
        out = scatter_tokens(linear(F.silu(gate) * up, self.down), pack.tp)
        return (out if self.down_bias is None else out + self.down_bias), None


class SharedExpert(nn.Module):
    """An expert that every token visits, behind a sigmoid gate (Qwen2-MoE); whole on every rank."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = config.shared_expert_intermediate_size
        self.gate_up = nn.Parameter(torch.empty(2 * inner, config.hidden_size))
        self.down = nn.Parameter(torch.empty(config.hidden_size, inner))
        self.gate = nn.Parameter(torch.empty(1, config.hidden_size))

    def forward(self, x_nC: Tensor) -> Tensor:
        """``[n, C] -> [n, C]``."""
        gate, up = linear(x_nC, self.gate_up).chunk(2, dim=-1)
        return F.sigmoid(F.linear(x_nC, self.gate)) * linear(F.silu(gate) * up, self.down)


class SparseMLP(nn.Module):
    """Top-k softmax router over SwiGLU experts; dropless, with a deterministic combine.

    The experts lie on the ranks of ``axis`` (ep x tp), ``experts / size`` on each.
    """

    def __init__(self, config: ModelConfig, axis: Axis) -> None:
        super().__init__()
        self.top_k, self.experts = config.num_experts_per_tok, config.num_experts
        self.norm_topk_prob = config.norm_topk_prob
        self.axis = axis
        self.held = self.experts // axis.size
        width, inner = config.hidden_size, config.moe_intermediate_size
        self.router = nn.Parameter(torch.empty(self.experts, width))
        self.gate_up = nn.Parameter(torch.empty(self.held, 2 * inner, width))
        self.down = nn.Parameter(torch.empty(self.held, width, inner))
        bias = torch.zeros(self.experts) if config.expert_bias else None
        self.bias: Tensor | None
        self.register_buffer("bias", bias)  # float32 whatever the weights are: it moves in small steps
        self.shared = SharedExpert(config) if config.shared_expert_intermediate_size else None
        self.how = ExpertSettings()

    def forward(self, x_nC: Tensor, layer: int, pack: Pack) -> tuple[Tensor, RouterStats]:
        """``[n, C] -> [n, C]`` and the router's statistics; ``layer`` counts sparse layers."""
        own = pack.local
        count = own.stop - own.start
        rows = x_nC if count == len(x_nC) else x_nC[:count]  # without the padding, if there is any: a slice costs
        recorded = None if pack.experts is None else pack.experts[own, layer]
        gates, chosen, stats = self._route(rows, recorded)
        mixed = self._dispatch(rows, gates.to(rows.dtype), chosen)
        if self.shared is not None:
            mixed = mixed + self.shared(rows)
        return pad_rows(mixed, len(x_nC)), stats

    def _route(self, x_nC: Tensor, recorded_nk: Tensor | None) -> tuple[Tensor, Tensor, RouterStats]:
        logits_nE = linear(x_nC, self.router).float()
        probs_nE = logits_nE.softmax(dim=-1)
        merit_nE = probs_nE.detach() if self.bias is None else probs_nE.detach() + self.bias
        own_nk = chosen_nk = merit_nE.topk(self.top_k, dim=-1).indices
        nothing = torch.zeros((), device=x_nC.device)
        replayed = rerouted = nothing
        if recorded_nk is not None:
            known = recorded_nk >= 0
            chosen_nk = torch.where(known, recorded_nk, own_nk)
            agrees = (chosen_nk[:, :, None] == own_nk[:, None, :]).any(dim=-1)
            replayed, rerouted = known.sum().float(), (known & ~agrees).sum().float()
        if self.norm_topk_prob:  # over the chosen alone: the others get no gradient, not even rounding
            gates_nk = logits_nE.gather(1, chosen_nk).softmax(dim=-1)
        else:
            gates_nk = probs_nE.gather(1, chosen_nk)
        counts_E = count_each(own_nk.reshape(-1), self.experts)
        z_sum = logits_nE.logsumexp(dim=-1).square().sum()
        return gates_nk, chosen_nk, RouterStats(probs_nE.sum(dim=0), z_sum, counts_E, replayed, rerouted)

    @torch.no_grad()
    def move_bias(self, counts_E: Tensor, rate: float) -> None:
        """Towards experts with less than the mean load, away from those with more (2408.15664, algorithm 1)."""
        assert self.bias is not None, "built without a bias"
        load_E = counts_E.float()
        self.bias += rate * torch.sign(load_E.mean() - load_E)

    def _dispatch(self, x_nC: Tensor, gates_nk: Tensor, chosen_nk: Tensor) -> Tensor:
        assignment = Assignment.of(chosen_nk, self.experts)
        weights_A = assignment.sort(gates_nk)
        if self.axis.size == 1:
            return run_experts(x_nC, weights_A, self.gate_up, self.down, assignment, self.how)
        send_rE = assignment.counts_E.view(self.axis.size, self.held)
        receive_rE = exchange_counts(send_rE, self.axis)
        send, receive = torch.stack((send_rE.sum(1), receive_rE.sum(1))).tolist()
        rows = exchange(take_rows(x_nC, assignment), send, receive, self.axis)
        weights = exchange(weights_A, send, receive, self.axis)
        experts = torch.arange(self.held, device=rows.device).repeat(self.axis.size)
        held = experts.repeat_interleave(receive_rE.reshape(-1), output_size=sum(receive))
        here = Assignment.of(held[:, None], self.held)
        out = run_experts(rows, here.sort(weights[:, None]), self.gate_up, self.down, here, self.how)
        return combine(exchange(out, receive, send, self.axis), assignment)
