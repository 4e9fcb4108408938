"""Outcomes as a picture: throughput, lag and idleness against what varies, or one run's lags and time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tools.pictures import BLUE, DPI, GREEN, INK, MUTED, ORANGE, SERIES, dress, plain
from tools.simulate.table import Line

PANEL = (4.2, 3.4)  # inches
MOST_CURVES = 6
IDLE = {"learner": BLUE, "actor": ORANGE, "replica": GREEN}


def draw(lines: Sequence[Line], keys: Sequence[str], path: Path) -> None:
    """Write a PNG or SVG. ``keys``: those with several values; the one with most of them is the horizontal axis."""
    figure = Figure(figsize=(3 * PANEL[0], PANEL[1]), dpi=DPI, layout="constrained")
    axes = [figure.add_subplot(1, 3, number) for number in (1, 2, 3)]
    if keys:
        _draw_sweep(lines, keys, axes)
    else:
        _draw_one(lines[0], axes)
    figure.savefig(path)


def _draw_sweep(lines: Sequence[Line], keys: Sequence[str], axes: Sequence[Axes]) -> None:
    across = max(keys, key=lambda key: len({line.values[key] for line in lines}))
    ticks = list(dict.fromkeys(line.values[across] for line in lines))
    others = [key for key in keys if key != across]
    curves: dict[str, list[Line]] = {}
    for line in lines:
        curves.setdefault(", ".join(f"{key}={line.values[key]}" for key in others), []).append(line)
    for one, title in zip(axes, ("steps/s", "lag: mean, and 95th percentile", "idle share"), strict=True):
        dress(one, title)
        one.set_xlabel(across, color=MUTED)
        one.set_xticks(range(len(ticks)), ticks)
    for number, (label, curve) in enumerate(list(curves.items())[:MOST_CURVES]):
        color, at = SERIES[number % len(SERIES)], [ticks.index(line.values[across]) for line in curve]
        style: dict[str, Any] = {"color": color, "marker": "o", "markersize": 4}
        axes[0].plot(at, [line.outcome.steps_per_s for line in curve], label=plain(label) or None, **style)
        axes[1].plot(at, [line.outcome.lag_mean for line in curve], **style)
        axes[1].plot(at, [line.outcome.lag_p95 for line in curve], linestyle=":", **style)
    label, curve = next(iter(curves.items()))
    at = [ticks.index(line.values[across]) for line in curve]
    for role, color in IDLE.items():
        if all(role in line.outcome.idle for line in curve):
            axes[2].plot(at, [line.outcome.idle[role] for line in curve], color=color, marker="o", label=role)
    axes[2].set_title(
        f"idle share{f', {label}' if label else ''}", loc="left", fontsize=13, fontweight="bold", color=INK
    )
    axes[2].yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes[2].legend(frameon=False, fontsize=9, labelcolor=INK)
    if others:
        axes[0].legend(frameon=False, fontsize=9, labelcolor=INK)
    for one in axes:
        one.set_ylim(bottom=0)


def _draw_one(line: Line, axes: Sequence[Axes]) -> None:
    outcome = line.outcome
    dress(axes[0], "tokens by lag")
    axes[0].bar(list(outcome.lags), list(outcome.lags.values()), color=BLUE)
    axes[0].set_xlabel("versions", color=MUTED)
    axes[0].set_xlim(-0.6, max(outcome.lag_max, 1) + 0.6)
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    dress(axes[1], "steps trained")
    axes[1].plot(outcome.commits, range(1, len(outcome.commits) + 1), color=BLUE)
    axes[1].set_xlabel("seconds", color=MUTED)
    dress(axes[2], "time by role; grey is waiting")
    for row, shares in enumerate(shares for _, shares in sorted(outcome.shares.items())):
        at = 0.0
        for number, (state, share) in enumerate(sorted(shares.items(), key=lambda one: one[0].startswith("idle."))):
            color = "#cbd2d9" if state.startswith("idle.") else SERIES[number % len(SERIES)]
            axes[2].barh(row, share, left=at, color=color, edgecolor="white")
            if share > 0.15:
                axes[2].text(at + share / 2, row, state, ha="center", va="center", fontsize=7, color=INK)
            at += share
    axes[2].set_yticks(range(len(outcome.shares)), sorted(map(plain, outcome.shares)))
    axes[2].set_xlim(0, 1)
    axes[2].set_xlabel("")
