"""Policy versions and lag, defined once.

A policy version counts optimizer steps: version 0 is the starting model and training step ``s``
turns version ``s`` into ``s + 1``. ``lag(token) = step - version that sampled the token``, taken
when the token is trained, queue time included; a trajectory's lag is that of its oldest token.
"""

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError


def lag(step: int, version: int) -> int:
    """Lag, in versions, at training step ``step`` of a token that ``version`` sampled; 0 is on policy."""
    if version > step:
        raise DataError(f"version {version} is from the future of step {step}")
    return step - version


def spans_from_versions(versions: NDArray[np.int32]) -> NDArray[np.int32]:
    """Run-length encode ``versions[T]`` as rows ``(start, version)``, shape ``[S, 2]``."""
    if len(versions) == 0:
        return np.zeros((0, 2), np.int32)
    starts = np.flatnonzero(np.concatenate(([True], versions[1:] != versions[:-1])))
    return np.stack([starts, versions[starts]], axis=1).astype(np.int32)


def versions_from_spans(spans: NDArray[np.int32], length: int) -> NDArray[np.int32]:
    """The inverse of :func:`spans_from_versions`: one version per token, shape ``[length]``."""
    if len(spans) == 0:
        return np.zeros(0, np.int32)
    ends = np.append(spans[1:, 0], length)
    return np.repeat(spans[:, 1], ends - spans[:, 0]).astype(np.int32)
