"""``python -m tools.bench end2end``: what asynchrony is worth, on the quick start's task.

::

    a short run of each setting -> the fastest of each contestant -> seed by seed, contestants in turn
    -> versions judged -> docs/results/end2end.md, end2end.png

Runs that are done are kept in ``runs/bench-end2end``, so that an interrupted study goes on.
``--reps`` is the number of seeds; ``python -m tools.bench.end2end`` takes more options.
"""

import json
import shutil
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tools.bench.end2end import trl_env
from tools.bench.end2end.analysis import Curve, Timed, paired, reaches
from tools.bench.end2end.contestants import SYNCHRONOUS, TRL, Contestant, Setting, apart, contestants
from tools.bench.end2end.running import TRIED, Place, finished, judge, judged, recipe_of, run_once
from tools.bench.harness import Row

DIRECTORY = Path("runs/bench-end2end")
STEPS, TRY_STEPS, APART_STEPS = 600, 40, 100
TRY_ROUNDS = 2  # of which the faster counts: what else the machine does can only slow a run down
CHOSEN = "chosen.json"
Job = TypeVar("Job")


@dataclass(frozen=True)
class Options:
    """What is run, and how it is looked at."""

    seeds: tuple[int, ...]
    budget: str = "2"  # of the asynchronous contestants: versions, or auto
    target: float = 0.8  # held-out reward
    steps: int = STEPS
    directory: Path = DIRECTORY
    docs: Path | None = Path("docs")  # where the report goes; None: nowhere
    timed_only: bool = False  # stop before versions are judged
    fresh: bool = False  # forget earlier runs


@dataclass
class Found:
    """All runs of a study."""

    options: Options
    contestants: dict[str, Contestant]
    settings: dict[str, Setting]
    timed: dict[str, dict[int, Timed]] = field(default_factory=dict)  # contestant -> seed -> run
    rewards: dict[str, dict[int, dict[int, float]]] = field(default_factory=dict)  # ... -> version -> held-out reward
    apart: dict[str, dict[int, Timed]] = field(default_factory=dict)  # as timed, where each side has its own machine

    def curve(self, key: str, seed: int) -> Curve:
        """Held-out reward by seconds."""
        return self.timed[key][seed].curve(self.rewards[key][seed])

    def seconds(self, key: str) -> dict[int, float | None]:
        """Seed -> seconds to the target; None where it was not reached."""
        return {seed: reaches(self.curve(key, seed), self.options.target) for seed in self.rewards[key]}

    def steps(self, key: str) -> dict[int, float | None]:
        """Seed -> steps to the target."""
        curves = {seed: [(float(v), r) for v, r in sorted(of.items())] for seed, of in self.rewards[key].items()}
        return {seed: reaches(curve, self.options.target) for seed, curve in curves.items()}

    def each(self, key: str, figure: Callable[[Timed], float]) -> dict[int, float | None]:
        """Seed -> a figure of the run."""
        return {seed: figure(timed) for seed, timed in self.timed[key].items()}

    def speed_apart(self, key: str) -> dict[int, float | None]:
        """Seed -> completions/s where each side has a machine of its own."""
        return {seed: timed.samples_per_s for seed, timed in self.apart.get(key, {}).items()}

    def figures(self) -> list[tuple[str, str, Callable[[str], dict[int, float | None]]]]:
        """(name, unit, contestant -> seed -> value) of all that is compared."""
        return [
            ("samples/s", "completions/s", lambda key: self.each(key, lambda t: t.samples_per_s)),
            ("tokens/s", "completion tokens/s", lambda key: self.each(key, lambda t: t.tokens_per_s)),
            (f"wall-clock to {self.options.target:g} held out", "s", self.seconds),
        ]


def run(reps: int) -> list[Row]:
    """The whole study on ``reps`` seeds."""
    return rows(study(Options(tuple(range(reps)))))


def study(options: Options) -> Found:
    """Run what has not been run, judge it, and write the report."""
    if options.fresh:
        shutil.rmtree(options.directory, ignore_errors=True)
    options.directory.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    place, python = Place(options.directory), trl_env.interpreter()
    among = contestants(options.budget)
    if python is None:
        del among[TRL]
        console.print(f"TRL is not installed, so its rows are left out; make its environment with `{trl_env.HOW}`")
        python = Path()
    models = {seed: place.start(seed) for seed in options.seeds}
    settings = _choose(among, place, models, python, console)
    found = Found(options, among, settings)
    _run_all(found, place, models, python, console)
    _run_apart(found, place, models, console)
    if options.timed_only:
        return found
    _judge_all(found, place, models, console)
    if options.docs is not None:
        from tools.bench.end2end.report import write_report

        write_report(found, options.docs)
    return found


def rows(found: Found) -> list[Row]:
    """Every figure beside the synchronous run's, then beside TRL's; what did not reach the target has no row."""
    made = []
    for reference in (SYNCHRONOUS, TRL):
        for key, one in found.contestants.items():
            if key == reference or reference not in found.contestants:
                continue
            for name, unit, values in found.figures():
                ratio = paired(values(key), values(reference))
                if ratio is None:
                    continue
                made.append(
                    Row(
                        "end2end", f"{name}: {one.title}", _mean(values(key)), unit,
                        found.contestants[reference].title, _mean(values(reference)), len(ratio.by_seed), ratio.spread,
                    )
                )  # fmt: skip
    return made + _rows_apart(found)


def _rows_apart(found: Found) -> list[Row]:
    made, base = [], found.speed_apart(SYNCHRONOUS)
    for key in found.apart:
        ratio = None if key == SYNCHRONOUS else paired(found.speed_apart(key), base)
        if ratio is not None:
            name = f"samples/s, a machine for each side: {found.contestants[key].title}"
            values = (_mean(found.speed_apart(key)), "completions/s", "synchronous, the same", _mean(base))
            made.append(Row("end2end", name, *values, len(ratio.by_seed), ratio.spread))
    return made


def _mean(values: Mapping[int, float | None]) -> float:
    return statistics.fmean(value for value in values.values() if value is not None)


# ---- the stages ---------------------------------------------------------------------------------


def _choose(
    among: dict[str, Contestant], place: Place, models: dict[int, Path], python: Path, console: Console
) -> dict[str, Setting]:
    """The fastest setting of each contestant by completions/s of short runs; kept, so that it is chosen once."""
    kept, seed = place.root / CHOSEN, min(models)
    try:
        before = json.loads(kept.read_text())
    except (FileNotFoundError, ValueError):
        before = {}
    jobs = [(one, s) for one in among.values() if before.get(one.key) not in _titles(one) for s in one.settings]
    speeds: dict[str, dict[str, float]] = {}
    for one, setting in _shown(jobs * TRY_ROUNDS, "settings", console):
        speed = run_once(one, setting, seed, TRY_STEPS, models[seed], place.root / TRIED, python).samples_per_s
        of = speeds.setdefault(one.key, {})
        of[setting.title] = max(speed, of.get(setting.title, 0.0))
    chosen = before | {key: max(of, key=lambda title: of[title]) for key, of in speeds.items()}
    kept.write_text(json.dumps(chosen, indent=1) + "\n")
    for key, of in speeds.items():
        said = ", ".join(f"{title} {speed:,.0f}" for title, speed in of.items())
        console.print(f"{among[key].title}: {said} completions/s")
    return {key: next(s for s in one.settings if s.title == chosen[key]) for key, one in among.items()}


def _titles(one: Contestant) -> list[str]:
    return [setting.title for setting in one.settings]


def _run_all(found: Found, place: Place, models: dict[int, Path], python: Path, console: Console) -> None:
    """Seed by seed, contestants in turn, so that a noisy neighbour disturbs all of them alike."""
    steps, waiting = found.options.steps, []
    for seed in found.options.seeds:
        for key, one in found.contestants.items():
            recipe = recipe_of(one, found.settings[key], seed, steps, models[seed])
            timed = finished(place.run(key, seed), recipe)
            if timed is None:
                waiting.append((seed, key))
            else:
                found.timed.setdefault(key, {})[seed] = timed
    for seed, key in _shown(waiting, "runs", console):
        one, setting = found.contestants[key], found.settings[key]
        timed = run_once(one, setting, seed, steps, models[seed], place.run(key, seed), python)
        found.timed.setdefault(key, {})[seed] = timed
        console.print(f"seed {seed}, {one.title}: {timed.wall_s:.0f} s, {timed.samples_per_s:,.0f} completions/s")


def _run_apart(found: Found, place: Place, models: dict[int, Path], console: Console) -> None:
    """Croupier's three with a machine for each side, for their speed alone."""
    among, waiting = apart(found.options.budget), []
    for seed in found.options.seeds:
        for key, one in among.items():
            recipe = recipe_of(one, one.settings[0], seed, APART_STEPS, models[seed])
            timed = finished(place.apart(key, seed), recipe)
            if timed is None:
                waiting.append((seed, key))
            else:
                found.apart.setdefault(key, {})[seed] = timed
    for seed, key in _shown(waiting, "a machine for each side", console):
        one, folder = among[key], place.apart(key, seed)
        timed = run_once(one, one.settings[0], seed, APART_STEPS, models[seed], folder, Path())
        found.apart.setdefault(key, {})[seed] = timed


def _judge_all(found: Found, place: Place, models: dict[int, Path], console: Console) -> None:
    waiting = [(key, seed) for key, of in found.timed.items() for seed in of if judged(place.run(key, seed)) is None]
    for key, seed in _shown(waiting, "judged", console):
        judge(place.run(key, seed), seed, models[seed])
    for key, of in found.timed.items():
        found.rewards[key] = {seed: judged(place.run(key, seed)) or {} for seed in of}


def _shown(jobs: list[Job], what: str, console: Console) -> Iterable[Job]:
    if not jobs:
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        yield from progress.track(jobs, description=what)
