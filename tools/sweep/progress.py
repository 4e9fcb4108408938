"""How a sweep stands, for a person: a live panel on a terminal, plain lines elsewhere."""

import time
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tools.progress import duration, number, remaining_s
from tools.run_files import Record
from tools.sweep.runner import Active, Runner

LINE_S = 15.0  # between plain lines where there is no terminal


@dataclass
class Screen:
    """Shows a runner."""

    console: Console
    live: Live | None = None
    line_at: float = field(default=0.0)
    started: float = field(default_factory=time.monotonic)

    def say(self, text: str, style: str = "") -> None:
        """One line that stays."""
        self.console.print(Text(text, style=style), soft_wrap=True)

    def show(self, runner: Runner) -> None:
        """The panel, or now and then a line."""
        now = time.monotonic()
        if self.live is not None:
            self.live.update(panel(runner, now - self.started, eta_s(runner, now)), refresh=True)
        elif now - self.line_at > LINE_S and runner.active:
            self.line_at = now
            self.say(plain_line(runner, eta_s(runner, now)))


def eta_s(runner: Runner, now: float) -> float | None:
    """Seconds to go: what active runs still need, and the mean of this call's runs for those that wait."""
    needs = [remaining_s(active.status, active.first) for active in runner.active]
    known = [need for need in needs if need is not None]
    ahead = [now - a.started + need for a, need in zip(runner.active, needs, strict=True) if need is not None]
    walls = runner.walls or ahead
    if not walls or not known:
        return None
    each = sum(walls) / len(walls)
    return max(known) + each * -(-len(runner.waiting) // runner.jobs)


def plain_line(runner: Runner, eta: float | None) -> str:
    """One line for logs and pipes."""
    done, failed = runner.count("finished"), runner.count("failed")
    present = "; ".join(_present(active) for active in runner.active)
    return f"{done}/{len(runner.plan.jobs)} runs done, {failed} failed  {present}  ETA {duration(eta)}"


def _present(active: Active) -> str:
    status = active.status
    return (
        f"{active.job.key} step {_progress(status)} reward "
        f"{number(status.get('reward'), '.3f')} held-out {held_out(active)}"
    )


def _progress(status: Record) -> str:
    return f"{status.get('step') or 0:g}/{number(status.get('steps'), 'g')}"


def held_out(active: Active) -> str:
    """The newest held-out reward and its version."""
    evaluations = active.status.get("evaluations") or []
    return f"{evaluations[-1]['reward']:.3f}@v{evaluations[-1].get('version', '?')}" if evaluations else "–"


def panel(runner: Runner, elapsed_s: float, eta: float | None) -> Panel:
    """The live panel."""
    done, failed, total = runner.count("finished"), runner.count("failed"), len(runner.plan.jobs)
    head = Table.grid(expand=True, padding=(0, 1))
    head.add_column(ratio=1)
    head.add_column(justify="right", no_wrap=True)
    under_way = sum(_share(active) for active in runner.active)
    bar = ProgressBar(total=total, completed=done + under_way, complete_style="cyan", finished_style="green")
    runs = ("runs ", (str(done), "bold"), f"/{total}   {duration(elapsed_s)} elapsed   ETA ", (duration(eta), "bold"))
    head.add_row(bar, Text.assemble(*runs))
    table = Table.grid(expand=True, padding=(0, 2))
    table.add_row(*(Text(title, style="dim") for title in ("run", "step", "reward", "held-out", "lag", "tokens/s")))
    for active in runner.active:
        status = active.status
        table.add_row(
            Text(active.job.key, style="bold"),
            _progress(status),
            number(status.get("reward"), ".3f"),
            held_out(active),
            number(status.get("lag_mean")),
            number(status.get("tokens_per_s"), ",.0f"),
        )
    parts: list[RenderableType] = [head, Text(), table]
    if failed:
        parts.append(Text(f"{failed} run(s) failed; the same command tries them again", style="yellow"))
    return Panel(Group(*parts), title=f"[b]sweep[/b] · {runner.plan.directory.name}", border_style="cyan")


def _share(active: Active) -> float:
    return float(active.status.get("step") or 0) / max(1, int(active.status.get("steps") or 1))
