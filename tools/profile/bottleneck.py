"""Which resource bounds the rate. Pure.

The learner is the end of the line: a step takes as long as the learner works at it and waits for it. So

1. a machine whose cores are used up bounds everything on it: CPU time of the run's processes fills FULL of
   its cores, or more processes are busy at a time than there are cores and those get less than STARVED of
   the time they are busy. No process of that machine is faster for another one's sake;
2. else a learner that is busy FULL of the time is the bound: its publishing, where that takes longer than
   its training;
3. else it is what the learner waited for longest, by the cause of the wait (tools.profile.causes). Rollouts
   that came late because actors had no credits are the budget's fault, those that came late because actors
   waited for versions are the publish's, the others are the actors'.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tools.profile.spent import Process

FULL = 0.9
STARVED = 0.9  # of the busy time with a core; less is starved where cores are too few
LEAST_BUSY = 0.02  # of the window: who works less is not called starved
NAMED = 3  # starved processes; more are counted
CAUSED_BY = {  # what of the run answers for a cause of the learner's waiting
    "rollouts.sampling": "actors", "rollouts.credits": "staleness budget", "rollouts.weights": "publish",
    "rollouts.server": "servers", "rollouts.scoring": "rewards", "rollouts.agents": "agents",
    "rollouts.broker": "broker", "rollouts.nobody": "actors", "version": "publish", "scoring": "replica",
    "scoring.weights": "publish", "scoring.transport": "broker", "thinning": "broker", "packing": "broker",
    "journal": "journal", "transport": "transport", "receivers": "publish", "ranks": "ranks",
}  # fmt: skip
PUBLISHING = ("gather", "send", "idle.receivers")


@dataclass(frozen=True)
class Machine:
    """A host and what of it the run used, on average over the window."""

    host: str
    cores: int | None  # None: not known
    cpu: float  # cores used by the main threads
    busy: float  # processes in states that are work, sleeps of a slowdown left out
    starved: tuple[str, ...] = ()  # processes that waited for a core

    @property
    def full(self) -> bool:
        """Whether its cores bound what runs on it."""
        return self.cores is not None and (self.cpu >= FULL * self.cores or bool(self.starved))


@dataclass(frozen=True)
class Bottleneck:
    """What bounds the rate."""

    resource: str
    share: float  # of the window
    why: str


def machines_of(
    processes: Sequence[Process], seconds: float, cores: Mapping[str, int], slowed: Mapping[str, float]
) -> list[Machine]:
    """One for every host. Processes are starved only where more of them are busy than there are cores.

    ``slowed``: by role, how many times as long work is made to take by sleeping (actor.slowdown, learner.slowdown).
    """
    found = []
    for host in dict.fromkeys(process.host for process in processes):
        here = [process for process in processes if process.host == host]
        busy = sum(process.busy_s / slowed.get(process.role, 1.0) for process in here) / seconds
        few = host in cores and busy > FULL * cores[host]
        at_work = [p for p in here if p.busy_s > LEAST_BUSY * seconds] if few else []
        starved = [p.name for p in at_work if p.cpu_of_busy * slowed.get(p.role, 1.0) < STARVED]
        cpu = sum(process.cpu_s for process in here) / seconds
        found.append(Machine(host, cores.get(host), cpu, busy, tuple(starved)))
    return found


def find_bottleneck(processes: Sequence[Process], machines: Sequence[Machine]) -> Bottleneck | None:
    """See above; None where there is no learner to judge by."""
    learner = next((process for process in processes if process.role == "learner" and process.there_s), None)
    if learner is None:
        return None
    there = learner.there_s
    for machine in machines:
        if machine.full:
            assert machine.cores
            names = ", ".join(machine.starved) if len(machine.starved) <= NAMED else f"{len(machine.starved)} of them"
            waits = f"; {names} wait for one" if machine.starved else ""
            return Bottleneck(
                "cores",
                min(1.0, machine.cpu / machine.cores),
                f"{machine.busy:.1f} processes are busy at a time on {machine.cores} cores of {machine.host}{waits}",
            )
    wall = {state: seconds for state, (seconds, _) in learner.states.items()}
    publishing = sum(wall.get(state, 0.0) for state in PUBLISHING)
    at_work = learner.busy_s + wall.get("idle.receivers", 0.0)
    if at_work >= FULL * there:
        name = "publish" if publishing > at_work - publishing else "learner"
        return Bottleneck(name, at_work / there, f"the learner trains or publishes {at_work / there:.0%} of the time")
    blamed: Counter[str] = Counter()
    for cause, seconds in learner.causes.items():
        blamed[CAUSED_BY.get(cause, cause)] += seconds  # type: ignore[assignment]  # a Counter of seconds
    if not blamed:
        return None
    resource, seconds = blamed.most_common(1)[0]
    causes = [name for name in learner.causes if CAUSED_BY.get(name, name) == resource]
    why = f"the learner waits {learner.idle_s / there:.0%} of the time, {seconds / there:.0%} for {', '.join(causes)}"
    return Bottleneck(resource, seconds / there, why)
