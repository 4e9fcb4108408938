"""What messages have in common: names of array types, what fields may say, and how they are checked."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError

FINISH_REASONS = ("stop", "length")
NEVER = (1 << 31) - 1  # a version that no policy has
EXPERT = 3  # in ``trainable``: a token that a human exemplar brought: trained, but nobody sampled it
STARTS = 2  # in ``trainable``: a token before which a new segment begins, which what lies before is no context of
UNROUTED = (1 << 16) - 1  # in the whole row of a token whose experts nobody recorded
FAILED = "failed:"  # begins the reason of a Bye that is not an orderly one
MAX_TEXT = 256  # characters of a peer's name, host and the like

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]
UInt16 = NDArray[np.uint16]


class Unchecked:
    """Messages whose fields cannot contradict each other."""

    def check(self) -> None:
        """Nothing to check."""


class Routed:
    """Messages with an expert record; one that is made without has ``R = 0``."""

    token_ids: Int32
    experts: Any  # UInt16 [N, R], or None for none

    def __post_init__(self) -> None:
        """Fill in the empty record."""
        if self.experts is None:
            self.experts = np.zeros((len(self.token_ids), 0), np.uint16)


def check_offsets(tag: str, cu_seqlens: Int32 | Int64, total: int) -> None:
    """``cu_seqlens[B+1]`` must rise from 0 to ``total``."""
    if (
        len(cu_seqlens) == 0
        or cu_seqlens[0] != 0
        or cu_seqlens[-1] != total
        or (cu_seqlens[1:] < cu_seqlens[:-1]).any()
    ):
        raise DataError(f"{tag}: offsets must rise from 0 to {total}, got {cu_seqlens[:4]}...{cu_seqlens[-1:]}")


def check_lengths(tag: str, **lengths: int) -> None:
    """All the named lengths must be equal."""
    if len(set(lengths.values())) > 1:
        raise DataError(f"{tag}: " + ", ".join(f"{k} {v}" for k, v in lengths.items()) + " must be equally long")
