"""``python -m tools.simulate [SETUP.yaml | --from RUN_DIR ...] [key=value ...] [--plot FILE]``.

::

    settings and costs -> every combination of listed values -> simulate each -> a table, and a picture
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from common.errors import CroupierError
from tools.console import make_console, print_error
from tools.outputs import PICTURES, check_output, writing
from tools.profile.spent import NS
from tools.run_files import check_run_dir
from tools.simulate.measured import Measured, measure
from tools.simulate.model import simulate
from tools.simulate.outcome import Outcome
from tools.simulate.settings import Setup, override, read_setup, to_yaml, variants, varied
from tools.simulate.table import Line, print_lines
from tools.watch.sound import number

MOST_VARIANTS = 1000


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m tools.simulate",
        description="A run in virtual time. key=a,b,c tries every value; see docs/simulator.md.",
    )
    parser.add_argument("inputs", nargs="*", metavar="SETUP.yaml | key=value", help="costs by hand, and overrides")
    parser.add_argument(
        "--from", dest="runs", type=Path, action="append", default=[], metavar="RUN_DIR",
        help="take costs and settings from a run; again for more runs of the same model",
    )  # fmt: skip
    parser.add_argument("--plot", type=Path, help="a picture: .png or .svg")
    parser.add_argument("--json", action="store_true", help="everything as one array of objects")
    parser.add_argument("--setup", action="store_true", help="print the setup as YAML, and simulate nothing")
    given = parser.parse_intermixed_args(arguments)
    console = make_console()
    try:
        if given.plot is not None:
            check_output(given.plot, PICTURES)
        files = [Path(one) for one in given.inputs if "=" not in one]
        overrides = [one for one in given.inputs if "=" in one]
        if len(files) + bool(given.runs) > 1:
            named = " and ".join(map(str, files))
            parser.error(f"costs come from one SETUP.yaml or from a run (--from RUN_DIR), not from {named} too")
        for run_dir in given.runs:
            check_run_dir(run_dir)
        measured = measure(given.runs) if given.runs else None
        base = measured.setup if measured else read_setup(files[0] if files else None)
        setups = _setups(base, overrides)
        if given.setup:
            sys.stdout.write(to_yaml(setups[0][1]))
            return 0
        lines = _simulate_all(setups, console, quiet=given.json)
        if given.json:
            found = [{"set": line.values, **line.outcome.to_json()} for line in lines]
            sys.stdout.write(json.dumps(found, indent=2) + "\n")
        else:
            if measured is not None:
                _print_measured(console, measured)
            print_lines(console, lines)
        if given.plot is not None:
            from tools.simulate.picture import draw

            with writing(given.plot, "name a file elsewhere"):
                draw(lines, varied(overrides), given.plot)
    except CroupierError as error:
        print_error(console, error)
        return 2
    return 0


def _setups(base: Setup, overrides: Sequence[str]) -> list[tuple[dict[str, str], Setup]]:
    """(the values that vary, the setup) of every combination; all are valid before any is simulated."""
    keys, combinations = varied(overrides), variants(overrides)
    if len(combinations) > MOST_VARIANTS:
        raise CroupierError(f"{len(combinations):,} combinations; list fewer values, {MOST_VARIANTS:,} at most")
    found = []
    for combination in combinations:
        given = dict(one.split("=", 1) for one in combination)
        found.append(({key: given[key] for key in keys}, override(base, combination)))
    return found


def _simulate_all(setups: Sequence[tuple[dict[str, str], Setup]], console: Console, quiet: bool) -> list[Line]:
    lines = []
    errors = Console(stderr=True)
    with errors.status("simulating") if errors.is_terminal and not quiet else _Silent() as status:
        for number, (values, setup) in enumerate(setups, 1):

            def show(done: int, steps: int, number: int = number) -> None:
                status.update(f"simulating {number} of {len(setups)}: step {done} of {steps}")

            lines.append(Line(values, setup, simulate(setup, show)))
    return lines


class _Silent:
    """A status that nobody sees."""

    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, _text: str) -> None:
        """Say nothing."""


def _print_measured(console: Console, measured: Measured) -> None:
    """Notes, and how well the first run is met by its own costs."""
    for note in measured.notes:
        console.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
    sample = measured.samples[0]
    real = sample.steps / (sample.window.ns * NS)
    lags = [lag for s in sample.trained if (lag := number(s.get("lag_mean"))) is not None]
    mean = f"{sum(lags) / len(lags):.2f}" if lags else "unknown size"
    again: Outcome = simulate(measured.setup)
    console.print(
        f"{sample.run.path.name} as it was: {real:.3f} steps/s and a mean lag of {mean}; "
        f"simulated {again.steps_per_s:.3f} and {again.lag_mean:.2f}",
        markup=False,
    )


if __name__ == "__main__":
    sys.exit(main())
