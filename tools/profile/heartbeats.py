"""What processes did where there are no timelines: from the seconds that heartbeats told, in the steps' lines. Pure.

::

    {"states": {role: {state: seconds of all its processes}}, "parked": {cause: seconds}} at two steps -> Process a role

A role is one Process, the mean of its ``count``. Of the learner's ranks it is the first: the others wait
while that one gathers and sends.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from common.config import RunConfig
from tools.lived import is_another_start
from tools.profile.causes import plain
from tools.profile.spent import ROLES, Process, started_again, which_start
from tools.run_files import Record
from tools.timelines import is_idle
from tools.watch.sound import number

PARKED = {"rollouts": "rollouts.sampling", "scoring": "scoring", "packing": "packing", "publish": "version"}
FIRST_RANKS = ("gather", "send", "idle.receivers")  # states of the learner that only its first rank knows


def of_one_start(steps: Sequence[Record]) -> tuple[Sequence[Record], str]:
    """Those of the start that :func:`tools.profile.spent.judged_start` would choose, and a word if there were more."""
    starts: list[list[Record]] = [[]]
    for step in steps:
        if starts[-1] and is_another_start(starts[-1][-1], step):
            starts.append([])
        starts[-1].append(step)
    judged = which_start([len(found) for found in starts])
    return starts[judged], started_again(judged, len(starts)) if len(starts) > 1 else ""


def processes_between(steps: Sequence[Record], seconds: float, config: RunConfig | None) -> list[Process]:
    """One a role, of the ``seconds`` between the first and the last of ``steps``."""
    first, last = steps[0].get("states"), steps[-1].get("states")
    if not isinstance(first, dict) or not isinstance(last, dict):
        return _by_the_learner(steps)
    processes = []
    for role, states in last.items():
        taken = _gained(states, first.get(role))
        count = count_of(role, sum(taken.values()) / seconds, config)
        if role == "learner":
            process = Process("learner", "learner")
            taken = _first_rank(taken, count)
        else:
            process = Process(f"{count} × {role}" if count > 1 else str(role), str(role), count=count)
            taken = {state: s / count for state, s in taken.items()}
        process.states = {state: (s, 0.0) for state, s in taken.items() if s}
        process.causes = {plain(str(role), state): s for state, s in taken.items() if is_idle(state) and s}
        if role == "learner" and (whole := process.causes.pop("shard", 0.0)):
            parked = Counter[str]()
            for cause, s in _gained(steps[-1].get("parked"), steps[0].get("parked")).items():
                parked[PARKED.get(cause, cause)] += s  # type: ignore[assignment]  # a Counter of seconds
            sum_ = sum(parked.values())
            process.causes |= {c: whole * s / sum_ for c, s in parked.items() if s} if sum_ else {"unknown": whole}
        processes.append(process)
    order = {role: place for place, role in enumerate(ROLES)}
    return sorted(processes, key=lambda p: order.get(p.role, len(order))) or _by_the_learner(steps)


def count_of(role: str, present: float, config: RunConfig | None) -> int:
    """How many there are of a role; without a configuration as many as were ``present`` on average."""
    if config is None:
        return max(1, round(present))
    replicas = config.replica.count if config.obrs.mode != "off" else 0
    counts = {
        "actor": config.actor.count,
        "learner": config.learner.ranks,
        "replica": max(1, replicas + sum(model.count for model in config.frozen.values())),
    }
    return counts.get(role, 1)


def _gained(after: object, before: object) -> dict[str, float]:
    """What was added to each sum; what is no number is left out."""
    if not isinstance(after, Mapping):
        return {}
    old = before if isinstance(before, Mapping) else {}
    sums = {str(name): (number(value), number(old.get(name)) or 0.0) for name, value in after.items()}
    return {name: max(0.0, value - was) for name, (value, was) in sums.items() if value is not None}


def _first_rank(taken: Mapping[str, float], ranks: int) -> dict[str, float]:
    """Its part of what ``ranks`` did together: all of FIRST_RANKS, in which the others waited for it."""
    own = {state: taken[state] for state in FIRST_RANKS if state in taken}
    found = own | {state: s / ranks for state, s in taken.items() if state not in own}
    if "idle.ranks" in taken:
        found["idle.ranks"] = max(0.0, (taken["idle.ranks"] - (ranks - 1) * sum(own.values())) / ranks)
    return found


def _by_the_learner(steps: Sequence[Record]) -> list[Process]:
    """From the learner's own figures, in runs older than heartbeats with seconds."""
    process = Process("learner", "learner")
    for state, key in (("train", "seconds_train"), ("send", "seconds_publish"), ("idle.shard", "seconds_fetch")):
        seconds = sum(number(step.get(key)) or 0.0 for step in steps[1:])
        process.states[state] = (seconds, 0.0)
    process.causes = {"unknown": process.idle_s}
    return [process]
