"""Configuration: one schema, near names, ranges, and what YAML does to words."""

import re
from operator import attrgetter
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from common.config import RANGES, RunConfig, TaskSection, load, to_yaml
from common.errors import ConfigError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text("run:\n  name: x\n  steps: 7\n")
    return file


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(path: Path) -> None:
    config = load(path, ["run.steps=9", "staleness.budget=0"])
    assert (config.run.name, config.run.steps, config.staleness.budget) == ("x", 9, 0)
    assert config.rollout == RunConfig().rollout


def test_what_is_written_loads_as_what_was(path: Path, tmp_path: Path) -> None:
    config = load(path, ["obrs.mode=off", "loss.weight_cap=2.5", "task.params={a: 1}", "task.reward_weights={b: 2.0}"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(config))
    assert load(copy) == config


REWARDED = """
task: {reward_weights: {correct: 1, style: 0.2, taste: 0.1}}
reward:
  models:
    style: {kind: grm, url: "http://127.0.0.1:1/v1", model: m, rubric: Be kind., scale: [0, 5], on_failure: neutral}
    taste: {path: /models/taste}
  normalise: group
  normalise_by: {style: task_running, taste: none}
  gate: {style: {where: correct, at_least: 1}, taste: {}}
"""


def test_a_section_with_named_entries_loads_as_what_it_was(path: Path, tmp_path: Path) -> None:
    path.write_text(REWARDED)
    config = load(path, ["reward.models.style.retries=5"])
    assert config.reward.models["style"].retries == 5 and config.reward.models["style"].scale == (0, 5)
    assert config.reward.gate["taste"].where == "correct" and config.reward.normalised("taste") == "none"
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(config))
    assert load(copy) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("reward.models.style.modle=x", r"unknown key reward\.models\.style\.modle; did you mean 'model'"),
        ("reward.models.style=x", r"reward\.models\.style is a section and needs keys, not 'x'"),
        ("reward.models.style.url=x", r"reward\.models\.style\.url='x': must read http"),
        ("reward.models.style.url=http://h:80000/v1", r"url='http://h:80000/v1': must read http://HOST:PORT"),
        ("reward.models.style.url='http://[::1/v1'", r"url='http://\[::1/v1': must read http://HOST:PORT"),
        ("reward.models.style.url=ftp://h:21/v1", r"url='ftp://h:21/v1': must read http://HOST:PORT"),
        ("reward.models.style.url=http://u:p@h/v1", r"url='http://…@h': holds a password; set api_key_env"),
        ("reward.models.style.api_key_env=sk-12345678", r"api_key_env='sk-1…': is the name of an environment variable"),
        ("reward.models.style.scale=[5,5]", r"style\.scale=.*worst and the best"),
        ("reward.models.style.samples=3", r"samples=3: greedy judgements are all alike"),
        ("reward.models.style.rubric=", r"style\.rubric"),
        ("reward.models.taste.url=http://h/classify", r"taste\.path='/models/taste': .* either a directory"),
        ("reward.models.taste.retries=-1", r"taste\.retries=-1: must lie in"),
        ("reward.models.style.on_failure=zero", r"style\.on_failure"),
        ("reward.normalise=grup", r"reward\.normalise: .*grup"),
        ("reward.normalise_by={style: grup}", r"reward\.normalise_by\.style='grup': must be one of none, group"),
        ("reward.gate={style: {where: taste}}", r"gate\.style\.where='taste': is a reward model's word"),
        ("reward.gate={style: {where: style}}", r"gate\.style\.where='style': .*own gate"),
        ("reward.deadline_s=0", r"reward\.deadline_s=0"), ("reward.memory=1", r"reward\.memory=1"),
        ("rollout.exemplars=1", r"name their JSONL file in reward\.exemplars"),
        ("rollout.exemplars=8", r"rollout\.exemplars=8: must leave something to sample"),
        ("task.reward_weights={correct: 1, style: 0.2, taste: 0.1, x: 0}", ""),
    ],
)  # fmt: skip
def test_rewards_that_cannot_be_run_are_refused_by_name(path: Path, override: str, words: str) -> None:
    path.write_text(REWARDED)
    if not words:  # a weight of a channel is the task's to refuse
        assert load(path, [override]).task.reward_weights["x"] == 0
        return
    with pytest.raises(ConfigError, match=words):
        load(path, [override])


def test_a_bare_off_is_a_word_and_not_false(path: Path) -> None:
    path.write_text("obrs:\n  mode: off\n")
    assert load(path).obrs.mode == load(path, ["obrs.mode=off"]).obrs.mode == "off"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.freeze=[*embed*]", "its value is not YAML"),
        ("task.reward_weights={correct:1.0}", "'correct:1.0' is a key without a value; write a space behind its colon"),
        ("staleness.bugdet=3", r"override: unknown key staleness\.bugdet; did you mean 'budget'\?"),
        ("stalenes.budget=3", r"override: unknown section stalenes; did you mean 'staleness'\?"),
        ("run.steps=many", r"run\.steps: .*many"),
        ("run.steps=0", r"run\.steps=0: must lie"),
        ("staleness.budget=-1", r"staleness\.budget=-1: must"),
        ("obrs.mode=sometimes", r"obrs\.mode: .*sometimes"),
        ("obrs.mode=true", r"obrs\.mode: "),
        ("obrs.threshold=0", r"obrs\.threshold=0.*: must lie in"),
        ("optim.lr=-1", r"optim\.lr=-1.*: must be positive"),
        ("optim.eps=0", r"optim\.eps=0.*: must lie in \[1e-20, 1\]"),
        ("optim.min_lr_ratio=2", r"optim\.min_lr_ratio=2.*: must lie in"),
        ("run=3", "override: run is a section and needs keys"),
        ("run.steps", "must read section.key=value"),
        ("weights.route=direct", "is itself what receives"),
        ("engine.least_servers=2", "between 1 and the number of servers"),
        ("actor.max_sequences=2", r"actor\.max_sequences=2: must hold one whole group"),
    ],
)
def test_a_wrong_override_is_refused_by_name(path: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(path, [override])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            "engine.launch=0 engine.addresses=[http://127.0.0.1:1] actor.count=2",
            "two actors would give the same servers",
        ),
        ("engine.launch=0 engine.addresses=[http://far:1] actor.count=1 engine.device=cpu", "over loopback alone"),
        ("engine.launch=0 engine.addresses=[127.0.0.1:1] actor.count=1", "must read http://HOST:PORT"),
        (
            "engine.launch=0 engine.addresses=[http://127.0.0.1:1,http://127.0.0.1:1/] actor.count=1",
            "names a server twice",
        ),
        ("engine.addresses=[http://127.0.0.1:1]", "either the actor starts servers"),
        ("engine.launch=0", "either the actor starts servers"),
        ("weights.backend=nccl weights.route=relay", "has no GPU of its own to pass weights on from"),
        ("loss.expert_bias_rate=0.1", "cannot take a bias of the experts"),
    ],
)
def test_servers_that_contradict_the_rest_are_refused(path: Path, overrides: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(path, ["actor.engine=sglang", *overrides.split()])


def test_a_wrong_file_is_refused_by_name(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        load(tmp_path / "nowhere.yaml")
    for content, words in (
        ("run: [1", "not valid YAML"),
        ("- 1\n- 2\n", "must hold sections, not a list"),
        ("", r"run\.yaml: is empty; configs/ holds the examples"),
        ("# run:\n", r"run\.yaml: is empty"),
        ("run:\n  stepz: 3\n", r"run\.yaml: unknown key run\.stepz; did you mean 'steps'"),
        ("learner: 3\n", "learner is a section"),
        ("rollout:\n  temperature: warm\n", r"rollout\.temperature: .*warm"),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError, match=words):
            load(path)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.name=", r"^override: run\.name: needs a value$"), ("=3", "override '=3': must read section.key=value"),
        ("obrs.mode=on", r"obrs\.mode: .*'budget'.*; YAML takes a bare on or yes for true$"),
        ("staleness.budget=1.5", r"^override: staleness\.budget: 1\.5 is neither a whole number nor a word$"),
        ("run.name=${oc.env:NOT_SET}", r"run\.name: cannot be resolved: Environment variable 'NOT_SET' not found$"),
        ("run.name=${run.nam}", r"run\.name: .*run\.nam"),
        ("run.steps=2147483648", r"run\.steps=2147483648: must lie in \[1, 2\*\*31\)"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_an_override_is_not_put_down_to_the_file(path: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(path, [override])


def test_rejection_off_cannot_anchor_at_the_version_that_nobody_scores(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loss\.anchor='broker'.*set obrs\.mode=threshold"):
        load(path, ["obrs.mode=off", "loss.anchor=broker"])


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12))
def test_no_unknown_key_passes(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    file = tmp_path_factory.getbasetemp() / "empty.yaml"
    file.write_text("{}\n")
    known = name in {"steps", "name", "seed", "dir"} or hasattr(RunConfig().run, name)
    if not known:
        with pytest.raises(ConfigError, match=f"unknown key run.{name}"):
            load(file, [f"run.{name}=1"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("learner.logprob_mb=0", "learner.logprob_mb"), ("optim.beta1=1.5", "optim.beta1"),
        ("optim.weight_decay=nan", "optim.weight_decay"), ("actor.wait_s=-5", "actor.wait_s"),
        ("broker.verify_rate=7", "broker.verify_rate"), ("run.name=..", "plain name"),
        ("replica.count=0", "obrs.mode=off"), ("broker.queue_mb=0.001", "largest step"),
        ("broker.journal_mb=0.01", "staleness.budget"),
        (
            "broker.max_message_mb=1 rollout.max_tokens=90000 broker.queue_mb=1000 broker.journal_mb=0",
            "broker.max_message_mb=1.0: must hold the longest trajectory",
        ),
        ("evaluation.temperature=.inf", "evaluation.temperature=inf"),
        ("evaluation.temperature=1e-38", "evaluation.temperature=1e-38: must be 0 (greedy), or at least 0.0001"),
        ("rollout.temperature=1e-38", "rollout.temperature=1e-38: must be at least 0.0001"),
        ("rollout.temperature=0", "rollout.temperature=0.0: must be at least 0.0001: a greedy rollout"),
    ],
)  # fmt: skip
def test_values_that_cannot_work_are_refused_at_once(path: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        load(path, override.split())


def test_every_range_names_a_key() -> None:
    for key, (low, high) in RANGES.items():
        value = attrgetter(key)(RunConfig())
        assert low <= value <= high


@given(text=st.text(st.sampled_from("\\${}a: '\"."), max_size=8))
@example(text="a ${HOME} b")
@example(text="\\\\${x}")
@settings(max_examples=25)
def test_texts_with_dollars_and_braces_come_back_from_a_file_as_they_are(tmp_path_factory, text):
    config = RunConfig(task=TaskSection("jsonl", params={"text": text, "list": [text]}))
    file = tmp_path_factory.getbasetemp() / "dollars.yaml"
    file.write_text(to_yaml(config))
    assert load(file).task.params == {"text": text, "list": [text]}


def test_a_whole_configuration_is_written_as_ever():
    assert to_yaml(RunConfig()) == OmegaConf.to_yaml(OmegaConf.structured(RunConfig()))


def test_what_is_wrong_in_the_file_is_not_blamed_on_the_override_of_it(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for text, override, words in (
        ("actor:\n  count: abc\n", "actor.count=2", f"{file}: actor.count: "),
        ("actor:\n  count: 2\n", "actor.count=abc", "override: actor.count: "),
        ("learner:\n  threads: ${x}\n", "actor.count=2", f"{file}: learner.threads: Interpolation key 'x'"),
        ("actor:\n  count: 2\n", "learner.threads=${x}", "override: learner.threads: Interpolation key 'x'"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=re.escape(words)):
            load(file, [override])
