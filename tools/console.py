"""Where the tools print for people: a terminal at its own width, a file or a pipe at a fixed one."""

import os
import sys

from rich.console import Console

from common.errors import CroupierError

PIPE_COLUMNS = 120


def make_console() -> Console:
    """One that takes text as it is, colours no numbers and wraps no table for want of a terminal."""
    console = Console(highlight=False, markup=False, emoji=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, emoji=False, width=PIPE_COLUMNS)


class LastingConsole(Console):
    """One whose reader may leave: rich would end the process when a pipe is closed."""

    def on_broken_pipe(self) -> None:
        """Say nothing more: what Python would still flush at its end, and exit with 120 for, goes nowhere."""
        self.quiet = True
        if self.file is sys.stdout:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


def print_error(console: Console, error: CroupierError) -> None:
    """What a user can mend, in one line."""
    console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
