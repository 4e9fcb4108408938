"""What is asked of the scorers about one batch, and what frozen models said of it.

::

    batch -> ask(policy), ask(reference), ask(teacher) ... all at once -> answers in any order -> gather -> FrozenScores

A teacher is asked about the trajectories of its tasks alone. Every sampled token is asked for, since
which of them survive rejection is known only when the policy has answered.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.batch import Batch
from broker.decision import Decision
from common.config import RunConfig
from common.errors import ConfigError, DataError
from common.frozen import POLICY, REFERENCE
from common.wire import ScoreRequest, ScoreResult

LARGEST_LOG_RATIO = 20.0  # cut before exp (algorithms.md 0.4)


@dataclass
class Asked:
    """One request: what was asked of whom, and the answer once it is there."""

    scorer: str  # POLICY, or the frozen model's name
    request: ScoreRequest
    tokens: NDArray[np.bool_]  # [N] of the batch, those in the request
    answer: ScoreResult | None = None
    seq: int = -1  # the journal's event with the answer

    def check(self, result: ScoreResult) -> None:
        """Raise :class:`DataError` for an answer of another shape, or of weights that are too old."""
        asked = self.request.topk_ids.shape
        if len(result.log_p) != asked[0]:
            raise DataError(f"score_result: {len(result.log_p)} scores for {asked[0]} tokens")
        if result.topk_log_p.shape != asked:
            raise DataError(f"score_result: alternatives {result.topk_log_p.shape}, asked {asked}")
        if result.version < self.request.min_version:
            raise DataError(f"score_result: scored by version {result.version}, asked for {self.request.min_version}")


@dataclass
class Scoring:
    """A batch whose scores are awaited."""

    batch: Batch
    again: bool = False  # decided already: this is its second thinning, which asks the policy alone
    asked: dict[str, Asked] = field(default_factory=dict)  # by scorer
    decision: Decision | None = None  # what the policy's answer came to

    def add(self, asked: Asked | None) -> ScoreRequest | None:
        """One more request, if there is anything to ask."""
        if asked is None:
            return None
        self.asked[asked.scorer] = asked
        return asked.request

    @property
    def open(self) -> list[Asked]:
        """What was not answered yet."""
        return [asked for asked in self.asked.values() if asked.answer is None]

    @property
    def of_policy(self) -> Asked | None:
        """The policy's part; None with rejection off."""
        return self.asked.get(POLICY)


def ask(batch: Batch, scorer: str, number: int, min_version: int, config: RunConfig) -> Asked | None:
    """Request ``number``: what ``scorer`` has to say of the batch; None if it has nothing to say.

    The policy is asked about all of it, alternatives and expert records included, under
    ``min_version`` or later; a frozen model about the sampled tokens of its tasks, which it routes
    its own way. The temperature is the rollout's for all.
    """
    temperature, wanted = config.rollout.temperature, batch.on.view(np.uint8)
    if scorer == POLICY:
        offsets = batch.segments.astype(np.int32)
        request = ScoreRequest(
            number, min_version, temperature, offsets, batch.token_ids, wanted, batch.topk_ids, batch.experts
        )
        return Asked(scorer, request, np.ones(len(wanted), np.bool_))
    mine = _trajectories(batch, config, scorer)
    tokens = np.repeat(mine, np.diff(batch.cu_seqlens))
    if not wanted[tokens].any():
        return None
    owner = batch.owners(batch.segments)
    lengths = np.diff(batch.segments)[mine[owner]]
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    none = np.zeros((int(offsets[-1]), 0), np.int32)
    request = ScoreRequest(number, 0, temperature, offsets, batch.token_ids[tokens], wanted[tokens], none)
    return Asked(scorer, request, tokens)


def _trajectories(batch: Batch, config: RunConfig, scorer: str) -> NDArray[np.bool_]:
    """Those that a frozen model scores ``[B]``."""
    if scorer not in config.frozen:
        raise ConfigError(
            f"{scorer}: the journal holds scores of this model, and the configuration does not ask for it (loss.kl, "
            "loss.distill, teachers); start the broker with the run's own file, or move the journal away"
        )
    tasks = config.frozen[scorer].tasks
    return np.ones(len(batch.groups), np.bool_) if tasks is None else np.isin(batch.tasks, tasks)


@dataclass(frozen=True)
class FrozenScores:
    """What the frozen models said of a batch, token by token."""

    log_reference: NDArray[np.float32] | None = None  # [N] 0 where not sampled, NaN where it came so; None: not asked
    log_teacher: NDArray[np.float32] | None = None  # [N] NaN where there is no teacher; None without any
    figures: dict[str, Any] = field(default_factory=dict)  # for the receipt


NOTHING = FrozenScores()


def gather(batch: Batch, answers: Mapping[str, Asked], config: RunConfig) -> FrozenScores:
    """Put the answers of frozen models where their tokens are in the batch, and say what they come to.

    -inf is kept: the learner cuts it. NaN is counted and stands for no score. ``kl_reference`` is the
    k3 estimate of KL(behaviour || reference) on sampled tokens, a teacher's ``gap`` the mean of
    ``log teacher - log q`` on its own, cut at ``loss.distill_clip``; both weigh tokens alike.
    """
    if not config.frozen:
        return NOTHING
    sampled = batch.on
    reference = np.zeros(len(sampled), np.float32) if config.loss.kl > 0 else None
    teacher = np.full(len(sampled), np.nan, np.float32) if config.loss.distill > 0 else None
    figures: dict[str, Any] = {}
    if reference is not None:
        figures |= {"kl_reference": None, "reference_unscorable": 0}
    if teacher is not None:
        figures["teachers"] = {}
    for name, asked in answers.items():
        if name == POLICY or asked.answer is None:
            continue
        on = sampled & asked.tokens
        log_p = np.minimum(asked.answer.log_p[sampled[asked.tokens]], np.float32(0))  # rounding may lift one above 0
        gap = log_p.astype(np.float64) - batch.log_q[on]
        known = ~np.isnan(gap)
        if name == REFERENCE and reference is not None:
            reference[on] = log_p
            figures["kl_reference"], figures["reference_unscorable"] = _k3(gap[known]), int((~known).sum())
        elif teacher is not None:
            teacher[on] = log_p
            figures["teachers"][name] = _gap(gap, config.loss.distill_clip)
    return FrozenScores(reference, teacher, figures)


def _k3(log_ratio: NDArray[np.float64]) -> float | None:
    """Mean of ``r - 1 - log r`` with r = p/q at tokens drawn from q: it estimates KL(q || p) and is never negative."""
    if not len(log_ratio):
        return None
    cut = np.clip(log_ratio, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return float((np.expm1(cut) - cut).mean())


def _gap(gap: NDArray[np.float64], clip: float) -> dict[str, Any]:
    known = gap[~np.isnan(gap)]
    return {
        "gap": float(np.clip(known, -clip, clip).mean()) if len(known) else None,
        "tokens": len(known),
        "clipped": int((np.abs(known) > clip).sum()),
        "unscorable": len(gap) - len(known),
    }
