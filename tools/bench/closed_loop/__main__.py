"""``python -m tools.bench.closed_loop``: the benchmark with its options."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from common.errors import CroupierError
from tools.bench.closed_loop.runs import AUTO, BUDGETS, RATIOS
from tools.bench.closed_loop.study import DIRECTORY, Options, rows, run_study
from tools.bench.harness import show

PIPE_COLUMNS = 160


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m tools.bench.closed_loop",
        description="staleness.budget=auto beside every fixed budget.",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="default: 0 1")
    parser.add_argument("--ratios", nargs="+", choices=list(RATIOS), default=list(RATIOS))
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--directory", type=Path, default=DIRECTORY, help="where finished runs are kept")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where results/closed-loop.md is written")
    parser.add_argument("--timed-only", action="store_true", help="run, and judge the versions another time")
    parser.add_argument("--fresh", action="store_true", help="forget the runs that are done")
    given = parser.parse_args(arguments)
    options = Options(
        seeds=tuple(given.seeds), ratios=tuple(given.ratios), budgets=tuple(given.budgets), directory=given.directory,
        docs=given.docs, timed_only=given.timed_only, fresh=given.fresh,
    )  # fmt: skip
    try:
        found = run_study(options)
    except CroupierError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not options.timed_only and AUTO in options.budgets and len(options.budgets) > 1:
        console = Console()
        show(rows(found), console if console.is_terminal else Console(width=PIPE_COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
