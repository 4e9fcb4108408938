"""The best checkpoint: what the broker says of it, and what a learner keeps, whenever either is killed."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from broker.evaluation import EvaluationSchedule
from common.codec import decode, encode
from common.config import EvaluationSection
from common.errors import CheckpointError
from common.wire import FROM_BROKER, KeepBest
from learner.retention import BEST, Best, Retention, complete, read_best, step_of
from tools.export import best_step

EVERY, LAST = 3, 14


def schedule() -> EvaluationSchedule:
    return EvaluationSchedule(EvaluationSection(prompts=4, every=EVERY, keep_best=True), LAST)


def evaluate(of: EvaluationSchedule, version: int, reward: float) -> None:
    asked = of.ask("a", version)
    assert of.result("a", asked.id, version, reward)


def make(directory: Path, step: int, whole: bool = True) -> None:
    path = directory / f"step-{step:08d}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "rank-00000.safetensors").write_text(str(step))
    if whole:
        (path / "state.json").write_text("{}")


def steps(directory: Path) -> list[int]:
    return [step_of(path) for path in complete(directory)]


# ---- the broker's word --------------------------------------------------------------------------


def test_the_earliest_of_equal_rewards_is_best_and_the_starting_model_may_be() -> None:
    of = schedule()
    assert vars(of.verdict(0)) == {"version": -1, "reward": 0.0, "pending": -1, "decided": -1}
    evaluate(of, 0, 0.5)
    assert (of.verdict(2).version, of.verdict(2).decided) == (0, 1)
    evaluate(of, 3, 0.5)
    assert of.verdict(3).version == 0
    evaluate(of, 6, 0.7)
    evaluate(of, 9, 0.6)
    assert (of.verdict(9).version, of.verdict(9).reward, of.verdict(9).decided) == (6, 0.7, 9)


def test_a_version_without_a_checkpoint_is_no_candidate() -> None:
    of = schedule()
    evaluate(of, 0, 0.1)
    evaluate(of, 4, 0.9)  # asked late: the evaluation before it was not done in time
    evaluate(of, LAST, 0.3)
    assert of.best is not None and of.best.asked == LAST
    again = schedule()
    again.restore(of.state())
    assert again.best == of.best and not again.due(LAST)


@pytest.mark.parametrize(("every", "last"), [(EVERY, LAST + 6), (4, LAST), (EVERY, 11)])
def test_what_had_a_checkpoint_has_one_under_other_settings(every: int, last: int) -> None:
    of = schedule()
    evaluate(of, 0, 0.1)
    evaluate(of, 4, 0.95)  # asked late: 4 is a multiple of another `every`, and nothing was kept of it
    evaluate(of, 9, 0.8)
    evaluate(of, LAST, 0.9)
    again = EvaluationSchedule(EvaluationSection(prompts=4, every=every, keep_best=True), last)
    again.restore(json.loads(json.dumps(of.state())))
    assert again.best == of.best and again.verdict(LAST).version == LAST


def test_what_was_evaluated_while_no_best_was_kept_is_no_candidate() -> None:
    of = EvaluationSchedule(EvaluationSection(prompts=4, every=EVERY), LAST)
    evaluate(of, 0, 0.1)
    evaluate(of, 3, 0.9)
    again = schedule()
    again.restore(of.state())
    evaluate(again, 6, 0.5)
    assert again.verdict(6).version == 6


def test_an_older_journal_is_judged_by_the_settings_of_now() -> None:
    of = schedule()
    of.restore([[0, 0.1, None, None, 0], [3, 0.5, 0.4, 0.6, 3], [4, 0.9, 0.8, 1.0, 4]])
    assert of.verdict(4).version == 3
    assert [result[-1] for result in of.state()] == [True, True, False]


def test_what_is_decided_and_what_is_awaited() -> None:
    of = schedule()
    evaluate(of, 0, 0.1)
    assert of.verdict(3).decided == 2  # published a moment ago: it will be asked for
    of.ask("a", 3)
    assert (of.verdict(3).pending, of.verdict(3).decided) == (3, 3)
    assert (of.verdict(8).pending, of.verdict(8).decided) == (3, 7)  # 6 passed meanwhile and never will be
    of.lost("a")
    assert of.verdict(8).pending == -1 and of.due(8)
    message = of.verdict(8)
    assert decode([bytes(f) for f in encode(message)], FROM_BROKER) == message


# ---- the learner's checkpoints ------------------------------------------------------------------


def test_the_best_outlives_the_newest_and_losers_go(tmp_path: Path) -> None:
    kept = Retention(tmp_path, 1, EVERY)
    for step in (3, 4, 6):
        make(tmp_path, step)
        kept.prune()
    assert steps(tmp_path) == [3, 6]  # 4 is nobody's, of 3 nothing was said yet
    kept.told(KeepBest(3, 0.5, 6, 6))
    for step in (9, 12):
        make(tmp_path, step)
    kept.told(KeepBest(3, 0.5, 9, 11))
    assert steps(tmp_path) == [3, 9, 12]
    kept.told(KeepBest(9, 0.6, -1, 12))
    assert steps(tmp_path) == [9, 12] and json.loads((tmp_path / BEST).read_text()) == {"version": 9, "reward": 0.6}


def test_a_new_best_replaces_the_old_one_only_when_it_is_whole(tmp_path: Path) -> None:
    kept = Retention(tmp_path, 1, EVERY)
    make(tmp_path, 3)
    kept.told(KeepBest(3, 0.5, -1, 3))
    make(tmp_path, 6, whole=False)
    make(tmp_path, 7)
    kept.told(KeepBest(6, 0.8, -1, 7))
    assert steps(tmp_path) == [3, 7] and best_of(tmp_path) == 3
    again = Retention(tmp_path, 1, EVERY)  # killed here: nothing was lost
    make(tmp_path, 9)
    again.prune()
    assert steps(tmp_path) == [3, 9] and best_of(tmp_path) == 3
    make(tmp_path, 6)
    again.told(KeepBest(6, 0.8, -1, 9))
    assert steps(tmp_path) == [6, 9] and best_of(tmp_path) == 6


def test_a_lesser_reward_replaces_no_best_that_is_here(tmp_path: Path) -> None:
    kept = Retention(tmp_path, 1, EVERY)
    for step in (3, 6):
        make(tmp_path, step)
    kept.told(KeepBest(3, 0.9, 6, 6))
    again = Retention(tmp_path, 1, EVERY)  # resumed, by a broker that remembers nothing
    for version, reward in ((-1, 0.0), (6, 0.5), (9, 0.9)):
        make(tmp_path, max(version, 6))
        again.told(KeepBest(version, reward, -1, max(version, 6)))
        assert 3 in steps(tmp_path) and read_best(tmp_path) == Best(3, 0.9)
    make(tmp_path, 12)
    again.told(KeepBest(12, 0.95, -1, 12))
    assert steps(tmp_path) == [12] and best_of(tmp_path) == 12


def test_a_best_that_is_gone_is_replaced_by_a_lesser_one(tmp_path: Path) -> None:
    (tmp_path / BEST).write_text('{"version": 3, "reward": 0.9}')
    make(tmp_path, 6)
    Retention(tmp_path, 1, EVERY).told(KeepBest(6, 0.5, -1, 6))
    assert best_of(tmp_path) == 6


def best_of(directory: Path) -> int:
    best = read_best(directory)
    assert best is not None
    return best.version


def test_without_keep_best_only_the_newest_stay(tmp_path: Path) -> None:
    kept = Retention(tmp_path, 2)
    for step in range(1, 7):
        make(tmp_path, step)
        kept.prune()
    assert steps(tmp_path) == [5, 6] and not kept.is_evaluated(6)


def test_a_disk_that_takes_nothing_loses_no_best(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = Retention(tmp_path, 1, EVERY)
    make(tmp_path, 3)
    kept.told(KeepBest(3, 0.5, -1, 3))
    for step in (6, 7):
        make(tmp_path, step)
    (tmp_path / BEST).unlink()
    (tmp_path / BEST).mkdir()  # nothing can take its place
    kept.told(KeepBest(6, 0.8, -1, 7))
    assert steps(tmp_path) == [3, 6, 7] and "best.json: cannot be written" in caplog.text
    (tmp_path / BEST).rmdir()
    kept.prune()
    assert steps(tmp_path) == [6, 7] and best_of(tmp_path) == 6


def test_exporting_the_best_needs_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"evaluation\.keep_best was false, or no evaluation was better"):
        best_step(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / BEST).write_text('{"version": 9, "reward": 0.5}')
    assert best_step(tmp_path) == 9
    (tmp_path / "checkpoints" / BEST).write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        best_step(tmp_path)


class Lives(RuleBasedStateMachine):
    """A broker and a learner, evaluations of any pace, messages delayed, both killed at will."""

    @initialize()
    def begin(self) -> None:
        import tempfile

        self.directory = Path(tempfile.mkdtemp())
        self.broker, self.version = schedule(), 0
        self.learner = Retention(self.directory, 1, EVERY)
        self.mail: list[KeepBest] = []
        self.asked: tuple[int, int] | None = None
        self.heard = -1  # the best that the learner has heard of

    def say(self) -> None:
        self.mail.append(self.broker.verdict(self.version))

    @precondition(lambda self: self.version < LAST)
    @rule()
    def train(self) -> None:
        self.version += 1
        make(self.directory, self.version)
        self.learner.prune()
        self.look()

    @rule()
    def look(self) -> None:
        """A turn of the broker."""
        if self.broker.due(self.version):
            self.asked = (self.broker.ask("a", self.version).id, self.version)
        self.say()

    @precondition(lambda self: self.asked is not None)
    @rule(reward=st.integers(0, 4))
    def answer(self, reward: int) -> None:
        (number, version), self.asked = self.asked, None
        self.broker.result("a", number, version, reward / 4)
        self.say()

    @precondition(lambda self: self.asked is not None)
    @rule()
    def lose_actor(self) -> None:
        self.asked = None
        self.broker.lost("a")
        self.say()

    @precondition(lambda self: self.mail)
    @rule()
    def deliver(self) -> None:
        said = self.mail.pop(0)
        self.learner.told(said)
        self.heard = said.version

    @rule()
    def kill_learner(self) -> None:
        self.learner = Retention(self.directory, 1, EVERY)
        self.mail = []
        self.say()  # it joins again

    @rule()
    def kill_broker(self) -> None:
        again = schedule()
        again.restore(self.broker.state())
        self.broker, self.asked, self.mail = again, None, []
        self.say()

    @invariant()
    def nothing_wanted_is_missing(self) -> None:
        here = steps(self.directory)
        assert not self.version or self.version in here
        best = self.broker.best
        if best is not None and best.asked > 0:
            assert best.asked in here
        if self.asked is not None and self.broker.has_checkpoint(self.asked[1]) and self.asked[1] > 0:
            assert self.asked[1] in here
        told = read_best(self.directory)
        if told is not None:
            assert told.version in here
        if self.heard > 0:
            assert told is not None and told.version >= 0

    @invariant()
    def what_nobody_wants_is_gone_once_all_is_heard(self) -> None:
        if not self.mail and self.heard >= 0:
            wanted = {self.version, self.heard, self.asked[1] if self.asked else -1}
            extra = set(steps(self.directory)) - wanted
            assert all(step > self.version - EVERY for step in extra), (extra, wanted)

    def teardown(self) -> None:
        if hasattr(self, "directory"):
            shutil.rmtree(self.directory)


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=25, stateful_step_count=40)


def test_an_evaluation_whose_actor_is_lost_is_asked_again_whenever_it_was_asked():
    found = EvaluationSchedule(EvaluationSection(prompts=4, every=10), last_version=100)
    evaluate(found, 0, 0.5)
    assert found.due(23)  # late: the one before took long
    found.ask("a", 23)
    found.lost("a")
    assert all(found.due(version) for version in range(23, 31))
    evaluate(found, 24, 0.5)
    assert not found.due(29) and found.due(30)
