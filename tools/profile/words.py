"""The verdict in words, and as bars in a terminal."""

from collections import Counter
from collections.abc import Sequence

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from tools.profile.bottleneck import STARVED
from tools.profile.causes import WORDS
from tools.profile.spent import Process
from tools.profile.verdict import Verdict
from tools.timelines import is_idle

BAR = 50  # characters of a whole window
ALONE = 4  # processes of a role that are shown one by one; of more, the mean
NEARLY_FULL = 0.9  # of an engine's slots, from which on it is not said
LEAST = 0.005  # of a process's time: a smaller share is not named
COLORS = {  # of states; idle ones are grey
    "sample": "green", "play": "cyan", "score": "green", "load": "cyan", "forward": "green", "backward": "dark_green",
    "reduce": "cyan", "optimizer": "chartreuse3", "joint": "dark_cyan", "gather": "yellow", "send": "orange3",
    "swap": "orange3", "receive": "cyan", "admit": "blue", "collate": "green", "thin": "dark_cyan", "pack": "magenta",
    "grant": "yellow", "commit": "purple", "journal": "red", "status": "grey70", "checkpoint": "magenta",
    "export": "magenta", "train": "green",
}  # fmt: skip
WORK, IDLE, ABSENT = "█", "░", "·"  # told apart without colours too
FAINT = "grey35"  # of the last two


def pct(part: float, whole: float) -> str:
    """A share in words."""
    return f"{100 * part / whole:.0f} %" if whole else "–"


def figure(value: float | None, form: str) -> str:
    """Or a dash."""
    return "–" if value is None else format(value, form)


def shown(processes: Sequence[Process]) -> list[Process]:
    """One by one, or where a role has many of them their mean."""
    found: list[Process] = []
    for role in dict.fromkeys(p.role for p in processes):
        alike = [p for p in processes if p.role == role]
        found += alike if len(alike) <= ALONE else [mean_of(alike)]
    return found


def mean_of(alike: Sequence[Process]) -> Process:
    """Of processes of one role."""
    n = sum(process.count for process in alike)
    mean = Process(f"{n} × {alike[0].role}", alike[0].role, alike[0].host, count=n)
    for process in alike:
        part = process.count / n
        for state, (wall, cpu) in process.states.items():
            w, c = mean.states.get(state, (0.0, 0.0))
            mean.states[state] = (w + part * wall, c + part * cpu)
        for cause, seconds in process.causes.items():
            mean.causes[cause] = mean.causes.get(cause, 0.0) + part * seconds
        mean.absent_s += part * process.absent_s
    return mean


def by_size(parts: dict[str, float], whole: float) -> str:
    """``name 12 %, ...``, largest first; what is too small to name is left out."""
    named = [(n, s) for n, s in sorted(parts.items(), key=lambda p: -p[1]) if whole and s / whole >= LEAST]
    return ", ".join(f"{name} {pct(seconds, whole)}" for name, seconds in named)


def states_line(process: Process) -> str:
    """What a process did, in shares of the window; then what it waited for."""
    whole = process.there_s + process.absent_s
    work = {state: wall for state, (wall, _) in process.states.items() if not is_idle(state)}
    line = by_size(work, whole)
    if process.absent_s >= LEAST * whole:
        line += f"; absent {pct(process.absent_s, whole)}"
    if process.idle_s >= LEAST * whole:
        line += f"; idle {pct(process.idle_s, whole)}: {by_size(process.causes, whole) or 'in waits too short to name'}"
    return line


def lines_of(verdict: Verdict) -> list[str]:
    """Plain sentences, the most important first."""
    lines = []
    if verdict.recommendation:
        lines.append(f"Recommendation: {verdict.recommendation.words} ({verdict.recommendation.why}).")
    if verdict.bottleneck:
        lines.append(f"Bottleneck: {verdict.bottleneck.resource}: {verdict.bottleneck.why}.")
    lines += [f"{label}: {words}." for label, words in figures_of(verdict)]
    lines += [f"{process.name}: {states_line(process)}." for process in shown(verdict.processes)]
    return lines


def figures_of(verdict: Verdict) -> list[tuple[str, str]]:
    """The rows under the bars."""
    rows = []
    if rates := verdict.rates:
        tokens = f"generated {rates.generated_s:,.0f}, in trained batches {rates.proposed_s:,.0f}"
        rows.append(("steps", f"{rates.steps_s:.2f} a second"))
        rows.append(("tokens/s", f"{tokens}, accepted and trained {rates.trained_s:,.0f}"))
        if rates.ratio is not None:
            could = f"{rates.fleet_s:,.0f} tokens/s the actors could generate without waiting"
            rows.append(
                ("rollout:train", f"{rates.ratio:.2f}: {could}, {rates.learner_s:,.0f} the learner could train")
            )
    if verdict.filled is not None and verdict.filled < NEARLY_FULL:
        rows.append(("engines", f"{verdict.filled:.0%} full while they sample (actor.max_sequences)"))
    if waste := verdict.waste:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in waste.reasons.items())
        words = f"{waste.dropped:.1%} of what is generated is dropped, {waste.rejected:.1%} of what is trained rejected"
        rows.append(("waste", words + (f" (trajectories dropped: {reasons})" if reasons else "")))
    if publishes := verdict.publishes:
        parts = ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in publishes.parts.items())
        words = f"{1000 * publishes.mean_s:.1f} ms of the learner, 95 % within {1000 * publishes.p95_s:.1f}"
        words += f" ({parts})" if parts else ""
        words += f"; taken into use in {1000 * publishes.swap_s:.1f} ms" if publishes.swap_s is not None else ""
        rows.append(("publish", words + (f"; {publishes.mbytes:.2f} MB" if publishes.mbytes else "")))
    return rows + _staleness_rows(verdict)


def _staleness_rows(verdict: Verdict) -> list[tuple[str, str]]:
    data = verdict.staleness
    if data is None:
        return []
    lag = f"mean {figure(data.lag_mean, '.2f')}, largest {figure(data.lag_max, 'd')}"
    budget = figure(data.budget, "d")
    if data.moved is not None:
        least, greatest = data.moved
        budget = f"auto ({least}{f' to {greatest}' if greatest > least else ''})"
    rows = [("lag", f"{lag}, budget {budget}")]
    if data.kl_after is not None:
        kl = f"KL {figure(data.kl_before, '.2g')} before, {figure(data.kl_after, '.2g')} after, nats a token"
        rows.append(("rejection", f"accepts {figure(data.acceptance, '.2%')}; {kl}; ESS {figure(data.ess, '.3f')}"))
    return rows


def render(verdict: Verdict) -> Group:
    """Everything, for a terminal."""
    parts: list[Table | Text] = []
    steps = f", commits of steps {verdict.first} to {verdict.last}" if verdict.first >= 0 else ""
    parts.append(Text(f"{verdict.run}: {verdict.seconds:.1f} s{steps}", style="bold"))
    if verdict.processes:
        parts += [bars(verdict), legend(verdict), waits(verdict)]
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    for label, words in figures_of(verdict):
        table.add_row(label, words)
    for machine in verdict.machines:
        starved = f"; starved of CPU: {', '.join(machine.starved)}" if machine.starved else ""
        cores = f" of {machine.cores}" if machine.cores else ""
        table.add_row(
            "cores", f"{machine.cpu:.1f}{cores} used on {machine.host}, {machine.busy:.1f} processes busy{starved}"
        )
    if verdict.bottleneck:
        of = (verdict.bottleneck.resource, "bold")
        table.add_row("bottleneck", Text.assemble(of, f": {verdict.bottleneck.why}"))
    parts.append(table)
    if advice := verdict.recommendation:
        parts.append(Text(f"→ {advice.words} ({advice.why})", style="bold green"))
        rest = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 2))
        for other in advice.others:
            rest.add_row(Text(other.sentence, style="dim"))
        if advice.basis:
            rest.add_row(Text(f"KL: {advice.basis}", style="dim"))
        parts.append(rest)
    return Group(*parts)


def bars(verdict: Verdict) -> Table:
    """One stacked bar a process: work in colours, waiting in grey, absence in dots."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("process", "", "busy", "idle", "CPU of busy"):
        table.add_column(title, header_style="dim", justify="right" if title[:1] in "biC" and title else "left")
    for process in shown(verdict.processes):
        whole = process.there_s + process.absent_s
        cpu = f"{process.cpu_of_busy:.0%}" if process.cpu_s else "–"
        table.add_row(
            process.name, bar(process), pct(process.busy_s, whole), pct(process.idle_s, whole),
            Text(cpu, style="red" if process.cpu_s and process.cpu_of_busy < STARVED else ""),
        )  # fmt: skip
    return table


def bar(process: Process) -> Text:
    """Each state as many characters as its share; the rest goes to the largest remainders."""
    whole = process.there_s + process.absent_s
    work = [(state, wall) for state, (wall, _) in process.states.items() if not is_idle(state)]
    parts = [(WORK, COLORS.get(state, "white"), wall) for state, wall in work]
    parts += [(IDLE, FAINT, process.idle_s), (ABSENT, FAINT, process.absent_s)]
    text, done, drawn = Text(), 0.0, 0
    for glyph, color, seconds in parts:
        done += seconds
        until = round(BAR * done / whole) if whole else 0
        text.append(glyph * (until - drawn), style=color)
        drawn = until
    return text


def legend(verdict: Verdict) -> Text:
    """The colours of the states that take a visible share of somebody's time, and absence where there is any."""
    seen, absent = Counter[str](), False
    for process in shown(verdict.processes):
        whole = process.there_s + process.absent_s
        absent |= process.absent_s > 0 and process.absent_s / whole >= 1 / BAR
        for state, (wall, _) in process.states.items():
            if not is_idle(state) and whole and wall / whole >= 1 / BAR:
                seen[state] += 1
    text = Text()
    for state in seen:
        text.append(WORK, style=COLORS.get(state, "white")).append(f" {state}  ", style="dim")
    text.append(IDLE, style=FAINT).append(" idle", style="dim")
    return text.append(f"  {ABSENT}", style=FAINT).append(" absent", style="dim") if absent else text


def waits(verdict: Verdict) -> Table:
    """Every cause of idleness with its share of the window, what it means and what helps."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("who waits", "for", "share", "", "what helps"):
        table.add_column(title, header_style="dim", justify="right" if title == "share" else "left")
    for name, cause, share, meaning, remedy in waits_of(verdict):
        table.add_row(name, cause, share, meaning, Text(remedy, style="dim"))
    return table


def waits_of(verdict: Verdict) -> list[tuple[str, str, str, str, str]]:
    """(who, for what, share of its time, what that means, what helps), a process's largest first."""
    rows = []
    for process in shown(verdict.processes):
        whole = process.there_s + process.absent_s
        for cause, seconds in sorted(process.causes.items(), key=lambda pair: -pair[1]):
            if whole and seconds / whole >= LEAST:
                rows.append((process.name, cause, pct(seconds, whole), *WORDS.get(cause, ("", ""))))
    return rows


def print_verdict(console: Console, verdict: Verdict) -> None:
    """To a terminal or a file."""
    console.print(render(verdict))
