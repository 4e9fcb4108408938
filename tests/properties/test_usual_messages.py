"""Messages of one group with which nothing is wrong are taken at once, to the same effect as one by one."""

from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.groups import GroupBook
from broker.pipeline import Pipeline
from broker.recorder import Recorder
from common import wire
from common.codec import decode, encode
from tests.unit.test_pipeline import G, config, trajectories

BAD = ("", "", "", "nan", "stale", "long")
MESSAGES = st.lists(
    st.tuples(
        st.integers(0, 3),  # group; nobody was granted the last
        st.lists(st.integers(-1, G), min_size=1, max_size=G + 1),
        st.sampled_from("aaaab"),
        st.sampled_from(BAD),
        st.integers(-1, G - 1),  # a sibling that fails after it
    ),
    max_size=8,
)


def sent(group: int, siblings: list[int], wrong: str) -> wire.Trajectories:
    """As it arrives."""
    message = trajectories(group, 1, siblings, seed=group)
    if wrong == "nan":
        message.log_q[-1] = np.nan
    elif wrong == "stale":
        message.versions[message.versions >= 0] = 0
    elif wrong == "long":
        n = 5000
        for name in ("token_ids", "trainable", "log_q", "versions"):
            array = getattr(message, name)
            setattr(message, name, np.concatenate([array, np.repeat(array[-1:], n)]))
        for name in ("topk_ids", "topk_log_q", "experts"):
            setattr(message, name, np.zeros((len(message.token_ids), 0), getattr(message, name).dtype))
        message.cu_seqlens[-1] += n
    found: wire.Trajectories = decode([bytes(f) for f in encode(message)], wire.TO_BROKER)
    return found


def live(messages: list[tuple[int, list[int], str, str, int]]) -> list[object]:
    """All that is said and kept of a life."""
    pipeline = Pipeline(config(), 16)
    recorder = Recorder(pipeline, None, dict)
    recorder.begin(0)
    recorder.grant("a", 3, 1)
    said: list[object] = []
    for group, siblings, actor, wrong, failing in messages:
        said.append(recorder.admit(sent(group, siblings, wrong), actor, 1).reasons)
        if failing >= 0:
            recorder.failed(group, failing, "environment")
    return [*said, pipeline.state(), pipeline.turned_away, pipeline.setbacks, pipeline.book.nbytes, pipeline.held()]


@settings(max_examples=200)
@given(MESSAGES)
def test_the_short_way_and_the_long_way_end_in_the_same_place(messages):
    short = live(messages)
    with mock.patch.object(GroupBook, "awaits_all", lambda *_: False):
        assert live(messages) == short


def test_a_whole_group_takes_the_short_way():
    with (
        mock.patch.object(GroupBook, "add", side_effect=AssertionError),
        mock.patch.object(GroupBook, "answer", side_effect=AssertionError),
    ):
        said, *_ = live([(0, [2, 0, 1, *range(3, G)], "a", "", -1)])
    assert said == [""] * G
