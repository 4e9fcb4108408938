import argparse
import sys

from rich.console import Console

from common.errors import CroupierError
from tools.bench.harness import REGISTRY, measure, show

PIPE_COLUMNS = 160  # of a table that goes to a file or a pipe
NAMES = [name for name in REGISTRY if name != "learner_gpu"]  # that is `learner --gpu`


def main(arguments: list[str] | None = None) -> int:
    width = max(map(len, NAMES)) + 2
    listing = "\n".join(f"  {name:{width}}{REGISTRY[name][1]}" for name in NAMES)
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m tools.bench",
        description=f"benchmarks:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=NAMES, metavar="NAME")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    parser.add_argument("--reps", type=int, help="repeats of each contestant")
    parser.add_argument("--gpu", action="store_true", help="learner: the figures of a GPU instead")
    given = parser.parse_args(arguments)
    if given.gpu and given.name != "learner":
        parser.error("--gpu: only `learner` has figures of a GPU")
    if given.reps is not None and given.reps < 1:
        parser.error(f"--reps {given.reps}: at least 1")
    try:
        rows = measure("learner_gpu" if given.gpu else given.name, given.reps)
    except CroupierError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if given.json:
        print("\n".join(row.to_json() for row in rows))
    else:
        console = Console()
        show(rows, console if console.is_terminal else Console(width=PIPE_COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
