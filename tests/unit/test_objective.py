"""Recipes, and what the configuration refuses (algorithms.md 9)."""

import pytest

from common.config import load
from common.errors import ConfigError
from common.objective import ALGORITHMS


def loaded(tmp_path, text="", *overrides):
    path = tmp_path / "run.yaml"
    path.write_text(text or "{}\n")
    return load(path, overrides)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_recipe_is_a_configuration_that_can_be_run(tmp_path, name):
    config = loaded(tmp_path, f"algorithm: {name}\nrollout: {{top_logprobs: 20}}\n")
    for section, values in ALGORITHMS[name].items():
        for key, value in values.items():
            assert getattr(getattr(config, section), key) == value


def test_what_a_file_or_an_override_sets_itself_wins(tmp_path):
    config = loaded(tmp_path, "algorithm: dapo\nloss: {clip_high: 0.4}\n", "advantage.zero_signal=keep")
    assert (config.loss.clip_low, config.loss.clip_high, config.advantage.zero_signal) == (0.2, 0.4, "keep")
    assert loaded(tmp_path, "algorithm: dapo\n", "algorithm=cispo").loss.kind == "cispo"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_quick_start_takes_every_recipe(name):
    more = ["rollout.top_logprobs=5"] if name == "jackpot_paper" else []
    config = load("configs/quickstart.yaml", [f"algorithm={name}", *more])
    assert config.loss.anchor == ALGORITHMS[name].get("loss", {}).get("anchor", "behaviour")
    assert config.obrs.mode == ALGORITHMS[name].get("obrs", {}).get("mode", "threshold")


def test_weights_that_are_given_stand_for_those_that_were(tmp_path):
    usual = loaded(tmp_path).task.entries["sort6"]
    assert usual.reward_weights == {"correct": 1.0}
    text = "task: {name: sort6_confidence, reward_weights: {correct: 1.0}}\n"
    entry = loaded(tmp_path, text, "task.reward_weights={rlcr: 1.0}").task.entries["sort6_confidence"]
    assert entry.reward_weights == {"rlcr": 1.0}
    both = loaded(tmp_path, text, "task.reward_weights.rlcr=1.0").task.entries["sort6_confidence"]
    assert both.reward_weights == {"correct": 1.0, "rlcr": 1.0}
    text = "task: {mix: {a: {name: sort6, reward_weights: {prefix: 1.0}}, guess: {}}}\n"
    mixed = loaded(tmp_path, text).task.entries
    assert [e.reward_weights for e in mixed.values()] == [{"prefix": 1.0}, {"correct": 1.0}]


def test_an_unknown_recipe_suggests_the_near_one(tmp_path):
    with pytest.raises(ConfigError, match=r"algorithm='gsop'.*did you mean 'gspo'"):
        loaded(tmp_path, "algorithm: gsop\n")
    with pytest.raises(ConfigError, match=r"loss.kind"):
        loaded(tmp_path, "", "loss.kind=pppo")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["obrs.mode=off", "loss.anchor=broker"], "loss.anchor.*rejection on"),
        (["loss.anchor=proximal", "loss.correction=uncorrected"], "loss.correction.*obrs.mode=off"),
        (["obrs.z_weight=batch", "loss.aggregate=sequence_mean"], "obrs.z_weight.*accepted tokens"),
        (["advantage.blocks=ocb", "loss.aggregate=constant"], "loss.aggregate.*own tokens"),
        (["advantage.kind=batch_mean", "advantage.zero_signal=mask"], "advantage.zero_signal.*do teach"),
        (["rollout.group_size=1"], "rollout.group_size.*batch_mean"),
        (["advantage.overlong_buffer=100"], "advantage.overlong_buffer.*longer than the 8 tokens"),
        (["advantage.blocks=ocb", "advantage.zero_signal=mask"], "advantage.zero_signal.*blocks"),
        (["advantage.blocks=ocb", "advantage.overlong_buffer=2"], "advantage.overlong_buffer.*blocks"),
        (["advantage.blocks=ocb", "reward.normalise=group"], "reward.normalise.*blocks"),
        (["obrs.mode=off", "obrs.z_weight=context", "rollout.top_logprobs=5"], "obrs.z_weight.*rejects nothing"),
        (["obrs.z_kappa=true"], "obrs.z_kappa.*context"),
        (["algorithm=m2po", "loss.kl=0.1", "loss.kl_estimator=k1"], "loss.kind.*before loss.kl_estimator=k1"),
        (["algorithm=opsm", "loss.distill=1"], "loss.opsm.*before loss.distill"),
        (["loss.anchor=proximal", "loss.target=policy", "loss.correction=cap_sequence"], "loss.correction.*second one"),
        (["advantage.shrinkage=4"], "advantage.shrinkage.*ocb"),
        (["advantage.block_weights=[-1]", "advantage.blocks=ocb"], "advantage.block_weights"),
    ],
)
def test_sections_that_cannot_stand_together_are_refused_with_the_reason(tmp_path, overrides, words):
    with pytest.raises(ConfigError, match=words):
        loaded(tmp_path, "", *overrides)
