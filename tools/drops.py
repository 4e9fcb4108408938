"""Is one kind of trajectory dropped more often than others? Dropping by age or failure usually favours short ones."""

from collections.abc import Mapping
from dataclasses import dataclass

from broker.audit import compare_shares
from broker.fates import STRATA
from tools.run_files import Record


@dataclass(frozen=True)
class DropRow:
    """Trajectories of one value of a stratum; a length stands for all down to half of it."""

    stratum: str  # length, reward, lag or task
    value: str
    trained: int
    dropped: int
    stands_out: bool  # its drop rate differs from that of the others by more than its noise

    @property
    def words(self) -> str:
        """Which trajectories these are."""
        if self.stratum == "length":
            return f"up to {int(self.value):,} sampled tokens"
        return f"{self.stratum} {self.value}"

    @property
    def drop_rate(self) -> float:
        """Share of the trajectories that were not trained."""
        return self.dropped / (self.trained + self.dropped)


def drop_rows(status: Record) -> list[DropRow]:
    """``status.json``'s ``trajectories_by_*``, by stratum and value; [] for a run that did not count them."""
    return [row for name in STRATA for row in _rows(name, status.get(f"trajectories_by_{name}") or {})]


def _rows(stratum: str, counted: Mapping[str, Mapping[str, int] | None]) -> list[DropRow]:
    trained, dropped = (counted.get("trained") or {}), (counted.get("dropped") or {})
    n_trained, n_dropped = sum(trained.values()), sum(dropped.values())
    rows = []
    for value in sorted(trained.keys() | dropped.keys(), key=_order):
        a, b = trained.get(value, 0), dropped.get(value, 0)
        comparison = compare_shares(b, a + b, n_dropped - b, n_trained + n_dropped - a - b)
        rows.append(DropRow(stratum, value, a, b, comparison.stands_out))
    return rows


def _order(value: str) -> tuple[float, str]:
    """Numbers in their order, labels by the alphabet."""
    digits = value.removeprefix("-")
    return (float(value), "") if digits.isascii() and digits.isdigit() else (0.0, value)
