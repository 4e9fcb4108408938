"""Held-out evaluations as blocks of a report. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from tools.document import Block, Bold, Code, Figure, Heading, Paragraph, Table, Text
from tools.run_files import Record

ROWS = 12  # of the table over versions; between the first and the last they are thinned out
NONE = "–"


def evaluation_blocks(
    evaluations: Sequence[Record], best: Record | None, pictures: Mapping[str, Figure]
) -> list[Block]:
    """The report's section: over versions, then of the last evaluation by task and its calibration."""
    if not evaluations:
        return []
    last = evaluations[-1]
    blocks: list[Block] = [Heading("Held-out evaluation"), _over_versions(evaluations, best)]
    blocks.append(Paragraph(_explained(last)))
    if best:
        which = f"The best version is {best['version']}, with a reward of {best['reward']:.3f}: "
        kept: Text = (which, "its checkpoint is kept (", Code("tools.export --best"), ").")
        blocks.append(Paragraph(kept if best["version"] else which + "the starting model."))
    blocks += [pictures[name] for name in ("evaluation", "tasks") if name in pictures]
    if last.get("tasks"):
        blocks += [Paragraph(f"By task, version {last['version']}:"), _by_task(last)]
    if last.get("calibration"):
        blocks += _calibration(last, pictures)
    return blocks


def interval(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """``0.240 (0.199 to 0.281)``, without the bounds where there are none."""
    if value is None:
        return NONE
    return f"{value:.3f}" + (f" ({low:.3f} to {high:.3f})" if low is not None and high is not None else "")


def thinned(evaluations: Sequence[Record], best: int) -> list[Record]:
    """At most ROWS of them: the first, the last, the best, and the others evenly spread."""
    count = len(evaluations)
    if count <= ROWS:
        return list(evaluations)
    chosen = {round(i * (count - 1) / (ROWS - 2)) for i in range(ROWS - 1)}
    chosen |= {i for i, line in enumerate(evaluations) if line.get("version_asked") == best}
    return [evaluations[i] for i in sorted(chosen)]


def _columns(line: Record) -> list[tuple[str, str]]:
    """(title, value) of what a set of figures has."""
    found = [("reward", interval(line.get("reward"), line.get("reward_low"), line.get("reward_high")))]
    if "correct" in line:
        title = f"correct, mean@{line['samples']}"
        found.append((title, interval(line["correct"], line["correct_low"], line["correct_high"])))
    found += [(f"pass@{k}", interval(*passed)) for k, passed in (line.get("pass_at") or {}).items()]
    votes: dict[str, Any] = line.get("votes") or {}
    named = (("majority", "majority vote"), ("weighted", "vote by confidence"))
    found += [(title, interval(*votes[kind])) for kind, title in named if kind in votes]
    return found


def _table(rows: Sequence[tuple[Text, Record]], head: str) -> Table:
    columns = [(name, dict(_columns(line))) for name, line in rows]
    titles = list(dict.fromkeys(title for _, found in columns for title in found))
    cells: list[tuple[Text, ...]] = [(name, *(found.get(title, NONE) for title in titles)) for name, found in columns]
    return Table((head, *titles), cells, numbers=range(1, 1 + len(titles)))


def _over_versions(evaluations: Sequence[Record], best: Record | None) -> Table:
    kept = best["version"] if best else -1
    named: list[tuple[Text, Record]] = [
        (Bold(str(line["version"])) if line.get("version_asked") == kept else str(line["version"]), line)
        for line in thinned(evaluations, kept)
    ]
    return _table(named, "version")


def _explained(line: Record) -> str:
    samples = line.get("samples", 1)
    drawn = f"{line.get('prompts', '?')} prompts" + (f", {samples} completions each" if samples > 1 else "")
    words = f"{drawn}; in brackets the 95 % interval over prompts."
    if votes := line.get("votes"):
        words += (
            f" Votes: a tie counts as the mean over what is tied ({votes['majority_tied']:.0%} of the prompts in the "
            f"last), and {votes['voted']:.0%} of the prompts have an answer to count."
        )
    return words


def _by_task(line: Record) -> Table:
    rows: list[tuple[Text, Record]] = [
        ((Code(label), f" ({figures['prompts']} prompts)"), figures) for label, figures in line["tasks"].items()
    ]
    return _table(rows, "task")


def _calibration(line: Record, pictures: Mapping[str, Figure]) -> list[Block]:
    found = line["calibration"]
    auroc = f"{found['auroc']:.3f}" if found["auroc"] is not None else "unknown, all are right or all wrong"
    clipped = f" {found['clipped']} of them lay outside [0, 1] and were clipped." if found["clipped"] else ""
    words = (
        f"Confidence, version {line['version']}: Brier score {found['brier']:.4f}, expected calibration error "
        f"{found['ece']:.4f} (11 fixed bins), AUROC {auroc}, of {found['count']:,} completions.{clipped}"
    )
    rows = [
        (f"{number / 10:.1f}", f"{count:,.0f}", f"{confidence:.3f}", f"{accuracy:.3f}")
        for number, (count, confidence, accuracy) in enumerate(found["bins"])
        if count
    ]
    table = Table(("confidence from", "completions", "mean confidence", "accuracy"), rows, numbers=(0, 1, 2, 3))
    picture: list[Block] = [pictures["reliability"]] if "reliability" in pictures else []
    return [Paragraph(words), table, *picture]
