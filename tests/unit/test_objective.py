"""Recipes, and what the configuration refuses (algorithms.md 9)."""

import pytest

from common.config import load
from common.errors import ConfigError
from common.objective import ALGORITHMS


def loaded(tmp_path, text="", *overrides):
    path = tmp_path / "run.yaml"
    path.write_text(text)
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
        (["advantage.shrinkage=4"], "advantage.shrinkage.*ocb"),
        (["advantage.block_weights=[-1]", "advantage.blocks=ocb"], "advantage.block_weights"),
    ],
)
def test_sections_that_cannot_stand_together_are_refused_with_the_reason(tmp_path, overrides, words):
    with pytest.raises(ConfigError, match=words):
        loaded(tmp_path, "", *overrides)
