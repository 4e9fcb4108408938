"""Log-probabilities at a vocabulary of 151,936: reading logits, and the way through the head.

One thread. Reading: everything the broker asks (log p, entropy, the 20 likeliest, p at 20 ids) beside
one pass over the same logits and beside log p and entropy alone as AReaL computes them. Through the
head, forward and backward: beside the whole matrix at once and beside checkpointed chunks.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from learner.device import keep_freed_memory
from learner.logprobs import Head, by_autograd, loss_through_head, score_logits
from tools.bench.harness import Row, interleave, rate

VOCAB = 151_936
ROWS, TOP = 512, 20  # of the reading part
TOKENS, WIDTH = 2048, 256  # of the head part
BASELINE_ROWS = 256  # tokens a chunk, as the usual chunked loss takes them
CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def run(reps: int) -> list[Row]:
    """Both parts."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    head = _head(max(1, reps // 3))
    keep_freed_memory()  # as the learner does; before, it would hide the head's peaks
    return [*_reading(reps), *head]


def _reading(reps: int) -> list[Row]:
    logits = torch.randn(ROWS, VOCAB) * 2.0
    targets, ids = torch.randint(VOCAB, (ROWS,)), torch.randint(VOCAB, (ROWS, TOP))
    base_2 = logits * math.log2(math.e)  # as the head hands them over
    heads = {compiled: Head(torch.empty(VOCAB, 0), compiled=compiled) for compiled in (False, True)}
    asked = torch.cat((targets[:, None], ids), dim=1)

    def ours(compiled: bool) -> Callable[[], float]:
        return lambda: rate(lambda: score_logits(base_2, asked, TOP, heads[compiled]), ROWS)

    def areal() -> None:  # log_softmax, gathered; entropy from both
        for part in logits.split(64):
            log_p = part.log_softmax(dim=-1)
            log_p.gather(1, targets[: len(part), None])
            (log_p.exp() * log_p).sum(dim=-1)

    def composed() -> None:
        for part in logits.split(64):
            log_p = part.log_softmax(dim=-1)
            log_p.topk(TOP, dim=-1)
            log_p.gather(1, ids[: len(part)])

    contestants: dict[str, Callable[[], float]] = {
        "log p + entropy + top-20 + 20 ids": ours(False),
        "the same, compiled": ours(True),
        "log p + entropy (AReaL's way)": lambda: rate(areal, ROWS),
        "log_softmax + topk + gather": lambda: rate(composed, ROWS),
        "one read pass": lambda: rate(lambda: logits.amax(dim=1), ROWS),
    }
    interleave(contestants, 1)
    found = interleave(contestants, reps)
    limit = found["one read pass"]
    return [Row("learner", f"logits: {k}", v, "tokens/s", "one read pass", limit, reps) for k, v in found.items()]


def _head(reps: int) -> list[Row]:
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weight = (torch.randn(VOCAB, WIDTH) * 0.05).requires_grad_()
    targets, gain = torch.randint(VOCAB, (TOKENS,)), torch.randn(TOKENS)

    def ours() -> Tensor:
        loss, _, _ = loss_through_head(
            hidden, Head(weight, chunk_mb=64.0), targets, by_autograd(lambda logp, part: (logp * gain[part]).sum())
        )
        return loss

    def naive() -> Tensor:
        log_p = (hidden @ weight.T).log_softmax(dim=-1)
        with torch.no_grad():
            (log_p.exp() * log_p).sum(dim=-1)
        return (log_p.gather(1, targets[:, None])[:, 0] * gain).sum()

    def chunked() -> Tensor:
        def one(h: Tensor, t: Tensor, g: Tensor) -> Tensor:
            log_p = (h @ weight.T).log_softmax(dim=-1)
            with torch.no_grad():
                (log_p.exp() * log_p).sum(dim=-1)
            return (log_p.gather(1, t[:, None])[:, 0] * g).sum()

        parts = zip(hidden.split(BASELINE_ROWS), targets.split(BASELINE_ROWS), gain.split(BASELINE_ROWS), strict=True)
        return torch.stack([checkpoint(one, *part, use_reentrant=False) for part in parts]).sum()

    ways = {"loss through the head": ours, "checkpointed chunks": chunked, "all logits at once": naive}
    peaks: dict[str, float] = {}

    def timed(name: str, way: Callable[[], Tensor]) -> float:
        hidden.grad = weight.grad = None
        before = reset_peak()
        start = time.perf_counter()
        way().backward()
        elapsed = time.perf_counter() - start
        peaks[name] = peak() - before
        return TOKENS / elapsed

    found = interleave({name: partial(timed, name, way) for name, way in ways.items()}, reps)
    reference = "all logits at once"
    rows = [Row("learner", f"head: {k}", v, "tokens/s", reference, found[reference], reps) for k, v in found.items()]
    return rows + [
        Row("learner", f"head, peak: {k}", v / 1e6, "MB", reference, peaks[reference] / 1e6, reps)
        for k, v in peaks.items()
    ]


def reset_peak() -> float:
    """Forget this process's peak of resident memory; returns what it holds now, bytes. Linux."""
    CLEAR.write_text("5")
    return _status("VmRSS")


def peak() -> float:
    """The peak since then, bytes."""
    return _status("VmHWM")


def _status(key: str) -> float:
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith(key))
    return float(line.split()[1]) * 1024
