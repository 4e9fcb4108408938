"""Philox4x32-10: the counter-based generator behind every coin and every sampled token.

A number depends on its key and counter alone, so coins replay bit for bit and do not depend on
arrival order, sharding or batch layout (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011; known answers of its reference implementation are in the tests).

The 64-bit key is ``(seed, stream)``: the seed of the run and what the number is for.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDS = 10
_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_WORD = 0xFFFFFFFF
_MASK = np.uint64(_WORD)
_SHIFT = np.uint64(32)

# Streams: what a number is for. Coins add the scoring version to theirs (see common.obrs).
STREAM_SAMPLING = 1
STREAM_EVALUATION = 2
STREAM_PROMPTS = 3
STREAM_COINS = 0x40000000


def philox4x32(
    key: tuple[int, int], c0: Any, c1: Any, c2: Any, c3: Any
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]:
    """Four 32-bit words for each counter ``(c0, c1, c2, c3)``.

    Counters are integers or arrays that broadcast together; only their low 32 bits count.
    Returns four uint64 arrays of the broadcast shape, each value below 2**32.
    """
    words = np.broadcast_arrays(*(np.asarray(c).astype(np.uint64) & _MASK for c in (c0, c1, c2, c3)))
    x0, x1, x2, x3 = words
    k0, k1 = key[0] & _WORD, key[1] & _WORD
    for _ in range(ROUNDS):
        product_0 = _MULTIPLIER_0 * x0
        product_1 = _MULTIPLIER_1 * x2
        x0, x1, x2, x3 = (
            (product_1 >> _SHIFT) ^ x1 ^ np.uint64(k0),
            product_1 & _MASK,
            (product_0 >> _SHIFT) ^ x3 ^ np.uint64(k1),
            product_0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    return x0, x1, x2, x3


def uniforms(seed: int, stream: int, c0: Any, c1: Any, c2: Any, c3: Any) -> NDArray[np.float64]:
    """Uniform float64 in the open interval (0, 1), 52 bits each, one per counter."""
    high, low, _, _ = philox4x32((seed, stream), c0, c1, c2, c3)
    bits = (high << np.uint64(20)) | (low >> np.uint64(12))
    return (bits.astype(np.float64) + 0.5) * 2.0**-52


def coin_uniforms(seed: int, stream: int, c0: Any, c1: Any, c2: Any, c3: Any) -> NDArray[np.float32]:
    """Uniform float32 in (0, 1), 23 bits each: ``(k + 0.5) * 2**-23`` (algorithms.md 1.4).

    Every value is exact in float32 and none rounds to 1.0, so a token whose acceptance
    probability is 1 is always accepted.
    """
    word, _, _, _ = philox4x32((seed, stream), c0, c1, c2, c3)
    bits = (word >> np.uint64(9)).astype(np.float32)
    return (bits + np.float32(0.5)) * np.float32(2.0**-23)
