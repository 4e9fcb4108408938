"""Where a run's time went, what bounds it, and one recommendation.

::

    python -m tools.profile RUN_DIR
    python -m tools.profile RUN_DIR --json            everything, for programs
    python -m tools.profile RUN_DIR --skip-s 60       leave out the first minute instead of the first steps
    python -m tools.profile RUN_DIR --bounds          quicker: without the simulator
    python -m tools.profile RUN_DIR --picture bars.png

Exit codes: 0 judged, 2 there was nothing to judge, or nowhere to write.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import ConfigError, CroupierError
from tools.checked import checked
from tools.console import make_console, print_error
from tools.outputs import PICTURES, check_output, writing
from tools.profile.picture import draw
from tools.profile.simulated import simulated
from tools.profile.verdict import verdict
from tools.profile.words import print_verdict
from tools.run_files import check_run_dir
from tools.runs import print_notes, read_run

NOTHING = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m tools.profile", description="Where a run's time went."
    )
    parser.add_argument("run_dir", type=Path, help="such as runs/quickstart; it may still be written")
    parser.add_argument("--json", action="store_true", help="everything as one object")
    parser.add_argument("--skip-s", type=float, help="seconds to leave out at the beginning")
    parser.add_argument("--bounds", action="store_true", help="do not ask the simulator: quicker, but only bounds")
    parser.add_argument("--picture", type=Path, help="write the bars as .png or .svg too")
    given = parser.parse_args(arguments)
    console = make_console()
    try:
        if given.skip_s is not None and not 0 <= given.skip_s < math.inf:
            raise ConfigError(f"--skip-s {given.skip_s:g}: must be a finite number of seconds, 0 or more")
        if given.picture is not None:
            check_output(given.picture, PICTURES)
        check_run_dir(given.run_dir)
        run = checked(read_run(given.run_dir))
        found = verdict(run, given.skip_s, None if given.bounds else simulated)
        if given.json:
            sys.stdout.write(json.dumps(found.as_dict(), indent=2) + "\n")
        else:
            print_notes(console, found.notes)
            print_verdict(console, found)
        if given.picture is not None:
            with writing(given.picture, "name a file elsewhere"):
                draw(found, given.picture)
    except CroupierError as error:
        print_error(console, error)
        return NOTHING
    return 0 if found.seconds else NOTHING


if __name__ == "__main__":
    sys.exit(main())
