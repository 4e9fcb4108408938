"""A group's places: each filled or reported failed exactly once, whatever order its siblings end in."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from actor.engine.base import Completion
from actor.rollout import Rollout, Rollouts
from actor.tasks.base import PromptItem
from actor.tasks.guess import Guess
from actor.tasks.sort6 import Sort6, encode
from common.config import RolloutSection
from common.errors import TaskError

ITEM = PromptItem(encode("c>"), 500)


def make(max_turns: int = 1, max_reply_tokens: int = 0) -> Rollouts:
    task = Guess(0, {}) if max_turns > 1 else Sort6(0, {})
    return Rollouts(RolloutSection(max_turns=max_turns, max_reply_tokens=max_reply_tokens), task)


def completion(text: str) -> Completion:
    ids = encode(text)
    zeros = np.zeros(len(ids), np.float32)
    return Completion(
        0, 0, ids, zeros, ids * 0, np.zeros((len(ids), 0), np.int32), np.zeros((len(ids), 0), np.float32),
        np.zeros((0, 0), np.uint16), "stop",
    )  # fmt: skip


def play(wanted: int, siblings: int, order: tuple[int, ...], failing: frozenset[int]) -> None:
    """End the siblings in ``order``, some by failing, and check what becomes of every place."""
    rollouts = make()
    started = rollouts.start(7, ITEM, siblings, wanted)
    filled: list[int] = []
    failed: list[int] = []
    cancelled: set[int] = set()
    for sibling in order:
        rollout = started[sibling]
        if sibling in cancelled:
            assert rollouts.get(7, sibling) is None
            continue
        assert rollouts.get(7, sibling) is rollout
        if sibling in failing:
            place = rollouts.failed(rollout)
            failed += [] if place is None else [place]
        else:
            place, spare = rollouts.ended(rollout)
            filled.append(place)
            cancelled |= set(spare)
    assert sorted(filled + failed) == list(range(wanted))
    assert len(filled) == min(wanted, siblings - len(failing & (set(order) - cancelled)))
    assert len(rollouts) == 0 and rollouts.request_ids() == set()
    if siblings == wanted:
        assert set(failed) == failing and filled == [sibling for sibling in order if sibling not in failing]


@pytest.mark.parametrize(("wanted", "siblings"), [(1, 1), (3, 3), (1, 2), (2, 4), (3, 4), (1, 4)])
def test_every_order_of_every_small_group(wanted: int, siblings: int) -> None:
    for order in itertools.permutations(range(siblings)):
        for count in range(siblings + 1):
            for failing in itertools.combinations(range(siblings), count):
                play(wanted, siblings, order, frozenset(failing))


class Groups(RuleBasedStateMachine):
    """Many groups at once: no place twice, none lost, nothing left over."""

    @initialize()
    def begin(self) -> None:
        self.rollouts = make()
        self.live: list[Rollout] = []
        self.wanted: dict[int, int] = {}
        self.places: dict[int, list[int]] = {}

    @rule(wanted=st.integers(1, 5), more=st.integers(0, 4))
    def start(self, wanted: int, more: int) -> None:
        group = len(self.wanted)
        self.live += self.rollouts.start(group, ITEM, wanted + more, wanted)
        self.wanted[group], self.places[group] = wanted, []

    @precondition(lambda self: self.live)
    @rule(data=st.data(), fails=st.booleans())
    def end(self, data: Any, fails: bool) -> None:
        rollout = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        group = rollout.request_id
        if fails:
            place = self.rollouts.failed(rollout)
            self.places[group] += [] if place is None else [place]
            return
        place, spare = self.rollouts.ended(rollout)
        self.places[group].append(place)
        gone = [r for r in self.live if r.request_id == group and r.sibling in spare]
        assert len(gone) == len(spare)
        self.live = [r for r in self.live if r not in gone]

    @invariant()
    def no_place_twice_and_none_lost(self) -> None:
        live = {group: 0 for group in self.wanted}
        for rollout in self.live:
            live[rollout.request_id] += 1
            assert self.rollouts.get(rollout.request_id, rollout.sibling) is rollout
        for group, wanted in self.wanted.items():
            places = self.places[group]
            assert len(set(places)) == len(places) and set(places) <= set(range(wanted))
            assert len(places) + live[group] >= wanted
            assert live[group] or len(places) == wanted
        assert len(self.rollouts) == len(self.live)
        assert self.rollouts.request_ids() == {group for group, count in live.items() if count}


Groups.TestCase.settings = settings(max_examples=30, stateful_step_count=25)
TestGroups = Groups.TestCase


def test_turns_are_exact_and_bounded() -> None:
    rollouts = make(max_turns=3, max_reply_tokens=2)
    rollout = rollouts.start(0, ITEM, 1, 1)[0]
    context = np.zeros(0, np.int32)
    given = ITEM.prompt_ids
    for turn, (answer, reply) in enumerate([("250$", "a>"), ("x", "c>"), ("999$", None)]):
        sampled = completion(answer.replace("x", ".."))
        rollout.given = given
        rollout.take(sampled)
        context = np.concatenate([context, given, sampled.token_ids])
        assert np.array_equal(rollout.context, context) and rollout.given is None
        said = rollouts.reply(rollout)
        assert (None if said is None else said.tolist()) == (reply and encode(reply).tolist()), turn
        given = said if said is not None else given
    assert rollout.sampled == 4 + 2 + 4


def test_a_task_of_one_turn_never_replies() -> None:
    rollouts = make()
    rollout = rollouts.start(0, ITEM, 1, 1)[0]
    rollout.given = ITEM.prompt_ids
    rollout.take(completion("1$"))
    assert rollouts.reply(rollout) is None


def test_a_reply_without_room_names_the_setting() -> None:
    rollouts = make(max_turns=2, max_reply_tokens=1)
    rollout = rollouts.start(0, ITEM, 1, 1)[0]
    rollout.given = ITEM.prompt_ids
    rollout.take(completion("1$"))
    with pytest.raises(TaskError, match=r"2 tokens; raise rollout\.max_reply_tokens=1"):
        rollouts.reply(rollout)
