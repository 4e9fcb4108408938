"""The verdict of a run: where its time went, what bounds it, and what to change.

::

    Run -> judged_start -> choose_window -> processes and causes -> rates, publishes, staleness -> bottleneck
        -> recommendation
    verdict(read_run(run_dir)) -> Verdict;   words.lines_of(it) -> sentences;   picture.draw(it, path)
"""

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tools.profile.advice import Recommendation, recommend
from tools.profile.bottleneck import Bottleneck, Machine, find_bottleneck, machines_of
from tools.profile.causes import Causes
from tools.profile.drift import fit
from tools.profile.figures import (
    Publishes,
    Rates,
    Staleness,
    Waste,
    filled_of,
    publishes_of,
    rates_of,
    staleness_of,
    waste_of,
)
from tools.profile.heartbeats import of_one_start, processes_between
from tools.profile.predict import Bounds, Predictor
from tools.profile.spent import FIRST_STEP, NS, Process, Window, choose_window, judged_start, processes_of
from tools.run_files import Record
from tools.runs import Run
from tools.timelines import Timelines
from tools.watch.sound import number

FEW_STEPS, UNSEEN = 10, 0.05  # steps, and their share, behind the end of the timelines that are worth a word
Ask = Callable[[Run, float, float | None], tuple[Predictor | None, str]]  # of a run, its steps a second, its mean lag


@dataclass
class Verdict:
    """Everything that ``python -m tools.profile`` prints. Seconds and shares are of the window."""

    run: str
    seconds: float  # of the window; 0: nothing could be judged
    first: int  # the step with whose commit the window begins, -1 for none
    last: int
    processes: list[Process] = field(default_factory=list)
    machines: list[Machine] = field(default_factory=list)
    rates: Rates | None = None
    waste: Waste | None = None
    publishes: Publishes | None = None
    staleness: Staleness | None = None
    filled: float | None = None  # share of actor.max_sequences that an actor decodes while it decodes any
    bottleneck: Bottleneck | None = None
    recommendation: Recommendation | None = None
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = asdict(self)
        for row, process in zip(found["processes"], self.processes, strict=True):
            row |= {"busy_s": process.busy_s, "idle_s": process.idle_s, "cpu_of_busy": process.cpu_of_busy}
        return found


def verdict(run: Run, skip_s: float | None = None, ask: Ask | None = None) -> Verdict:
    """Judge what could be read of a run; whom ``ask`` gives is asked for predictions before the bounds are."""
    timelines, again = judged_start(run.timelines)
    run = replace(run, timelines=timelines)
    window, word = choose_window(timelines, skip_s)
    notes = [*run.notes, *filter(None, (again, word))]
    if window is None:
        return _from_records(run, notes, skip_s)
    processes = processes_of(run.timelines, window)
    causes = Causes(run.timelines)
    for process in processes:
        causes.name(process, window)
    steps = [step for step in run.steps if window.first <= step["step"] <= window.last]
    later = sum(step["step"] > window.last for step in run.steps)
    if window.last >= 0 and later > max(FEW_STEPS, UNSEEN * len(run.steps)):
        notes.append(f"timelines end with step {window.last}: the {later} behind it are not judged (trace.limit_mb)")
    seconds = window.ns * NS
    found = Verdict(run.path.name, seconds, window.first, window.last, processes, notes=notes)
    slowed = {}
    if run.config is not None:
        actor, learner = run.config.actor, run.config.learner
        slowed["actor"] = PACED if actor.pace_s else actor.slowdown
        slowed["learner"] = PACED if learner.pace_s else learner.slowdown
        if actor.engine == "local":
            found.filled = filled_of(run.timelines, window, actor.max_sequences)
    found.machines = machines_of(processes, seconds, cores_of(run.timelines), slowed)
    found.publishes = publishes_of(run.timelines, window, _published(run, window))
    _judge(found, run, steps, ask)
    return found


def cores_of(timelines: Timelines) -> dict[str, int]:
    """By host, as the timelines say; else this machine's, where they were written here."""
    found = {
        str(life.header.get("host")): int(cores)
        for life in timelines.lives
        if (cores := number(life.header.get("cores")))
    }
    here = socket.gethostname()
    if here not in found and any(life.header.get("host") == here for life in timelines.lives):
        found[here] = len(os.sched_getaffinity(0))
    return found


def _published(run: Run, window: Window) -> list[Record]:
    if window.first < 0:
        return run.publishes
    return [p for p in run.publishes if window.first + 1 < p["version"] <= window.last + 1]


def _judge(found: Verdict, run: Run, steps: Sequence[Record], ask: Ask | None) -> None:
    """What follows from times and steps together."""
    if len(steps) >= 2:
        found.rates = rates_of(steps, found.seconds, found.processes)
        found.waste = waste_of(steps)
        found.staleness = staleness_of(steps, run.config.staleness if run.config else None)
    found.bottleneck = find_bottleneck(found.processes, found.machines)
    learner = next((p for p in found.processes if p.role == "learner"), None)
    if run.config is None:
        found.notes.append("no recommendation without config.yaml")
    elif found.rates is None or found.staleness is None or learner is None:
        found.notes.append("no recommendation: fewer than two steps, or no timeline of the learner")
    else:
        rest = f"change nothing: the learner is busy {learner.busy_s / found.seconds:.0%} of the time"
        if found.bottleneck and found.bottleneck.resource == "cores":
            rest = "change nothing on this machine: its cores are used up, more of them would help"
        predictor, word = ask(run, found.rates.steps_s, found.staleness.lag_mean) if ask else (None, "")
        found.notes += [word] if word else []
        bounds = bounds_of(found, run)
        asked: list[Predictor] = [bounds] if predictor is None else [predictor, bounds]
        found.recommendation = recommend(run.config, asked, found.staleness, fit(run.steps), rest)


def bounds_of(found: Verdict, run: Run) -> Bounds:
    """What a step costs everybody, for predictions without the simulator."""
    assert run.config is not None and found.rates is not None
    steps = max(1e-9, found.rates.steps_s * found.seconds)
    by_role: dict[str, list[Process]] = {}
    for process in found.processes:
        by_role.setdefault(process.role, []).append(process)
    learner, actors = by_role["learner"][0], by_role.get("actor", [])
    fleet = max(1, sum(p.count for p in actors))
    without_credits = sum(p.count * s for p in actors for c, s in p.causes.items() if c.split(".")[0] == "credits")
    publishing = sum(learner.states.get(state, (0.0, 0.0))[0] for state in ("gather", "send"))
    frozen = {model.process(n) for model in run.config.frozen.values() for n in range(model.count)}
    replicas = [p for p in by_role.get("replica", []) if p.name.partition(".")[0] not in frozen]  # of the policy
    fullest = max(found.machines, key=lambda m: m.cpu / m.cores if m.cores else 0.0, default=None)
    return Bounds(
        step_s=found.seconds / steps,
        learner_s=learner.busy_s / steps,
        train_s=(learner.busy_s - publishing) / steps,
        actors_s=sum(p.count * p.busy_s for p in actors) / steps,
        replica_s=sum(p.count * p.states.get("score", (0.0, 0.0))[0] for p in replicas) / steps,
        cpu_s=(fullest.cpu if fullest else 0.0) * found.seconds / steps,
        cores=fullest.cores if fullest else None,
        full=any(machine.full for machine in found.machines),
        waits={cause: seconds / steps for cause, seconds in learner.causes.items()},
        credits_s=without_credits / steps / fleet,
        actors=fleet,
        replicas=run.config.replica.count,
        ranks=run.config.learner.ranks,
        replicates=run.config.learner.dp_replicate,
        budget=run.config.staleness.limit,
    )


# ---- runs without timelines ---------------------------------------------------------------------

PACED = 1e3  # taken for the slowdown of a role that sleeps up to a pace_s: nearly all of its work is sleep


def _from_records(run: Run, notes: list[str], skip_s: float | None) -> Verdict:
    """What metrics.jsonl alone tells: every role as one, no CPU, waits as the broker saw them."""
    timed, again = of_one_start([step for step in run.steps if number(step.get("time_s")) is not None])
    notes += [again] if again and again not in notes else []
    steps = timed[min(FIRST_STEP, max(0, len(timed) - 2)) :]
    if skip_s is not None:
        steps = [step for step in timed if step["time_s"] >= skip_s]
    found = Verdict(run.path.name, 0.0, -1, -1, notes=notes)
    if len(steps) < 2 or steps[-1]["time_s"] <= steps[0]["time_s"]:
        why = "there are no timelines, and fewer than two steps were committed"
        if skip_s is not None and timed:
            why = f"--skip-s {skip_s:g} leaves fewer than two steps of a run of {timed[-1]['time_s']:.1f} s"
        notes.append(f"nothing to judge: {why}")
        return found
    found.first, found.last = int(steps[0]["step"]), int(steps[-1]["step"])
    found.seconds = float(steps[-1]["time_s"] - steps[0]["time_s"])
    notes.append("without timelines: processes of a role are taken together, CPU and most causes are not known")
    found.processes = processes_between(steps, found.seconds, run.config)
    for process in found.processes:
        process.absent_s = max(0.0, found.seconds - process.there_s) if process.role == "learner" else 0.0
    found.publishes = publishes_of(
        run.timelines, Window(0, 0), [p for p in run.publishes if found.first + 1 < p["version"] <= found.last + 1]
    )
    _judge(found, run, steps, None)
    return found
