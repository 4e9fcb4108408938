"""What every benchmark shares: rows, interleaved repeats, the registry and the two ways to print.

A benchmark is a module with ``run(reps) -> list[Row]``. Contestants take turns inside one process
(:func:`interleave`), so a noisy neighbour disturbs all of them alike, and medians are compared.
"""

import importlib
import json
import mmap
import shutil
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.table import Table

REGISTRY = {  # name -> (module, what it measures, default repeats); imported when asked for
    "loop": ("tools.bench.loop", "completion tokens/s of the whole loop beside bare generation and bare training", 3),
    "obrs": ("tools.bench.obrs", "rejection arithmetic at [64, 4096]", 15),
    "broker": (
        "tools.bench.broker",
        "socket, admission, journal, packing, rejection; beside raw sockets and disk",
        5,
    ),
    "learner": (
        "tools.bench.learner",
        "MoE layer, whole model, log-probabilities, publish; beside transformers, dense products, one broadcast",
        5,
    ),
    "fleet": (
        "tools.bench.fleet",
        "the actor on real SGLang servers: tokens/s beside a bare loop, cache hits, time lost to updates",
        3,
    ),
    "learner_gpu": ("tools.bench.gpu", "MFU, memory, the MoE layer and weights over NCCL on GPUs: learner --gpu", 5),
    "algorithms": ("tools.bench.algorithms", "every loss and advantage beside a bare PPO clip and a Python loop", 9),
    "staleness": (
        "tools.bench.staleness.study",
        "what old data cost each method: rates chosen, then seeds; about two hours; writes docs/results.md",
        5,
    ),
    "end2end": (
        "tools.bench.end2end.study",
        "synchronous, asynchronous with and without correction, TRL: samples/s and wall-clock to a reward; 40 minutes",
        3,
    ),
    "trace": (
        "tools.bench.trace",
        "what timelines cost: each call, a step's share, the quick start with and without",
        5,
    ),
    "simulate": (
        "tools.bench.simulate",
        "the simulator's predictions beside real runs of other settings, 8 minutes",
        1,
    ),
    "closed_loop": (
        "tools.bench.closed_loop.study",
        "staleness.budget=auto beside every fixed budget: reward at equal wall-clock; an hour",
        2,
    ),
    "store": ("tools.bench.store", "LMDB and SQLite as the journal's store, beside append + fdatasync", 5),
    "verifiers": ("tools.bench.verifiers", "math-verify, reasoning-gym, searches and the order of questions", 5),
    "codec": ("tools.bench.codec", "encode + decode of 2,048-token trajectories", 15),
}


@dataclass(frozen=True)
class Row:
    """One figure beside the reference that it is to be judged by."""

    bench: str
    name: str
    value: float
    unit: str
    reference: str
    reference_value: float
    reps: int
    spread: float | None = None  # standard deviation of the ratio over repeats, where it was taken

    @property
    def ratio(self) -> float:
        """Value over reference."""
        return self.value / self.reference_value

    def to_json(self) -> str:
        """The row as one JSON object."""
        order = ("bench", "name", "value", "unit", "reference", "reference_value", "ratio", "reps", "spread")
        fields = asdict(self) | {"ratio": self.ratio}
        return json.dumps({key: fields[key] for key in order})


def interleave(contestants: Mapping[str, Callable[[], float]], reps: int) -> dict[str, float]:
    """Let each measure in turn, ``reps`` times over; the median of each."""
    if reps < 1:
        raise ValueError(f"reps={reps}: at least one repeat is needed")
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(reps):
        for name, measure in contestants.items():
            taken[name].append(measure())
    return {name: statistics.median(values) for name, values in taken.items()}


def forget(directory: Path, kinds: Collection[str], also: Collection[str] = ()) -> None:
    """Delete from ``directory`` a study's own: what is named ``kind-seed``, and ``also``. Anything else stays."""
    for path in list(directory.glob("*")):
        kind, _, seed = path.name.rpartition("-")
        if path.name not in also and not (kind in kinds and seed.isdecimal()):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def touch_memory(megabytes: int) -> tuple[float, float]:
    """Write to fresh memory, twice, and free it; the seconds of each.

    A virtual machine that gives free memory back to its host waits for the host at the first touch, a hundred times as
    long as for the memory itself. What is touched shortly before a measurement is at hand for it, whoever asks.
    """
    seconds = []
    with mmap.mmap(-1, megabytes << 20) as memory:
        ones = b"\1" * (1 << 20)
        for _ in range(2):
            began = time.perf_counter()
            for start in range(0, len(memory), len(ones)):
                memory[start : start + len(ones)] = ones
            seconds.append(time.perf_counter() - began)
    return seconds[0], seconds[1]


def rate(work: Callable[[], object], amount: float, least_s: float = 0.05) -> float:
    """``amount`` per second of ``work``, repeated until ``least_s`` has passed so that clocks do not matter."""
    rounds, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < least_s:
        work()
        rounds += 1
    return amount * rounds / elapsed


def measure(name: str, reps: int | None) -> list[Row]:
    """Run one registered benchmark."""
    module, _, default_reps = REGISTRY[name]
    run = cast(Callable[[int], list[Row]], importlib.import_module(module).run)
    return run(reps or default_reps)


def show(rows: list[Row], console: Console) -> None:
    """A table for people."""
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    table.add_column("figure", header_style="dim")
    for title in ("value", "unit", "reference", "its value", "ratio", "reps"):
        justify = "left" if title in ("unit", "reference") else "right"
        table.add_column(title, header_style="dim", justify=justify)  # type: ignore[arg-type]  # a Literal
    for row in rows:
        figure = f"{row.bench} · {row.name}"
        table.add_row(
            figure,
            _short(row.value),
            row.unit,
            row.reference,
            _short(row.reference_value),
            f"{row.ratio:.2f}" if row.spread is None else f"{row.ratio:.2f} ± {row.spread:.2f}",
            str(row.reps),
        )
    console.print(table)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
