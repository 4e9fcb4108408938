"""Outcomes as a table for people."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from tools.simulate.outcome import Outcome
from tools.simulate.settings import Setup


@dataclass(frozen=True)
class Line:
    """One simulation; ``values`` are those of the keys that vary."""

    values: dict[str, str]
    setup: Setup
    outcome: Outcome


def print_lines(console: Console, lines: Sequence[Line]) -> None:
    """One row each; rates a second, lags in versions, idle as shares of each role's time."""
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for key in lines[0].values:
        table.add_column(key.replace(".", ".\n"), header_style="dim", no_wrap=True)
    for title in HEADINGS:
        table.add_column(title, justify="right", header_style="dim", no_wrap=True)
    for line in lines:
        table.add_row(*line.values.values(), *cells(line.outcome))
    console.print(table)


HEADINGS = (
    "steps/s", "tok/s\nsampled", "tok/s\ntrained", "lag\nmean", "\np95", "\nmax", "learner\nidle",
    "actors\nno credits", "actors\nno weights", "replica\nidle", "waste",
)  # fmt: skip


def cells(outcome: Outcome) -> list[str]:
    """As HEADINGS name them."""
    actors = outcome.shares.get("actor", {})
    replica = f"{outcome.idle['replica']:.0%}" if "replica" in outcome.idle else "–"
    return [
        f"{outcome.steps_per_s:#.3g}", f"{outcome.generated_per_s:,.0f}", f"{outcome.trained_per_s:,.0f}",
        f"{outcome.lag_mean:.2f}", str(outcome.lag_p95), str(outcome.lag_max), f"{outcome.learner_idle:.0%}",
        f"{actors.get('idle.credits', 0.0):.0%}", f"{actors.get('idle.weights', 0.0):.0%}", replica,
        f"{outcome.waste:.1%}",
    ]  # fmt: skip
