"""What a line of ``metrics.jsonl`` is as points of curves. Pure.

``reward``, ``lag_mean`` and the rest go under a heading each (reward/, staleness/, …); what has no heading here is
kept under other/, so that a new figure needs no change.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tools.follow.events import Histogram, Scalar, Value, Words
from tools.run_files import Record
from tools.watch.sound import number

GROUPS = {  # heading -> how the figures under it begin
    "reward": ("reward", "advantage_", "groups_", "exemplars", "channels_", "questions_"),
    "staleness": ("lag_",),
    "rejection": (
        "acceptance", "kl_before", "kl_after", "ess", "threshold", "unscorable", "z_", "topk_", "scored_by_version",
    ),
    "length": ("length_", "truncated"),
    "tokens": ("tokens", "trajectories", "denominator"),
    "queue": ("queue_", "in_flight_", "dropped"),
    "seconds": ("seconds_", "states", "parked"),
    "learner": (
        "loss", "policy_loss", "balance_loss", "router_", "entropy", "clip_", "masked_", "ratio_", "weight_",
        "kl_to_behaviour", "expert_", "faulty_", "routing_", "grad_norm", "lr", "skipped_updates", "moments_age",
    ),
    "joint": ("joint_",),
    "frozen": ("kl_reference", "reference_", "teachers"),
}  # fmt: skip
MOST_LAG = 4096  # versions; staleness.most allows 1024
LEFT_OUT = {"kind", "time_s", "step", "version", "audit", "lag_histogram", "pass_rates", "version_max", "version_asked"}


@dataclass(frozen=True)
class Points:
    """Values of one step, or of one version."""

    kind: str  # step, eval, publish, budget, alert
    step: int
    time_s: float  # since the run began
    values: tuple[Value, ...]


def points_of(record: Record) -> Points | None:
    """None for a record of another kind."""
    kind, values = str(record.get("kind")), tuple[Value, ...]()
    step = record.get("version") if kind in ("eval", "publish") else record.get("step")
    if not isinstance(step, int):
        return None
    match kind:
        case "step":
            values = tuple(_of_step(record))
        case "eval":
            values = tuple(_of_evaluation(record))
        case "publish":
            values = tuple(_scalars("publish", {"seconds": record.get("seconds")}))
        case "budget":
            values = tuple(_scalars("staleness", {"budget": record.get("value")}))
        case "alert":
            values = (Words(f"alerts/{record.get('sign')}", f"**{record.get('state')}**: {record.get('text')}"),)
        case _:
            return None
    return Points(kind, step, float(record.get("time_s") or 0.0), values)


def _of_step(record: Record) -> Iterator[Value]:
    for name, value in record.items():
        if name not in LEFT_OUT:
            yield from _scalars(heading(name), {name: value})
    for name, width in (("lag_histogram", 1.0), ("pass_rates", 0.1)):
        counts = record.get(name)
        if isinstance(counts, Mapping) and counts:
            yield _histogram(f"{'staleness' if width == 1.0 else 'reward'}/{name}", counts, width)


def is_place(at: object) -> bool:
    """Whether a key of a histogram is a number that one may draw."""
    try:
        return 0 <= float(str(at)) <= MOST_LAG
    except ValueError:
        return False


def heading(name: str) -> str:
    """The longest beginning wins: kl_to_behaviour is the learner's."""
    found = [(len(start), group) for group, starts in GROUPS.items() for start in starts if name.startswith(start)]
    return max(found)[1] if found else "other"


def _histogram(tag: str, counts: Mapping[str, Any], width: float) -> Histogram:
    """Integers (or tenths) as bins around them; what is neither, or beyond every budget, is left out."""
    sound = {at: count for at, value in counts.items() if (count := number(value)) is not None and is_place(at)}
    known = {round(float(at) / width): count for at, count in sound.items()} or {0: 0.0}
    low, high = min(known), max(known)
    edges = [width * (at - 0.5) for at in range(low, high + 2)]
    return Histogram(tag, edges, [known.get(at, 0.0) for at in range(low, high + 1)])


def _of_evaluation(record: Record) -> Iterator[Value]:
    figures = {name: value for name, value in record.items() if name not in LEFT_OUT and name != "calibration"}
    for kind in ("pass_at", "votes"):
        spread = figures.pop(kind, None)
        if isinstance(spread, Mapping):  # value, low, high
            figures[kind] = {name: value[0] if isinstance(value, list) else value for name, value in spread.items()}
    calibration = record.get("calibration")
    if isinstance(calibration, Mapping):
        figures["calibration"] = {name: calibration.get(name) for name in ("brier", "ece", "auroc")}
    tasks = figures.pop("tasks", None)
    if isinstance(tasks, Mapping):
        figures["tasks"] = {
            label: {"reward": found.get("reward")} for label, found in tasks.items() if isinstance(found, Mapping)
        }
    yield from _scalars("eval", figures)


def _scalars(prefix: str, figures: Mapping[str, Any]) -> Iterator[Scalar]:
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _scalars(f"{prefix}/{name}", value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield Scalar(f"{prefix}/{name}", float(value))
