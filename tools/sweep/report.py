"""A sweep's report: report.md, report.html (whole in itself) and pictures, from what lies in its directory.

::

    SWEEP_DIR  ->  read_sweep()  ->  Sweep: cells, runs measured, what could not be read
               ->  judge()       ->  Verdict: comparisons, means, fronts, advice
               ->  blocks + pictures  ->  report.md, report.html

It may be written at any moment: runs that are missing, unfinished or damaged are named and left out.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import ConfigError, DataError
from tools.document import Block, Document, Heading, Items, Note, Paragraph, Table
from tools.markdown import to_markdown
from tools.outputs import writing
from tools.page import to_html
from tools.run_files import REPORT, SUMMARY
from tools.sweep import advice, pictures
from tools.sweep.analysis import Comparison, Runs, by_samples, by_time, compare, front, means, samples_at
from tools.sweep.measure import Measured, measure
from tools.sweep.plan import STATE, read_state

PAGE = "report.html"
COLUMNS = (  # (figure, title, format)
    ("train_s", "training, s", ",.1f"),
    ("generated_per_s", "generated tokens/s", ",.0f"),
    ("trained_per_s", "trained tokens/s", ",.0f"),
    ("accepted_per_s", "accepted tokens/s", ",.0f"),
    ("kl_before", "KL before rejection", ".2e"),
    ("kl_after", "KL after", ".2e"),
    ("kl_learner", "KL at the learner", ".2e"),
    ("acceptance", "acceptance", ".4f"),
    ("ess", "ESS", ".4f"),
    ("unused", "never trained", ".2%"),
    ("rejected", "rejected", ".2%"),
    ("lag_mean", "lag, mean", ".2f"),
    ("lag_max", "lag, max", ".0f"),
)


@dataclass(frozen=True)
class CellView:
    """A cell as the report knows it."""

    name: str
    label: str
    values: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Sweep:
    """What could be read of a sweep."""

    directory: Path
    config: str
    cells: Sequence[CellView]
    seeds: Sequence[int]
    runs: Runs
    problems: Sequence[str] = field(default=())  # runs that are not in the report, and why

    @property
    def labels(self) -> dict[str, str]:
        """By cell."""
        return {cell.name: cell.label for cell in self.cells}


def write_report(directory: Path) -> "Verdict":
    """Read the sweep, judge it, write everything.

    Raises :class:`ConfigError` if it is no sweep's directory, or cannot be written.
    """
    sweep = read_sweep(directory)
    verdict = judge(sweep)
    with writing(directory, "make it writable, or copy it and name the copy"):
        document = Document(f"Sweep {directory.name}", _blocks(sweep, verdict, pictures.draw_all(sweep, verdict)))
        (directory / REPORT).write_text(to_markdown(document))
        (directory / PAGE).write_text(to_html(document))
    return verdict


# ---- reading ------------------------------------------------------------------------------------


def read_sweep(directory: Path) -> Sweep:
    """Every finished run that can be measured; the others are named."""
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such directory")
    problems: list[str] = []
    try:
        state = read_state(directory)
        config, seeds = str(state["config"]), [int(seed) for seed in state["seeds"]]
        cells = [_cell(name, about) for name, about in state["cells"].items()]
    except (ConfigError, AttributeError, KeyError, TypeError, ValueError) as error:
        config, cells, seeds = "?", *_guessed(directory)
        if not cells:
            raise ConfigError(f"{directory}: not a sweep's directory ({error})") from error
        problems.append(f"{STATE} cannot be read, so cells and seeds are those of the directories ({error})")
    runs: dict[str, list[Measured]] = {}
    for cell in cells:
        for seed in seeds:
            try:
                run = _measure(directory / cell.name / f"seed-{seed}", seed)
            except DataError as error:
                problems.append(f"{cell.label}, seed {seed}: {error}")
                continue
            problems += [f"{cell.label}, seed {seed}, read in part: {note}" for note in run.notes]
            runs.setdefault(cell.name, []).append(run)
    return Sweep(directory, config, cells, seeds, runs, problems)


def _cell(name: str, about: Mapping[str, Any]) -> CellView:
    values = tuple((str(key), str(value)) for key, value in about["values"].items())
    return CellView(str(name), str(about["label"]), values)


def _guessed(directory: Path) -> tuple[list[CellView], list[int]]:
    """Cells and seeds from the names of directories, where ``sweep.json`` does not tell."""
    found = sorted(directory.glob("*/seed-*/"), key=lambda path: path.name)
    seeds = sorted({int(path.name[5:]) for path in found if path.name[5:].isdigit()})
    cells = []
    for name in sorted({path.parent.name for path in found}):
        values = tuple(tuple(part.split("=", 1)) for part in name.split(",") if part.count("=") == 1)
        cells.append(CellView(name, name.replace(",", " "), values))  # type: ignore[arg-type]  # pairs
    return cells, seeds


def _measure(run_dir: Path, seed: int) -> Measured:
    if not run_dir.is_dir():
        raise DataError("not run yet")
    try:
        summary = json.loads((run_dir / SUMMARY).read_text())
        status = summary["status"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError("not finished: it has no readable summary") from error
    if status != "finished":
        raise DataError(f"not finished: {status}")
    return measure(run_dir, seed)


# ---- judging ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """All that the report says."""

    at_time: Comparison
    at_samples: Comparison
    figures: Mapping[str, Mapping[str, float]]  # figure -> cell -> mean over seeds
    samples: Mapping[str, float]  # generated until T, by cell
    remaining: str  # the figure that stands for the KL after rejection in every cell
    frugal: Mapping[str, tuple[float, float]]  # cell -> (samples until T, reward at T)
    fast: Mapping[str, tuple[float, float]]  # cell -> (remaining KL, tokens generated a second)
    advice: advice.Advice


def judge(sweep: Sweep) -> Verdict:
    """Compare the cells and recommend one."""
    at_time, at_samples = compare(sweep.runs, by_time), compare(sweep.runs, by_samples)
    figures = means(sweep.runs)
    samples = samples_at(sweep.runs, at_time)
    thinned = figures.get("kl_after", {})
    remaining = "kl_after" if set(thinned) == set(sweep.runs) else "kl_learner"
    speeds, divergences = figures.get("generated_per_s", {}), figures.get(remaining, {})
    return Verdict(
        at_time,
        at_samples,
        figures,
        samples,
        remaining,
        {cell: (samples[cell], at_time.level(cell)) for cell in at_time.cells()},
        {cell: (divergences[cell], speeds[cell]) for cell in speeds if cell in divergences},
        advice.advise(at_time, sweep.runs, figures, budgets(sweep, figures), sweep.labels),
    )


def budgets(sweep: Sweep, figures: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Each cell's staleness budget; one that moves counts as the oldest token it let through."""
    found = {}
    for cell in sweep.cells:
        said = dict(cell.values).get("staleness.budget", "0")  # not an axis: the same for all
        number = float(said) if said.isdigit() else figures.get("lag_max", {}).get(cell.name, math.inf)
        found[cell.name] = number
    return found


# ---- writing ------------------------------------------------------------------------------------


def _blocks(sweep: Sweep, verdict: Verdict, drawn: Sequence[Block]) -> list[Block]:
    finished = sum(map(len, sweep.runs.values()))
    wanted = len(sweep.cells) * len(sweep.seeds)
    blocks: list[Block] = [
        Paragraph(
            f"{len(sweep.cells)} cells × {len(sweep.seeds)} seed(s) of {sweep.config}: {finished} of {wanted} runs "
            "are finished and measured."
        )
    ]
    if sweep.problems:
        blocks += [Note("Missing here, in whole or in part:", "warning"), Items(list(sweep.problems))]
    blocks += [Heading("Recommendation"), *_advice(sweep, verdict)]
    if not sweep.runs:
        return blocks
    blocks += [Heading("All figures"), _rewards(sweep, verdict), _costs(sweep, verdict), Paragraph(_legend(verdict))]
    left_out = [f"{sweep.labels[words.partition(',')[0]]}," + words.partition(",")[2] for words in _left_out(verdict)]
    if left_out:
        blocks += [Paragraph("Finished, but with no reward to compare:"), Items(left_out)]
    return [*blocks, *drawn]


def _left_out(verdict: Verdict) -> list[str]:
    return list(dict.fromkeys([*verdict.at_time.left_out, *verdict.at_samples.left_out]))


def _advice(sweep: Sweep, verdict: Verdict) -> list[Block]:
    found = verdict.advice
    if not found.cell:
        return [Note(found.reasons[0], "warning")]
    return [
        Note(f"{sweep.labels[found.cell]}", "good"),
        Items(list(found.reasons)),
        Paragraph(
            "The rule: of the cells that are not separated from the one with the greatest mean reward at equal "
            f"wall-clock, and that give up at most {advice.GIVE_UP:.0%} of what training gained, the one with the "
            "smallest staleness budget. Differences are paired by seed, ± is half of a 95 % interval."
        ),
    ]


def _rewards(sweep: Sweep, verdict: Verdict) -> Table:
    head = ["cell", "seeds", f"reward at {verdict.at_time.where:.4g} s", "difference to the best"]
    head += ["samples by then", f"reward at {verdict.at_samples.where:,.0f} samples"]
    rows = [_outcome(sweep, verdict, cell) for cell in sweep.cells if cell.name in sweep.runs]
    return Table(head, rows, numbers=range(1, len(head)))


def _costs(sweep: Sweep, verdict: Verdict) -> Table:
    shown = [column for column in COLUMNS if column[0] in verdict.figures]
    head = ["cell", *(title for _, title, _ in shown)]
    rows = [
        [cell.label, *(_figure(verdict.figures[name].get(cell.name), form) for name, _, form in shown)]
        for cell in sweep.cells
        if cell.name in sweep.runs
    ]
    return Table(head, rows, numbers=range(1, len(head)))


def _outcome(sweep: Sweep, verdict: Verdict, cell: CellView) -> list[str]:
    marks = " ★" if cell.name in front(verdict.frugal) else ""
    marks += " ◆" if cell.name in front(verdict.fast) else ""
    marks += " ← recommended" if cell.name == verdict.advice.cell else ""
    best = verdict.advice.best
    compared = cell.name in verdict.at_time.cells()
    difference = _spread(*verdict.at_time.difference(cell.name, best)) if compared and cell.name != best else "–"
    return [
        cell.label + marks,
        str(len(sweep.runs[cell.name])),
        _reward(verdict.at_time, cell.name),
        difference,
        _figure(verdict.samples.get(cell.name), ",.0f"),
        _reward(verdict.at_samples, cell.name),
    ]


def _reward(comparison: Comparison, cell: str) -> str:
    if cell not in comparison.cells():
        return "–"
    return _spread(comparison.level(cell), comparison.half(cell), "")


def _spread(mean: float, half: float, sign: str = "+") -> str:
    return f"{mean:{sign}.3f} ± {half:.3f}" if math.isfinite(half) else f"{mean:{sign}.3f}"


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else advice.figure(value, form)


def _legend(verdict: Verdict) -> str:
    spread = (
        "± is half of a 95 % interval: of a mean with the seeds' spread pooled over all cells, of a difference paired "
        "by seed."
        if verdict.at_time.knows_seeds
        else "There is one seed, so there are no bands over seeds; ± is half of an evaluation's own 95 % interval."
    )
    return (
        "★ on the Pareto front of reward at equal wall-clock against samples; ◆ on that of tokens generated a second "
        f"against {pictures.REMAINING[verdict.remaining]}. Time runs from the learner's first batch, so processes "
        "that start and the first rollouts are not in it; an evaluation counts at the moment its version was made. "
        "Samples are trajectories generated, trained or not. Trained tokens are those of all batches, accepted ones "
        "those that rejection left in; KL in nats a token; ESS is of the learner's weights, normalised. Never trained "
        f"and rejected are shares of what was generated. {spread}"
    )
