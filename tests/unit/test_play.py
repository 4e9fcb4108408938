"""An actor's play with a scripted engine: mixed tasks, and evaluations of several samples."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actor.evaluation import answer_key
from actor.outbox import by_channels, pack
from actor.play import Play, open_task
from actor.service import ActorService
from actor.tasks.mixed import MixedTask
from actor.tasks.sort6 import decode
from common import wire
from common.config import ActorSection, EvaluationSection, RolloutSection, RunConfig, TaskEntry, TaskSection
from common.errors import ConfigError, TaskError
from common.trace import STATES, Tracer, trace_path
from tests.unit.scripted import Script, ScriptedEngine, play_out
from tools.timelines import read_timelines

MIX = TaskSection(
    mix={
        "sort": TaskEntry("sort6", 2.0, reward_weights={"correct": 1.0, "prefix": 0.5}),
        "game": TaskEntry("guess", 1.0, reward_weights={"correct": 0.0, "closeness": 2.0}),
    }
)


def config(task: TaskSection = MIX, samples: int = 1, max_sequences: int = 256, **rollout: Any) -> RunConfig:
    limits = {"group_size": 2, "max_turns": 3, "max_reply_tokens": 2, **rollout}
    evaluation, actor = EvaluationSection(samples=samples), ActorSection(max_sequences=max_sequences)
    return RunConfig(task=task, rollout=RolloutSection(**limits), evaluation=evaluation, actor=actor)


class Table:
    def __init__(self, config: RunConfig, script: Script) -> None:
        self.engine, self.sent, self.counters = ScriptedEngine(script), [], Counter()
        self.play = Play(config, open_task(config), self.engine, self.counters, self.sent.append)

    def play_on(self) -> list[Any]:
        finished = []
        while self.engine.busy:
            finished += self.play.collect(self.engine.step())
        return finished


def answer_of(request: Any, sibling: int) -> str:
    """Sorts what is to be sorted; guesses 500, then what is higher or lower."""
    text = decode(request.prompt_ids)
    if text[-1] == ">" and len(text) == 7:
        return "".join(sorted(text[:6])) + "$"
    return {"c>": "500$", "a>": "750$", "b>": "250$"}[text[-2:]]


def test_each_prompt_is_played_and_paid_by_its_own_task() -> None:
    table = Table(config(), answer_of)
    for group in range(3):
        table.play.start_group(group, group)
    finished = sorted(table.play_on(), key=lambda f: (f.group, f.sibling))
    assert [f.group for f in finished] == [0, 0, 1, 1, 2, 2]
    own = [MIX.mixture.place(f.group) for f in finished]
    assert {task for task, _ in own} == {0, 1}
    single = {0: open_task(config(TaskSection(), max_turns=1)), 1: open_task(config(TaskSection(name="guess")))}
    for one, (task, question) in zip(finished, own, strict=True):
        item = single[task].prompt(question, "train")
        assert np.array_equal(one.turns[0].given, item.prompt_ids)
        if task == 0:
            assert len(one.turns) == 1 and one.channels == {"correct": 1.0, "prefix": 1.0} and one.reward == 1.5
        else:
            last = 750 if item.reference > 500 else 250
            assert len(one.turns) == 3 and set(one.channels) == {"correct", "closeness"}
            assert one.reward == pytest.approx(2 * (1 - abs(last - item.reference) / 1000))


def test_a_message_has_the_channels_of_one_task() -> None:
    table = Table(config(), answer_of)
    for group in range(4):
        table.play.start_group(group, group)
    messages = [pack("r", names, alike) for names, alike in by_channels(table.play_on()).items()]
    assert sorted(m.channel_names for m in messages) == [["correct", "closeness"], ["correct", "prefix"]]
    for message in messages:
        message.check()
        assert not message.faults(16, 0)
    assert sorted(g for m in messages for g in m.groups.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_mixed_task_is_its_parts() -> None:
    task = open_task(config())
    assert isinstance(task, MixedTask) and task.channels == ("correct", "prefix", "closeness")
    item = task.prompt(0, "heldout")
    assert item.task == 0 and task.reward(item, task.prompt(0, "heldout").prompt_ids)["correct"] == 0.0
    assert task.reply(item, [item.prompt_ids]) is None
    assert task.answer(item, item.prompt_ids) is None


@pytest.mark.parametrize(
    ("task", "error", "words"),
    [
        ({"a": TaskEntry("sort6"), "b": TaskEntry("sort7")}, TaskError, "did you mean 'sort6'"),
        ({"a": TaskEntry("sort6", reward_weights={"prefxi": 1.0})}, TaskError, "did you mean 'prefix'"),
        ({"a": TaskEntry("sort6"), "b": TaskEntry("sort6")}, ConfigError, "max_turns=3: task a, b has one turn"),
    ],
)
def test_what_cannot_be_mixed_is_refused_by_name(task: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        open_task(config(TaskSection(mix=task)))


def test_agents_are_not_mixed(tmp_path: Any) -> None:
    (tmp_path / "q.jsonl").write_text("{}\n{}\n")
    params = {"questions": str(tmp_path / "q.jsonl"), "command": ["true"]}
    mixed = TaskSection(mix={"sort6": TaskEntry(), "helper": TaskEntry("agent", params=params)})
    with pytest.raises(ConfigError, match=r"task\.mix\.helper: agents hold conversations of their own.*alone"):
        open_task(config(mixed))


# ---- evaluations --------------------------------------------------------------------------------


def test_samples_of_a_prompt_are_asked_for_together_and_told_side_by_side() -> None:
    def script(request: Any, sibling: int) -> str:
        right = answer_of(request, sibling)
        return right if sibling < 2 else "12$"

    table = Table(config(samples=3), script)
    table.play.start_evaluation(5, 4, 3)
    assert [r.samples for r in table.engine.asked] == [3] * 4
    assert table.play_on() == []
    (result,) = table.sent
    assert isinstance(result, wire.EvaluationResult)
    result.check()
    assert (result.evaluation, result.samples, len(result.rewards)) == (5, 3, 12)
    assert result.channel_names == ["correct", "prefix", "closeness"]
    tasks, _ = MIX.mixture.places(range(4))
    by_prompt = result.channels.reshape(4, 3, 3)
    for n, task in enumerate(tasks.tolist()):
        assert np.isnan(by_prompt[n, :, 2 if task == 0 else 1]).all()
        if task == 0:
            assert by_prompt[n, :, 0].tolist() == [1, 1, 0]
            answers = result.answers[3 * n : 3 * n + 3].tolist()
            assert answers[0] == answers[1] != answers[2] == answer_key("12") and wire.NO_ANSWER not in answers
    assert result.lengths[0] == 7


@pytest.mark.parametrize("failure", [RuntimeError("no such question"), SystemExit(0)], ids=["raises", "exits"])
def test_what_fails_is_worth_nothing_and_is_not_correct(failure: BaseException) -> None:
    def script(request: Any, sibling: int) -> str | None:
        return None if sibling == 1 else answer_of(request, sibling)

    table = Table(config(TaskSection(), samples=2, max_turns=1), script)
    inner = table.play.task.prompt

    def prompt(index: int, split: Any) -> Any:
        if index == 1:
            raise failure
        return inner(index, split)

    table.play.task.prompt = prompt  # type: ignore[method-assign]
    table.play.start_evaluation(0, 3, 2)
    table.play_on()
    (result,) = table.sent
    result.check()
    assert result.rewards.tolist() == [1, 0, 0, 0, 1, 0]
    assert result.channels[:, 0].tolist() == [1, 0, 0, 0, 1, 0]
    np.testing.assert_array_equal(result.channels[:, 1], np.array([1, np.nan, np.nan, np.nan, 1, np.nan], np.float32))
    assert [bool(a) for a in result.answers] == [True, False, False, False, True, False]
    assert table.counters["evaluation_failures"] == 3


@pytest.mark.parametrize("ids", [[], [3, 99]], ids=["empty", "beyond the vocabulary"])
def test_a_first_prompt_that_cannot_be_sampled_costs_its_question(ids: list[int]) -> None:
    table = Table(config(TaskSection(), samples=2, max_turns=1), answer_of)
    table.engine.vocab_size, inner = 16, table.play.task.prompt

    def prompt(index: int, split: Any) -> Any:
        item = inner(index, split)
        return replace(item, prompt_ids=np.array(ids, np.int32)) if index == 1 else item

    table.play.task.prompt = prompt  # type: ignore[method-assign]
    for group in range(3):
        table.play.start_group(group, group)
    table.play.start_evaluation(0, 3, 2)
    finished = table.play_on()
    assert sorted((f.group, f.sibling) for f in finished) == [(0, 0), (0, 1), (2, 0), (2, 1)]
    *failed, result = table.sent
    assert [(message.group, message.sibling) for message in failed] == [(1, 0), (1, 1)]
    assert all(message.reason.startswith("request 1: prompt") for message in failed)
    assert result.rewards.tolist() == [1, 1, 0, 0, 1, 1] and len(table.play.rollouts) == 0


def test_held_out_questions_are_made_once() -> None:
    table, made = Table(config(), answer_of), []
    prompt = table.play.task.prompt
    table.play.task.prompt = lambda index, split: made.append((index, split)) or prompt(index, split)  # type: ignore[method-assign]
    for number in range(2):
        table.play.start_evaluation(number, 6, 1)
        table.play_on()
    assert sorted(made) == [(index, "heldout") for index in range(6)]
    assert len(table.sent) == 2


def test_evaluations_leave_groups_alone() -> None:
    table = Table(config(samples=2), answer_of)
    table.play.start_evaluation(0, 2, 2)
    table.play.start_group(0, 0)
    finished = table.play_on()
    assert [f.group for f in finished] == [0, 0] and len(table.sent) == 1
    assert len(table.play.rollouts) == 0


def test_answers_are_compared_without_width_and_spacing() -> None:
    assert answer_key(" the  answer\n") == answer_key("the answer") != answer_key("the Answer")
    assert answer_key("４２") == answer_key("42")  # noqa: RUF001
    assert answer_key(None) == answer_key(" \n") == wire.NO_ANSWER
    assert answer_key("42") == 8820412187630416983  # the same in every process and on every machine


def test_a_task_whose_answers_cannot_be_read_still_counts() -> None:
    def broken(item: Any, ids: Any) -> str:
        raise RuntimeError("surprise")

    table = Table(config(TaskSection(), max_turns=1), answer_of)
    table.play.task.answer = broken  # type: ignore[attr-defined]
    table.play.start_evaluation(0, 1, 1)
    table.play_on()
    assert table.sent[0].rewards.tolist() == [1.0] and table.sent[0].answers.tolist() == [wire.NO_ANSWER]
    assert table.counters["answer_failures"] == 1


class Rows(ScriptedEngine):
    """One with so many rows: requests wait in order, and each sibling takes a step."""

    def __init__(self, script: Script, rows: int) -> None:
        super().__init__(script)
        self.rows, self.steps, self.most = rows, 0, 0

    def step(self, wait_s: float = 0.0) -> Any:
        self.steps += 1
        self.most = max(self.most, sum(r.samples for r in self._waiting))
        taken: list[Any] = []
        while self._waiting and sum(r.samples for r in [*taken, self._waiting[0]]) <= self.rows:
            taken.append(self._waiting.pop(0))
        waiting, self._waiting = self._waiting, taken
        ended = super().step(wait_s)
        self._waiting = waiting + self._waiting
        return ended


def test_an_evaluation_leaves_room_for_the_later_turns_of_groups() -> None:
    """All of its prompts at once would make a group's second turn wait for every one of them."""
    rows, samples = 8, 2
    table = Table(config(TaskSection(name="guess"), samples=samples, max_sequences=rows), answer_of)
    table.play.engine = table.engine = Rows(answer_of, rows)
    table.play.start_evaluation(0, 40, samples)
    for group in range(3):
        table.play.start_group(group, group)
    whole: dict[int, int] = {}
    while table.engine.busy:
        for one in table.play.collect(table.engine.step()):
            whole.setdefault(one.group, table.engine.steps)
    assert set(whole) == {0, 1, 2} and max(whole.values()) <= 8 < table.engine.steps
    assert table.engine.most <= rows + 6  # never more in the queue than its share, beside the groups
    (result,) = table.sent
    assert len(result.rewards) == 80


def test_an_evaluation_goes_on_however_busy_training_keeps_the_actor() -> None:
    table = Table(config(TaskSection(), samples=1, max_turns=1, max_sequences=8), answer_of)
    table.play.engine = table.engine = Rows(answer_of, 8)
    table.play.start_evaluation(0, 20, 1)
    group = 0
    for _ in range(40):
        while len(table.play.rollouts) < 16:  # twice what there is room for
            table.play.start_group(group, group)
            group += 1
        table.play.collect(table.engine.step())
    assert len(table.sent) == 1 and len(table.sent[0].rewards) == 20


def test_followed_rollouts_are_on_the_timeline_and_others_are_not(tmp_path: Path) -> None:
    settings = config()
    with Tracer(trace_path(tmp_path, "actor-0"), "actor-0", "actor", follow_every=2) as tracer:
        engine = ScriptedEngine(answer_of, version=3)
        play = Play(settings, open_task(settings), engine, Counter(), lambda message: None, tracer)
        for group in range(4):
            play.start_group(group, group)
        play.start_evaluation(0, 2, 1)
        finished = play_out(play, engine)
    (life,) = read_timelines(tmp_path).lives
    spans = {(span.args["group"], span.args["sibling"]): span.args for span in life.spans}
    assert spans.keys() == {(f.group, f.sibling) for f in finished if f.group % 2 == 0} and len(spans) == 4
    for one in finished:
        if one.group % 2 == 0:
            args = spans[one.group, one.sibling]
            assert args["tokens"] == sum(len(turn.completion.token_ids) for turn in one.turns)
            assert args["prompt_tokens"] == sum(len(turn.given) for turn in one.turns)
            assert args["version"] == 3 and args["turns"] == len(one.turns)


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        ({}, "idle.credits"),
        ({"_grants": [SimpleNamespace(min_version=4)]}, "idle.weights"),
        ({"_grants": [SimpleNamespace(min_version=3)]}, "idle.broker"),
        ({"rollouts": [1]}, "idle.scoring"),
        ({"waits_for_agents": True, "rollouts": [1]}, "idle.agents"),
        ({"version": -1, "rollouts": [1]}, "idle.server"),
        ({"_loading": object()}, "swap"),
    ],
)
def test_an_actor_names_what_it_waits_for(state: dict[str, Any], cause: str) -> None:
    actor = SimpleNamespace(
        _loading=state.get("_loading"),
        _grants=state.get("_grants", []),
        engine=SimpleNamespace(version=state.get("version", 3)),
        play=SimpleNamespace(waits_for_agents=state.get("waits_for_agents", False), rollouts=state.get("rollouts", [])),
    )
    found = ActorService._waits_for(actor)  # type: ignore[arg-type]
    assert found == cause and found in STATES["actor"]
