"""What tools count on of a run's files, whoever wrote them: a figure is a number or it is not there."""

from collections.abc import Callable, Mapping
from typing import Any

from broker.fates import DROPPED, STRATA, TRAINED
from common.trace import STATES
from tools.run_files import Record
from tools.runs import Run
from tools.watch.sound import counts, mapping, number, numbers, records

STEP_NUMBERS = (
    "step", "time_s", "reward", "lag_mean", "lag_max", "acceptance", "acceptance_low", "acceptance_high",
    "acceptance_expected", "kl_before", "kl_after", "ess", "weight_ess", "entropy", "truncated", "loss", "grad_norm",
    "tokens_proposed", "tokens_accepted", "tokens_generated", "seconds_fetch", "seconds_train", "seconds_publish",
    "joint_kl", "joint_kl_drop", "joint_grad_norm", "joint_clip_fraction", "seconds_joint", "skipped_updates",
    "groups_padded", "kl_to_behaviour", "length_mean", "threshold", "trajectories", "tokens", "reward_std",
    "reward_mixed", "reward_mixed_std", "exemplars", "groups_without_signal", "length_max", "scored_by_version",
    "unscorable", "kl_before_se", "kl_after_se", "z_lower", "z_upper", "z_theta", "z_kappa", "topk_missing_mass",
    "threshold_next", "questions_retired", "questions_skipped", "rethinned_by_version", "rethinned_tokens",
    "kl_reference", "reference_unscorable", "tokens_dropped", "staleness_budget",
)  # fmt: skip
STEP_TALLIES = ("parked", "dropped", "reward_channels", "channels_missing", "channels_gated", "pass_rates")
STEP_MAPPINGS = (*STEP_TALLIES, "lag_histogram", "tasks", "teachers")
EVALUATION_NUMBERS = (
    "version", "time_s", "reward", "reward_low", "reward_high", "correct", "correct_low", "correct_high", "samples",
    "prompts", "version_asked",
)  # fmt: skip
STATUS_NUMBERS = (
    "time", "started_at", "step", "steps", "version", "tokens_generated", "tokens_proposed", "tokens_accepted",
    "trajectories_acked", "trajectories_trained", "trajectories_queued",
)  # fmt: skip
STATUS_COUNTS = (
    "trajectories_dropped",
    "trajectories_refused",
    "receivers_late",
    "bad_messages",
    "impostors",
    "suspects",
)
CALIBRATION = ("brier", "ece", "count", "clipped")  # beside auroc, which may be unknown
TRIPLE = 3  # value, low, high; or count, confidence, accuracy
LARGEST = 1e15  # no figure of a run is larger; what is was written by a fault


def checked(run: Run) -> Run:
    """``run`` with every figure of the wrong kind taken out, and a note of how many there were."""
    odd: list[str] = []
    kinds: dict[str, Callable[[Record], Record | None]] = {
        "step": _step,
        "eval": _evaluation,
        "budget": _move,
        "alert": _alert,
    }
    kept: list[Record] = []
    for record in run.records:
        found = kinds.get(str(record.get("kind")), dict)(record)
        odd += _lost(record, found)
        kept += [] if found is None else [found]
    status = checked_status(run.status)
    odd += [f"status.{name}" for name in _lost(run.status, status)]
    notes = list(run.notes)
    if odd:
        few = ", ".join(dict.fromkeys(odd[:200]))
        notes.append(f"{len(odd)} figures are none and were left out: {few[:200]}")
    return Run(run.path, run.config, status, kept, run.timelines, notes)


def _lost(before: Record, after: Record | None) -> list[str]:
    """Names of what was taken out, in whole or in part; what was None before is not missed."""
    if after is None:
        return [f"a line of kind {before.get('kind')}"]
    return [str(name) for name, value in before.items() if value is not None and _less(name, value, after.get(name))]


def _less(name: str, before: Any, after: Any) -> bool:
    if after is None or name not in (*STEP_MAPPINGS, "states", "audit"):
        return after is None
    return not isinstance(before, Mapping) or (name in STEP_MAPPINGS and len(after) < len(before))


def _numbers(record: Record, names: tuple[str, ...]) -> Record:
    """``record``, with numbers or nothing under ``names``."""
    found = dict(record)
    for name in names:
        value = number(found.get(name))
        if name in found and (value is None or abs(value) > LARGEST):
            found[name] = None
    return found


def _step(record: Record) -> Record | None:
    found = _numbers(record, STEP_NUMBERS)
    if found.get("step") is None:
        return None
    if "states" in found:
        states = mapping(found["states"])
        found["states"] = {role: numbers(states[role]) for role in STATES if role in states}
    for name in STEP_TALLIES:
        if name in found:
            found[name] = _tallied(found[name])
    for name in ("tasks", "teachers"):
        if found.get(name) is not None:
            found[name] = _parts(found[name])
    if found.get("audit") is not None:
        found["audit"] = _audit(found["audit"])
    if "lag_histogram" in found:
        found["lag_histogram"] = {str(lag): count for lag, count in counts(found["lag_histogram"]).items()}
    return found


def _parts(value: Any) -> dict[str, Record]:
    """Of each task or teacher its numbers, and what is not known of it as None."""
    return {
        str(name): _tallied(part) | {str(key): None for key, known in part.items() if known is None}
        for name, part in mapping(value).items()
        if isinstance(part, Mapping)
    }


def _audit(value: Any) -> Record:
    """Strata of (tokens, share accepted, how far from the rest), and warnings that are words."""
    found = mapping(value)
    strata = {
        name: {kind: row for kind, row in mapping(rows).items() if _is_triple(row) and row[0] > 0}
        for name, rows in mapping(found.get("strata")).items()
    }
    warnings = found.get("warnings")
    words = [one for one in warnings if isinstance(one, str)] if isinstance(warnings, list) else []
    return {"strata": strata, "warnings": words}


def _evaluation(record: Record) -> Record | None:
    found = _numbers(record, EVALUATION_NUMBERS)
    if found.get("version") is None or found.get("reward") is None:
        return None
    if "correct" in found and None in (found.get(key) for key in ("correct", "correct_low", "correct_high", "samples")):
        del found["correct"]
    found["pass_at"] = {k: row for k, row in mapping(found.get("pass_at")).items() if _is_triple(row)}
    found["samples"], found["prompts"] = found.get("samples") or 1, found.get("prompts") or 0
    votes = mapping(found.get("votes"))
    rows = [votes[kind] for kind in ("majority", "weighted") if kind in votes]
    shares = [votes.get("majority_tied"), votes.get("voted")]
    found["votes"] = votes if rows and all(map(_is_triple, rows)) and None not in map(number, shares) else None
    version = {"version": found["version"]}
    tasks = {
        str(label): _evaluation(version | dict(task))
        for label, task in mapping(found.get("tasks")).items()
        if isinstance(task, Mapping)
    }
    found["tasks"] = {label: task for label, task in tasks.items() if task is not None} or None
    found["calibration"] = _calibration(found.get("calibration"))
    return found


def _is_triple(row: Any) -> bool:
    return isinstance(row, list) and len(row) == TRIPLE and None not in map(number, row)


def _calibration(value: Any) -> Record | None:
    found = mapping(value)
    bins = found.get("bins")
    sound = isinstance(bins, list) and bins and all(map(_is_triple, bins))
    if not sound or None in (number(found.get(name)) for name in CALIBRATION):
        return None
    return {**found, "auroc": number(found.get("auroc"))}


def _move(record: Record) -> Record | None:
    sound = None not in (number(record.get(name)) for name in ("step", "old", "value"))
    return dict(record) if sound else None


def _alert(record: Record) -> Record | None:
    sound = None not in (number(record.get(name)) for name in ("step", "since"))
    return dict(record) if sound else None


def _tallied(value: Any) -> dict[str, float]:
    """Counts as whole numbers, where they are."""
    return {name: int(found) if found.is_integer() else found for name, found in numbers(value).items()}


def checked_status(status: Record) -> Record:
    """``status`` without figures of the wrong kind, also where nothing else of the run is there."""
    found = _numbers(status, STATUS_NUMBERS)
    for name in STATUS_COUNTS:
        if name in found:
            found[name] = _tallied(found[name])
    if "evaluations" in found:
        found["evaluations"] = [row for row in records(found["evaluations"]) if number(row.get("reward")) is not None]
    if "offences" in found:
        found["offences"] = {str(name): _tallied(kinds) for name, kinds in mapping(found["offences"]).items()}
    if "alerts" in found:
        found["alerts"] = records(found["alerts"])
    best = mapping(found.get("best"))
    found["best"] = best if None not in (number(best.get(name)) for name in ("version", "reward")) else None
    for stratum in STRATA:
        by = mapping(found.get(f"trajectories_by_{stratum}"))
        found[f"trajectories_by_{stratum}"] = {fate: _fates(stratum, by.get(fate)) for fate in (TRAINED, DROPPED)}
    return found


def _fates(stratum: str, found: object) -> dict[str, int]:
    """Trajectories by value: a label of a task, else a whole number, which only a reward's sign may have below 0."""
    kept = {value: int(n) for value, n in numbers(found).items() if n >= 1 and n == int(n)}
    if stratum == "task":
        return kept
    if stratum == "reward":
        return {value: n for value, n in kept.items() if value in ("-1", "0", "1")}
    return {value: n for value, n in kept.items() if counts({value: n})}
