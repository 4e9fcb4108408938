import math

import numpy as np
import pytest

from actor.rewards import LARGEST, combine
from common.errors import TaskError


def test_weighted_sum_of_named_channels() -> None:
    assert combine({"correct": 1.0, "format": 0.5, "unused": 9.0}, {"correct": 2.0, "format": -1.0}) == 1.5


def test_no_weight_at_all_is_refused() -> None:
    with pytest.raises(TaskError, match="empty"):
        combine({"correct": 1.0}, {})


def test_unknown_channel_names_the_nearest() -> None:
    with pytest.raises(TaskError, match=r"corect: the task has no such channel; did you mean 'correct'"):
        combine({"correct": 1.0, "score": 0.0}, {"corect": 1.0})


def test_what_float32_cannot_hold_is_not_finite_and_neither_is_such_a_sum() -> None:
    for channels in ({"correct": 1e39}, {"correct": 1.0, "other": -1e39}, {"correct": LARGEST}):
        with pytest.raises(TaskError, match=r"finite .*float32"):
            combine(channels, {"correct": 2.0})
    assert combine({"correct": LARGEST}, {"correct": -1.0}) == -LARGEST
    with np.errstate(over="ignore"):
        assert np.isfinite(np.float32(LARGEST)) and np.isinf(np.float32(1e39))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_and_weights_are_refused(bad: float) -> None:
    with pytest.raises(TaskError, match="finite"):
        combine({"correct": bad}, {"correct": 1.0})
    with pytest.raises(TaskError, match="finite"):
        combine({"correct": 1.0, "other": bad}, {"correct": 1.0})
    with pytest.raises(TaskError, match="finite"):
        combine({"correct": 1.0}, {"correct": bad})
