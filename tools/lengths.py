"""Are long trajectories dropped more often than others? Dropping by age or failure usually does that."""

import math
from dataclasses import dataclass

from tools.run_files import Record

WARN_SIGMA = 4.0  # a difference from the other lengths beyond its noise
WARN_SHARE = 0.02  # ... and at least this large
FEWEST = 50  # trajectories below which a length says nothing


@dataclass(frozen=True)
class LengthRow:
    """Trajectories of more than half of ``longest`` sampled tokens, and no more than it."""

    longest: int
    trained: int
    dropped: int
    stands_out: bool  # its drop rate differs from that of the others by more than its noise

    @property
    def drop_rate(self) -> float:
        """Share of the trajectories that were not trained."""
        return self.dropped / (self.trained + self.dropped)


def length_rows(status: Record) -> list[LengthRow]:
    """``status.json``'s ``trajectories_by_length``, shortest first; [] for a run that did not count them."""
    counted = status.get("trajectories_by_length") or {}
    trained = {int(k): n for k, n in (counted.get("trained") or {}).items()}
    dropped = {int(k): n for k, n in (counted.get("dropped") or {}).items()}
    n_trained, n_dropped = sum(trained.values()), sum(dropped.values())
    rows = []
    for longest in sorted(trained.keys() | dropped.keys()):
        a, b = trained.get(longest, 0), dropped.get(longest, 0)
        odd = _stands_out(b, a + b, n_dropped - b, n_trained + n_dropped - a - b)
        rows.append(LengthRow(longest, a, b, odd))
    return rows


def _stands_out(here: int, of: int, elsewhere: int, of_others: int) -> bool:
    if min(of, of_others) < FEWEST:
        return False
    pooled = (here + elsewhere) / (of + of_others)
    difference = abs(here / of - elsewhere / of_others)
    error = math.sqrt(pooled * (1 - pooled) * (1 / of + 1 / of_others))
    return difference >= WARN_SHARE and difference > WARN_SIGMA * error
