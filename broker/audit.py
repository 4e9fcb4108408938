"""The selection-bias audit: whose tokens does rejection take, and is it more than chance?

Acceptance by response length, reward sign and lag. Under the rule itself a stratum may differ
because its tokens are further from the learner's policy; so each stratum is compared with what the
rule expected of it (mean of a, which needs no coin), and its difference from the batch is told
apart from its noise by a z score. Drops by length are counted where they happen (pipeline).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.batch import Batch, Decision

WARN_SIGMA = 4.0  # a difference from the rest of the batch beyond its noise
WARN_SHARE = 0.02  # ... and at least this large
FEWEST = 50  # tokens below which a stratum says nothing
LENGTH_BINS = 4


def strata(batch: Batch) -> dict[str, NDArray[np.int64]]:
    """``name -> stratum of each trajectory [B]``: length quartile, sign of the advantage."""
    lengths = batch.sampled_tokens()
    edges = np.quantile(lengths, np.linspace(0, 1, LENGTH_BINS + 1)[1:-1])
    return {
        "length": np.searchsorted(edges, lengths, side="left"),
        "reward": np.sign(batch.advantages).astype(np.int64),
    }


def audit(batch: Batch, decision: Decision) -> dict[str, Any]:
    """``{stratum: {value: [tokens, acceptance, z]}}`` and ``warnings`` where a value stands out."""
    on = batch.trainable == 1
    owner = np.repeat(np.arange(len(batch.groups)), np.diff(batch.cu_seqlens))[on]
    accepted = decision.accept[on].astype(np.float64)
    by_token = {name: of[owner] for name, of in strata(batch).items()}
    by_token["lag"] = (batch.step - batch.versions[on]).astype(np.int64)
    found: dict[str, Any] = {}
    warnings: list[str] = []
    for name, values in by_token.items():
        found[name] = {}
        for value in np.unique(values):
            inside = values == value
            count, rest = int(inside.sum()), int((~inside).sum())
            rate = float(accepted[inside].mean())
            z = _z_score(accepted[inside], accepted[~inside]) if min(count, rest) >= FEWEST else 0.0
            found[name][str(int(value))] = [count, rate, round(z, 2)]
            difference = rate - float(accepted[~inside].mean()) if rest else 0.0
            if abs(z) >= WARN_SIGMA and abs(difference) >= WARN_SHARE:
                warnings.append(f"{name} {int(value)}: acceptance {rate:.3f}, {difference:+.3f} from the rest")
    return {"strata": found, "warnings": warnings}


def _z_score(inside: NDArray[np.float64], outside: NDArray[np.float64]) -> float:
    """Difference of two shares in units of its standard error (pooled)."""
    pooled = (inside.sum() + outside.sum()) / (len(inside) + len(outside))
    error = np.sqrt(pooled * (1 - pooled) * (1 / len(inside) + 1 / len(outside)))
    return float((inside.mean() - outside.mean()) / error) if error > 0 else 0.0
