"""torch.profiler's own record of chosen training steps (``trace.torch_steps``), for tools.trace to merge.

The profiler's clock is not the timeline's. So every record begins with a few empty regions that are named after
the timeline's clock: ``croupier.clock 70675008310666``.
"""

import contextlib
import logging
from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from common.config import RunConfig
from common.trace import TORCH, TORCH_CLOCK, TRACE, Tracer

MARKS = 5  # the first ones are slow

log = logging.getLogger("learner")


@contextlib.contextmanager
def profiled(config: RunConfig, tracer: Tracer, step: int, device: torch.device) -> Iterator[None]:
    """Record what is done within, if ``step`` is one that was asked for, as ``trace/<process>.step<N>.torch.json.gz``.

    A profiler that cannot work here is a warning: the run goes on.
    """
    if step not in config.trace.torch_steps:
        yield
        return
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    record = profile(activities=activities)
    try:
        record.start()
    except RuntimeError as error:
        log.warning("step %d is not recorded by torch.profiler: %s", step, error)
        yield
        return
    try:
        for _ in range(MARKS):
            with record_function(f"{TORCH_CLOCK} {tracer.now()}"):
                pass
        yield
    finally:
        directory = config.run.path / TRACE
        with tracer.within("profile", step):
            try:
                record.stop()
                directory.mkdir(parents=True, exist_ok=True)
                record.export_chrome_trace(str(directory / f"{tracer.process}.step{step}{TORCH}"))
            except (OSError, RuntimeError) as error:  # a step that is trained is worth more than its record
                log.warning("step %d: what torch.profiler recorded is lost: %s", step, error)
