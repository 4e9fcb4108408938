"""``python -m tools.trace RUN_DIR [--out FILE] [--from-step A --to-step B]``: a whole run as one trace for Perfetto.

::

    RUN_DIR/trace/* -> one clock -> tracks, curves, arrows -> RUN_DIR/trace.json.gz -> ui.perfetto.dev

Exit codes: 0 written, 2 there was nothing to draw, or nowhere to write.
"""

import argparse
import gzip
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import orjson
from rich.console import Console
from rich.table import Table

from common.errors import CroupierError
from tools.clocks import DRIFT
from tools.console import make_console, print_error
from tools.flows import draw_flows
from tools.outputs import check_folder, writing
from tools.perfetto import Drawing, Window, draw
from tools.run_files import check_run_dir
from tools.timelines import Timelines, read_timelines
from tools.torch_events import draw_torch

OUT = "trace.json.gz"  # within the run directory
NOTHING = 2
COMPRESSION = 5  # of gzip: half the time of the default for a twentieth more bytes


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m tools.trace", description="One trace of a run, for Perfetto."
    )
    parser.add_argument("run_dir", type=Path, help="the run's directory")
    parser.add_argument("--out", type=Path, help=f"the file; compressed if it ends in .gz (default: RUN_DIR/{OUT})")
    parser.add_argument("--from-step", type=int, help="leave out what was before this training step")
    parser.add_argument("--to-step", type=int, help="leave out what was after this one")
    given = parser.parse_args(arguments)
    console = make_console()
    out = given.out or given.run_dir / OUT
    try:
        check_run_dir(given.run_dir)
        timelines = read_timelines(given.run_dir)
        window = choose(timelines, given.from_step, given.to_step)
        if window is None:
            for note in timelines.notes:
                console.print(note, markup=False, soft_wrap=True)
            steps = "" if given.from_step is None and given.to_step is None else " of these steps"
            console.print(f"{given.run_dir}: nothing{steps} to draw", style="red", markup=False, soft_wrap=True)
            return NOTHING
        check_folder(out)
        _draw_and_tell(given.run_dir, out, timelines, window, console)
    except CroupierError as error:
        print_error(console, error)
        return NOTHING
    return 0


def _draw_and_tell(run_dir: Path, out: Path, timelines: Timelines, window: Window, console: Console) -> None:
    """Everything within ``window`` into ``out``. Raises :class:`ConfigError` where that cannot be written."""
    drawing, drawn = draw(timelines, window)
    flows = draw_flows(drawing, drawn)
    operations, notes = draw_torch(run_dir, drawing, timelines, window)
    with writing(out, "--out FILE elsewhere"):
        write(out, drawing, timelines)
    _tell(console, timelines, [*timelines.notes, *notes])
    what = f"{len(drawing.events):,} events, {flows:,} trajectories followed"
    what += f", {operations:,} operations of torch.profiler" if operations else ""
    console.print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {what}", markup=False, soft_wrap=True)
    console.print("Open https://ui.perfetto.dev and drop the file on it; it stays on your machine.")


def choose(timelines: Timelines, first: int | None, last: int | None) -> Window | None:
    """What is to be drawn: all, or from the learner's wait for step ``first`` to its last word on ``last``.

    None where there is nothing.
    """
    lives = [life for life in timelines.lives if life.slices or life.spans]
    if not lives:
        return None
    start, end = min(life.start for life in lives), max(life.end for life in lives)
    if first is None and last is None:
        return Window(start, end)
    low, high = first if first is not None else 0, last if last is not None else 1 << 60
    wanted = range(low, high + 1)
    moments = [(s.start, s.end) for life in timelines.of("learner") for s in life.slices if s.step in wanted]
    assembled: set[int] = set()
    for life in timelines.of("broker"):
        for one in life.instants:
            if one.name == "step" and one.args.get("step") in wanted:
                moments.append((one.at, one.at))
                assembled.update(one.args.get("groups", ()))
    if not moments:
        return None
    return Window(
        min(begin for begin, _ in moments) if first is not None else start,
        max(until for _, until in moments) if last is not None else end,
        frozenset(assembled),
    )


def write(out: Path, drawing: Drawing, timelines: Timelines) -> None:
    """One JSON object, an event a line."""
    facts = {
        "run": sorted({str(life.header.get("host")) for life in timelines.lives}),
        "base_ns": drawing.base,
        "notes": timelines.notes,
    }
    with _open(out) as file:
        file.write(b'{"displayTimeUnit":"ms","otherData":' + orjson.dumps(facts) + b',"traceEvents":[\n')
        file.writelines(_lines(drawing.events))
        file.write(b"\n]}\n")


def _lines(events: Iterable[dict[str, Any]]) -> Iterable[bytes]:
    before = b""
    for event in events:
        yield before + orjson.dumps(event, default=str, option=orjson.OPT_NON_STR_KEYS)
        before = b",\n"


def _open(out: Path) -> IO[bytes]:
    return gzip.open(out, "wb", COMPRESSION) if out.suffix == ".gz" else out.open("wb")  # type: ignore[return-value]


def _tell(console: Console, timelines: Timelines, notes: list[str]) -> None:
    """Whose clock was how far off, and what could not be read."""
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    table.add_column("process", header_style="dim")
    for title in ("seconds", "clock off by", "known to within", "ended"):
        table.add_column(title, header_style="dim", justify="left" if title == "ended" else "right")
    for life in timelines.lives:
        off, error = f"{life.offset_ns / 1e6:+,.2f} ms", "not measured"
        if life.delay_ns is not None:
            error = f"{life.delay_ns / 2e6:.2f} ms"
        elif life.role == "broker":
            off, error = "the run's clock", ""
        table.add_row(
            life.process,
            f"{(life.end - life.start) / 1e9:.1f}",
            off,
            error,
            life.ended or "cut short, or still running",
        )
    console.print(table)
    if any(life.clock.bends for life in timelines.lives):
        console.print(f"Clocks that drifted (up to {DRIFT * 1e6:.0f} ppm) are followed from exchange to exchange.")
    for note in notes:
        console.print(note, style="yellow", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
