"""Only what was granted and comes for the first time is written down; what is answered does not depend on it."""

from pathlib import Path

import numpy as np
import pytest

from broker.journal import Journal
from broker.pipeline import Pipeline
from broker.recorder import Recorder
from broker.recovery import recover
from broker.trajectories import gather, pieces_of
from common import wire
from common.codec import decode, encode
from tests.unit.test_pipeline import G, config, trajectories


class Run:
    """A recorder over a journal, and what the journal was given."""

    def __init__(self, directory: Path) -> None:
        self.journal = Journal(directory, "r", 64)
        self.pipeline = Pipeline(config(), 16)
        self.recorder = Recorder(self.pipeline, self.journal, dict)
        self.recorder.begin(0)
        self.first, self.second = self.recorder.grant("a", 2, 0).groups.tolist()

    def admit(self, message: wire.Trajectories, actor: str = "a") -> list[str]:
        ack = self.recorder.admit(decode([bytes(f) for f in encode(message)], wire.TO_BROKER), actor, 0)
        np.testing.assert_array_equal(ack.groups, message.groups)
        np.testing.assert_array_equal(ack.siblings, message.siblings)
        return ack.reasons

    def written(self) -> list[str]:
        return [kind for kind, _, _ in self.journal._pending]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(Journal, "_run", lambda self: None)  # everything stays where it can be looked at
    return Run(tmp_path)


def both(one: wire.Trajectories, other: wire.Trajectories) -> wire.Trajectories:
    """One message of two."""
    arrays = {
        name: np.concatenate([getattr(one, name), getattr(other, name)])
        for name, value in vars(one).items()
        if isinstance(value, np.ndarray) and name not in ("cu_seqlens", "blocks")
    }
    arrays["cu_seqlens"] = np.concatenate((one.cu_seqlens, other.cu_seqlens[1:] + one.cu_seqlens[-1]))
    moved = other.blocks + np.array([len(one.groups), 0, 0, 0, 0], np.int32)
    return wire.Trajectories("r", ["correct"], blocks=np.concatenate([one.blocks, moved]), **arrays)


def test_what_nobody_awaits_is_answered_and_not_written_down(run: Run):
    before = run.written()
    stranger, theirs = trajectories(99), trajectories(run.first)
    assert run.admit(stranger) == ["unknown_group"] * G
    assert run.admit(theirs, "b") == ["granted_to_another_actor"] * G
    run.recorder.failed(99, -1, "environment")
    run.recorder.failed(run.first, G, "environment")
    assert run.recorder.actor_lost("b") == 0
    assert run.written() == before
    assert run.pipeline.turned_away == {"unknown_group": G, "granted_to_another_actor": G}


def test_repeats_are_acknowledged_and_not_written_down_again(run: Run):
    part, whole = trajectories(run.first, siblings=[0, 1]), trajectories(run.first)
    assert run.admit(part) == ["", ""]
    before = run.written()
    assert run.admit(part) == ["", ""]
    assert run.written() == before
    assert run.admit(whole) == [""] * G
    assert run.written() == [*before, "admit"]
    kept = run.journal._pending[-1]
    assert decode(kept[2], wire.TO_BROKER).siblings.tolist() == [2], "the one that was new"
    assert run.admit(whole) == [""] * G and run.pipeline.book.held == G
    assert run.admit(both(trajectories(run.second), trajectories(run.second, seed=5))) == [""] * 2 * G
    assert run.pipeline.book.held == 2 * G and run.pipeline.turned_away[""] == 2 + 2 + G + G


def test_what_is_taken_of_a_message_keeps_nothing_else_of_it_in_memory(run: Run):
    message = both(trajectories(99), trajectories(run.first))
    message.blocks = np.array([[0, 0, 0, 3, 4], [G, 0, 1, 3, 4], [G + 2, 1, 0, 3, 4]], np.int32)
    message.block_rewards = np.arange(3, dtype=np.float32)
    assert run.admit(message) == ["unknown_group"] * G + [""] * G
    alone = trajectories(run.first)
    for index, member in enumerate(run.pipeline.book.members(run.first)):
        at = slice(*alone.cu_seqlens[index : index + 2])
        for name in ("token_ids", "log_q"):
            np.testing.assert_array_equal(gather(pieces_of([member]), name), getattr(alone, name)[at])
        assert (member.sibling, member.reward) == (alone.siblings[index], alone.rewards[index])
        owner = member.message.token_ids
        while owner.base is not None:
            owner = owner.base
        assert owner.nbytes == alone.token_ids.nbytes
    blocks = [member.blocks.tolist() for member in run.pipeline.book.members(run.first)]
    assert blocks == [[[0, 1, 3, 4]], [], [[1, 0, 3, 4]]]
    assert [member.block_rewards.tolist() for member in run.pipeline.book.members(run.first)] == [[1.0], [], [2.0]]


def test_what_is_larger_than_was_granted_gives_its_group_up_without_its_bytes(run: Run):
    long = trajectories(run.first)
    n = 1000
    for name in ("token_ids", "trainable", "log_q", "versions"):
        setattr(long, name, np.concatenate([getattr(long, name)] + [getattr(long, name)[-1:]] * n))
    long.topk_ids, long.topk_log_q = (np.zeros((len(long.token_ids), 0), kind) for kind in (np.int32, np.float32))
    long.experts = np.zeros((len(long.token_ids), 0), np.uint16)
    long.cu_seqlens[-1] += n
    length = int(long.cu_seqlens[-1] - long.cu_seqlens[-2])
    reason = f"{length} tokens, more than rollout allows (8)"
    assert run.admit(long) == ["", "", reason]
    wide = trajectories(run.second)
    wide.topk_ids = np.zeros((len(wide.token_ids), 100), np.int32)
    wide.topk_log_q = np.full(wide.topk_ids.shape, -1.0, np.float32)
    told = "100 alternatives a token, rollout.top_logprobs=0"
    assert run.admit(wide) == [told, "refused_sibling", "refused_sibling"]
    assert run.written()[-3:] == ["admit", "refused", "refused"]
    assert run.pipeline.book.groups() == [] and run.pipeline.refused == {reason: 1, told: 1}
    assert sum(view.nbytes for _, _, views in run.journal._pending for view in views) < 1000
    assert run.pipeline.queued == run.pipeline.held() == 0


def test_a_sibling_that_comes_after_its_place_was_made_up_for_is_told_so(run: Run):
    assert run.admit(trajectories(run.first, siblings=[0, 1])) == ["", ""]
    run.recorder.actor_lost("a")
    assert run.pipeline.ledger.is_complete(run.first)
    assert run.admit(trajectories(run.first)) == ["", "", "sibling_failed"]


def test_a_restart_comes_to_the_same(tmp_path: Path):
    run = Run(tmp_path)
    run.admit(both(trajectories(99), trajectories(run.first, siblings=[1])))
    run.admit(trajectories(run.first))
    wide = trajectories(run.second)
    wide.topk_ids = np.zeros((len(wide.token_ids), 1), np.int32)
    wide.topk_log_q = np.zeros(wide.topk_ids.shape, np.float32)
    run.admit(wide)
    run.journal.close()
    again = Pipeline(config(), 16)
    journal = Journal(tmp_path, "r", 64)
    recover(again, journal)
    assert again.state() == run.pipeline.state()
    journal.close()
