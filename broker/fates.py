"""Which trajectories are trained and which dropped: by length, reward, lag and task (whose are not trained?)."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.batch import Batch
from broker.trajectories import Trajectory

TRAINED, DROPPED = "trained", "dropped"
STRATA = ("length", "reward", "lag", "task")


def length_bins(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Lengths are counted by powers of two: the bin of each of ``tokens[n]`` is the smallest one not below it."""
    _, bits = np.frexp(np.maximum(tokens - 1, 0))  # of a whole number below 2 ** 53: how many it takes
    return np.left_shift(np.int64(1), bits)


class Fates:
    """Counts of trajectories that a policy sampled; ``counts[stratum][fate][value]``.

    Lengths are bins of sampled tokens, rewards their signs, lags those of the oldest token at the step that trained it
    or would have been the next.
    """

    def __init__(self) -> None:
        self.counts = {name: {TRAINED: Counter[Any](), DROPPED: Counter[Any]()} for name in STRATA}

    def trained(self, batch: Batch) -> None:
        """``batch`` is."""
        members = [t for t in batch.members if t.sampled_tokens]
        self._add(TRAINED, members, batch.step)
        self.counts["task"][TRAINED].update(batch.count_tasks())

    def dropped(self, members: Sequence[Trajectory], task: str, next_step: int) -> None:
        """``members`` of one group of ``task`` never will be."""
        sampled = [t for t in members if t.sampled_tokens]
        self._add(DROPPED, sampled, next_step)
        self.counts["task"][DROPPED][task] += len(members)

    def _add(self, fate: str, members: Sequence[Trajectory], step: int) -> None:
        lengths = np.array([t.sampled_tokens for t in members], np.int64)
        self.counts["length"][fate].update(length_bins(lengths).tolist())
        self.counts["reward"][fate].update(np.sign([t.reward for t in members]).astype(int).tolist())
        self.counts["lag"][fate].update([max(0, step - t.oldest_version) for t in members])

    def status(self) -> dict[str, dict[str, dict[str, int]]]:
        """``{"trajectories_by_length": {"trained": {"8": 2, ...}, "dropped": ...}, ...}``, values in order."""
        return {
            f"trajectories_by_{name}": {
                fate: {str(value): n for value, n in sorted(found.items())} for fate, found in fates.items()
            }
            for name, fates in self.counts.items()
        }

    def state(self) -> list[list[Any]]:
        """What :meth:`restore` needs."""
        return [[name, fate, list(found.items())] for name, by in self.counts.items() for fate, found in by.items()]

    def restore(self, state: Sequence[Sequence[Any]]) -> None:
        """Take up where :meth:`state` was written."""
        for name, fate, items in state:
            self.counts[name][fate] = Counter(dict(items))
