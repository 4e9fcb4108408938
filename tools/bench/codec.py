"""The wire codec on 2,048-token trajectories, beside a bare copy of the same bytes and msgpack lists."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial

import msgpack
import numpy as np

from common.codec import decode, encode
from common.wire import Trajectories
from tools.bench.harness import Row, interleave, rate

TOKENS = 2048
PROMPT = 256
KINDS = {Trajectories.TAG: Trajectories}


def message(top_k: int, batch: int) -> Trajectories:
    """``batch`` trajectories of 2,048 tokens with ``top_k`` alternatives a token."""
    random = np.random.default_rng(0)
    count = TOKENS * batch
    trainable = np.tile(np.arange(TOKENS) >= PROMPT, batch)
    return Trajectories(
        run_id="bench",
        channel_names=["correct"],
        groups=np.arange(batch, dtype=np.int64),
        siblings=np.zeros(batch, np.int32),
        rewards=np.ones(batch, np.float32),
        channels=np.ones((batch, 1), np.float32),
        finish=np.zeros(batch, np.uint8),
        cu_seqlens=np.arange(0, count + 1, TOKENS, dtype=np.int32),
        token_ids=random.integers(0, 150_000, count).astype(np.int32),
        trainable=trainable.astype(np.uint8),
        log_q=np.where(trainable, -random.exponential(1.0, count), 0.0).astype(np.float32),
        versions=np.where(trainable, 3, -1).astype(np.int32),
        topk_ids=random.integers(0, 150_000, (count, top_k)).astype(np.int32),
        topk_log_q=-random.exponential(1.0, (count, top_k)).astype(np.float32),
    )


def run(reps: int) -> list[Row]:
    """Trajectories/s through encode and decode, lean and with top-20, alone and eight at once."""
    rows = []
    for label, top_k, batch in (
        ("lean", 0, 1),
        ("lean, 8 a message", 0, 8),
        ("top-20", 20, 1),
        ("top-20, 8 a message", 20, 8),
    ):
        rows += _compare(label, message(top_k, batch), batch, reps)
    return rows


def _compare(label: str, sent: Trajectories, batch: int, reps: int) -> list[Row]:
    arrays = [value for f in fields(sent) if isinstance(value := getattr(sent, f.name), np.ndarray)]
    payload = b"".join(array.tobytes() for array in arrays)

    def through_lists() -> object:
        packed = msgpack.packb([array.tolist() for array in arrays])
        received = msgpack.unpackb(packed)
        return [np.asarray(values, array.dtype) for values, array in zip(received, arrays, strict=True)]

    def over_the_wire() -> object:  # what the socket would take and hand over: bytes
        return decode([bytes(frame) for frame in encode(sent)], KINDS)

    work: dict[str, Callable[[], object]] = {
        "copy": lambda: bytearray(payload),
        "lists": through_lists,
        "codec": over_the_wire,
    }
    speed = interleave({name: partial(rate, f, batch) for name, f in work.items()}, reps)
    name = f"{label} ({len(payload) / batch / 1e3:.1f} kB each)"
    yardsticks = (("bare copy of the bytes", "copy"), ("msgpack lists", "lists"))
    return [Row("codec", name, speed["codec"], "traj/s", text, speed[key], reps) for text, key in yardsticks]
