import math

import pytest

from actor.rewards import combine
from common.errors import TaskError


def test_weighted_sum_of_named_channels() -> None:
    assert combine({"correct": 1.0, "format": 0.5, "unused": 9.0}, {"correct": 2.0, "format": -1.0}) == 1.5


def test_no_weight_at_all_is_refused() -> None:
    with pytest.raises(TaskError, match="empty"):
        combine({"correct": 1.0}, {})


def test_unknown_channel_names_the_nearest() -> None:
    with pytest.raises(TaskError, match=r"corect: the task has no such channel; did you mean 'correct'"):
        combine({"correct": 1.0, "score": 0.0}, {"corect": 1.0})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_and_weights_are_refused(bad: float) -> None:
    with pytest.raises(TaskError, match="finite"):
        combine({"correct": bad}, {"correct": 1.0})
    with pytest.raises(TaskError, match="finite"):
        combine({"correct": 1.0, "other": bad}, {"correct": 1.0})
    with pytest.raises(TaskError, match="finite"):
        combine({"correct": 1.0}, {"correct": bad})
