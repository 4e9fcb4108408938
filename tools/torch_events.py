"""torch.profiler's records of chosen steps (learner.profiling), drawn below the learner's own tracks.

::

    trace/<process>.step<N>.torch.json.gz -> its clock against ours by the regions named after it
        -> a track for each of its threads and GPU streams, with its own arrows from launch to kernel
"""

import gzip
import json
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.trace import TORCH, TORCH_CLOCK, TRACE
from tools.clocks import ClockMap
from tools.perfetto import LANES, TRACKS, Drawing, Place, Window
from tools.timelines import Timelines

FIRST = LANES * (len(TRACKS) + 2)  # track number of the first thread
GPU = ("kernel", "gpu_memcpy", "gpu_memset", "gpu_user_annotation")
Source = tuple[str, str]  # process and thread, or device and stream, as the profiler names them


@dataclass
class _Op:
    start: int
    end: int
    name: str
    category: str
    args: dict[str, Any]


@dataclass
class _Record:
    """One file's events in nanoseconds of its process's own clock."""

    ops: dict[Source, list[_Op]] = field(default_factory=lambda: defaultdict(list))
    arrows: dict[tuple[str, Any], dict[str, tuple[int, Source]]] = field(default_factory=lambda: defaultdict(dict))
    gpu: set[Source] = field(default_factory=set)


def draw_torch(run_dir: Path, drawing: Drawing, timelines: Timelines, window: Window) -> tuple[int, list[str]]:
    """Every record of the run; returns how many operations were drawn, and what could not be read."""
    count, notes = 0, []
    tids: dict[tuple[int, Source], int] = {}
    for path in sorted((run_dir / TRACE).glob(f"*{TORCH}")):
        process = path.name.removesuffix(TORCH).rpartition(".step")[0]
        try:
            record = _read(path)
        except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError, AttributeError) as error:
            notes.append(f"{path.name}: cannot be read ({type(error).__name__}: {error})")
            continue
        lives = [life for life in timelines.lives if life.process == process]
        moment = min((op.start for ops in record.ops.values() for op in ops), default=0)
        clock = next((life.clock for life in reversed(lives) if life.header["clock_ns"] <= moment), None)
        if clock is None or process not in drawing.pids:
            notes.append(f"{path.name}: {process} has no timeline of that time, so its clock is not known")
            continue
        count += _draw(record, drawing, drawing.pids[process], tids, clock, window)
    return count, notes


def _draw(
    record: _Record,
    drawing: Drawing,
    pid: int,
    tids: dict[tuple[int, Source], int],
    clock: ClockMap,
    window: Window,
) -> int:
    count = 0
    for source, ops in sorted(record.ops.items(), key=lambda item: (item[0] in record.gpu, item[0])):
        tid = tids.get((pid, source))
        if tid is None:
            tid = tids[pid, source] = FIRST + len(tids)
            title = f"GPU {source[0]} stream {source[1]}" if source in record.gpu else f"torch thread {source[1]}"
            drawing.thread(pid, tid, title)
        for op in _nested(ops):
            start, end = clock(op.start), clock(op.end)
            if window.has(start, end):
                drawing.slice(Place(pid, tid, start, max(start, end)), op.name, op.category, op.args)
                count += 1

    def _is_drawn(at: int, source: Source) -> bool:
        return (pid, source) in tids and window.has(clock(at), clock(at))

    for (category, _), ends in record.arrows.items():
        if set(ends) == {"s", "f"} and all(_is_drawn(*end) for end in ends.values()):
            flow = drawing.flow()
            for phase, (at, source) in sorted(ends.items(), reverse=True):
                place = Place(pid, tids[pid, source], clock(at), clock(at))
                drawing.arrow(phase, flow, place, clock(at), category, category)
    return count


def _nested(ops: list[_Op]) -> list[_Op]:
    """By beginning, each cut where the one around it ends: rounding makes some longer by a few nanoseconds."""
    ops.sort(key=lambda op: (op.start, -op.end))
    around: list[_Op] = []
    for op in ops:
        while around and around[-1].end <= op.start:
            around.pop()
        if around:
            op.end = min(op.end, around[-1].end)
        around.append(op)
    return ops


def _read(path: Path) -> _Record:
    """Raises what reading a foreign or torn file raises; ValueError for one without the clock."""
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    shift = _shift([event for event in events if str(event.get("name")).startswith(f"{TORCH_CLOCK} ")])
    record = _Record()
    for event in events:
        source = (str(event.get("pid")), str(event.get("tid")))
        category = str(event.get("cat", ""))
        match event.get("ph"):
            case "X" if category != "Trace" and not str(event["name"]).startswith(TORCH_CLOCK):
                start = round(event["ts"] * 1000) + shift
                end = start + round(event["dur"] * 1000)
                record.ops[source].append(_Op(start, end, event["name"], category, _few(event.get("args", {}))))
                if category in GPU:
                    record.gpu.add(source)
            case "s" | "f" as phase:
                record.arrows[category, event["id"]][phase] = round(event["ts"] * 1000) + shift, source
    return record


def _few(args: dict[str, Any]) -> dict[str, Any]:
    """What a person would look at."""
    return {key: value for key, value in args.items() if key in ("Input Dims", "grid", "block", "bytes", "correlation")}


def _shift(marks: Sequence[dict[str, Any]]) -> int:
    """What takes the profiler's clock to the timeline's, nanoseconds.

    Each mark's name was made before it began, so the one that was named latest before it is the closest.
    """
    if not marks:
        raise ValueError(f"no regions named {TORCH_CLOCK}, so its clock is not known")
    return max(int(mark["name"].split(" ")[1]) - round(float(mark["ts"]) * 1000) for mark in marks)
