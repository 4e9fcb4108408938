"""``python -m tools.bench end2end``: what asynchrony is worth.

::

    short runs of each setting -> the fastest of each contestant -> seed by seed, contestants in turn
    -> versions judged -> docs/results/end2end.md, end2end.png

Three arenas: the quick start, whose versions are judged; the same with a machine for each side; and a
larger shape. Runs that are done are kept in ``runs/bench-end2end``, so that an interrupted study goes
on. ``--reps`` is the number of seeds; ``python -m tools.bench.end2end`` takes more options.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tools.bench.end2end import trl_env
from tools.bench.end2end.analysis import Curve, Timed, paired, reaches
from tools.bench.end2end.contestants import APART, LARGER, MAIN, SYNCHRONOUS, TRL, Arena, Contestant, Setting, arenas
from tools.bench.end2end.running import finished, judge, judged, recipe_of, run_once
from tools.bench.end2end.shapes import start_model
from tools.bench.harness import Row, forget

DIRECTORY = Path("runs/bench-end2end")
STEPS = 600
BUDGET = "1"  # what tools.sweep recommends (docs/sweep.md)
TRY_ROUNDS = 2  # of which the faster counts: what else the machine does can only slow a run down
CHOSEN, TRIED = "chosen.json", "tried"
ELSEWHERE = {APART: "a machine for each side", LARGER: "a larger shape"}
Job = TypeVar("Job")
Values = Mapping[int, float | None]  # seed -> figure; None where there is none


@dataclass(frozen=True)
class Options:
    """What is run, and how it is looked at."""

    seeds: tuple[int, ...]
    budget: str = BUDGET  # of the asynchronous contestants: versions, or auto
    target: float = 0.8  # held-out reward
    steps: int = STEPS
    directory: Path = DIRECTORY
    docs: Path | None = Path("docs")  # where the report goes; None: nowhere
    among: tuple[str, ...] = (MAIN, APART, LARGER)  # arenas
    timed_only: bool = False  # stop before versions are judged
    fresh: bool = False  # forget earlier runs


@dataclass
class Found:
    """All runs of a study."""

    options: Options
    arenas: dict[str, Arena]
    settings: dict[str, dict[str, Setting]] = field(default_factory=dict)  # arena -> contestant
    timed: dict[str, dict[str, dict[int, Timed]]] = field(default_factory=dict)  # arena -> contestant -> seed
    rewards: dict[str, dict[int, dict[int, float]]] = field(default_factory=dict)  # contestant -> seed -> version

    @property
    def main(self) -> dict[str, Contestant]:
        """Those whose versions are judged."""
        return self.arenas[MAIN].contestants

    def curve(self, key: str, seed: int) -> Curve:
        """Held-out reward by seconds."""
        return self.timed[MAIN][key][seed].curve(self.rewards[key][seed])

    def seconds(self, key: str) -> Values:
        """Seed -> seconds to the target; None where it was not reached."""
        return {seed: reaches(self.curve(key, seed), self.options.target) for seed in self.rewards[key]}

    def steps(self, key: str) -> Values:
        """Seed -> steps to the target."""
        curves = {seed: [(float(v), r) for v, r in sorted(of.items())] for seed, of in self.rewards[key].items()}
        return {seed: reaches(curve, self.options.target) for seed, curve in curves.items()}

    def each(self, key: str, figure: Callable[[Timed], float], arena: str = MAIN) -> Values:
        """Seed -> a figure of the run."""
        return {seed: figure(timed) for seed, timed in self.timed.get(arena, {}).get(key, {}).items()}

    def figures(self, arena: str) -> list[tuple[str, str, Callable[[str], Values]]]:
        """(name, unit, contestant -> seed -> value) of all that is compared there."""
        where = "" if arena == MAIN else f", {ELSEWHERE[arena]}"
        samples = (f"samples/s{where}", "completions/s", lambda key: self.each(key, lambda t: t.samples_per_s, arena))
        tokens = (
            f"tokens/s{where}",
            "completion tokens/s",
            lambda key: self.each(key, lambda t: t.tokens_per_s, arena),
        )
        if arena != MAIN:
            return [tokens]
        return [samples, tokens, (f"wall-clock to {self.options.target:g} held out", "s", self.seconds)]


def run(reps: int) -> list[Row]:
    """The whole study on ``reps`` seeds."""
    return rows(study(Options(tuple(range(reps)))))


def study(options: Options) -> Found:
    """Run what has not been run, judge it, and write the report."""
    if options.fresh:
        every = arenas(options.budget, options.steps, with_trl=True).values()
        runs = [arena.kind(key) for arena in every for key in arena.contestants]
        forget(options.directory, ["start", f"{LARGER}-start", *runs], [CHOSEN, TRIED])
    options.directory.mkdir(parents=True, exist_ok=True)
    console, python = Console(stderr=True), trl_env.interpreter()
    if python is None:
        console.print(f"TRL is not installed, so its rows are left out; make its environment with `{trl_env.HOW}`")
    among = arenas(options.budget, options.steps, with_trl=python is not None)
    found = Found(options, {name: among[name] for name in options.among})
    for arena in found.arenas.values():
        host = Host(options.directory, arena, options.seeds, python or Path(), console)
        found.settings[arena.name] = host.choose()
        found.timed[arena.name] = host.run_all(found.settings[arena.name])
    if options.timed_only or MAIN not in found.arenas:
        return found
    _judge_all(found, console)
    if options.docs is not None:
        from tools.bench.end2end.report import write_report

        write_report(found, options.docs)
    return found


def rows(found: Found) -> list[Row]:
    """Every figure beside the synchronous run's, then beside TRL's; what did not reach the target has no row."""
    return [
        row
        for arena in found.arenas.values()
        for reference in (SYNCHRONOUS, TRL)
        for key in arena.contestants
        for name, unit, values in found.figures(arena.name)
        if (row := _row(arena, name, unit, values, key, reference)) is not None
    ]


def _row(arena: Arena, name: str, unit: str, values: Callable[[str], Values], key: str, reference: str) -> Row | None:
    if key == reference or reference not in arena.contestants:
        return None
    ratio = paired(values(key), values(reference))
    if ratio is None:
        return None
    beside, name = arena.contestants[reference].title, f"{name}: {arena.contestants[key].title}"
    return Row("end2end", name, ratio.value, unit, beside, ratio.reference, len(ratio.pairs), ratio.spread)


# ---- running ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Host:
    """Runs what an arena lacks."""

    root: Path
    arena: Arena
    seeds: tuple[int, ...]
    python: Path  # TRL's
    console: Console

    def choose(self) -> dict[str, Setting]:
        """The fastest setting of each contestant by completions/s of short runs; kept, so that it is chosen once."""
        arena, kept = self.arena, self.root / CHOSEN
        try:
            before = json.loads(kept.read_text())
        except (FileNotFoundError, ValueError):
            before = {}
        names = {key: arena.kind(key) for key in arena.contestants}
        found = {key: _titled(one, before.get(names[key])) for key, one in arena.contestants.items()}
        jobs = [(key, s) for key, one in arena.contestants.items() if found[key] is None for s in one.settings]
        speeds: dict[str, dict[str, float]] = {}
        for key, setting in self._shown(jobs * TRY_ROUNDS, "settings"):
            timed = self._run(key, setting, min(self.seeds), arena.try_steps, self.root / TRIED)
            of = speeds.setdefault(key, {})
            of[setting.title] = max(timed.samples_per_s, of.get(setting.title, 0.0))
        chosen = {key: max(of, key=lambda title: of[title]) for key, of in speeds.items()}
        kept.write_text(json.dumps(before | {names[key]: title for key, title in chosen.items()}, indent=1) + "\n")
        for key, of in speeds.items():
            said = ", ".join(f"{title} {speed:,.0f}" for title, speed in of.items())
            self.console.print(f"{arena.contestants[key].title}: {said} completions/s")
        settings = {key: found[key] or _titled(one, chosen.get(key)) for key, one in arena.contestants.items()}
        return {key: setting for key, setting in settings.items() if setting is not None}

    def run_all(self, settings: dict[str, Setting]) -> dict[str, dict[int, Timed]]:
        """Seed by seed, contestants in turn, so that a noisy neighbour disturbs all of them alike."""
        timed: dict[str, dict[int, Timed]] = {key: {} for key in settings}
        waiting = []
        for seed in self.seeds:
            model = start_model(self.root, self.arena, seed)
            for key, setting in settings.items():
                recipe = recipe_of(self.arena.contestants[key], setting, seed, self.arena.steps, model)
                before = finished(self.root / self.arena.directory(key, seed), recipe)
                if before is None:
                    waiting.append((seed, key))
                else:
                    timed[key][seed] = before
        for seed, key in self._shown(waiting, f"runs, {self.arena.name}"):
            folder = self.root / self.arena.directory(key, seed)
            one = timed[key][seed] = self._run(key, settings[key], seed, self.arena.steps, folder)
            title = self.arena.contestants[key].title
            self.console.print(f"seed {seed}, {title}: {one.wall_s:.0f} s, {one.samples_per_s:,.0f} completions/s")
        return timed

    def _run(self, key: str, setting: Setting, seed: int, steps: int, folder: Path) -> Timed:
        model = start_model(self.root, self.arena, seed)
        return run_once(self.arena.contestants[key], setting, seed, steps, model, folder, self.python)

    def _shown(self, jobs: list[Job], what: str) -> Iterable[Job]:
        if not jobs:
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console) as progress:
            yield from progress.track(jobs, description=what)


def _titled(one: Contestant, title: str | None) -> Setting | None:
    """The setting of that title; the only one where there is no choice."""
    if len(one.settings) == 1:
        return one.settings[0]
    return next((setting for setting in one.settings if setting.title == title), None)


def _judge_all(found: Found, console: Console) -> None:
    arena, root = found.arenas[MAIN], found.options.directory
    runs = {(key, seed): root / arena.directory(key, seed) for key, of in found.timed[MAIN].items() for seed in of}
    for (key, seed), folder in runs.items():
        rewards = judged(folder)
        if rewards is None:
            console.print(f"judging the versions of {folder}")
            rewards = judge(folder, seed, start_model(root, arena, seed))
        found.rewards.setdefault(key, {})[seed] = rewards
