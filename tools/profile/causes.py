"""Why somebody waited: every idle nanosecond of every process gets one named cause. Pure.

::

    learner idle.shard, step s  x  the broker's milestones of s  ->  transport, rollouts, version, scoring, ...
    rollouts   x  what the actors did meanwhile   ->  rollouts.sampling, rollouts.credits, rollouts.weights, ...
    scoring    x  what the replicas did meanwhile ->  scoring, scoring.weights, scoring.transport
    actor idle.credits  x  what the learner did   ->  credits.training, credits.publish, credits.waiting
    actor idle.scoring  ->  rewards;   any other idle.X  ->  X

A wait is cut at the milestones that fall into it, so its parts add up to it exactly. Where several
processes could be the reason (actors), a moment is shared out equally among them.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from common.trace import IDLE
from tools.profile.spent import Course, Process, Window, apportion, courses_of
from tools.timelines import Timelines, is_idle

Marks = Mapping[str, Sequence[int]]  # milestone -> when, oldest first; twice where a step was thinned again

# What is missing until a milestone is reached.
STAGES = (
    ("transport", "asked"),
    ("rollouts", "ready"),
    ("version", "assembled"),
    ("scoring", "scored"),
    ("thinning", "decided"),
    ("packing", "served"),
)
UNKNOWN = "unknown"  # marks are missing: the broker's timeline was cut, or its file is full

WORDS = {  # cause -> what it means; what to do about it
    "rollouts.sampling": ("too few groups; actors sample meanwhile", "more actors; if half empty, the budget"),
    "rollouts.credits": ("too few groups; actors may not start more", "a larger staleness.budget"),
    "rollouts.weights": ("too few groups; actors wait for a version", "a cheaper publish, a larger budget"),
    "rollouts.server": ("too few groups; requests hang in the servers", "engine.concurrency; the servers' logs"),
    "rollouts.scoring": ("groups are sampled, rewards are not there", "reward.threads, faster verifiers"),
    "rollouts.agents": ("agents are at work outside", "faster agents, more of them"),
    "rollouts.broker": ("actors wait for acknowledgements", "actor.unacked_mb, a faster disk"),
    "rollouts.nobody": ("no actor is there", "start actors; read their logs"),
    "version": ("the version that scores it is not out", "broker.assemble_ahead=1"),
    "scoring": ("the replica scores", "a faster replica, or obrs.mode=off"),
    "scoring.weights": ("the replica waits for or loads a version", "a cheaper publish"),
    "scoring.transport": ("tokens and scores are on their way", "broker.assemble_ahead=1"),
    "thinning": ("the broker tosses coins, writes the receipt", "small, unless cores are too few"),
    "packing": ("the broker makes shards", "small, unless cores are too few"),
    "journal": ("the journal must be on disk first", "a faster disk, broker.journal_mb=0"),
    "transport": ("request or shard is on its way, or decoded", "a faster network"),
    "receivers": ("a receiver is not ready for a version", "the slowest one's track in tools.trace"),
    "ranks": ("other ranks of the learner are late", "their tracks in tools.trace"),
    "credits.training": ("the budget is spent; the learner trains", "a larger budget, a faster learner"),
    "credits.publish": ("the budget is spent; the learner publishes", "a larger budget, a cheaper publish"),
    "credits.waiting": ("the budget is spent; the learner waits too", "a larger budget"),
    "credits.nobody": ("nothing is granted; no learner is there", "start the learner; read its log"),
    "credits": ("the budget is spent", "a larger budget"),
    "weights": ("a version is on its way", "a cheaper publish"),
    "server": ("everything is under way on the servers", "more servers, engine.concurrency"),
    "rewards": ("all is sampled and is being scored", "reward.threads, faster verifiers"),
    "agents": ("agents are at work and ask for nothing", "faster agents, more of them"),
    "broker": ("trajectories wait to be acknowledged", "actor.unacked_mb, a faster disk"),
    "requests": ("nothing is asked: it is fast enough", ""),
    "messages": ("nobody sends anything: it is fast enough", ""),
    "start": ("before the broker's welcome", ""),
    "end": ("everything is trained", ""),
    UNKNOWN: ("the broker's marks of it are missing", "trace.limit_mb, if its file is full"),
}

ACTOR_AT = {  # what an actor did while the learner waited for rollouts
    "idle.credits": "rollouts.credits", "idle.weights": "rollouts.weights", "swap": "rollouts.weights",
    "idle.server": "rollouts.server", "idle.scoring": "rollouts.scoring", "idle.agents": "rollouts.agents",
    "idle.broker": "rollouts.broker", "start": "rollouts.nobody", "idle.start": "rollouts.nobody",
    "end": "rollouts.nobody", "": "rollouts.nobody",
}  # fmt: skip
LEARNER_AT = {  # what the learner did while an actor had no credits
    "gather": "credits.publish", "send": "credits.publish", "idle.receivers": "credits.publish",
    "idle.shard": "credits.waiting", "start": "credits.nobody", "idle.start": "credits.nobody",
    "end": "credits.nobody", "": "credits.nobody",
}  # fmt: skip
REPLICA_WEIGHTS = ("swap", "idle.weights")


def marks_of(timelines: Timelines) -> dict[int, dict[str, list[int]]]:
    """The broker's milestones by step, each with its moments, oldest first."""
    found: dict[int, dict[str, list[int]]] = defaultdict(dict)
    for life in timelines.of("broker"):
        for instant in life.instants:
            if instant.name == "step" and isinstance(instant.args.get("step"), int):
                found[instant.args["step"]].setdefault(str(instant.args.get("what")), []).append(instant.at)
    for marks in found.values():
        for moments in marks.values():
            moments.sort()
    return dict(found)


def split_wait(start: int, end: int, marks: Marks) -> list[tuple[str, int, int]]:
    """A learner's wait cut into ``(cause, start, end)``, without gaps: what was missing when.

    A second thinning counts as scoring and thinning once more. After the last milestone the next one is
    waited for; before one that was marked though an earlier one was not, the cause is UNKNOWN.
    """
    path: list[tuple[str, int]] = []  # cause, and until when
    missing = ""
    for cause, what in STAGES:
        moments = marks.get(what, ())
        if not moments:
            missing = missing or cause
            continue
        path.append((UNKNOWN if missing else cause, moments[0]))
        missing = ""
    again = [moments[1] for what in ("scored", "decided") if len(moments := marks.get(what, ())) > 1]
    if len(again) == 2 and "served" in marks:
        path[-1:] = [("scoring", again[0]), ("thinning", again[1]), path[-1]]
    path.append(((missing or "transport") if path else UNKNOWN, end))
    parts, at = [], start
    for cause, until in path:
        until = min(end, until)
        if until > at:
            parts.append((cause, at, until))
            at = until
    return parts


def shared(courses: Sequence[Course], start: int, end: int, names: Mapping[str, str], other: str) -> Counter[str]:
    """What several processes did from ``start`` to ``end``, by ``names``: in equal shares, which add up to it."""
    parts: Counter[str] = Counter()
    for course in courses:
        for state, since, until in course.between(start, end):
            parts[names.get(state, other)] += until - since
    return apportion(parts, end - start) if parts else Counter({names[""]: end - start})


def scoring_parts(replicas: Sequence[Course], start: int, end: int) -> Counter[str]:
    """A wait for scores: one that scores is the reason, else one that lacks weights, else the way there and back."""
    cuts = sorted({start, end, *(t for r in replicas for _, *moments in r.between(start, end) for t in moments)})
    found: Counter[str] = Counter()
    walks = [list(r.between(start, end)) for r in replicas]
    places = [0] * len(walks)
    for since, until in itertools.pairwise(cuts):
        states = set()
        for number, walk in enumerate(walks):
            while walk[places[number]][2] <= since:
                places[number] += 1
            states.add(walk[places[number]][0])
        if "score" in states:
            name = "scoring"
        elif states.intersection(REPLICA_WEIGHTS):
            name = "scoring.weights"
        else:
            name = "scoring.transport"
        found[name] += until - since
    return found


class Causes:
    """Names the cause of every idle moment of a run."""

    def __init__(self, timelines: Timelines) -> None:
        self._marks = marks_of(timelines)
        self._courses = {role: courses_of(timelines, role) for role in ("actor", "broker", "learner", "replica")}
        leads = self._courses["learner"]
        self._learner = [leads[name] for name in sorted(leads, key=len)[:1]]  # rank 0

    def of_wait(self, role: str, state: str, start: int, end: int, step: int) -> Counter[str]:
        """Nanoseconds by cause of one idle slice; they add up to its length."""
        if role == "learner" and state == "idle.shard":
            return self._of_shard(start, end, step)
        if role == "actor" and state == "idle.credits":
            return shared(self._learner, start, end, LEARNER_AT, "credits.training")
        return Counter({plain(role, state): end - start})

    def _of_shard(self, start: int, end: int, step: int) -> Counter[str]:
        found: Counter[str] = Counter()
        for cause, since, until in split_wait(start, end, self._marks.get(step, {})):
            if cause == "rollouts":
                actors = list(self._courses["actor"].values())
                found += shared(actors, since, until, ACTOR_AT, "rollouts.sampling")
            elif cause == "scoring":
                found += scoring_parts(list(self._courses["replica"].values()), since, until)
            elif cause == "packing":
                names = {"journal": "journal", "": "packing"}
                found += shared(list(self._courses["broker"].values()), since, until, names, "packing")
            else:
                found[cause] += until - since
        return found

    def of_process(self, role: str, name: str, window: Window) -> dict[str, Counter[str]]:
        """Idle state -> nanoseconds by cause, of the slices within the window."""
        found: defaultdict[str, Counter[str]] = defaultdict(Counter)
        course = self._courses.get(role, {}).get(name)
        for piece in course.slices if course else ():
            start, end = max(piece.start, window.start), min(piece.end, window.end)
            if is_idle(piece.state) and end > start:
                found[piece.state] += self.of_wait(role, piece.state, start, end, piece.step)
        return found

    def name(self, process: Process, window: Window) -> None:
        """Fill in ``process.causes``: shares from the slices, seconds from the totals (see tools.profile.spent)."""
        drawn = self.of_process(process.role, process.name, window)
        causes: Counter[str] = Counter()
        for state, (wall, _) in process.states.items():
            if not is_idle(state):
                continue
            parts = drawn.get(state) or Counter({unsplit(process.role, state): 1})
            whole = sum(parts.values())
            for cause, ns in parts.items():
                causes[cause] += wall * ns / whole  # type: ignore[assignment]  # a Counter of seconds
        process.causes = dict(causes)


def unsplit(role: str, state: str) -> str:
    """The cause of waits that were all too short to be drawn, or that nothing is known about."""
    return UNKNOWN if (role, state) == ("learner", "idle.shard") else plain(role, state)


def plain(role: str, state: str) -> str:
    """The cause that an idle state names itself."""
    return "rewards" if (role, state) == ("actor", "idle.scoring") else state.removeprefix(IDLE)
