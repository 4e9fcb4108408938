"""An outcome reward model in the actor: a tiny random checkpoint, in batches; one text at a time is the oracle."""

import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Qwen3Config
from transformers import Qwen3ForCausalLM as LanguageModel

from actor.scoring.judges import Judges
from actor.scoring.remote import conversation_ids
from actor.scoring.rubric import Judged
from actor.tasks.tokenizer import load_tokenizer
from common.errors import ModelError
from common.rewards import RewardModelEntry, RewardSection
from tests.chatml import make_tokenizer

TEXTS = [Judged("hello", "the weather in Paris " * n) for n in (1, 4, 2, 7, 1, 3, 5)]


def shape(outputs: int = 2) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=256, initializer_range=0.5, num_labels=outputs,
        eos_token_id=2, bos_token_id=None, pad_token_id=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its pad is the token that every text ends with, as many checkpoints have it."""
    directory = make_tokenizer(tmp_path_factory.mktemp("orm"))
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(shape()).save_pretrained(directory)
    return directory


def alone(path: Path, judged: Judged, label: int) -> float:
    """The score of a text that nothing is padded beside."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    model.config.pad_token_id = 7
    ids = conversation_ids(load_tokenizer(str(path)), judged)
    with torch.inference_mode():
        hidden = model.model(torch.tensor([ids])).last_hidden_state
        return float(model.score(hidden[0, -1])[label])


def judge_all(judges: Judges, texts: list[Judged]) -> list[Any]:
    owners = [dataclasses.replace(text) for text in texts]
    for owner in owners:
        judges.submit(owner, ("taste",), owner)
    found: dict[int, Any] = {}
    deadline = time.monotonic() + 20
    while len(found) < len(owners):
        assert time.monotonic() < deadline
        found |= {id(v.owner): v for v in judges.poll()}
        time.sleep(0.001)
    return [found[id(owner)] for owner in owners]


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_a_batch_scores_as_its_texts_alone(path: Path, batch: int) -> None:
    threads = torch.get_num_threads()  # of the thread that samples
    judges = Judges(RewardSection(models={"taste": RewardModelEntry(path=str(path), label=1, batch=batch, threads=2)}))
    try:
        verdicts = judge_all(judges, TEXTS)
        wanted = [alone(path, text, 1) for text in TEXTS]
        assert [v.scores["taste"] for v in verdicts] == pytest.approx(wanted, abs=1e-4)
        assert len(set(wanted)) > 4  # a model that tells them apart
        assert torch.get_num_threads() == threads
    finally:
        judges.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("reward-")]


def test_a_text_that_is_too_long_fails_alone(path: Path) -> None:
    judges = Judges(RewardSection(models={"taste": RewardModelEntry(path=str(path), squash="sigmoid")}))
    try:
        long, short = judge_all(judges, [Judged("hello", "x" * 900), TEXTS[0]])
        assert "it reads 1 to 256" in long.failures["taste"] and 0 < short.scores["taste"] < 1
    finally:
        judges.close()


def test_what_is_no_reward_model_is_refused_with_a_remedy(path: Path, tmp_path: Path) -> None:
    LanguageModel(shape()).save_pretrained(tmp_path / "language")
    make_tokenizer(tmp_path / "language")
    for directory, fields, words in (
        (tmp_path / "none", {}, "no such directory"),
        (tmp_path, {}, "no sequence-classification checkpoint"),
        (tmp_path / "language", {}, r"score\.weight, which would be random; name a reward model"),
        (path, {"label": 2}, r"label=2: .* has 2 outputs"),
    ):
        with pytest.raises((ModelError, ValueError), match=words):
            Judges(RewardSection(models={"taste": RewardModelEntry(path=str(directory), **fields)}))
