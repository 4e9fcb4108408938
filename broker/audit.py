"""The selection-bias audit: whose tokens does rejection take, and is it more than chance?

Acceptance by response length, sign of the advantage, task and lag. Each stratum is compared with the rest of
the batch, and its difference told apart from its noise by a z score. Under the rule itself a stratum
may differ because its tokens are further from the learner's policy. What is dropped is counted where
it happens (broker.fates).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.batch import Batch
from broker.decision import Decision
from common.ragged import count

WARN_SIGMA = 4.0  # a difference from the rest of the batch beyond its noise
WARN_SHARE = 0.02  # ... and at least this large
FEWEST = 50  # tokens or trajectories below which a stratum says nothing
LENGTH_BINS = 4


def strata(batch: Batch) -> dict[str, NDArray[np.int64]]:
    """``name -> stratum of each trajectory [B]``: length quartile, sign of the advantage, of a mixture the task."""
    lengths = batch.sampled_tokens
    edges = np.quantile(lengths[lengths > 0] if lengths.any() else lengths, np.linspace(0, 1, LENGTH_BINS + 1)[1:-1])
    found = {
        "length": np.searchsorted(edges, lengths, side="left"),
        "advantage": np.sign(batch.advantages).astype(np.int64),
    }
    return found if len(batch.labels) == 1 else {**found, "task": batch.tasks}


def audit(batch: Batch, decision: Decision) -> dict[str, Any]:
    """``{stratum: {value: [tokens, acceptance, z]}}`` and ``warnings`` where a value stands out.

    Values are numbers, of a task its label.
    """
    tokens, accepted = batch.sampled_tokens, count(decision.accept == 1, batch.cu_seqlens)
    by_stratum = {name: (of, tokens, accepted) for name, of in strata(batch).items()}
    by_stratum["lag"] = batch.by_lag(decision.accept == 1)
    found: dict[str, Any] = {}
    warnings: list[str] = []
    for name, (values, of, hits) in by_stratum.items():
        found[name] = {}
        for value in np.unique(values[of > 0]).tolist():
            inside = values == value
            here, got = int(of[inside].sum()), int(hits[inside].sum())
            comparison = compare_clusters(hits, of, inside)
            called = batch.labels[value] if name == "task" else str(value)
            found[name][called] = [here, got / here, round(comparison.z, 2)]
            if comparison.stands_out:
                difference = comparison.difference
                warnings.append(f"{name} {called}: acceptance {got / here:.3f}, {difference:+.3f} from the rest")
    return {"strata": found, "warnings": warnings}


@dataclass(frozen=True)
class Comparison:
    """A stratum's share beside that of the rest."""

    difference: float  # 0 where there is no rest
    z: float  # in units of its standard error (pooled); 0 where either says nothing

    @property
    def stands_out(self) -> bool:
        """Whether the difference is beyond its noise, and large enough to matter."""
        return abs(self.z) >= WARN_SIGMA and abs(self.difference) >= WARN_SHARE


def compare_clusters(hits: NDArray[np.int64], of: NDArray[np.int64], inside: NDArray[np.bool_]) -> Comparison:
    """``hits[C]`` successes ``of[C]`` so many, those ``inside[C]`` beside the others; each of C is one draw.

    Tokens of a trajectory share its lag and its prompt, so their acceptance is alike: the error is that of a ratio of
    sums over trajectories, about the share of all of them.
    """
    sides = [(int(hits[side].sum()), int(of[side].sum())) for side in (inside, ~inside)]
    (got, here), (elsewhere, rest) = sides
    difference = got / here - elsewhere / rest if here and rest else 0.0
    if min(here, rest) < FEWEST:
        return Comparison(difference, 0.0)
    off = np.square(hits - (got + elsewhere) / (here + rest) * of)
    error = math.sqrt(float(off[inside].sum()) / here**2 + float(off[~inside].sum()) / rest**2)
    return Comparison(difference, difference / error if error > 0 else 0.0)


def compare_shares(here: float, of: int, elsewhere: float, of_others: int) -> Comparison:
    """``here`` successes ``of`` so many, beside ``elsewhere`` of ``of_others``; fewer than FEWEST say nothing."""
    difference = here / of - elsewhere / of_others if of and of_others else 0.0
    if min(of, of_others) < FEWEST:
        return Comparison(difference, 0.0)
    pooled = (here + elsewhere) / (of + of_others)
    error = math.sqrt(pooled * (1 - pooled) * (1 / of + 1 / of_others))
    return Comparison(difference, difference / error if error > 0 else 0.0)
