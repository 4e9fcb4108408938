"""The learner's figures: MoE layer, whole model, log-probabilities, weight publishing."""

from tools.bench import logprob, model, moe, publish
from tools.bench.harness import Row

PARTS = (publish, logprob, model, moe)  # in this order: all after the head's peaks keep freed memory, which hides those


def run(reps: int) -> list[Row]:
    """All parts, one after the other; each part's contestants take turns."""
    return [row for part in PARTS for row in part.run(reps)]
