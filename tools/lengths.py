"""Are long trajectories dropped more often than others? Dropping by age or failure usually does that."""

from dataclasses import dataclass

from broker.audit import compare_shares
from tools.run_files import Record


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
        comparison = compare_shares(b, a + b, n_dropped - b, n_trained + n_dropped - a - b)
        rows.append(LengthRow(longest, a, b, comparison.stands_out))
    return rows
