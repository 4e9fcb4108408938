"""A rollout model of its own: what it cannot stand beside, who makes it, how tokens are dated, what is reported."""

import dataclasses
import json
from pathlib import Path

import pytest

from actor.outbox import Finished, pack
from actor.rollout import Rollout
from common.config import RunConfig, RunSection, load, to_yaml
from common.errors import ConfigError, ModelError
from common.joint import JointSection, WarmstartSection
from tests.unit.test_report import step_record, told
from tests.unit.test_rollout import ITEM, completion
from tools.preflight import check_models
from tools.stamp import ModelState, fingerprint, model_state, models_of, wants_warmstart, write_stamp

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["learner.tp=2"], "learner.tp=2: joint.path trains two models on the same ranks"),
        (["learner.pp=2"], "learner.dp_replicate or learner.dp_shard"),
        (["learner.ep=2"], "learner.ep=2"),
        (["rollout.routing_replay=true"], "the policy has others; set it to false"),
        (["obrs.z_weight=batch"], "trains the rollout model on all of them"),
        (["evaluation.keep_best=true"], "which rollout model is best and not which policy"),
        (["joint.lr=0"], "joint.lr=0"),
        (["joint.kl=-1"], "joint.kl=-1"),
        (["joint.clip_low=2"], "joint.clip_low=2"),
        (["joint.warmstart.experts=0"], "joint.warmstart.experts=0"),
        (["joint.warmstart.widht=3"], "unknown key joint.warmstart.widht"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(ROOT / "configs/joint.yaml", overrides)
    assert words in str(error.value)


def test_who_runs_which_model() -> None:
    alone, joint = load(ROOT / "configs/quickstart.yaml"), load(ROOT / "configs/joint.yaml")
    assert alone.rollout_path == alone.model.path and not (alone.joint.trains or alone.joint.stays)
    assert joint.rollout_path == "models/sort6-small" and joint.joint.trains
    still = dataclasses.replace(joint, joint=dataclasses.replace(joint.joint, train=False))
    assert still.joint.stays and not still.joint.trains
    load(ROOT / "configs/joint.yaml", ["joint.train=false", "learner.tp=2"])  # nothing is trained beside it
    frozen = ["optim.freeze=[model.embed_tokens.*]", "loss.expert_bias_rate=0.01"]  # those are the policy's
    with_patterns = load(ROOT / "configs/joint.yaml", frozen)
    assert (with_patterns.rollout_frozen, with_patterns.rollout_bias) == ((), False)
    usual = load(ROOT / "configs/quickstart.yaml", frozen)
    assert (usual.rollout_frozen, usual.rollout_bias) == (("model.embed_tokens.*",), True)


def test_a_model_that_stays_dates_its_tokens_by_their_grant() -> None:
    rollout = Rollout(7, 0, ITEM, given=ITEM.prompt_ids, date=5)
    rollout.take(rollout.dated(completion("ab$")))
    sent = pack("run", ["correct"], [Finished(7, 0, rollout.turns, {"correct": 1.0}, 1.0)])
    assert sent.versions[sent.trainable == 1].tolist() == [5, 5, 5]
    assert set(sent.versions[sent.trainable == 0].tolist()) == {-1}
    same = completion("ab$")
    assert Rollout(7, 0, ITEM).dated(same) is same


def test_both_models_are_made_and_each_by_its_own_recipe(tmp_path: Path) -> None:
    config = load(ROOT / "configs/joint.yaml", [f"model.path={tmp_path / 'large'}", f"joint.path={tmp_path / 'small'}"])
    large, small = models_of(config)
    assert large is config and small.model.path.endswith("small") and small.warmstart == config.joint.warmstart
    assert fingerprint(large) != fingerprint(small)
    assert fingerprint(large) == fingerprint(dataclasses.replace(config, joint=JointSection()))  # the quick start's
    assert wants_warmstart(config)
    for one in (large, small):
        assert wants_warmstart(config) and model_state(one) is ModelState.MISSING
        Path(one.model.path).mkdir()
        write_stamp(Path(one.model.path), one, 1, 0.0)
    assert not wants_warmstart(config)
    other = dataclasses.replace(config.joint, warmstart=WarmstartSection(layers=1))
    assert wants_warmstart(dataclasses.replace(config, joint=other))


def test_half_a_rollout_model_and_one_with_other_tokens_are_told_before_anything_starts(tmp_path: Path) -> None:
    config = load(ROOT / "configs/joint.yaml", [f"model.path={tmp_path / 'large'}", f"joint.path={tmp_path / 'small'}"])
    for name, vocabulary in (("large", 16), ("small", 17)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "x", "vocab_size": vocabulary}))
    (tmp_path / "large" / "model.safetensors").touch()
    with pytest.raises(ModelError, match=r"joint\.path='.*small': half a model"):
        check_models(config)
    (tmp_path / "small" / "model.safetensors").touch()
    with pytest.raises(ModelError, match="vocabulary 17 where this run has 16"):
        check_models(config)


def test_the_report_has_a_section_of_two_models(tmp_path: Path) -> None:
    run_dir = tmp_path / "x"
    run_dir.mkdir()
    own = {"joint_kl_drop": 0.01, "joint_grad_norm": 2.0, "joint_clip_fraction": 0.1, "seconds_joint": 0.2}
    records = [step_record(step, joint_kl=1 / (1 + step), **own) for step in range(1, 13)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = RunConfig(run=RunSection(name="x"), joint=JointSection(path="small", direction="reverse"))
    (run_dir / "config.yaml").write_text(to_yaml(config))
    report = told(run_dir)
    assert "Actors ran `small`" in report and "KL(rollout model ‖ policy)" in report
    assert "| 0.290 → 0.092 |" in report and "(joint.png)" in report
