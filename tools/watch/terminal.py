"""The screen in a real terminal, one frame for ``--once``, and plain lines where there is no terminal."""

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from functools import partial

from rich.console import Console, ConsoleDimensions
from rich.live import Live

from common.process import StopFlag
from tools.run_files import LOGS, METRICS, STATUS
from tools.watch.follow import Follower
from tools.watch.screen import Screen, phase_of, plain_line
from tools.watch.view import View

EVERY_S = 0.5  # the broker replaces status.json as often
KEY_S = 0.1  # how often keys and the terminal's size are looked at
LINE_S = 5.0  # between plain lines
SILENCE_S = 300.0  # without a new word: a run whose broker lives writes twice a second
QUIT = "qQ\x03\x04"
KEYS = "q quits"

EXIT_OK, EXIT_SILENT, EXIT_NOTHING = 0, 1, 2


def watch_live(follower: Follower, console: Console, stop: StopFlag) -> int:
    """Full screen until ``q``, Ctrl-C or SIGTERM."""
    with keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        while not stop.is_set:
            view, size = follower.look(), console.size
            live.update(Screen(view, follower.history, size.height, KEYS, filling=True), refresh=True)
            disturbed = partial(_disturbed, stop, console, size)
            if _rest(EVERY_S if follower.caught_up else 0.0, pressed, disturbed):
                break
    return EXIT_OK


def _disturbed(stop: StopFlag, console: Console, size: ConsoleDimensions) -> bool:
    return stop.is_set or console.size != size


def _rest(seconds: float, pressed: "Pressed", disturbed: Callable[[], bool]) -> bool:
    """Wait, unless disturbed; whether somebody asked to quit."""
    until = time.monotonic() + seconds
    while not pressed(KEY_S):
        if disturbed() or time.monotonic() >= until:
            return False
    return True


def watch_lines(follower: Follower, console: Console, stop: StopFlag, silence_s: float = SILENCE_S) -> int:
    """A line every few seconds until the run is over; 1 once nobody has written for ``silence_s``."""
    nobody, sign, heard = Pressed(None), follower.sign, time.monotonic()
    while not stop.is_set:
        view = read_all(follower)
        console.print(plain_line(view), markup=False, soft_wrap=True)
        if view.over:
            break
        if follower.sign != sign:
            sign, heard = follower.sign, time.monotonic()
        left = heard + silence_s - time.monotonic()
        if left <= 0:
            console.print(_given_up(follower, silence_s), style="red", markup=False, soft_wrap=True)
            return EXIT_SILENT
        _rest(min(LINE_S, left), nobody, lambda: stop.is_set)
    return EXIT_OK


def _given_up(follower: Follower, silence_s: float) -> str:
    return (
        f"given up: nobody wrote {STATUS} or {METRICS} in {follower.run_dir} for {silence_s:g} s (--silence-s), so the "
        f"run was killed or its broker hangs; {follower.run_dir / LOGS} tells more"
    )


def show_once(follower: Follower, console: Console) -> int:
    """One frame of everything there is; 2 where there is nothing yet."""
    view = read_all(follower)
    if view.phase == "nothing":
        console.print(phase_of(view), soft_wrap=True)
        return EXIT_NOTHING
    console.print(Screen(view, follower.history))
    return EXIT_OK


def read_all(follower: Follower) -> View:
    """A look that does not end before everything is read."""
    view = follower.look()
    while not follower.caught_up:
        view = follower.look()
    return view


@contextlib.contextmanager
def keys() -> Iterator["Pressed"]:
    """Single keys from the terminal, without echo; nothing where standard input is none."""
    if not sys.stdin.isatty():
        yield Pressed(None)
        return
    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)
    tty.setcbreak(number)
    try:
        yield Pressed(number)
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)


class Pressed:
    """Whether somebody asked to quit."""

    def __init__(self, number: int | None) -> None:
        self._number = number

    def __call__(self, seconds: float) -> bool:
        """Wait for at most ``seconds``."""
        if self._number is None:
            time.sleep(seconds)
            return False
        if not select.select([self._number], [], [], seconds)[0]:
            return False
        read = os.read(self._number, 64)
        if not read:  # the terminal is gone
            return True
        return any(chr(byte) in QUIT for byte in read)
