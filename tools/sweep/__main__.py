"""``python -m tools.sweep RUN.yaml key=a,b,c ...``: a grid of real runs and one report; docs/sweep.md.

Exit codes: 0 every run finished, 1 some failed, 2 a sweep that cannot be run, 130 interrupted.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.live import Live

from common.errors import ConfigError, CroupierError
from common.process import StopFlag
from tools.console import make_console, print_error
from tools.sweep.child import Lock, launch
from tools.sweep.grid import parse
from tools.sweep.plan import Plan, check_directory, make_plan
from tools.sweep.progress import Screen
from tools.sweep.runner import STALL_S, Runner
from tools.sweep.start import prepare_start, warm_start


def main(arguments: list[str] | None = None) -> int:
    """Run, go on with, or report on a sweep; returns the exit code."""
    parser = _parser()
    given = parser.parse_intermixed_args(arguments)
    console = make_console()
    try:
        if given.report_only is not None:
            if given.config or given.words:
                raise ConfigError("--report-only takes the sweep's directory and nothing else")
            _report(given.report_only, console)
            return 0
        if given.config is None:
            parser.error("the run's YAML is missing; configs/ holds examples")
        if given.jobs < 1:
            raise ConfigError(f"--jobs {given.jobs}: at least one run at a time")
        if not given.stall_s > 0:
            raise ConfigError(f"--stall-s {given.stall_s:g}: must be a number of seconds above 0, or inf")
        plan = make_plan(given.config, parse(given.words), given.seeds, given.name)
        if given.jobs > 1:
            _check_apart(plan, given.jobs)
        return _run(plan, given.jobs, given.redo, given.stall_s, console)
    except CroupierError as error:
        print_error(console, error)
        return 2


def _check_apart(plan: Plan, jobs: int) -> None:
    """Raise :class:`ConfigError` where two runs of ``plan`` sample on one server: each would give it its weights."""
    whose: dict[str, str] = {}
    for job in plan.jobs:
        for address in job.config.engine.addresses if job.config.actor.engine == "sglang" else []:
            other = whose.setdefault(address.rstrip("/"), job.key)
            if other != job.key:
                raise ConfigError(
                    f"--jobs {jobs}: {other} and {job.key} would sample on the same server {address} "
                    "(engine.addresses); take --jobs 1, or servers of each run's own (engine.launch, with "
                    "engine.addresses=[])"
                )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m tools.sweep",
        description="Run a grid of settings, resumably, and report on it.",
    )
    parser.add_argument("config", nargs="?", help="the run's YAML; configs/ holds examples")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="key=a,b,c",
        help="values to try, such as staleness.budget=0,2,8; one value is for all",
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs of every cell; more may be asked for later")
    parser.add_argument("--name", default="", help="of the sweep's directory under run.dir")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--stall-s",
        type=float,
        default=STALL_S,
        help="a run that made no new step for so long is stopped and counted as failed; inf never (%(default)g)",
    )
    parser.add_argument("--redo", action="store_true", help="run again what was finished under other settings")
    parser.add_argument("--report-only", type=Path, metavar="SWEEP_DIR", help="write a sweep's report again")
    return parser


def _run(plan: Plan, jobs: int, redo: bool, stall_s: float, console: Console) -> int:
    stop = StopFlag().install()
    screen = Screen(console)
    lock = Lock(plan.directory, screen.say)
    try:
        starter = partial(launch, keep=(lock.descriptor,))
        states = check_directory(plan)
        runner = Runner(plan, starter, screen, lambda: stop.is_set, jobs, redo, states, stall_s=stall_s)
        runner.prepare()
        cells, seeds, done = len(plan.cells), len(plan.seeds), runner.count("finished")
        screen.say(f"{cells} cells × {seeds} seed(s) in {plan.directory}: {done} of {len(plan.jobs)} runs are done")
        if runner.waiting:
            prepare_start(plan.originals, plan.directory, warm_start, screen.say)
        if console.is_terminal:
            with Live(console=console, auto_refresh=False, transient=True) as screen.live:
                whole = runner.run()
            screen.live = None
        else:
            whole = runner.run()
    finally:
        lock.release()
    if runner.count("finished"):
        _report(plan.directory, console)
    if stop.is_set:
        screen.say(f"{stop.reason}: interrupted; the same command goes on from here", "yellow")
        return 130
    if not whole:
        screen.say(f"{runner.count('failed')} run(s) failed; the same command tries them again", "bold red")
    return 0 if whole else 1


def _report(directory: Path, console: Console) -> None:
    from tools.sweep.report import PAGE, read_sweep, write_report  # matplotlib takes a second

    verdict = write_report(directory)
    if verdict.advice.cell:
        label = read_sweep(directory).labels[verdict.advice.cell]
        console.print(f"recommended: {label}", style="bold green", markup=False)
    for reason in verdict.advice.reasons:
        console.print(f"  {reason}", markup=False, soft_wrap=True)
    console.print(f"report: {directory / PAGE} and report.md", markup=False)


if __name__ == "__main__":
    sys.exit(main())
