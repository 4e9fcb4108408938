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
BLOCK = 4096  # counters worked on together: their words and products stay in the L2 cache
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
STREAM_QUESTIONS = 4
STREAM_COINS = 0x40000000


def philox4x32(
    key: tuple[int, int], c0: Any, c1: Any, c2: Any, c3: Any
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]:
    """Four 32-bit words for each counter ``(c0, c1, c2, c3)``.

    Counters are integers or arrays that broadcast together; only their low 32 bits count.
    Returns four uint64 arrays of the broadcast shape, each value below 2**32.
    """
    counters = np.broadcast_arrays(*(np.asarray(c).astype(np.uint64) & _MASK for c in (c0, c1, c2, c3)))
    shape = counters[0].shape
    words = np.empty((4, counters[0].size), np.uint64)
    for word, counter in zip(words, counters, strict=True):
        word[:] = counter.reshape(-1)
    for start in range(0, words.shape[1], BLOCK):
        _rounds(words[:, start : start + BLOCK], key[0] & _WORD, key[1] & _WORD)
    return words[0].reshape(shape), words[1].reshape(shape), words[2].reshape(shape), words[3].reshape(shape)


def _rounds(words: NDArray[np.uint64], k0: int, k1: int) -> None:
    """All rounds on ``[4, n]`` in place."""
    x0, x1, x2, x3 = words
    product_0, product_1 = np.empty_like(x0), np.empty_like(x0)
    for _ in range(ROUNDS):
        np.multiply(x0, _MULTIPLIER_0, out=product_0)
        np.multiply(x2, _MULTIPLIER_1, out=product_1)
        np.right_shift(product_1, _SHIFT, out=x0)
        np.bitwise_xor(x0, x1, out=x0)
        np.bitwise_xor(x0, np.uint64(k0), out=x0)
        np.right_shift(product_0, _SHIFT, out=x2)
        np.bitwise_xor(x2, x3, out=x2)
        np.bitwise_xor(x2, np.uint64(k1), out=x2)
        np.bitwise_and(product_1, _MASK, out=x1)
        np.bitwise_and(product_0, _MASK, out=x3)
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD


def uniforms(seed: int, stream: int, c0: Any, c1: Any, c2: Any, c3: Any) -> NDArray[np.float64]:
    """Uniform float64 in the open interval (0, 1), 52 bits each, one per counter."""
    high, low, _, _ = philox4x32((seed, stream), c0, c1, c2, c3)
    bits = (high << np.uint64(20)) | (low >> np.uint64(12))
    return (bits.astype(np.float64) + 0.5) * 2.0**-52


def coin_uniforms(seed: int, stream: int, c0: Any, c1: Any, c2: Any, c3: Any) -> NDArray[np.float32]:
    """Four uniform float32 in (0, 1) for each counter, ``[..., 4]``: ``(k + 0.5) * 2**-23`` (algorithms.md 1.4).

    ``k`` has 23 bits. Every value is exact in float32 and none rounds to 1.0, so a token whose
    acceptance probability is 1 is always accepted.
    """
    words = philox4x32((seed, stream), c0, c1, c2, c3)
    uniforms = np.empty((*words[0].shape, len(words)), np.float32)
    for place, word in enumerate(words):
        uniforms[..., place] = word >> np.uint64(9)
    uniforms += np.float32(0.5)
    uniforms *= np.float32(2.0**-23)
    return uniforms
