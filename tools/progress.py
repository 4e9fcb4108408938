"""How a run stands, for a person: a live panel on a terminal, a plain line every few seconds elsewhere.

Pure rendering of the broker's ``status.json``; nothing here reads files or clocks.
"""

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tools.run_files import Record

SPARKS = "▁▂▃▄▅▆▇█"
SILENT_S = 3.0  # a peer silent for longer is shown in yellow


def number(value: object, form: str = ".2f") -> str:
    """A figure, or a dash where there is none yet."""
    return format(value, form) if isinstance(value, int | float) else "–"


def duration(seconds: float | None) -> str:
    """``m:ss``, or ``h:mm:ss``, or a dash."""
    if seconds is None or seconds < 0:
        return "–"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def remaining_s(status: Record, first: tuple[float, int] | None) -> float | None:
    """Seconds to go at the pace since ``first`` = (time, step), which leaves the start-up out."""
    step, steps, now = status.get("step"), status.get("steps"), status.get("time")
    if first is None or not step or not steps or not now or step <= first[1]:
        return None
    return float((steps - step) * (now - first[0]) / (step - first[1]))


def sparkline(values: list[float], width: int = 40) -> str:
    """The last values as bars on a scale from 0 to 1, each bar the mean of its share."""
    if not values:
        return ""
    size = -(-len(values) // width)
    means = [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]
    return "".join(SPARKS[min(len(SPARKS) - 1, max(0, int(mean * len(SPARKS))))] for mean in means)


def plain_line(status: Record, eta_s: float | None) -> str:
    """One line for logs and pipes."""
    if not status:
        return "starting"
    if status.get("phase") == "waiting":
        return f"waiting for {status.get('waiting_for') or 'the others'}"
    evaluations = status.get("evaluations") or []
    held_out = f"{evaluations[-1]['reward']:.3f}@v{evaluations[-1]['version']}" if evaluations else "–"
    return (
        f"step {status.get('step', 0)}/{status.get('steps', '?')}  version {status.get('version', 0)}  "
        f"reward {number(status.get('reward'), '.3f')}  held-out {held_out}  "
        f"lag {number(status.get('lag_mean'))} (max {number(status.get('lag_max'), 'd')})  "
        f"acceptance {number(status.get('acceptance'), '.3f')}  {number(status.get('tokens_per_s'), ',.0f')} tok/s  "
        f"queue {number(status.get('queue_groups'), 'd')} groups  ETA {duration(eta_s)}"
    )


def panel(name: str, status: Record, rewards: list[float], eta_s: float | None, elapsed_s: float) -> RenderableType:
    """The live panel."""
    phase = str(status.get("phase", "starting"))
    if phase == "waiting" and status.get("waiting_for"):
        phase = f"waiting for {status['waiting_for']}"
    step, steps = status.get("step", 0), status.get("steps") or 1
    head = Table.grid(expand=True, padding=(0, 1))
    head.add_column(ratio=1)
    head.add_column(justify="right", no_wrap=True)
    bar = ProgressBar(total=steps, completed=step, complete_style="cyan", finished_style="green")
    head.add_row(bar, f"step [b]{step}[/b]/{steps}   {duration(elapsed_s)} elapsed   ETA [b]{duration(eta_s)}[/b]")
    parts: list[RenderableType] = [head, Text(), _figures(status)]
    if rewards:
        parts += [Text(), Text.assemble(("reward  ", "dim"), (sparkline(rewards), "cyan"))]
    evaluations = status.get("evaluations") or []
    if evaluations:
        shown = "  ".join(f"v{e['version']} [b]{e['reward']:.3f}[/b]" for e in evaluations[-6:])
        parts.append(Text.from_markup(f"[dim]held-out[/dim]  {shown}"))
    if status.get("peers"):
        parts += [Text(), _peers(status["peers"])]
    dropped = {reason: count for reason, count in (status.get("trajectories_dropped") or {}).items() if count}
    if dropped:
        shown = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        parts.append(Text(f"dropped: {shown}", style="yellow"))
    return Panel(Group(*parts), title=f"[b]croupier[/b] · {name}", subtitle=phase, border_style="cyan", padding=(1, 2))


def _figures(status: Record) -> Table:
    table = Table.grid(expand=True, padding=(0, 2))
    for _ in range(4):
        table.add_column(ratio=1, no_wrap=True)
    queue = (
        f"{number(status.get('queue_groups'), 'd')} groups, {number((status.get('queue_bytes') or 0) / 1e6, '.1f')} MB"
    )
    lag = f"{number(status.get('lag_mean'))} mean, {number(status.get('lag_max'), 'd')} max"
    cells = [
        ("reward", number(status.get("reward"), ".3f")),
        ("version", number(status.get("version"), "d")),
        ("lag", lag),
        ("acceptance", number(status.get("acceptance"), ".3f")),
        ("tokens/s", number(status.get("tokens_per_s"), ",.0f")),
        ("queue", queue),
        ("in flight", f"{number(status.get('in_flight_groups'), 'd')} groups"),
        ("trained", f"{number(status.get('trajectories_trained'), ',d')} trajectories"),
    ]
    for start in (0, 4):
        table.add_row(*(Text(label, style="dim") for label, _ in cells[start : start + 4]))
        table.add_row(*(Text(value, style="bold") for _, value in cells[start : start + 4]))
    return table


def _peers(peers: list[Record]) -> Table:
    table = Table.grid(padding=(0, 3))
    table.add_row(*(Text(title, style="dim") for title in ("peer", "role", "version", "heard")))
    for peer in peers:
        silent = peer.get("silent_s") or 0.0
        style = "yellow" if silent > SILENT_S else ""
        version = "frozen" if peer.get("serves") else number(peer.get("version"), "d")
        cells = (str(peer.get("peer")), str(peer.get("role")), version, f"{silent:.1f} s ago")
        table.add_row(*(Text(cell, style=style) for cell in cells))
    return table
