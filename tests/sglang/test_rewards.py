"""An outcome reward model on a real SGLang server says what the same checkpoint says in the actor."""

import dataclasses
import time
import urllib.request

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, Qwen3Config

from actor.engine.process import CPU_FLAGS, ServerProcess
from actor.scoring.judges import Judges
from actor.scoring.rubric import Judged
from common.process import free_port
from common.rewards import RewardModelEntry, RewardSection
from tests.chatml import make_tokenizer

TEXTS = [Judged("hello", "the weather in Paris " * n) for n in (1, 3, 2, 6, 1, 4)]
START_S = 240.0

pytestmark = pytest.mark.sglang


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = make_tokenizer(tmp_path_factory.mktemp("reward"))
    config = Qwen3Config(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, initializer_range=0.3, num_labels=3,
        eos_token_id=2, bos_token_id=None, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def url(sglang_python, checkpoint, tmp_path_factory):
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    words = [
        str(sglang_python), "-m", "sglang.launch_server", "--model-path", str(checkpoint), "--is-embedding",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--device", "cpu", *CPU_FLAGS,
        "--log-level-http", "warning",
    ]  # fmt: skip
    process = ServerProcess(words, log, 1, True)
    deadline = time.monotonic() + START_S
    while True:
        assert not process.ended and time.monotonic() < deadline, process.ended or f"not up within {START_S:g} s"
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            break
        except OSError:
            time.sleep(0.5)
    yield f"http://127.0.0.1:{port}"
    process.kill()


def scores(entry, texts=TEXTS):
    judges, owners = Judges(RewardSection(models={"taste": entry})), [dataclasses.replace(text) for text in texts]
    try:
        for owner in owners:
            judges.submit(owner, ("taste",), owner)
        found, deadline = {}, time.monotonic() + 60
        while len(found) < len(owners):
            assert time.monotonic() < deadline
            found |= {id(v.owner): v for v in judges.poll()}
            time.sleep(0.002)
    finally:
        judges.close()
    said = [found[id(owner)] for owner in owners]
    assert not any(v.failures for v in said), said
    return [v.scores["taste"] for v in said]


@pytest.mark.parametrize("label", [0, 2])
def test_its_classify_gives_the_outputs_themselves_but_for_a_bias_of_its_own(url, checkpoint, label):
    """SGLang 0.5.23 gives Qwen's classifiers a bias that no checkpoint has: a constant, another at every start."""
    here = np.array(scores(RewardModelEntry(path=str(checkpoint), label=label, batch=4)))
    there = np.array(scores(RewardModelEntry(url=f"{url}/classify", tokenizer=str(checkpoint), label=label)))
    np.testing.assert_allclose(there - there.mean(), here - here.mean(), atol=1e-4)
    assert here.std() > 0.1


def test_the_other_protocol_gives_a_softmax_of_them(url, checkpoint):
    def all_of(**fields):
        entries = [RewardModelEntry(tokenizer=str(checkpoint), label=label, **fields) for label in range(3)]
        return torch.tensor([scores(entry, TEXTS[:2]) for entry in entries])

    logits = all_of(url=f"{url}/classify")
    shares = all_of(url=f"{url}/v1/classify", protocol="vllm", model="m")
    assert torch.allclose(shares, logits.softmax(0), atol=1e-4)
