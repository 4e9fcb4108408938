"""``python -m tools.bench.end2end``: the benchmark with its options."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from common.errors import CroupierError
from tools.bench.end2end.contestants import APART, LARGER, MAIN
from tools.bench.end2end.study import BUDGET, DIRECTORY, STEPS, Options, rows, study
from tools.bench.harness import show

PIPE_COLUMNS = 180
ARENAS = (MAIN, APART, LARGER)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m tools.bench.end2end", description="What asynchrony is worth."
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument(
        "--budget",
        default=BUDGET,
        help="staleness.budget of the asynchronous runs: a number, or auto; default: the %(default)s that tools.sweep "
        "recommends",
    )
    parser.add_argument("--target", type=float, default=0.8, help="held-out reward whose wall-clock is compared")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of a run")
    parser.add_argument("--directory", type=Path, default=DIRECTORY, help="where finished runs are kept")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where results/end2end.md is written")
    parser.add_argument("--among", nargs="+", choices=ARENAS, default=ARENAS, help="arenas; without main no report")
    parser.add_argument("--timed-only", action="store_true", help="run, and judge the versions another time")
    parser.add_argument("--fresh", action="store_true", help="forget the runs that are done")
    given = parser.parse_args(arguments)
    options = Options(
        seeds=tuple(given.seeds), budget=given.budget, target=given.target, steps=given.steps,
        directory=given.directory, docs=given.docs, among=tuple(given.among), timed_only=given.timed_only,
        fresh=given.fresh,
    )  # fmt: skip
    try:
        found = study(options)
    except CroupierError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if found.rewards or MAIN not in options.among:
        console = Console()
        show(rows(found), console if console.is_terminal else Console(width=PIPE_COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
