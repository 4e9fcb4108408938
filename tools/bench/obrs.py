"""Rejection arithmetic over one packed batch of 64 × 4,096 tokens, beside two plain numpy yardsticks."""

from collections.abc import Callable
from functools import partial

import numpy as np

from common.obrs import coins, log_acceptance, thin
from tools.bench.harness import Row, interleave, rate

SHAPE = (64, 4096)
TOKENS = SHAPE[0] * SHAPE[1]
WEIGHT_CAP = np.float32(2.0)


def run(reps: int) -> list[Row]:
    """Mtok/s of acceptance alone, of the whole decision, and of the coins."""
    random = np.random.default_rng(0)
    log_q = -random.exponential(1.0, TOKENS).astype(np.float32)
    log_p = np.minimum(log_q + random.normal(0, 0.1, TOKENS).astype(np.float32), np.float32(0))
    uniforms = random.uniform(1e-6, 1 - 1e-6, TOKENS).astype(np.float32)
    groups, siblings = np.arange(SHAPE[0], dtype=np.int64), np.zeros(SHAPE[0], np.int32)
    lengths = np.full(SHAPE[0], SHAPE[1], np.int64)

    def naive() -> object:
        return uniforms < np.minimum(1.0, np.exp(log_p) / (1.0 * np.exp(log_q)))

    def toss() -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        return coins(0, groups, siblings, lengths, 7)

    work: dict[str, Callable[[], object]] = {
        "plain": lambda: np.minimum(np.exp(log_p - log_q), WEIGHT_CAP),
        "naive": naive,
        "accept": lambda: np.log(uniforms) < log_acceptance(log_p, log_q, 0.0),
        "thin": lambda: thin(log_p, log_q, uniforms, 0.0),
        "coins": toss,
        "all": lambda: thin(log_p, log_q, toss(), 0.0),
    }
    speed = interleave({name: partial(rate, f, TOKENS / 1e6) for name, f in work.items()}, reps)
    yardsticks = [("plain numpy exp + clamp", speed["plain"]), ("naive OBRS, accept only", speed["naive"])]
    figures = [
        ("accept", "accept"),
        ("thin: checks, accept and log m", "thin"),
        ("coins (Philox)", "coins"),
        ("coins and thin", "all"),
    ]
    return [
        Row("obrs", label, speed[key], "Mtok/s", reference, value, reps)
        for label, key in figures
        for reference, value in yardsticks
    ]
