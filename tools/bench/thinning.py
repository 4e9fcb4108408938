"""What rejection costs in the quick start: its share of the loop's wall-clock.

The broker's part (coins, accept, log m, receipt, audit) is ``seconds_decide`` of each step's line;
the policy replica's scoring, in a process of its own, is ``seconds_score``.
"""

import tempfile
from pathlib import Path

from common.config import load
from common.process import free_port
from tools.bench.harness import Row
from tools.bench.launching import launch, loop_figures

STEPS = 60
BAR = 0.03
MODEL = "models/sort6"  # made by tools.launch if it is not there


def run(reps: int = 1) -> list[Row]:
    """Launch the quick start for STEPS steps; rejection's shares beside the bar, which is for the broker's part."""
    with tempfile.TemporaryDirectory(dir=".") as place:
        overrides = [f"run.dir={place}", f"run.steps={STEPS}", "evaluation.prompts=0"]
        config = load("configs/quickstart.yaml", [*overrides, f"broker.address=tcp://127.0.0.1:{free_port()}"])
        _, shares = loop_figures(launch(config, Path(place)), 1)
    said = "share of the quick start's wall-clock"
    return [
        Row("broker", f"thinning: {said}", shares["decide"], "of wall time", "bar", BAR, 1),
        Row("broker", f"scoring by the replica: {said}", shares["score"], "of wall time", "whole loop", 1.0, 1),
    ]
