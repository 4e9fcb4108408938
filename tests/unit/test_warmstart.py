"""The warm start: the same seed gives the same bytes, nothing foreign is overwritten, nothing leaks."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, Qwen3MoeForCausalLM

import tools.warmstart
from actor.tasks.base import DemonstratedTask, make_task
from actor.tasks.sort6 import write_tokenizer
from common.config import RunConfig, load
from common.errors import ConfigError, DeadlineError, ModelError
from tools.stamp import ModelState, model_state
from tools.warmstart import alone, ensure, main

ROOT = Path(__file__).parents[2]
QUICK = ["warmstart.target_reward=0", "warmstart.max_steps=2", "warmstart.batch=8", "warmstart.hidden=16",
         "warmstart.expert_width=8", "warmstart.layers=1", "warmstart.experts=4"]  # fmt: skip


def tiny(path: Path, *overrides: str) -> RunConfig:
    return load(ROOT / "configs" / "quickstart.yaml", [*QUICK, f"model.path={path}", *overrides])


def content(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return ensure(tiny(tmp_path / "a")), ensure(tiny(tmp_path / "b"))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(two: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = two
    assert content(first) == content(second)
    other = ensure(tiny(tmp_path / "c", "run.seed=1"))
    assert content(other)["model.safetensors"] != content(first)["model.safetensors"]


def test_it_is_a_hugging_face_directory(two: tuple[Path, Path]) -> None:
    path, _ = two
    config = json.loads((path / "config.json").read_text())
    assert (config["model_type"], config["num_experts"], config["rope_theta"]) == ("qwen3_moe", 4, 10000.0)
    assert (config["tie_word_embeddings"], config["norm_topk_prob"]) == (False, True)
    with safe_open(path / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert {
        f"model.layers.0.mlp.experts.{n}.{p}_proj.weight" for n in range(4) for p in ("gate", "up", "down")
    } <= names
    model = Qwen3MoeForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert config["eos_token_id"] == tokenizer.convert_tokens_to_ids("$")
    assert torch.isfinite(model(input_ids=torch.tensor([tokenizer.encode("582013>")])).logits).all()


def test_two_at_once_make_one_model(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second waits for the first, and finds its work done."""
    path = tmp_path / "c"
    monkeypatch.setattr(tools.warmstart, "make", None)
    with ThreadPoolExecutor() as pool:
        with alone(tmp_path):
            second = pool.submit(ensure, tiny(path))
            until = time.monotonic() + 10
            while "waiting for another warm start" not in capsys.readouterr().out:
                assert time.monotonic() < until
                time.sleep(0.01)
            shutil.copytree(two[0], path)
        assert second.result(10) == path
    assert "made meanwhile" in capsys.readouterr().out
    assert content(path) == content(two[0]) and sorted(one.name for one in tmp_path.iterdir()) == ["a", "b", "c"]


def test_one_that_never_ends_is_told(tmp_path: Path) -> None:
    late = pytest.raises(DeadlineError, match="another warm start has been at work")
    with alone(tmp_path), late, alone(tmp_path, 0.1):
        pass


def test_a_second_call_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(tmp_path / "m")
    before = (ensure(config) / "model.safetensors").stat().st_mtime_ns
    time.sleep(0.01)
    assert ensure(config) == tmp_path / "m"
    assert (tmp_path / "m" / "model.safetensors").stat().st_mtime_ns == before
    assert "already made" in capsys.readouterr().out


def test_another_recipe_is_made_again_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ensure(tiny(tmp_path / "m"))
    other = tiny(tmp_path / "m", "warmstart.experts=8")
    assert model_state(other) is ModelState.STALE
    ensure(other)
    assert "making it again" in capsys.readouterr().out
    assert model_state(other) is ModelState.CURRENT


def test_a_model_of_someone_else_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("precious")
    with pytest.raises(ModelError, match="will not overwrite"):
        ensure(tiny(tmp_path))
    assert (tmp_path / "config.json").read_text() == "precious"
    arguments = [str(ROOT / "configs" / "quickstart.yaml"), f"model.path={tmp_path}"]
    assert main(arguments) == 1
    assert "will not overwrite" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    arguments = [str(ROOT / "configs" / "quickstart.yaml"), f"model.path={tmp_path}/file/in/m"]
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert (
        said
        == f"error: {tmp_path}/file/in/m: cannot be written (Not a directory); set model.path to another directory\n"
    )


def test_only_sort6_has_a_warm_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="knows sort6"):
        ensure(tiny(tmp_path / "m", "task.name=gym:chain_sum"))


def test_a_target_out_of_reach_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"warmstart\.max_steps=2.*raise the first or lower the second"):
        ensure(tiny(tmp_path / "m", "warmstart.target_reward=0.9"))
    assert list(tmp_path.iterdir()) == []


def test_training_never_sees_a_held_out_prompt(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    task = make_task("sort6", str(tmp_path), 0, {})
    train, held_out = (
        {tuple(int(t) for t in task.prompt(index, split).prompt_ids) for index in range(count)}
        for split, count in (("train", 8192), ("heldout", 1024))
    )
    assert train.isdisjoint(held_out)


@pytest.mark.parametrize("name", ["sort6", "sort6_confidence", "sort6_twice"])
def test_the_taught_answer_is_what_the_verifier_wants(name: str) -> None:
    task = make_task(name, "", 0, {})
    assert isinstance(task, DemonstratedTask)
    lengths = set()
    for index in range(64):
        item = task.prompt(index, "train")
        right = task.demonstration(item, index * 7919)
        lengths.add(len(right))
        channels = task.reward(item, right)
        assert channels["correct"] == channels.get("valid", 1.0) == 1.0
        assert task.reward(item, right[::-1])["correct"] == 0.0
    assert len(lengths) == 1
