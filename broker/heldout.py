"""What a held-out evaluation says: mean@k, pass@k, votes and calibration, with intervals. Pure.

A completion is *right* where its channel ``correct`` is at least RIGHT_FROM; without that channel only
rewards and lengths are said. Prompts, not completions, are the independent draws: intervals (95 %)
are of the mean over prompts, so those of one prompt may be as alike as they like.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.calibration import calibrate
from common.mixture import Mixture
from common.obrs import wilson_interval
from common.wire import NO_ANSWER, EvaluationResult

RIGHT_FROM = 0.5
Z_95 = 1.96
TIE = 1e-9  # relative: sums of confidences that differ by less are equal

Wide = NDArray[np.float64]
Longs = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Mean:
    """A mean over prompts and its 95 % interval, None for a single prompt."""

    value: float
    low: float | None
    high: float | None


def mean_of(values: Wide, is_share: bool = False) -> Mean:
    """Of ``values [P, k]``, k of each prompt: the standard error is that of the prompts' means.

    The interval of a share (in [0, 1]) stays there. Where every value is 0 or 1 and there is one a prompt,
    or several prompts are all alike, it is Wilson's, of prompts.
    """
    of_prompt = values.mean(axis=1)
    value, count = float(of_prompt.mean()), len(of_prompt)
    alike = of_prompt.max() == of_prompt.min()
    spread = 0.0 if alike else float(of_prompt.std(ddof=1))
    if is_share and ((alike and count > 1) or (values.shape[1] == 1 and np.isin(values, (0, 1)).all())):
        return Mean(value, *wilson_interval(value * count, count))
    if count < 2:
        return Mean(value, None, None)
    half = Z_95 * spread / math.sqrt(count)
    low, high = value - half, value + half
    return Mean(value, max(0.0, low), min(1.0, high)) if is_share else Mean(value, low, high)


def pass_at(right: Flags, k: int) -> Wide:
    """``[P]``: the chance that of ``k`` of a prompt's ``n`` completions ``right [P, n]`` one is right at least.

    Unbiased: ``1 - C(n - c, k) / C(n, k)`` for c right ones, as a product, so that nothing overflows
    (2107.03374).
    """
    n = right.shape[1]
    assert 1 <= k <= n
    drawn = np.arange(k)
    missed = np.array([np.prod(np.maximum(0, n - c - drawn) / (n - drawn)) for c in range(n + 1)])
    return np.asarray(1.0 - missed[right.sum(axis=1)], np.float64)


@dataclass(frozen=True)
class Votes:
    """What prompts ``[P]`` answer if their completions vote."""

    accuracy: Wide  # a tie is drawn by lot: the mean over the tied answers; 0 where nobody answers
    tied: Flags
    voted: Flags  # at least one completion has an answer


def vote(answers: Longs, right: Flags, weights: Wide) -> Votes:
    """All arguments ``[P, n]``: the answer with the greatest sum of ``weights`` (not negative) wins its prompt.

    Completions without an answer (NO_ANSWER) do not vote. Where completions with one answer are judged
    differently it is right by their share.
    """
    prompts = len(answers)
    accuracy, tied, voted = np.zeros(prompts), np.zeros(prompts, np.bool_), np.zeros(prompts, np.bool_)
    for p in range(prompts):
        named = answers[p] != NO_ANSWER
        if not named.any():
            continue
        _, of = np.unique(answers[p][named], return_inverse=True)
        tally = np.bincount(of, weights[p][named])
        best = tally >= tally.max() * (1 - TIE)
        share = np.bincount(of, right[p][named].astype(np.float64)) / np.bincount(of)
        accuracy[p], tied[p], voted[p] = share[best].mean(), best.sum() > 1, True
    return Votes(accuracy, tied, voted)


def evaluate(
    result: EvaluationResult, ks: tuple[int, ...], labels: tuple[str, ...], schedule: Mixture
) -> dict[str, Any]:
    """The figures of a result, and of each of several tasks ``tasks: {label: figures}``; for metrics.jsonl."""
    prompts = len(result.rewards) // result.samples
    found = _figures(result, np.arange(prompts), ks)
    if len(labels) > 1:
        tasks, _ = schedule.places(np.arange(prompts))
        found["tasks"] = {
            label: _figures(result, np.flatnonzero(tasks == number), ks)
            for number, label in enumerate(labels)
            if (tasks == number).any()
        }
    return found


def _figures(result: EvaluationResult, of: Longs, ks: tuple[int, ...]) -> dict[str, Any]:
    """Of prompts ``of``."""

    def table(column: NDArray[Any]) -> NDArray[Any]:
        return column.reshape(-1, result.samples)[of]

    reward = mean_of(table(result.rewards).astype(np.float64))
    channels = {name: table(result.channels[:, c]).astype(np.float64) for c, name in enumerate(result.channel_names)}
    found = {
        "prompts": len(of),
        "samples": result.samples,
        "reward": reward.value,
        "reward_low": reward.low,
        "reward_high": reward.high,
        "length_mean": float(table(result.lengths).mean()),
        "channels": {n: float(np.nanmean(v)) for n, v in channels.items() if not np.isnan(v).all()},
    }
    judged = ~np.isnan(channels["correct"]).all(axis=1) if "correct" in channels else np.zeros(len(of), np.bool_)
    if judged.any():
        correct = np.nan_to_num(channels["correct"][judged], nan=0.0)
        confidence = channels["confidence"][judged] if "confidence" in channels else np.full(correct.shape, np.nan)
        found |= _of_right(correct, table(result.answers)[judged], confidence, ks)
    return found


def _of_right(correct: Wide, answers: Longs, confidence: Wide, ks: tuple[int, ...]) -> dict[str, Any]:
    """What follows from who was right; all ``[P, k]``."""
    right = correct >= RIGHT_FROM
    mean = mean_of(correct, is_share=bool(0 <= correct.min() <= correct.max() <= 1))
    found: dict[str, Any] = {"correct": mean.value, "correct_low": mean.low, "correct_high": mean.high}
    if ks:
        passed = {k: mean_of(pass_at(right, k)[:, None], is_share=True) for k in ks}
        found["pass_at"] = {str(k): [m.value, m.low, m.high] for k, m in passed.items()}
    if correct.shape[1] > 1 and (answers != NO_ANSWER).any():
        found["votes"] = _votes("majority", vote(answers, right, np.ones(correct.shape)))
        if not np.isnan(confidence).all():
            weights = np.clip(np.nan_to_num(confidence, nan=0.0), 0.0, 1.0)
            found["votes"] |= _votes("weighted", vote(answers, right, weights))
    found["calibration"] = None
    if (calibration := calibrate(confidence.ravel(), right.ravel())) is not None:
        found["calibration"] = calibration.figures()
    return found


def _votes(kind: str, votes: Votes) -> dict[str, Any]:
    mean = mean_of(votes.accuracy[:, None], is_share=True)
    return {
        kind: [mean.value, mean.low, mean.high],
        f"{kind}_tied": float(votes.tied.mean()),
        "voted": float(votes.voted.mean()),
    }
