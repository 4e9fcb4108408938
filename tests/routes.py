"""Expert records of made-up models."""

import numpy as np


def routes(rng: np.random.Generator, n: int, layers: int, experts: int, per_token: int) -> np.ndarray:
    """``[n, layers * per_token]``: of each layer different experts."""
    shuffled = rng.random((n, layers, experts)).argsort(axis=2)
    return shuffled[:, :, :per_token].reshape(n, layers * per_token).astype(np.uint16)
