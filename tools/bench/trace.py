"""What the timelines cost: each call alone times the calls of a real run, and that run with them and without.

::

    Tracer.state, .tally, .span, .write      nanoseconds a call, alone in a process
      x calls of each process in a real run   -> what it pays, of each step
    quick start, trace.spans=true | false     in turns -> steps/s, and the ratio of neighbours

The bar is 1 % of a step for the process that pays most.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.config import RunConfig, load
from common.process import free_port
from common.trace import RESOLUTION_NS, Tracer, trace_path
from tools.bench.harness import Row, rate
from tools.bench.launching import launch, loop_figures
from tools.timelines import Life, read_timelines

STEPS = 80  # of each run: some 15 s
BATCH = 1000  # records of one write
BAR = 0.01
CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@dataclass(frozen=True)
class Costs:
    """Nanoseconds a call."""

    change: float  # of state, to another
    same: float  # of state, to the one that it is
    tally: float  # with the clocks read before and after
    span: float
    write: float  # a record, in the tracer's own thread, which shares the interpreter

    def of(self, life: Life) -> float:
        """Nanoseconds that ``life`` spent on its timeline."""
        changes = sum(times for _, _, times in life.totals[-1][1].values())
        tallies = sum(entry[0] for by_key in life.tallies.values() for entry in by_key.values())
        drawn = len(life.spans) + len(life.instants) + len(life.levels)
        records = drawn + len(life.slices) + len(life.totals)
        return changes * (self.change + self.same) + tallies * self.tally + drawn * self.span + records * self.write


def run(reps: int) -> list[Row]:
    """The calls, what they come to in a real run, and that run with and without."""
    with tempfile.TemporaryDirectory(prefix="croupier-bench-") as folder:
        costs = measure(Path(folder))
        rows = [
            Row("trace", what, value, "ns", "a microsecond", 1000.0, 1)
            for what, value in (
                ("change of state", costs.change), ("the same state again", costs.same),
                ("tally and its clocks", costs.tally), ("span", costs.span), ("a record written", costs.write),
            )
        ]  # fmt: skip
        speeds: dict[bool, list[float]] = {True: [], False: []}
        for number in range(reps):
            for spans in (True, False) if number % 2 == 0 else (False, True):  # whoever is first may be favoured
                config = quick_start(Path(folder) / f"{number}-{spans}", spans)
                speeds[spans].append(loop_figures(launch(config, config.run.path.parent), 1)[0])
                if spans:
                    traced = config.run.path
        rows += shares(costs, read_timelines(traced).lives)
    ratios = [on / off for on, off in zip(speeds[True], speeds[False], strict=True)]
    on, off = statistics.median(speeds[True]), statistics.median(speeds[False])
    spread = statistics.stdev(ratios) if reps > 1 else None
    rows.append(Row("trace", "quick start with timelines", on, "steps/s", "without", off, reps, spread))
    return rows


def measure(folder: Path) -> Costs:
    """Each call alone."""
    tracer = Tracer(trace_path(folder, "alone"), "alone", "actor", limit_bytes=1 << 40)

    def changes() -> None:
        tracer.state("sample")
        tracer.state("play")

    def tally() -> None:
        began, cpu = tracer.now(), tracer.cpu()
        tracer.tally("decode", 64, tracer.now() - began, tracer.cpu() - cpu, 64)

    def fill() -> None:
        for index in range(BATCH):
            tracer.span("rollouts", "rollout", index, index + RESOLUTION_NS, group=index, sibling=3, tokens=64)

    def timed(work: Callable[[], object], calls: int) -> float:
        return statistics.median(1e9 / rate(work, calls, least_s=0.02) for _ in range(15))

    tracer.state("play")
    found = timed(changes, 2), timed(lambda: tracer.state("play"), 1), timed(tally, 1)
    spans, writes = [], []
    for _ in range(30):
        began = time.perf_counter_ns()
        fill()
        filled = time.perf_counter_ns()
        tracer.write()
        spans.append((filled - began) / BATCH)
        writes.append((time.perf_counter_ns() - filled) / BATCH)
    tracer.close()
    return Costs(*found, statistics.median(spans), statistics.median(writes))


def quick_start(folder: Path, spans: bool) -> RunConfig:
    """A short one, without evaluations, which come in bursts."""
    folder.mkdir(parents=True)
    return load(CONFIG, [
        f"run.steps={STEPS}", f"run.dir={folder}", f"trace.spans={str(spans).lower()}", "evaluation.prompts=0",
        f"broker.address=tcp://127.0.0.1:{free_port()}", "metrics.tensorboard=false",
    ])  # fmt: skip


def shares(costs: Costs, lives: list[Life]) -> list[Row]:
    """What each process pays for its timeline, in hundredths of its time and so of a step."""
    found = {life.process: 100 * costs.of(life) / (life.end - life.start) for life in lives}
    return [
        Row("trace", f"timeline of {process}", share, "% of a step", "bar", 100 * BAR, 1)
        for process, share in sorted(found.items())
    ]
