"""A benchmark's own launch of the real loop, and what its step lines say."""

import subprocess
import sys
from pathlib import Path

from common.config import RunConfig, to_yaml
from common.errors import EngineError
from tools.run_files import Record, last_lines, of_kind, read_metrics

LAUNCH_LIMIT_S = 300.0
FIRST_STEP = 3  # the pipeline has filled by then


def launch(config: RunConfig, folder: Path, limit_s: float = LAUNCH_LIMIT_S) -> list[Record]:
    """Run ``config`` once with ``tools.launch``; its step lines. Raises :class:`EngineError` if it fails or is late."""
    file, log = folder / "run.yaml", folder / "launch.log"
    file.write_text(to_yaml(config))
    with log.open("wb") as output:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "tools.launch", str(file)],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        try:
            code = launcher.wait(limit_s)
        except subprocess.TimeoutExpired as late:
            raise EngineError(f"the loop was not done after {limit_s:.0f} s:\n{_tail(log)}") from late
        finally:
            if launcher.poll() is None:
                launcher.terminate()
                launcher.wait()
    if code != 0:
        raise EngineError(f"tools.launch ended with exit code {code}:\n{_tail(log)}")
    return of_kind(read_metrics(config.run.path), "step")


def _tail(log: Path) -> str:
    return "\n".join(last_lines(log, 25))


def loop_figures(steps: list[Record], tokens_per_step: int) -> tuple[float, dict[str, float]]:
    """Speed and shares between ``FIRST_STEP`` and the last step; a share is a ``seconds_*`` key over wall time."""
    steady = [step for step in steps if step["step"] >= FIRST_STEP]
    if len(steady) < 2:
        raise EngineError(f"{len(steps)} steps recorded, {FIRST_STEP + 1} are needed to measure a speed")
    wall_s = steady[-1]["time_s"] - steady[0]["time_s"]
    rooms = sorted({key for step in steady for key in step if key.startswith("seconds_")})
    spent = {room: sum(step.get(room) or 0.0 for step in steady[1:]) for room in rooms}
    shares = {room.removeprefix("seconds_"): seconds / wall_s for room, seconds in spent.items()}
    return tokens_per_step * (len(steady) - 1) / wall_s, shares
