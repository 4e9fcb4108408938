"""The verdict as a chapter of a report."""

from pathlib import Path

from tools.document import Block, Bold, Code, Figure, Fold, Heading, Items, Note, Paragraph, Table, Text, pairs
from tools.pictures import place_figure
from tools.profile.picture import figure_of
from tools.profile.verdict import Verdict, verdict
from tools.profile.words import figures_of, waits_of
from tools.runs import Run

PICTURE = "time.png"


def verdict_blocks(run: Run) -> list[Block]:
    """Where the time went, what bounds the run and what to change; the picture goes into the run's directory."""
    found = verdict(run)
    if not found.seconds:
        return []
    return [
        Heading("Where the time went"),
        *(Paragraph(f"Note: {note}.") for note in found.notes if note not in run.notes),
        *_advice(found, run.path),
        *_picture(found, run.path),
        *_waits(found),
        pairs([(label, words) for label, words in figures_of(found)]),
    ]


def _advice(found: Verdict, path: Path) -> list[Block]:
    blocks: list[Block] = []
    if found.bottleneck:
        blocks.append(Paragraph(("Bottleneck: ", Bold(found.bottleneck.resource), f": {found.bottleneck.why}.")))
    if advice := found.recommendation:
        blocks.append(Note((Bold(f"Recommendation: {advice.words}"), f" ({advice.why})."), "good"))
        asks = ("These are bounds. ", Code(f"python -m tools.profile {path}"), " asks the simulator, which knows more.")
        blocks.append(Paragraph(asks))
        others = [other.sentence for other in advice.others]
        if advice.basis:
            others.append(f"KL: {advice.basis}")
        if others:
            blocks.append(Fold("What else was weighed", [Items(others)]))
    return blocks


def _picture(found: Verdict, directory: Path) -> list[Block]:
    figure = figure_of(found)
    if figure is None:
        return []
    shown: Figure = place_figure(figure, PICTURE, "Where every process's time went", directory)
    return [shown]


def _waits(found: Verdict) -> list[Block]:
    rows: list[tuple[Text, ...]] = list(waits_of(found))
    head = ("who waits", "for", "share", "which means", "what helps")
    return [Fold("Every cause of waiting", [Table(head, rows, numbers=(2,))])] if rows else []
