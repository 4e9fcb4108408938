"""What the page is sent: the View and the columns as JSON, each of bounded size. Pure."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tools.watch.bins import Bin
from tools.watch.history import History
from tools.watch.palette import colour
from tools.watch.screen import phase_of
from tools.watch.shares import words
from tools.watch.view import View, part

DRAWN = (
    "reward", "acceptance", "acceptance_low", "acceptance_high", "kl_before", "kl_after", "ess", "weight_ess",
    "threshold", "lag_mean", "lag_max", "budget", "queue_groups", "in_flight_groups", "entropy",
)  # fmt: skip
DIGITS = 5  # of a mean


def state(view: View, epoch: str) -> dict[str, Any]:
    """``/api/state``: everything but the curves. ``epoch``: of the columns."""
    found = asdict(view)
    seen = {one.state for role in view.roles for one in role.shares}
    seen |= {one.state for peer in view.peers for one in peer.shares}
    found |= {"epoch": epoch, "over": view.over, "lost": view.lost, "says": phase_of(view).plain}
    found["colours"] = {name: colour(name) for name in sorted(seen)}
    found["meanings"] = {
        f"{role.role} {one.state}": words(role.role, one.state) for role in view.roles for one in role.shares
    }
    return found


def metrics(history: History, epoch: str, since: int = 0, known: str = "") -> dict[str, Any]:
    """``/api/metrics``: the bins from step ``since`` on; all of them where ``known`` is not the present key.

    Only as long as the ``key`` stays the same do a client's earlier bins still hold.
    """
    bins, key = history.steps, f"{epoch}.{history.steps.width}.{history.evaluations.width}"
    whole = known != key
    chosen = bins.bins if whole else bins.since(since)
    evaluated = history.evaluations.bins
    return {
        "key": key,
        "whole": whole,
        "width": bins.width,
        "first": [one.first for one in chosen],
        "last": [one.last for one in chosen],
        "means": {name: means(chosen, name, bins.width > 1) for name in DRAWN},
        "levels": levels(chosen),
        "lags": [sorted(one.lags.items()) for one in chosen],
        "evaluations": {
            "version": [(one.first + one.last) / 2 for one in evaluated],
            **{name: means(evaluated, name, False)["mean"] for name in ("reward", "reward_low", "reward_high")},
        },
        "colours": {name: colour(name) for name in sorted(states(bins.bins))},
    }


def means(bins: Sequence[Bin], name: str, extremes: bool) -> dict[str, list[float | None]]:
    """One column: a number for each bin, None where it has none; with both extremes where bins hold several steps."""
    found = [one.means.get(name) for one in bins]
    told = {"mean": [rounded(one.mean) if one else None for one in found]}
    if extremes:
        told["low"] = [rounded(one.low) if one else None for one in found]
        told["high"] = [rounded(one.high) if one else None for one in found]
    return told


def rounded(value: float) -> float:
    """To DIGITS significant digits: a pixel shows no more."""
    return float(f"{value:.{DIGITS}g}")


def levels(bins: Sequence[Bin]) -> dict[str, list[float | None]]:
    """What has come together by the end of each bin."""
    names = sorted({name for one in bins for name in one.levels})
    return {name: [round(one.levels[name], 2) if name in one.levels else None for one in bins] for name in names}


def states(bins: Sequence[Bin]) -> set[str]:
    """The states that any role was in, the wait for a shard by its causes too."""
    if not bins:
        return set()
    last = bins[-1].levels
    found = {name.split(" ", 2)[2] for name in last if name.startswith("state ") and name.count(" ") >= 2}
    return found | {f"idle.shard:{cause}" for cause in part(last, "parked ")}
