"""Run every decision of a run again from its journal, or decide it anew under other settings.

::

    python -m tools.replay RUN_DIR                    bit for bit, or the first difference; exit code 1
    python -m tools.replay RUN_DIR obrs.budget=0.8    what would that have kept? a table and replay.png
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from broker.chunks import Event
from broker.decision import Rule, Scores, reject, trainable_scores
from broker.journal import Journal
from broker.pipeline import Pipeline
from broker.recorder import CHECKS, apply, difference
from broker.recovery import check_settings, load_snapshot
from broker.service import JOURNAL, read_vocab_size
from broker.steps import controller_of, scores_of
from common import wire
from common.budget import ThresholdController
from common.codec import decode
from common.config import RunConfig
from common.errors import ConfigError, CroupierError, JournalError
from common.frozen import POLICY
from common.routing import read_routing
from tools.console import make_console, print_error
from tools.outputs import writing
from tools.runs import load_config

SHOWN_ROWS = 12


@dataclass
class Verdict:
    """What a replay found."""

    events: int = 0
    first: int = -1  # the first event applied
    decisions: int = 0
    shards: int = 0
    committed: int = 0
    difference: str = ""


def start(config: RunConfig, journal: Journal) -> tuple[Pipeline, int]:
    """A pipeline at the oldest state that the journal can still build, and the next event's number.

    Raises :class:`JournalError` where the journal was written under settings that are others now.
    """
    vocab_size, routing = read_vocab_size(config.model.path), read_routing(config)
    pipeline = Pipeline(config, vocab_size, routing)
    check_settings(pipeline.fixed_settings, journal)
    whole = journal.whole_from()
    if whole == 0:
        return pipeline, 0
    for event in journal.events(whole):
        if event.kind == "snapshot":
            pipeline = Pipeline(config, vocab_size, routing)
            try:
                load_snapshot(pipeline, journal, event)
            except JournalError:  # what it stands on was pruned since
                continue
            return pipeline, event.seq + 1
    raise JournalError(f"{journal.directory}: holds no state to begin from")


def verify(config: RunConfig, journal: Journal, seen: Callable[[Pipeline, Event, Any], None] | None = None) -> Verdict:
    """Apply every event; stop at the first check that comes out differently.

    Raises :class:`JournalError` where a run that goes on has pruned what was still to be read.
    """
    pipeline, first = start(config, journal)
    verdict = Verdict(first=first)
    for event in journal.events(first):
        if event.seq != first + verdict.events:
            break
        verdict.events += 1
        result = apply(pipeline, event)
        if event.kind in CHECKS:
            verdict.decisions += event.kind == "decided"
            verdict.shards += event.kind == "served"
            if odd := difference(pipeline, event):
                verdict.difference = f"event {event.seq}: {odd}"
        verdict.committed += event.kind == "commit" and result is not None
        if verdict.difference:
            break
        if seen is not None:
            seen(pipeline, event, result)
    if not verdict.difference and first + verdict.events <= journal.durable:
        raise JournalError(
            f"{journal.directory}: event {first + verdict.events} is gone: the run has pruned it meanwhile; once more"
        )
    return verdict


@dataclass
class Alternative:
    """The same batches and scores under another rule."""

    config: RunConfig
    rows: list[dict[str, float]] = field(default_factory=list)
    _scores: Scores | None = None
    _controller: ThresholdController | None = None

    def __post_init__(self) -> None:
        if self.config.obrs.mode == "off":
            raise ConfigError("obrs.mode=off: nothing is rejected; compare with obrs.budget, .target_ess or .threshold")
        self._controller = controller_of(self.config.obrs)

    def __call__(self, pipeline: Pipeline, event: Event, _result: Any) -> None:
        """Called with every event that was applied."""
        if event.kind == "scored" and event.head["scorer"] == POLICY:
            self._scores = scores_of(decode(event.frames, wire.TO_BROKER))
        if event.kind != "decided" or self._scores is None:
            return
        entry = pipeline.step(event.head["step"])
        if entry is None or entry.again_seq is not None:  # a second thinning is not decided anew
            self._scores = None
            return
        obrs = self.config.obrs
        threshold = float(np.log(obrs.threshold)) if self._controller is None else self._controller.log_threshold
        rule = Rule(self.config.run.seed, threshold, obrs.z_weight, obrs.z_kappa)
        decision = reject(entry.batch, self._scores, rule)
        if self._controller is not None:
            log_p, log_q, _ = trainable_scores(entry.batch, self._scores)
            self._controller.update(log_p, log_q)
        self._scores = None
        now = decision.divergence
        if now is None:
            return
        then = entry.receipt
        self.rows.append({
            "step": entry.batch.step,
            "lambda_then": float(np.exp(entry.log_threshold)), "lambda": float(np.exp(threshold)),
            "acceptance_then": then["acceptance"], "acceptance": decision.accepted / max(1, decision.proposed),
            "kl_before": now.kl_before, "kl_then": then["kl_after"], "kl": now.kl_after,
            "ess_then": then["ess"], "ess": now.ess,
        })  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m tools.replay", description=__doc__.split("\n")[0]
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="other settings of obrs.*, to compare")
    given = parser.parse_args(arguments)
    console = make_console()
    try:
        return _replay(given.run_dir, given.overrides, console)
    except CroupierError as error:
        print_error(console, error)
        return 2


def _replay(run_dir: Path, overrides: Sequence[str], console: Console) -> int:
    config = load_config(run_dir)
    journal = Journal(run_dir / JOURNAL, "", config.broker.journal_mb or 1.0, read_only=True)
    alternative = Alternative(_altered(run_dir, config, overrides)) if overrides else None
    verdict = verify(config, journal, alternative)
    since = "the beginning" if verdict.first == 0 else f"event {verdict.first} (older ones were pruned)"
    console.print(
        f"{verdict.events:,} events applied again since {since}: {verdict.decisions} decisions, "
        f"{verdict.shards} sets of shards, {verdict.committed} commits"
    )
    if verdict.difference:
        console.print(f"first difference: {verdict.difference}", style="red", markup=False, soft_wrap=True)
        return 1
    if not verdict.decisions:
        console.print("nothing had been decided yet", style="yellow")
        return 0
    console.print("every decision came out as it did then, bit for bit", style="green")
    if alternative is not None:
        _compare(alternative, run_dir, console)
    return 0


def _altered(run_dir: Path, config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    odd = [o for o in overrides if not o.startswith("obrs.")]
    if odd:
        raise ConfigError(f"{odd[0]}: only obrs.* can be decided anew, the trajectories are what they are")
    implied = ["obrs.mode=budget"] if any(o.startswith("obrs.budget") for o in overrides) else []
    if any(o.startswith("obrs.target_ess") for o in overrides):
        implied = ["obrs.mode=ess"]
    if any(o.startswith("obrs.threshold") for o in overrides):
        implied = ["obrs.mode=threshold"]
    return load_config(run_dir, [*implied, *overrides])


def _compare(alternative: Alternative, run_dir: Path, console: Console) -> None:
    rows = alternative.rows
    if not rows:
        console.print("no scored decisions in the journal: the run rejected nothing")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for title in (
        "step",
        "λ then",
        "λ now",
        "accepted then",
        "now",
        "KL before",
        "after then",
        "now",
        "ESS then",
        "now",
    ):
        table.add_column(title, justify="right", header_style="dim")
    stride = max(1, len(rows) // SHOWN_ROWS)
    for row in [
        *rows[::stride],
        {"step": -1, **{k: float(np.mean([r[k] for r in rows])) for k in rows[0] if k != "step"}},
    ]:
        table.add_row(
            "mean" if row["step"] < 0 else str(int(row["step"])), f"{row['lambda_then']:.3f}", f"{row['lambda']:.3f}",
            f"{row['acceptance_then']:.4f}", f"{row['acceptance']:.4f}", f"{row['kl_before']:.2e}",
            f"{row['kl_then']:.2e}", f"{row['kl']:.2e}", f"{row['ess_then']:.3f}", f"{row['ess']:.3f}",
        )  # fmt: skip
    console.print(table)
    from tools.plots import plot_replay

    with writing(run_dir, "make it writable, or copy it and name the copy"):
        console.print(f"picture: {plot_replay(run_dir, rows)}")


if __name__ == "__main__":
    sys.exit(main())
