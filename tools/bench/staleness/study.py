"""``python -m tools.bench staleness``: what old data cost each method, on the quick start's task.

::

    start models (one a seed) -> a rate for every method and regime, on a seed of its own -> seeds -> docs/results.md

Runs that are done are kept in ``runs/bench-staleness/results.jsonl``, so that an interrupted study
goes on; remove the file to begin again. ``--reps`` is the number of seeds.
"""

import json
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from common.config import load
from tools.bench.harness import Row
from tools.bench.staleness.methods import METHODS, RATES, REGIMES

DIRECTORY = Path("runs/bench-staleness")
CONFIG = "configs/quickstart.yaml"
TUNING_SEED = 100
LAST = 3  # evaluations whose mean is a run's result
NICE = 10
SMALL = ("warmstart.hidden=32", "warmstart.heads=2", "warmstart.kv_heads=2", "warmstart.expert_width=32")


@dataclass(frozen=True)
class Job:
    """One run."""

    method: str
    regime: str
    lr: float
    seed: int


@dataclass(frozen=True)
class Result:
    """What came of it."""

    job: Job
    curve: list[tuple[int, float]]  # (update, held-out reward)
    figures: dict[str, float]  # means over the second half of the run

    @property
    def reward(self) -> float:
        """Mean of the last evaluations."""
        return sum(reward for _, reward in self.curve[-LAST:]) / LAST


def run(reps: int) -> list[Row]:
    """The whole study; one row a method and regime, beside no correction."""
    from tools.bench.staleness.report import write_report

    seeds = list(range(reps))
    results = Results(DIRECTORY / "results.jsonl")
    _models([*seeds, TUNING_SEED])
    _run_all(list(_tuning()), results, "choosing rates")
    _run_all(list(_seeds(results, seeds)), results, "seeds")
    table = final_rewards(results, seeds)
    write_report(results, seeds, Path("docs"))
    rows = []
    for regime in REGIMES:
        for method in METHODS:
            mean, reference = (sum(table[m, regime]) / len(seeds) for m in (method, "none"))
            rows.append(Row("staleness", f"{REGIMES[regime].title}: {METHODS[method].title}", mean,
                            "held-out reward", "no correction", reference, reps))  # fmt: skip
    return rows


class Results:
    """A JSON line a finished run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.by_job: dict[Job, Result] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    found = json.loads(line)
                    job = Job(**found["job"])
                    curve = [(int(u), float(r)) for u, r in found["curve"]]
                    self.by_job[job] = Result(job, curve, found["figures"])
                except (ValueError, KeyError, TypeError):  # the line that a kill cut short
                    continue

    def add(self, result: Result) -> None:
        """Keep it, on disk at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")
        self.by_job[result.job] = result

    def rate(self, method: str, regime: str) -> float:
        """The learning rate that did best on the tuning seed."""
        return max(RATES, key=lambda lr: self.by_job[Job(method, regime, lr, TUNING_SEED)].reward)

    def of(self, method: str, regime: str, seeds: list[int]) -> list[Result]:
        """The seeds' runs at the chosen rate."""
        lr = self.rate(method, regime)
        return [self.by_job[Job(method, regime, lr, seed)] for seed in seeds]


def final_rewards(results: Results, seeds: list[int]) -> dict[tuple[str, str], list[float]]:
    """``(method, regime) -> reward of each seed``."""
    return {(m, r): [run.reward for run in results.of(m, r, seeds)] for m in METHODS for r in REGIMES}


def _tuning() -> Iterator[Job]:
    for regime in REGIMES:
        for method in METHODS:
            for lr in RATES:
                yield Job(method, regime, lr, TUNING_SEED)


def _seeds(results: Results, seeds: list[int]) -> Iterator[Job]:
    for seed in seeds:
        for regime in REGIMES:
            for method in METHODS:
                yield Job(method, regime, results.rate(method, regime), seed)


def start_model(seed: int) -> Path:
    """Where the policy of ``seed`` starts from."""
    return DIRECTORY / f"start-{seed}"


def small_model(seed: int) -> Path:
    """The other model that samples in the regime ``actor``."""
    return DIRECTORY / f"small-{seed}"


def _models(seeds: list[int]) -> None:
    """Warm starts that are not there yet."""
    from tools.warmstart import ensure

    for seed in seeds:
        for path, more in ((start_model(seed), ()), (small_model(seed), SMALL)):
            if not (path / "config.json").exists():
                ensure(load(CONFIG, [f"model.path={path}", f"run.seed={seed}", *more]))


def _run_all(jobs: list[Job], results: Results, what: str) -> None:
    waiting = [job for job in jobs if job not in results.by_job]
    if not waiting:
        return
    workers = max(1, min(len(waiting), os.cpu_count() or 1))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with multiprocessing.get_context("spawn").Pool(workers, _settle) as pool, Progress(
        *columns, console=Console(stderr=True)
    ) as progress:  # fmt: skip
        task = progress.add_task(what, total=len(waiting))
        for result in pool.imap_unordered(_run_one, waiting):
            results.add(result)
            progress.advance(task)


def _settle() -> None:
    import torch

    os.nice(NICE)
    torch.set_num_threads(1)


def _run_one(job: Job) -> Result:
    from tools.bench.staleness.trainer import TUNING_UPDATES, UPDATES, Run

    run = Run(
        start_model(job.seed), small_model(job.seed), METHODS[job.method], REGIMES[job.regime], job.lr, job.seed
    )  # fmt: skip
    run.train(TUNING_UPDATES if job.seed == TUNING_SEED else UPDATES)
    late = run.figures[len(run.figures) // 2 :]
    names = sorted({name for figures in late for name in figures})
    return Result(job, run.curve, {n: sum(f.get(n, 0.0) for f in late) / len(late) for n in names})
