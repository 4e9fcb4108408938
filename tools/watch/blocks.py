"""The parts of the terminal's screen. Each draws itself into the lines it is given. Pure."""

import math
import textwrap
from collections.abc import Sequence

from rich.text import Text

from common.trace import IDLE
from tools.watch.bins import LAGS
from tools.watch.curves import Canvas, Line, bar, bounds, short, sparkline, stacked, thinned
from tools.watch.history import History, Receipt
from tools.watch.layout import DIM, Block, Cell, table
from tools.watch.palette import colour
from tools.watch.shares import Share
from tools.watch.sound import text
from tools.watch.view import SILENT_S, PeerRow, Role, View

LEFT, RIGHT = "left", "right"
KL_FLOOR = 1e-7  # nats; a divergence is drawn by its logarithm, and below this it is a rounding error
AXIS = 7  # cells for the numbers beside a curve
PEER_BAR, NAME_SHOWN = 10, 22  # cells
LAG_ROWS = 9  # lags with a line of their own; more share lines
FLEET_WANTED, STEPS_WANTED = 12, 8  # lines with their header


def blocks_of(view: View, history: History, filling: bool = False) -> list[tuple[str, Block]]:
    """What there is something to say about, in the order of a single column."""
    found: list[tuple[str, Block]] = []
    if view.raised:
        found.append((RIGHT, Block("Alerts", 0, 1, min(6, 3 * len(view.raised)), lambda w, n: alerts(view, w, n))))
    if history.steps.bins or history.evaluations.bins:
        more = 8 * filling
        found.append((LEFT, Block("Reward", 1, 3, 8, lambda w, n: rewards(history, w, n), more)))
    if any(role.shares for role in view.roles):
        told = [role for role in view.roles if role.shares]
        over = "since the broker's start" if view.span_s is None else f"over the last {view.span_s:.0f} s"
        found.append((RIGHT, Block(f"Time {over}", 1, len(told), 2 * len(told), lambda w, n: times(told, w, n))))
    if view.lags:
        rows = len(lag_rows(view))
        found.append(
            (RIGHT, Block("Lag of the last steps' tokens", 2, min(3, rows), rows, lambda w, n: lags(view, w, n)))
        )
    if history.steps.bins:
        found.append((LEFT, Block("Rejection", 2, 2, 5, lambda w, n: rejection(view, history, w, n))))
    if view.queue_groups is not None:
        found.append((RIGHT, Block("Queue", 3, 1, 2, lambda w, n: queue(view, w, n))))
    if view.budget_auto:
        found.append(
            (RIGHT, Block("Staleness budget", 3, 1, 1 + min(3, len(view.moves)), lambda w, n: budget(view, n)))
        )
    if view.peers:
        wanted = min(FLEET_WANTED, 2 + len(view.peers))
        found.append((RIGHT, Block("Fleet", 4, 2, wanted, lambda w, n: fleet(view, w, n), len(view.peers))))
    if view.receipts:
        wanted = min(STEPS_WANTED, 1 + len(view.receipts))
        found.append((LEFT, Block("Last steps", 5, 2, wanted, lambda w, n: steps(view.receipts, w, n), 20 * filling)))
    return found


def alerts(view: View, width: int, lines: int) -> list[Text]:
    """What is wrong now; whole sentences where there is room, else the beginning of each."""
    whole = [line for said in view.raised for line in textwrap.wrap(f"! {said}", width, subsequent_indent="  ")]
    found = whole if len(whole) <= lines else [f"! {said}" for said in view.raised]
    return [Text(line, style="bold red") for line in found[:lines]]


def rewards(history: History, width: int, lines: int) -> list[Text]:
    """Batch reward as a curve, held-out rewards with their intervals on it."""
    room = max(4, width - AXIS)
    batch = Line(thinned(history.steps.mean("reward"), 2 * room), "cyan")
    points = thinned(history.evaluations.mean("reward"), room)
    bands = [
        ((one.first + one.last) / 2, one.means["reward_low"].mean, one.means["reward_high"].mean)
        for one in history.evaluations.bins
        if "reward_low" in one.means and "reward_high" in one.means
    ]
    held_out = Line(points, "dark_orange", bands=bands if len(bands) <= room else ())
    box = bounds([batch, held_out])
    if box is None or lines < 2:
        return []
    canvas = Canvas(room, lines - 1, box)
    for line in (batch, held_out):
        canvas.draw(line)
    drawn = canvas.rows()
    labels = {0: short(box[3]), len(drawn) - 1: short(box[2])}
    found = [Text.assemble((f"{labels.get(i, ''):>{AXIS - 1}} ", DIM), row) for i, row in enumerate(drawn)]
    legend = Text.assemble(
        " " * AXIS, (f"step {box[0]:,.0f} to {box[1]:,.0f}   ", DIM), ("━ batches", "cyan"), "   ",
        ("━ held-out" if held_out.points else "", "dark_orange"),
    )  # fmt: skip
    return [*found, legend]


def times(roles: Sequence[Role], width: int, lines: int) -> list[Text]:
    """A bar of states for each role, and if there is room their names below it."""
    found: list[Text] = []
    with_names = lines >= 2 * len(roles)
    for role in roles:
        count = f" ×{role.count}" if role.count and role.count > 1 else ""
        label = Text(f"{role.role}{count}"[:14].ljust(14), style="bold" if not role.silent else "yellow")
        room = max(4, width - 14 - (0 if with_names else 24))
        line = Text.assemble(label, state_bar(role.shares, room))
        found.append(line if with_names else Text.assemble(line, " ", largest_wait(role.shares)))
        if with_names:
            found.append(Text.assemble(" " * 14, names_of(role.shares)))
    return found


def state_bar(shares: Sequence[Share], width: int) -> Text:
    """States beside each other; waiting is hatched, so that it is seen without colours too."""
    return stacked([(one.share, colour(one.state), "▒" if one.idle else "█") for one in shares], width)


def names_of(shares: Sequence[Share]) -> Text:
    """Each state's name in its colour with its share, waiting first: it is what one looks for."""
    line = Text()
    for one in sorted(shares, key=lambda share: (not share.idle, -share.share)):
        if one.share >= 0.005:
            line.append(f"{one.share:.0%} {one.state}  ", style=colour(one.state))
    return line


def largest_wait(shares: Sequence[Share]) -> Text:
    """The greatest idle share with its cause."""
    waits = [one for one in shares if one.idle]
    if not waits:
        return Text("busy", style=DIM)
    most = max(waits, key=lambda share: share.share)
    return Text(f"{most.share:.0%} {most.state.removeprefix(IDLE)}", style=colour(most.state))


def lag_rows(view: View, most: int = LAG_ROWS) -> list[tuple[str, int, bool]]:
    """(label, tokens, within the budget) from no lag to the largest, in at most ``most`` rows."""
    top = max([*view.lags, min(view.budget or 0, LAGS)])
    size = -(-(top + 1) // most)
    found = []
    for low in range(0, top + 1, size):
        high = min(top, low + size - 1)
        tokens = sum(view.lags.get(lag, 0) for lag in range(low, high + 1))
        label = str(low) if low == high else f"{low}–{high}"
        found.append((label + ("+" if high == LAGS else ""), tokens, view.budget is None or low <= view.budget))
    return found


def lags(view: View, width: int, lines: int) -> list[Text]:
    """A bar for each lag; the budget is marked where it ends."""
    rows, total = lag_rows(view, lines), sum(view.lags.values()) or 1
    most = max(tokens for _, tokens, _ in rows) or 1
    inside = sum(within for *_, within in rows)
    room = max(4, width - 24)
    beyond = "yellow" if view.budget_auto else "red"  # a group keeps the budget under which it was granted
    found = []
    for place, (label, tokens, within) in enumerate(rows):
        marked = view.budget is not None and place == inside - 1
        filled = bar(tokens / most, room)
        found.append(
            Text.assemble(
                (f"{label:>6} ", "" if within else beyond),
                (filled, "blue" if within else beyond),
                " " * (room - len(filled)),
                (f" {tokens / total:5.1%} ", ""),
                ("◄ budget" if marked else "", "red"),
            )
        )
    return found


def rejection(view: View, history: History, width: int, lines: int) -> list[Text]:
    """Acceptance, divergence before and after, sample size and lambda, each with its past."""
    figures = view.figures
    ess = "weight_ess" if figures.get("weight_ess") is not None else "ess"
    rows = (
        ("acceptance", "acceptance", "green"), ("KL after", "kl_after", "green"), ("ESS", ess, "cyan"),
        ("KL before", "kl_before", "red"), ("λ", "threshold", "magenta"),
    )  # fmt: skip
    found = []
    for label, name, style in rows:
        if figures.get(name) is not None:
            past = [y for _, y in history.steps.mean(name)]
            if name.startswith("kl"):
                past = [math.log10(max(KL_FLOOR, y)) for y in past]
            line = sparkline(past, max(4, width - 20))
            found.append(
                Text.assemble((f"{label:<11}", DIM), (f"{short(figures[name]):>7}", "bold"), "  ", (line, style))
            )
    return found[:lines] or [Text("rejection is off", style=DIM)]


def queue(view: View, width: int, lines: int) -> list[Text]:
    """Groups that wait, groups under way, and how full the memory for them is."""
    first = Text.assemble(
        (f"{view.queue_groups or 0:,}", "bold"),
        " groups queued   ",
        (f"{view.in_flight_groups or 0:,}", "bold"),
        " in flight",
    )
    if view.trained is not None:
        first.append(f"   {view.trained:,} trajectories trained", style=DIM)
    found = [first]
    if lines > 1 and view.queue_mb is not None:
        bound = f" of {view.queue_limit_mb:,.0f}" if view.queue_limit_mb else ""
        share = view.queue_mb / view.queue_limit_mb if view.queue_limit_mb else 0.0
        told = f" {view.queue_mb:,.1f}{bound} MB"
        room = max(4, min(30, width - len(told)))
        filled = bar(share, room)
        style = "red" if share > 0.9 else "cyan"
        second = Text.assemble((filled, style), ("·" * (room - len(filled)), DIM), told)
        if view.dropped:
            most = sorted(view.dropped.items(), key=lambda item: -item[1])
            second.append(
                "   dropped " + ", ".join(f"{count:,} {reason}" for reason, count in most[:3]), style="yellow"
            )
        found.append(second)
    return found


def budget(view: View, lines: int) -> list[Text]:
    """What it is now, and its last moves with their reasons."""
    found = [
        Text.assemble(
            (str(view.budget if view.budget is not None else "–"), "bold"), " versions, moved by the governor"
        )
    ]
    for move in view.moves:
        before = move.before if move.before is not None else "–"
        up = move.before is None or move.budget > move.before
        sign = ("▲", "green") if up else ("▼", "yellow")
        found.append(Text.assemble(sign, f" step {move.step:,}  {before} → {move.budget}  ", (move.reason, DIM)))
    return found[:lines]


def fleet(view: View, width: int, lines: int) -> list[Text]:
    """A row for each process, and a line for those that are not shown."""
    wide = width >= 58
    header = ("process", "v", "heard", "tok/s", "time", "waits for") if wide else ("process", "v", "heard", "time")
    rest = view.hidden > 0 or any(role.silent for role in view.roles)
    rows = [peer_row(peer, wide) for peer in view.peers]
    found = table(header, rows, width, lines - rest)
    if rest:
        silent = sum(role.silent for role in view.roles)
        hidden = f"and {view.hidden:,} more" if view.hidden else ""
        words = [hidden, f"{silent} silent for more than {SILENT_S:.0f} s" if silent else ""]
        found.append(Text(", ".join(word for word in words if word), style="yellow" if silent else DIM))
    return found


def peer_row(peer: PeerRow, wide: bool) -> list[Cell | Text]:
    """Cells of one process."""
    style = "yellow" if peer.silent_s > SILENT_S else ""
    version = "frozen" if peer.version is None else str(peer.version)
    heard = f"{peer.silent_s:.1f} s"
    states = state_bar(peer.shares, PEER_BAR)
    name = f"{text(peer.peer, NAME_SHOWN)} {peer.servers}".strip()
    if not wide:
        return [(name, style), (version, style), (heard, style), states]
    tokens = f"{peer.tokens_per_s:,.0f}" if peer.tokens_per_s is not None else "–"
    wait = largest_wait(peer.shares) if peer.shares else Text("–", style=DIM)
    return [(name, style), (version, style), (heard, style), (tokens, style), states, wait]


def steps(receipts: Sequence[Receipt], width: int, lines: int) -> list[Text]:
    """A row for each of the last steps, the newest first."""
    header = ("step", "reward", "lag", "accept", "KL after", "ESS", "λ", "dropped")
    rows: list[list[Cell | Text]] = []
    for one in receipts:
        dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(one.dropped.items()))
        lag = f"{short(one.lag_mean)}/{one.lag_max if one.lag_max is not None else '–'}"
        rows.append([
            (f"{one.step:,}", "bold"), (short(one.reward), ""), (lag, ""), (short(one.acceptance), ""),
            (short(one.kl_after), ""), (short(one.ess), ""), (short(one.threshold), ""),
            (dropped[:30] or "·", "yellow" if dropped else DIM),
        ])  # fmt: skip
    return table(header, rows, width, lines, counting=False)
