"""``python -m tools.watch RUN_DIR [--web]``: a run while it goes, or as it ended.

A terminal shows a live screen, a pipe plain lines until the run is over, or until nobody has written for
``--silence-s`` (exit code 1); ``--once`` prints one frame and exits with 2 if there is nothing yet; ``--web``
serves a page.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from common.errors import ConfigError, CroupierError
from common.process import StopFlag
from tools.console import make_console, print_error
from tools.watch.follow import Follower
from tools.watch.terminal import SILENCE_S, show_once, watch_lines, watch_live


def main(arguments: list[str] | None = None) -> int:
    """Watch; returns the exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m tools.watch", description="Watch a run, live or as it ended."
    )
    parser.add_argument("run_dir", type=Path, help="the run's directory, such as runs/quickstart")
    parser.add_argument("others", type=Path, nargs="*", help=argparse.SUPPRESS)  # to be refused in words
    parser.add_argument("--once", action="store_true", help="print one frame and exit; 2 if there is nothing yet")
    parser.add_argument(
        "--silence-s",
        type=float,
        default=SILENCE_S,
        help="without a terminal: exit with 1 once nobody wrote for so long; inf waits for ever (%(default)g)",
    )
    parser.add_argument("--web", action="store_true", help="serve a page instead")
    parser.add_argument("--host", default="127.0.0.1", help="with --web: where to listen (this machine only)")
    parser.add_argument("--port", type=int, default=0, help="with --web: 0 for any that is free")
    given = parser.parse_args(arguments)
    console, stop = make_console(), StopFlag().install()
    follower = Follower(given.run_dir)
    try:
        if given.others:
            raise ConfigError(
                f"one run is watched at a time, not {1 + len(given.others)}: give {given.others[0]} a terminal "
                "of its own, or see them all in TensorBoard (tensorboard --logdir runs)"
            )
        if not given.silence_s > 0:
            raise ConfigError(f"--silence-s {given.silence_s:g}: must be a number of seconds above 0, or inf")
        if given.web and given.once:
            raise ConfigError("--once --web: a page is served until Ctrl-C; give one of the two")
        if given.web:
            from tools.watch.web import serve  # a screen needs no server

            return serve(follower, given.host, given.port, console, stop)
        if given.once:
            return show_once(follower, console)
        watch = watch_live if console.is_terminal else partial(watch_lines, silence_s=given.silence_s)
        return watch(follower, console, stop)
    except CroupierError as error:
        print_error(console, error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
