"""``python -m tools.follow RUN_DIR [--wandb PROJECT]``: for runs whose processes were started one by one."""

import argparse
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from common.errors import CroupierError
from common.process import StopFlag
from tools.console import make_console, print_error
from tools.follow.follower import following
from tools.follow.sinks import TENSORBOARD, WANDB

POLL_S = 0.2


def main(arguments: Sequence[str] | None = None) -> int:
    """Follow until the run is over, or until Ctrl-C."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m tools.follow",
        description="A run's figures into TensorBoard and Weights & Biases.",
    )
    parser.add_argument("run_dir", type=Path, help="such as runs/quickstart")
    parser.add_argument("--wandb", default="", metavar="PROJECT", help="also into this project")
    parser.add_argument("--no-tensorboard", action="store_true", help="no event files")
    parser.add_argument("--once", action="store_true", help="take what is there and end")
    given = parser.parse_args(arguments)
    console, stop, event = make_console(), StopFlag().install(), threading.Event()
    try:
        with following(given.run_dir, not given.no_tensorboard, given.wandb) as follower:
            if not given.no_tensorboard:
                console.print(f"tensorboard --logdir {given.run_dir / TENSORBOARD}", soft_wrap=True)
            if given.wandb:
                console.print(f"wandb project {given.wandb}, in {given.run_dir / WANDB}", soft_wrap=True)
            if given.once:
                event.set()
            threading.Thread(target=_watch, args=(stop, event), daemon=True).start()
            follower.run(event)
    except CroupierError as error:
        print_error(console, error)
        return 2
    finally:
        event.set()
    return 0


def _watch(stop: StopFlag, event: threading.Event) -> None:
    while not stop.is_set and not event.wait(POLL_S):
        pass
    event.set()


if __name__ == "__main__":
    sys.exit(main())
