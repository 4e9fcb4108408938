"""An actor's play with slow tasks, reward models and exemplars, over a scripted engine."""

import json
import re
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from actor.outbox import by_channels, pack
from actor.play import Play, open_task
from actor.scoring.exemplars import Exemplars, end_ids
from actor.scoring.texts import Texts
from actor.tasks.sort6 import Sort6, decode, encode, write_tokenizer
from actor.tasks.tokenizer import load_tokenizer
from common import wire
from common.config import ModelSection, RolloutSection, RunConfig, TaskSection
from common.errors import ConfigError, TaskError
from common.rewards import GateEntry, RewardModelEntry, RewardSection
from tests.unit.reward_server import RewardServer, chat
from tests.unit.scripted import Script, ScriptedEngine
from tests.unit.test_play import answer_of

PATIENCE_S = 10.0
STYLE = TaskSection(reward_weights={"correct": 1.0, "style": 0.5})


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return str(directory)


class Table:
    """A play whose loop turns as the actor's does."""

    def __init__(self, config: RunConfig, script: Script, task: Any = None) -> None:
        self.engine, self.sent, self.counters = ScriptedEngine(script), [], Counter()
        self.play = Play(config, task or open_task(config), self.engine, self.counters, self.sent.append)  # type: ignore[arg-type]
        self.finished: list[Any] = []

    def __enter__(self) -> "Table":
        return self

    def __exit__(self, *_: object) -> None:
        self.play.close()
        names = [t.name for t in threading.enumerate() if t.name.startswith(("verifier", "reward-models"))]
        assert names == []

    def turn(self) -> None:
        self.finished += self.play.collect(self.engine.step()) if self.engine.busy else self.play.scored()

    def until_idle(self) -> list[Any]:
        deadline = time.monotonic() + PATIENCE_S
        while len(self.play.rollouts):
            assert time.monotonic() < deadline, f"{len(self.play.rollouts)} rollouts hang"
            self.turn()
            time.sleep(0.0005)
        return sorted(self.finished, key=lambda f: (f.group, f.sibling))


def config(model_dir: str, reward: RewardSection | None = None, task: TaskSection | None = None, **rollout: Any) -> Any:
    limits = {"group_size": 3, "max_tokens": 8, "max_prompt_tokens": 8, **rollout}
    sections = {"reward": reward or RewardSection(), "task": task or TaskSection()}
    return RunConfig(model=ModelSection(path=model_dir), rollout=RolloutSection(**limits), **sections)


# ---- slow tasks ---------------------------------------------------------------------------------


class Slow(Sort6):
    """Sorting whose verifier takes as long as ``hold`` says, by completion."""

    slow = True

    def __init__(self, hold: Any = None) -> None:
        super().__init__(0, {})
        self.hold, self.threads = hold, set[str]()

    def reward(self, item: Any, completion_ids: Any) -> dict[str, float]:
        self.threads.add(threading.current_thread().name)
        if self.hold is not None:
            self.hold(decode(completion_ids))
        return super().reward(item, completion_ids)


def test_a_slow_verifier_runs_in_threads_while_the_engine_goes_on(model_dir: str) -> None:
    go = threading.Event()
    task = Slow(lambda text: go.wait(PATIENCE_S))
    with Table(config(model_dir), answer_of, task) as table:
        table.play.start_group(0, 0)
        table.turn()
        assert table.play.figures["scoring"] == 3 and table.finished == []
        table.play.start_group(1, 1)  # decoding goes on
        table.turn()
        assert table.counters["tokens"] == 6 * 7 and table.finished == []
        go.set()
        finished = table.until_idle()
        assert [(f.group, f.sibling, f.reward) for f in finished] == [(g, s, 1.0) for g in (0, 1) for s in range(3)]
        assert threading.current_thread().name not in task.threads
        assert table.play.figures["scoring"] == 0


def test_threads_and_the_loop_say_the_same_in_whatever_order_they_end(model_dir: str) -> None:
    def script(request: Any, sibling: int) -> str:
        return answer_of(request, sibling) if (request.request_id + sibling) % 3 else f"{sibling}$"

    def hold(text: str) -> None:
        time.sleep(0.002 * (hash(text) % 4))

    found = []
    for task in (Sort6(0, {}), Slow(hold)):
        with Table(config(model_dir), script, task) as table:
            for group in range(6):
                table.play.start_group(group, group)
            found.append([(f.group, f.sibling, f.reward, f.channels) for f in table.until_idle()])
    assert found[0] == found[1]


def test_a_verifier_that_raises_or_is_late_costs_its_sibling(model_dir: str) -> None:
    stuck = threading.Event()

    def hold(text: str) -> None:
        if text == "1$":
            raise RuntimeError("surprise")
        if text == "2$":
            stuck.wait(PATIENCE_S)

    def script(request: Any, sibling: int) -> str:
        return answer_of(request, sibling) if sibling == 0 else f"{sibling}$"

    with Table(config(model_dir, RewardSection(deadline_s=1.0)), script, Slow(hold)) as table:
        table.play.start_group(0, 0)
        try:
            assert [f.sibling for f in table.until_idle()] == [0]
        finally:
            stuck.set()
        said = {m.sibling: m.reason for m in table.sent}
        assert re.fullmatch(r"sort6: RuntimeError: surprise \(test_scoring\.py:\d+ in hold\)", said[1])
        assert said[2] == "sort6: TimeoutError: not done within reward.deadline_s=1"
        assert table.counters["reward_failures"] == 2


class _Mute(RuntimeError):
    def __str__(self) -> str:
        return self.nothing  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize(
    ("word", "told"),
    [
        (None, "TaskError"), (1.0, "TaskError"), (["correct"], "TaskError"), ({"prefix": 1.0}, "TaskError"),
        ({"correct": float("nan"), "prefix": 0.0}, "TaskError"), (SystemExit(2), "SystemExit: 2"),
        (_Mute(), "_Mute: it cannot say"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("slow", [False, True])
def test_a_verifier_without_channels_or_that_leaves_fails_and_is_no_zero(
    model_dir: str, word: Any, told: str, slow: bool
) -> None:
    class Odd(Sort6):
        def reward(self, item: Any, completion_ids: Any) -> Any:
            if isinstance(word, BaseException):
                raise word
            return word

    task = Odd(0, {})
    task.slow = slow  # type: ignore[attr-defined]
    with Table(config(model_dir), answer_of, task) as table:
        table.play.start_group(0, 0)
        assert table.until_idle() == [] and len(table.sent) == 3
        assert table.counters["reward_failures"] == 3 and told in table.sent[0].reason


def test_what_ends_as_it_is_dropped_goes_no_further(model_dir: str) -> None:
    """Four of two wanted, all in threads: the word of those that are dropped may be in the queue already."""
    with Table(config(model_dir, group_size=2, oversample=2.0), lambda r, s: f"{s}$", Slow()) as table:
        for group in range(30):
            table.play.start_group(group, group)
        finished = table.until_idle()
        assert len(finished) == 60 and sorted((f.group, f.sibling) for f in finished) == [
            (g, s) for g in range(30) for s in range(2)
        ]
        for _ in range(20):
            table.turn()
            time.sleep(0.001)
        assert len(table.finished) == 60 and table.play.figures["scoring"] == 0


def test_spare_siblings_being_scored_are_dropped(model_dir: str) -> None:
    """Of four started two are wanted: what is still in a thread when two have ended is nobody's any more."""
    go = threading.Event()

    def hold(text: str) -> None:
        if text in ("2$", "3$"):
            go.wait(PATIENCE_S)

    with Table(config(model_dir, group_size=2, oversample=2.0), lambda r, s: f"{s}$", Slow(hold)) as table:
        table.play.start_group(0, 0)
        finished = table.until_idle()
        assert [f.sibling for f in finished] == [0, 1] and table.counters["cancelled"] == 2
        assert table.play.figures["scoring"] == 0 and table.sent == []
        go.set()
        for _ in range(20):
            table.turn()
            time.sleep(0.001)
        assert len(table.finished) == 2


def test_a_slow_environment_replies_from_a_thread(model_dir: str) -> None:
    from actor.tasks.guess import Guess

    class SlowGuess(Guess):
        slow = True

    rollout = {"group_size": 2, "max_turns": 3, "max_reply_tokens": 2}
    found = []
    for task in (Guess(0, {}), SlowGuess(0, {})):
        with Table(config(model_dir, task=TaskSection(name="guess"), **rollout), answer_of, task) as table:
            for group in range(3):
                table.play.start_group(group, group)
            finished = table.until_idle()
            found.append([(f.reward, [t.given.tolist() for t in f.turns]) for f in finished])
    assert found[0] == found[1] and any(len(turns) == 3 for _, turns in found[0])


# ---- reward models ------------------------------------------------------------------------------


def style(server: RewardServer, **fields: Any) -> dict[str, RewardModelEntry]:
    return {"style": RewardModelEntry(url=server.url, protocol="scores", retries=0, timeout_s=5.0, **fields)}


def by_answer(request: web.Request, body: Any) -> web.Response:
    """A longer answer is a better one; there is no word for an answer of three."""
    text = body["answer"]
    return web.Response(status=500) if text == "3" else web.json_response({"scores": [len(text) / 10]})


@pytest.fixture
def server() -> Any:
    found = RewardServer(by_answer)
    yield found
    found.close()


def test_models_are_asked_about_text_and_add_a_channel(model_dir: str, server: RewardServer) -> None:
    with Table(config(model_dir, RewardSection(models=style(server)), STYLE), lambda r, s: "012$", None) as table:
        table.play.start_group(0, 0)
        table.play.start_evaluation(1, 2)
        finished = table.until_idle()
        prompt = decode(table.play.task.prompt(0, "train").prompt_ids)
    assert [(f.channels, f.reward) for f in finished] == [({"correct": 0.0, "prefix": p, "style": 0.3}, 0.15) for p in
                                                          [finished[0].channels["prefix"]] * 3]  # fmt: skip
    assert {"question": prompt, "answer": "012"} in server.asked
    (result,) = table.sent
    result.check()
    assert result.channel_names == ["correct", "prefix", "style"]
    assert result.channels[:, 2].tolist() == pytest.approx([0.3, 0.3]) and result.rewards.tolist() == pytest.approx(
        [0.15] * 2
    )


def test_a_shut_gate_saves_the_question(model_dir: str, server: RewardServer) -> None:
    def script(request: Any, sibling: int) -> str:
        return answer_of(request, sibling) if sibling == 0 else "1$"

    reward = RewardSection(models=style(server), gate={"style": GateEntry()})
    with Table(config(model_dir, reward, STYLE), script) as table:
        table.play.start_group(0, 0)
        right, *wrong = table.until_idle()
    assert len(server.asked) == 1
    assert right.channels["style"] == pytest.approx(0.6) and right.reward == pytest.approx(1.3)
    assert all("style" not in f.channels and f.reward == 0 for f in wrong)


@pytest.mark.parametrize("on_failure", ["exclude", "neutral"])
def test_a_failure_is_counted_and_named_and_never_a_zero(
    model_dir: str, server: RewardServer, on_failure: Any, caplog: pytest.LogCaptureFixture
) -> None:
    reward = RewardSection(models=style(server, on_failure=on_failure))
    with Table(config(model_dir, reward, STYLE), lambda r, s: f"{'3' if s == 1 else '12'}$") as table:
        table.play.start_group(0, 0)
        finished = table.until_idle()
        figures = table.play.figures
    assert table.counters["judge_failures"] == 1 and figures["reward_style_failures"] == 1
    if on_failure == "exclude":
        assert [f.sibling for f in finished] == [0, 2]
        (failed,) = table.sent
        assert failed.sibling == 1 and failed.reason.startswith("reward model style: style: HTTP 500")
        assert table.counters["reward_failures"] == 0
    else:
        assert [f.sibling for f in finished] == [0, 1, 2] and table.sent == []
        assert "style" not in finished[1].channels and table.counters["judge_neutral"] == 1
        assert "rollout 0.1 takes its group's mean of style: style: HTTP 500" in caplog.text
        messages = [pack("r", names, alike) for names, alike in by_channels(finished).items()]
        assert sorted(len(m.groups) for m in messages) == [1, 2] and not any(m.faults(16, 0) for m in messages)


def test_agents_rewards_and_a_judges_go_together(model_dir: str, server: RewardServer) -> None:
    """What an agent says its conversation was worth is judged on top."""
    from actor.gateway.driver import Ended

    with Table(config(model_dir, RewardSection(models=style(server)), STYLE), answer_of) as table:
        table.play.start_group(0, 0)
        rollouts = [table.play.rollouts.get(0, s) for s in range(3)]
        for rollout, completion in zip(rollouts, table.engine.step(), strict=True):
            assert rollout is not None
            rollout.take(completion)  # type: ignore[arg-type]
            channels = {"correct": 1.0, "prefix": 0.0}
            table.play._played(rollout, Ended(rollout, rollout.turns, channels, ""))
        assert [f.reward for f in table.until_idle()] == pytest.approx([1.3] * 3)


def test_closing_with_judges_at_work_leaves_nothing(model_dir: str, server: RewardServer) -> None:
    import asyncio

    async def hang(request: web.Request, body: Any) -> web.Response:
        await asyncio.sleep(PATIENCE_S)
        return chat("")

    server.handler = hang
    with Table(config(model_dir, RewardSection(models=style(server)), STYLE), answer_of) as table:
        table.play.start_group(0, 0)
        table.turn()
        assert table.play.figures["scoring"] == 3


@pytest.mark.parametrize(
    ("weights", "reward", "words"),
    [
        ({"correct": 1.0, "stlye": 1.0, "style": 0.0}, {}, r"reward_weights\.stlye: .*did you mean 'style'"),
        ({"correct": 1.0, "style": 1.0}, {"gate": {"stile": GateEntry()}}, "did you mean 'style'"),
        ({"correct": 1.0, "style": 1.0}, {"gate": {"style": GateEntry("corect")}}, "did you mean 'correct'"),
        ({"correct": 1.0, "style": 1.0}, {"normalise_by": {"prefx": "group"}}, "did you mean 'prefix'"),
    ],
)
def test_channels_that_nobody_makes_are_refused(model_dir: str, weights: Any, reward: Any, words: str) -> None:
    section = RewardSection(models={"style": RewardModelEntry(path="/x")}, **reward)
    with pytest.raises((ConfigError, TaskError), match=words):
        open_task(config(model_dir, section, TaskSection(reward_weights=weights)))


def test_a_model_that_no_task_weighs_is_refused(model_dir: str) -> None:
    with pytest.raises(ConfigError, match=r"nobody would ask it; set task\.reward_weights\.style \(0 records it"):
        config(model_dir, RewardSection(models={"style": RewardModelEntry(path="/x")}))


# ---- exemplars ----------------------------------------------------------------------------------


def write(path: Path, *lines: Any) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_exemplars_take_the_last_places_of_their_questions_groups(model_dir: str, tmp_path: Path) -> None:
    task = Sort6(0, {})
    question = decode(task.prompt(0, "train").prompt_ids)
    right = task.prompt(0, "train").reference.removesuffix("$")
    file = write(
        tmp_path / "a.jsonl", {"question": question, "answer": right}, {"question": 2, "answer": "1"},
        {"question": 2, "answer": "12", "task": "sort6"}, {"question": 2, "answer": "123"},
    )  # fmt: skip
    settings = config(model_dir, RewardSection(exemplars=file), group_size=4, exemplars=2, top_logprobs=3)
    with Table(settings, lambda r, s: "0$") as table:
        for group in range(3):
            table.play.start_group(group, group)
        assert [r.samples for r in table.engine.asked] == [3, 4, 2]
        finished = table.until_idle()
        assert table.counters["exemplars"] == 3
    assert [(f.group, f.sibling) for f in finished] == [(g, s) for g in range(3) for s in range(4)]
    experts = {(f.group, f.sibling): f for f in finished if f.turns[0].exemplar}
    assert sorted(experts) == [(0, 3), (2, 2), (2, 3)]
    assert experts[0, 3].reward == 1.0  # by the task's own verifier
    assert [decode(experts[2, s].turns[0].completion.token_ids) for s in (2, 3)] == ["1$", "12$"]
    message = pack("r", ("correct", "prefix"), finished)
    message.check()
    assert message.faults(16, 0) == {}
    a, b = message.cu_seqlens[3:5]
    assert message.trainable[a:b].tolist() == [0] * 7 + [wire.EXPERT] * 7
    assert (message.versions[a:b] == -1).all() and (message.log_q[a:b] == 0).all()
    assert message.summary[0][3] == wire.NEVER and (message.trainable[: message.cu_seqlens[1]] < 2).all()


def test_exemplars_beside_siblings_to_spare(model_dir: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"question": 0, "answer": "1"})
    settings = config(model_dir, RewardSection(exemplars=file), group_size=3, exemplars=1, oversample=2.0)
    with Table(settings, lambda r, s: "0$") as table:
        table.play.start_group(0, 0)
        assert [r.samples for r in table.engine.asked] == [4]
        finished = table.until_idle()
    assert [f.sibling for f in finished] == [0, 1, 2] and sum(f.turns[0].exemplar for f in finished) == 1
    assert table.counters["cancelled"] == 2


def test_exemplars_of_a_question_that_cannot_be_sampled_fail_with_it(model_dir: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"question": 0, "answer": "1"})
    settings = config(model_dir, RewardSection(exemplars=file), group_size=3, exemplars=1)
    with Table(settings, lambda r, s: "0$") as table:
        table.engine.vocab_size = 1
        table.play.start_group(0, 0)
        assert table.until_idle() == [] and table.counters["exemplars"] == 0
    assert [(message.group, message.sibling) for message in table.sent] == [(0, 0), (0, 1), (0, 2)]


def test_an_exemplar_that_does_not_fit_is_left_out_and_named(
    model_dir: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "a.jsonl", {"question": 0, "answer": "1" * 30}, {"question": 0, "answer": "12"})
    with Table(config(model_dir, RewardSection(exemplars=file), exemplars=2), lambda r, s: "0$") as table:
        table.play.start_group(0, 0)
        finished = table.until_idle()
        table.play.start_group(3, 0)
        table.until_idle()
    assert sum(f.turns[0].exemplar for f in finished[:3]) == 1 and table.counters["exemplars_too_long"] == 2
    assert caplog.text.count("an exemplar of 31 tokens leaves no room") == 1


def test_evaluations_hold_no_exemplars_and_judges_see_them_as_references(
    model_dir: str, tmp_path: Path, server: RewardServer
) -> None:
    server.handler = lambda request, body: chat("Score: 10")
    file = write(
        tmp_path / "a.jsonl", {"question": 0, "answer": "11"}, {"question": 1, "answer": "22"}, {"answer": "33"}
    )
    models = {"style": RewardModelEntry("grm", url=server.url, model="m", rubric="Be brief.")}
    settings = config(model_dir, RewardSection(models=models, exemplars=file), STYLE, exemplars=1, group_size=2)
    with Table(settings, lambda r, s: "0$") as table:
        table.play.start_group(0, 0)
        table.until_idle()
        shown = [body["messages"][1]["content"] for body in server.asked]
        table.play.start_evaluation(0, 2)
        table.until_idle()
    judged = {text.rpartition("BEGIN ANSWER")[2].split("\n")[1]: text.count("BEGIN REFERENCE") for text in shown}
    assert judged == {"0": 2, "11": 1}  # an exemplar is no reference to itself
    assert all("\n33\n" in text and "\n22\n" not in text for text in shown)
    evaluated = [body["messages"][1]["content"] for body in server.asked[2:]]
    assert len(evaluated) == 2 and all("\n11\n" not in text and "\n33\n" in text for text in evaluated)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ((), "holds no line"), (({"anwser": "x"},), "line 1: must be an object of answer, question, task"),
        (({"answer": ""},), "line 1: needs an answer"), (({"answer": "x"}, {"answer": 3}), "line 2: needs an answer"),
        (({"answer": "x", "question": True},), "its text or its number"), ((["x"],), "must be a JSON object"),
        (({"answer": "x", "task": "sort7"},), "no task 'sort7'; sort6"), (({"answer": "x", "task": 1},), "a label"),
        (({"answer": "x"},), "no line of reward.exemplars=.* names its question"),
        (({"answer": "x"}, {"answer": "\ud83d"}), "line 2: holds half a character, '.ud83d'"),
        (({"question": "\udc4d", "answer": "x"},), "line 1: holds half a character"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused_by_line(model_dir: str, tmp_path: Path, lines: Any, words: str) -> None:
    file = write(tmp_path / "a.jsonl", *lines)
    settings = config(model_dir, RewardSection(exemplars=file), exemplars=1)
    with pytest.raises(ConfigError, match=words):
        Play(settings, open_task(settings), ScriptedEngine(answer_of), Counter(), print)  # type: ignore[arg-type]


def test_ids_are_made_once_and_end_as_the_chat_template_ends(tmp_path: Path, model_dir: str) -> None:
    from tests.chatml import make_tokenizer

    make_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.convert_ids_to_tokens(end_ids(tokenizer)) == ["<|im_end|>"]
    assert end_ids(load_tokenizer(model_dir)) == encode("$").tolist()
    exemplars = Exemplars(
        write(tmp_path / "a.jsonl", {"question": " q ", "answer": "hello you"}), str(tmp_path), ("t",)
    )
    ids = exemplars.ids("hello you")
    assert tokenizer.decode(ids.tolist()) == "hello you<|im_end|>" and exemplars.ids("hello you") is ids
    assert exemplars.of("t", 9, "q") == ["hello you"] and exemplars.of("t", 9, "p") == []


def test_a_question_without_words_is_the_prompt_decoded(model_dir: str) -> None:
    texts = Texts(Sort6(0, {}), model_dir)
    item = Sort6(0, {}).prompt(0, "train")
    assert texts.question(item, np.asarray(item.prompt_ids)) == decode(item.prompt_ids)
