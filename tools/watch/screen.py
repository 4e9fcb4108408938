"""One frame for a terminal: a View and its History as lines that fit, at any width from 60 columns. Pure.

::

    header      run, phase, what is waited for, step bar, ETA
    body        blocks in one column, or in two from WIDE columns on; the least important go first
    footer      what could not be read, keys
"""

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from tools.progress import duration, number
from tools.watch.blocks import LEFT, blocks_of
from tools.watch.curves import bar, short
from tools.watch.history import History
from tools.watch.layout import DIM, beside, column, fitted
from tools.watch.view import View

WIDE = 104  # columns from which there are two columns of blocks
LEAST_WIDTH = 20
ENDLESS = 10_000  # lines
PHASES = {"running": "green", "evaluating": "cyan", "finished": "bold green", "stopped": "yellow", "gone": "red"}


class Screen:
    """A frame as something that rich renders: as wide as the console, at most ``height`` lines."""

    def __init__(
        self, view: View, history: History, height: int = ENDLESS, keys: str = "", filling: bool = False
    ) -> None:
        """``filling``: what can be drawn larger is, until ``height`` is used up."""
        self.view, self.history, self.height, self.keys, self.filling = view, history, height, keys, filling

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The lines."""
        yield from frame(self.view, self.history, options.max_width, self.height, self.keys, self.filling)


def frame(
    view: View, history: History, width: int, height: int = ENDLESS, keys: str = "", filling: bool = False
) -> list[Text]:
    """At most ``height`` lines of exactly ``width`` cells."""
    width = max(LEAST_WIDTH, width)
    top, bottom = header(view, width), footer(view, width, keys)
    room = max(0, height - len(top) - len(bottom))
    blocks = blocks_of(view, history, filling)
    if width < WIDE:
        body = column([block for _, block in blocks], width, room)
    else:
        left_width = (width - 3) // 2
        right_width = width - 3 - left_width
        left = column([block for side, block in blocks if side == LEFT], left_width, room)
        right = column([block for side, block in blocks if side != LEFT], right_width, room)
        body = beside(left, right, left_width, right_width)
    if filling and bottom:  # keys stand at the bottom
        body += [fitted(Text(), width)] * (room - len(body))
    return [*top, *body, *bottom][:height]


def phase_of(view: View) -> Text:
    """How it stands, in a few words."""
    if view.phase == "nothing":
        return Text(f"waiting for {view.words}", style="yellow")
    if view.phase == "gone":
        return Text(view.words, style="red")
    if view.lost:
        return Text(f"no word from the broker for {duration(view.status_age_s)}", style="bold red")
    if view.phase == "waiting":
        return Text(f"waiting for {view.words or 'the others'}", style="yellow")
    if view.words and not view.over:
        return Text.assemble((view.phase, PHASES.get(view.phase, "yellow")), f"  waits for {view.words}")
    return Text(view.phase, style=PHASES.get(view.phase, "yellow"))


def header(view: View, width: int) -> list[Text]:
    """Three lines."""
    first = Text.assemble(("croupier", "bold cyan"), ("  ·  ", DIM), (view.name, "bold"), "  ", phase_of(view))
    steps = f"{view.step:,}/{view.steps:,}" if view.steps else f"{view.step:,}"
    share = view.step / view.steps if view.steps else 0.0
    told = Text.assemble("  step ", (steps, "bold"), f"  {share:4.0%}  ")
    told.append(f"{duration(view.elapsed_s)} elapsed" if width >= 80 else duration(view.elapsed_s))
    if not view.over:
        told.append("  ETA ").append(duration(view.eta_s), style="bold")
    room = max(4, width - told.cell_len)
    filled = bar(share, room)
    second = Text.assemble((filled, "cyan"), ("·" * (room - len(filled)), DIM), told)
    return [fitted(first, width), fitted(second, width), fitted(_headline(view), width)]


def _headline(view: View) -> Text:
    """The figures that are looked for first."""
    line = Text()
    held_out = f"{view.held_out[1]:.3f}" if view.held_out else "–"
    lag = f"{short(view.lag_mean)} of {view.budget if view.budget is not None else '–'}"
    tokens = f"{view.tokens_per_s:,.0f}" if view.tokens_per_s is not None else "–"
    for name, value in (
        ("reward", short(view.reward)), ("held-out", held_out), ("lag", lag),
        ("accepted", short(view.figures.get("acceptance"))), ("tok/s", tokens),
        ("version", f"{view.version:,}" if view.version is not None else "–"),
    ):  # fmt: skip
        line.append(name + " ", style=DIM).append(value, style="bold").append("   ")
    return line


def footer(view: View, width: int, keys: str) -> list[Text]:
    """One line, if there is anything to say."""
    said = Text("; ".join(view.notes), style="yellow")
    if keys:
        said = Text.assemble((keys, DIM), "   " if view.notes else "", said)
    return [fitted(said, width)] if said.plain else []


def plain_line(view: View) -> str:
    """One line for logs and pipes."""
    if view.phase in ("nothing", "gone", "starting", "waiting") or view.lost:
        return phase_of(view).plain
    held_out = f"{view.held_out[1]:.3f}@v{view.held_out[0]}" if view.held_out else "–"
    parts = [
        f"step {view.step}/{number(view.steps, 'd')}", f"version {number(view.version, 'd')}",
        f"reward {number(view.reward, '.3f')}", f"held-out {held_out}",
        f"lag {number(view.lag_mean)} (max {number(view.lag_max, 'd')})",
        f"acceptance {number(view.figures.get('acceptance'), '.3f')}", f"{number(view.tokens_per_s, ',.0f')} tok/s",
        f"queue {number(view.queue_groups, 'd')} groups", f"ETA {duration(view.eta_s)}",
    ]  # fmt: skip
    if view.words and view.step == view.steps and not view.over:
        parts.append(f"waits for {view.words}")
    return "  ".join([view.phase] * view.over + parts)
