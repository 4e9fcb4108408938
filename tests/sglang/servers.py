"""A tiny random model, engines on it, and the numbers that transformers gives for what they sampled."""

import json
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from actor.engine.base import Completion, SampleRequest
from actor.engine.local import LocalEngine
from actor.engine.sglang import SglangEngine
from common.config import ActorSection, EngineSection, ModelSection, RolloutSection, RunConfig, RunSection
from common.weights import plan_buckets
from learner.weights.publish import flatten

VOCAB, EOS, LONGEST = 97, 1, 400
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024, "initializer_range": 0.25,
    "eos_token_id": EOS, "bos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
TOLERANCE = 2e-5 * 5  # two kernels of float32 attention, beside 2e-5 of sglang.md for larger models


def make_models(root: Path) -> dict[str, Path]:
    """``first`` and ``second`` are two states of one mixture of experts; ``dense`` is a Llama."""
    torch.set_num_threads(1)
    made = {}
    configs = {"first": Qwen3MoeConfig(**SHAPE, **MOE), "second": Qwen3MoeConfig(**SHAPE, **MOE)}
    configs["dense"] = LlamaConfig(**SHAPE)
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        made[name] = root / name
        AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
    return made


def run_config(model: Path, run_dir: Path, python: Path | None = None, rollout=None, **engine) -> RunConfig:
    """``python`` None is the embedded engine."""
    settings = {"device": "cpu", "server_timeout_s": 15.0, "heartbeat_s": 0.2, "backoff_s": 0.1, **engine}
    if python is not None:
        settings["python"] = str(python)
    return RunConfig(
        run=RunSection(name="t", dir=str(run_dir)),
        model=ModelSection(path=str(model)),
        rollout=RolloutSection(max_prompt_tokens=100, max_tokens=300, **(rollout or {})),
        actor=ActorSection(count=1, engine="sglang", max_sequences=64),
        engine=EngineSection(**settings),
    )


def local_engine(config: RunConfig) -> LocalEngine:
    return LocalEngine(config.model.path, config.actor.max_sequences, config.rollout.max_length)


def sglang_engine(config: RunConfig, name: str = "actor-0") -> SglangEngine:
    engine = SglangEngine(config, name)
    try:
        wait_for(engine, lambda: engine.version >= 0, 120.0)
    except BaseException:
        engine.close()
        raise
    return engine


def wait_for(engine, condition, seconds: float = 60.0) -> list:
    """Step until ``condition()``; what ended meanwhile."""
    ended, deadline = [], time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {engine.counters}"
        ended += engine.step(0.02)
    return ended


def drain(engine, seconds: float = 60.0) -> list:
    return wait_for(engine, lambda: not engine.in_flight, seconds)


def ask(number: int, prompt, samples: int = 1, tokens: int = 12, temperature: float = 1.0, **more) -> SampleRequest:
    return SampleRequest(number, np.asarray(prompt, np.int32), samples, tokens, temperature, (7, 1), **more)


def weights(directory: Path, bucket_bytes: int = 1 << 20) -> list:
    """The buckets in which a learner would send the directory's weights."""
    state = load_file(directory / "model.safetensors")
    listing = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in state.items()]
    plan = plan_buckets(listing, bucket_bytes)
    return [(bucket, flatten(bucket, state, torch.empty(bucket.nbytes, dtype=torch.uint8))) for bucket in plan]


def running_tokens(engine: SglangEngine) -> int:
    """Tokens that the server holds keys of at present."""
    url = engine.servers[0].client.url
    load = json.load(urllib.request.urlopen(f"{url}/v1/loads?include=core", timeout=5))["loads"][0]
    return load["num_used_tokens"]


def take_version(engine, version: int, directory: Path, bucket_bytes: int = 1 << 20) -> list:
    """Load it and wait until it is in use; returns what ended meanwhile."""
    engine.load(version, weights(directory, bucket_bytes))
    found = []

    def done() -> bool:
        loaded = engine.loaded()
        found.extend([loaded] if loaded is not None else [])
        return bool(found)

    ended = wait_for(engine, done)
    assert found[0].version == version and found[0].error == ""
    return ended


def reference(directory: Path):
    return AutoModelForCausalLM.from_pretrained(directory, experts_implementation="eager").eval()


@torch.inference_mode()
def logprobs_of(model, prompt, completion: Completion, temperature: float = 1.0) -> torch.Tensor:
    """log p ``[T, V]`` of every completion position, by one full forward."""
    ids = torch.from_numpy(np.concatenate([prompt, completion.token_ids]).astype(np.int64))[None]
    return (model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)


def at(rows: torch.Tensor, ids) -> np.ndarray:
    return rows.gather(1, torch.from_numpy(np.asarray(ids, np.int64))[:, None])[:, 0].numpy()


def prompt_of(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, VOCAB, length).astype(np.int32)


def attached(config: RunConfig, url: str, **engine) -> RunConfig:
    """The same, on a server that runs already."""
    return replace(config, engine=replace(config.engine, launch=0, addresses=(url,), **engine))
