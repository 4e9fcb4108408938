"""One run of the study: the quick start's task, trained by the learner's own step on data of a known age.

::

    sample from the version that the regime says -> reward -> advantages -> coins, Z -> train_step -> evaluate

Everything is in one process and deterministic, so that two methods differ by what they do alone: the
same seed gives both the same questions.
"""

from collections import deque
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from actor.tasks.base import PromptItem, Split
from actor.tasks.sort6 import EOS, Sort6
from broker.advantages import group_advantages
from common.config import OptimSection
from common.objective import AdvantageSection
from common.obrs import coins, thin
from learner.hf import load_hf
from learner.model.config import ModelConfig
from learner.model.decoder import Decoder
from learner.optim import Optimizer
from learner.step import StepBatch, StepSettings, train_step
from tools.bench.staleness.methods import Method, Regime
from tools.bench.staleness.sampler import Samples, sample

GROUPS, SIBLINGS = 16, 8
UPDATES = 120
TUNING_UPDATES = 80  # of a run that chooses a rate
ANSWER = 8  # tokens at most
EVALUATE_EVERY = 20
HELD_OUT = 512  # one standard error is .02
TASK = Sort6(0, {})


@dataclass
class Rollouts:
    """Sampled trajectories of one batch or more, ``b`` rows, padded."""

    prompts: Tensor  # i64 [b, P]
    samples: Samples
    rewards: Tensor  # f32 [b]

    def part(self, index: int, count: int) -> "Rollouts":
        """Rows of the ``index``-th of ``count`` equal parts."""
        size = len(self.rewards) // count
        rows = slice(index * size, (index + 1) * size)
        s = self.samples
        return Rollouts(self.prompts[rows], Samples(s.ids[rows], s.log_q[rows], s.lengths[rows]), self.rewards[rows])


class Run:
    """Trains one policy from ``start`` with one method; :attr:`curve` holds its held-out rewards."""

    def __init__(self, start: Path, small: Path, method: Method, regime: Regime, lr: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.method, self.regime, self.seed = method, regime, seed
        self.policy = _load(start)
        self.actor = _load(small if regime.actor == "small" else start)
        self.optimizer = Optimizer(self.policy, OptimSection(lr=lr, beta1=0.9, beta2=0.99), UPDATES)
        self.generator = torch.Generator().manual_seed(seed)
        self.questions = 0
        self.versions: deque[list[Tensor]] = deque(maxlen=max(1, regime.lag + 1))
        self.held: Rollouts | None = None
        self.curve: list[tuple[int, float]] = []
        self.figures: list[dict[str, float]] = []

    def train(self, updates: int) -> None:
        """So many updates."""
        fraction = self.policy.uniform_expert_fraction()
        settings = StepSettings(self.method.loss, 1.0, 1 << 30, 256.0)
        for update in range(updates):
            if update % EVALUATE_EVERY == 0:
                self.curve.append((update, self.evaluate()))
            batch, figures = self._batch(self._rollouts(update), update)
            metrics, fraction = train_step(self.policy, self.optimizer, batch, fraction, settings)
            self.figures.append(figures | {k: metrics[k] for k in ("kl_to_behaviour", "weight_ess", "clip_fraction")})
        self.curve.append((updates, self.evaluate()))

    def evaluate(self) -> float:
        """Mean reward of sampled answers to held-out questions."""
        generator = torch.Generator().manual_seed(1 + self.seed)
        return float(self._sample(self.policy, range(HELD_OUT), 1, "heldout", generator).rewards.mean())

    # ---- data -----------------------------------------------------------------------------------

    def _rollouts(self, update: int) -> Rollouts:
        """What ``update`` trains on, as old as the regime says."""
        parts = self.regime.batch
        if update % parts == 0:
            source = self.actor
            if self.regime.actor == "policy":
                self.versions.append([p.detach().clone() for p in self.policy.parameters()])
                _copy(self.versions[0], self.actor)  # the oldest that is kept
            questions = range(self.questions, self.questions + GROUPS * parts)
            self.questions += GROUPS * parts
            self.held = self._sample(source, questions, SIBLINGS, "train", self.generator)
        assert self.held is not None
        return self.held.part(update % parts, parts)

    def _sample(
        self, model: Decoder, questions: range, siblings: int, split: Split, generator: torch.Generator
    ) -> Rollouts:
        items = [_question(self.seed, i, split) for i in questions]
        prompts = torch.from_numpy(np.stack([item.prompt_ids for item in items]).astype(np.int64))
        prompts = prompts.repeat_interleave(siblings, dim=0)
        samples = sample(model, prompts, ANSWER, EOS, generator)
        ids, lengths = samples.ids.numpy().astype(np.int32), samples.lengths.tolist()
        rewards = [TASK.reward(items[row // siblings], ids[row, : lengths[row]])["correct"] for row in range(len(ids))]
        return Rollouts(prompts, samples, torch.tensor(rewards))

    def _batch(self, rollouts: Rollouts, update: int) -> tuple[StepBatch, dict[str, float]]:
        """Packed, with coins and Z where the method has them; p is the policy that trains."""
        samples, lengths = rollouts.samples, rollouts.samples.lengths
        rows, width = samples.ids.shape
        prompt = rollouts.prompts.shape[1]
        on = torch.arange(width)[None, :] < lengths[:, None]
        whole = torch.cat((torch.ones(rows, prompt, dtype=torch.bool), on), dim=1)
        token_ids = torch.cat((rollouts.prompts, samples.ids), dim=1)[whole]
        offsets = np.concatenate(([0], np.cumsum(lengths.numpy() + prompt))).astype(np.int32)
        trainable = torch.cat((torch.zeros(rows, prompt, dtype=torch.bool), on), dim=1)[whole]
        log_q = samples.log_q.gather(2, samples.ids[:, :, None])[:, :, 0][on]
        advantages = group_advantages(
            rollouts.rewards.numpy(), np.full(rows // SIBLINGS, SIBLINGS), SIBLINGS, AdvantageSection()
        )
        log_m, accept = log_q, torch.ones(len(log_q), dtype=torch.bool)
        figures: dict[str, float] = {}
        if self.method.coins or self.method.z_weight:
            log_p = self._densities(token_ids, offsets, trainable)
            log_m, accept, figures = self._thin(samples.log_q[on], log_p, samples.ids[on], log_q, lengths, update)

        def spread(values: Tensor) -> Tensor:
            return torch.zeros(len(token_ids), dtype=values.dtype).masked_scatter_(trainable, values)

        count = len(token_ids)
        return StepBatch(
            token_ids=token_ids,
            cu_seqlens=offsets,
            trainable=trainable.numpy().astype(np.uint8),
            accept=spread(accept.to(torch.uint8)),
            advantages=torch.from_numpy(advantages).repeat_interleave(lengths + prompt),
            weights=torch.full((count,), 1 / int(trainable.sum())),
            log_q=spread(log_q),
            log_m=spread(log_m),
            log_p_v=spread(log_q),
            tokens_global=count,
        ), figures

    @torch.no_grad()
    def _densities(self, token_ids: Tensor, offsets: np.ndarray, trainable: Tensor) -> Tensor:
        """``[n, V]`` of the policy that trains, at the sampled tokens."""
        at = torch.nonzero(trainable).squeeze(1)
        hidden = self.policy.hidden(token_ids, offsets)[at - 1]
        return (hidden @ self.policy.head.T).log_softmax(dim=1)

    def _thin(
        self, q: Tensor, p: Tensor, ids: Tensor, log_q: Tensor, lengths: Tensor, update: int
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """``(log m, accept)`` at lambda 1; with a Z weight ``log m - log Z`` is what a learner takes for log m."""
        log_p = p.gather(1, ids[:, None])[:, 0]
        log_m, accept = log_q, torch.ones(len(log_q), dtype=torch.bool)
        figures: dict[str, float] = {}
        if self.method.coins:
            rows = len(lengths)
            uniforms = coins(
                self.seed, np.arange(rows) // SIBLINGS, (np.arange(rows) % SIBLINGS).astype(np.int32),
                lengths.numpy(), update,
            )  # fmt: skip
            thinning = thin(log_p.numpy(), log_q.numpy(), uniforms, 0.0)
            log_m, accept = torch.from_numpy(thinning.log_m), torch.from_numpy(thinning.accept)
            figures["acceptance"] = float(accept.float().mean())
        if self.method.z_weight:
            log_m = log_m - torch.minimum(p, q).exp().sum(dim=1).clamp_min(1e-30).log()
        return log_m, accept, figures


@cache
def _question(seed: int, index: int, split: Split) -> PromptItem:
    return Sort6(seed, {}).prompt(index, split)


def _load(path: Path) -> Decoder:
    model = Decoder(ModelConfig.from_hf_dir(path))
    load_hf(path, model)
    model.prepare(compiled=False)
    return model


@torch.no_grad()
def _copy(weights: list[Tensor], model: Decoder) -> None:
    for parameter, value in zip(model.parameters(), weights, strict=True):
        parameter.copy_(value)
