"""The engine against transformers itself: full forwards, ``generate``, and a chi-square of its samples."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from actor.engine.base import Completion, SampleRequest
from actor.engine.experts import sparse_forward, use_lean_experts
from actor.engine.loading import read_model_facts
from actor.engine.local import LocalEngine
from actor.engine.sampling import sample
from common.config.sampling import LEAST_TEMPERATURE
from common.errors import EngineError, ModelError
from common.philox import uniforms
from common.wire import UNROUTED

VOCAB, EOS, MAX_LENGTH = 23, 1, 40
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # far from uniform, so that wrong attention shows
    "eos_token_id": EOS,
    "bos_token_id": None,
    "pad_token_id": 0,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
MIXED = {"num_hidden_layers": 4, "mlp_only_layers": [1], "num_experts_per_tok": 3}  # three sparse layers of four
CONFIGS = {
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, head_dim=8, **MOE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SHAPE),
    "llama": LlamaConfig(**SHAPE),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model directory of each family, and a second set of MoE weights."""
    torch.set_num_threads(1)
    out = {}
    more = {
        "other": CONFIGS["qwen3_moe"],
        "mixed": Qwen3MoeConfig(**(SHAPE | MOE | MIXED), head_dim=8),
        "gelu": Qwen3MoeConfig(**(SHAPE | MOE), hidden_act="gelu", head_dim=8),  # not the lean forward
    }
    for name, config in (CONFIGS | more).items():
        torch.manual_seed(len(out))
        out[name] = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_config(config).save_pretrained(out[name])
    return out


def reference(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, experts_implementation="eager").eval()


def engine_of(directory: Path, max_sequences: int = 16) -> LocalEngine:
    return LocalEngine(directory, max_sequences, MAX_LENGTH)


def request(
    number: int, prompt: Any, samples: int = 1, tokens: int = 12, temperature: float = 1.0, **more: Any
) -> SampleRequest:
    return SampleRequest(number, np.asarray(prompt, np.int32), samples, tokens, temperature, (7, 1), **more)


def prompts(count: int, lengths: tuple[int, int] = (1, 9)) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, VOCAB, rng.integers(*lengths)).astype(np.int32) for _ in range(count)]


def drain(engine: LocalEngine) -> dict[tuple[int, int], Completion]:
    out = {}
    while engine.busy:
        out.update({(c.request_id, c.sibling): c for c in engine.step()})
    return out


@torch.inference_mode()
def full_logprobs(model: Any, prompt: np.ndarray, completion: Completion, temperature: float = 1.0) -> torch.Tensor:
    """log q ``[T, V]`` of every completion position, by one full forward."""
    ids = torch.from_numpy(np.concatenate([prompt, completion.token_ids]).astype(np.int64))[None]
    logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


@torch.inference_mode()
def routed_experts(model: Any, ids: np.ndarray, cache: Any = None) -> tuple[np.ndarray, Any]:
    """Experts ``[len(ids), R]`` of one forward by transformers itself, and its cache."""
    out = model(
        torch.from_numpy(ids.astype(np.int64))[None], past_key_values=cache, use_cache=True, output_router_logits=True
    )
    k = model.config.num_experts_per_tok
    return np.concatenate([logits.topk(k).indices.numpy() for logits in out.router_logits], axis=1), out.past_key_values


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_rows_of_different_lengths_equal_generate(models: dict[str, Path], family: str) -> None:
    model, engine = reference(models[family]), engine_of(models[family])
    asked = prompts(6)
    for number, prompt in enumerate(asked):
        engine.add(request(number, prompt, temperature=0.0))
    done = drain(engine)
    for number, prompt in enumerate(asked):
        completion = done[number, 0]
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert completion.token_ids.tolist() == wanted[0, len(prompt) :].tolist()
        rows = full_logprobs(model, prompt, completion)
        expected = rows[torch.arange(len(rows)), torch.from_numpy(completion.token_ids.astype(np.int64))]
        np.testing.assert_allclose(completion.logprobs, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_logged_density_is_the_sampled_one(models: dict[str, Path], family: str) -> None:
    """With slots refilled while others decode, so rows move and lengths mix."""
    model, engine = reference(models[family]), engine_of(models[family], max_sequences=7)
    asked = prompts(9)
    for number, prompt in enumerate(asked):
        engine.add(request(number, prompt, samples=3, tokens=4 + number, temperature=0.7, top_logprobs=number % 3))
    assert engine.in_flight == 27
    done = drain(engine)
    assert len(done) == 27 and engine.in_flight == 0
    for (number, _), c in done.items():
        rows = full_logprobs(model, asked[number], c, 0.7)
        ids = torch.from_numpy(c.token_ids.astype(np.int64))
        np.testing.assert_allclose(c.logprobs, rows.gather(1, ids[:, None])[:, 0].numpy(), atol=1e-5)
        top = rows.topk(number % 3)
        assert c.topk_ids.tolist() == top.indices.tolist()
        np.testing.assert_allclose(c.topk_logprobs, top.values.numpy(), atol=1e-5)
        assert c.finish_reason == ("stop" if c.token_ids[-1] == EOS else "length")
        assert EOS not in c.token_ids[:-1]
        assert len(c.token_ids) == 4 + number or c.finish_reason == "stop"
    assert {c.finish_reason for c in done.values()} == {"stop", "length"}


def test_samples_do_not_depend_on_what_else_is_in_flight(models: dict[str, Path]) -> None:
    asked = prompts(8)
    together, alone = engine_of(models["qwen3_moe"], 64), engine_of(models["qwen3_moe"], 2)
    for number, prompt in enumerate(asked):
        together.add(request(number + (1 << 62), prompt, samples=2))
    batch = drain(together)
    for number in reversed(range(8)):
        alone.add(request(number + (1 << 62), asked[number], samples=2))
    single = drain(alone)
    assert batch.keys() == single.keys()
    for key, completion in batch.items():
        assert completion.token_ids.tolist() == single[key].token_ids.tolist()
    assert len({tuple(c.token_ids) for c in batch.values()}) > 12  # siblings differ


def test_two_noise_keys_and_ignored_ends(models: dict[str, Path]) -> None:
    engine = engine_of(models["qwen3_moe"])
    engine.add(request(0, [3, 4], samples=4, tokens=20, ignore_eos=True))
    engine.add(SampleRequest(1, np.array([3, 4], np.int32), 4, 20, 1.0, (7, 2), ignore_eos=True))
    done = drain(engine)
    assert all(len(c.token_ids) == 20 and c.finish_reason == "length" for c in done.values())
    assert any(EOS in c.token_ids for c in done.values())
    assert done[0, 0].token_ids.tolist() != done[1, 0].token_ids.tolist()


def test_swap_in_flight_stamps_and_samples_with_the_new_weights(models: dict[str, Path]) -> None:
    old, new = reference(models["qwen3_moe"]), reference(models["other"])
    source = engine_of(models["other"]).weight_targets()
    engine = engine_of(models["qwen3_moe"])
    prompt = np.array([5, 9, 2], np.int32)
    engine.add(request(0, prompt, tokens=10, ignore_eos=True))
    for _ in range(4):
        engine.step()
    engine.swap(3, {name: tensor.clone() for name, tensor in source.items()})
    completion = drain(engine)[0, 0]
    assert completion.versions.tolist() == [0] * 4 + [3] * 6 and engine.version == 3
    # The oracle: transformers' own cache filled by the old weights, read on by the new.
    ids = torch.from_numpy(np.concatenate([prompt, completion.token_ids]).astype(np.int64))[None]
    with torch.inference_mode():
        before = old(ids[:, :6], use_cache=True)
        after = new(ids[:, 6:12], past_key_values=before.past_key_values, use_cache=True)
    rows = torch.cat([before.logits[0, 2:], after.logits[0]]).log_softmax(-1)
    expected = rows.gather(1, ids[0, 3:, None])[:, 0]
    np.testing.assert_allclose(completion.logprobs, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(("family", "width"), [("qwen3_moe", 4), ("mixed", 9), ("gelu", 4)])
def test_recorded_experts_are_those_of_a_full_forward(models: dict[str, Path], family: str, width: int) -> None:
    """With ragged prompts and rows that move, every token that was read, and only those."""
    model, asked = reference(models[family]), prompts(9)
    engine = LocalEngine(models[family], 7, MAX_LENGTH, record_experts=True)
    for number, prompt in enumerate(asked):
        engine.add(request(number, prompt, samples=1 + number % 3, tokens=1 + number))
    done = drain(engine)
    assert len(done) == 18
    for (number, _), completion in done.items():
        ids = np.concatenate([asked[number], completion.token_ids])
        expected, _ = routed_experts(model, ids)
        assert completion.experts.shape == (len(ids), width)
        assert completion.experts.dtype == np.uint16
        np.testing.assert_array_equal(completion.experts[:-1], expected[:-1])
        assert (completion.experts[-1] == UNROUTED).all()


def test_recorded_experts_are_of_the_weights_that_read_the_token(models: dict[str, Path]) -> None:
    old, new = reference(models["qwen3_moe"]), reference(models["other"])
    source = engine_of(models["other"]).weight_targets()
    engine = LocalEngine(models["qwen3_moe"], 4, MAX_LENGTH, record_experts=True)
    prompt = np.array([5, 9, 2], np.int32)
    engine.add(request(0, prompt, tokens=10, ignore_eos=True))
    for _ in range(4):
        engine.step()
    engine.swap(3, {name: tensor.clone() for name, tensor in source.items()})
    completion = drain(engine)[0, 0]
    ids = np.concatenate([prompt, completion.token_ids])
    before, cache = routed_experts(old, ids[:6])
    after, _ = routed_experts(new, ids[6:12], cache)
    np.testing.assert_array_equal(completion.experts[:-1], np.concatenate([before, after]))
    assert (before != routed_experts(new, ids[:6])[0]).any()


def test_nothing_is_recorded_unless_asked_and_a_dense_model_cannot(models: dict[str, Path]) -> None:
    engine = engine_of(models["qwen3_moe"])
    engine.add(request(0, [3, 4], tokens=5, ignore_eos=True))
    assert drain(engine)[0, 0].experts.shape == (7, 0)
    with pytest.raises(ModelError, match=r"routing_replay=true: .* no experts .*set rollout\.routing_replay=false"):
        LocalEngine(models["llama"], 1, MAX_LENGTH, record_experts=True)


def test_a_bias_on_the_experts_chooses_them_and_is_swapped_in_and_loaded_again(
    models: dict[str, Path], tmp_path: Path
) -> None:
    plain = LocalEngine(models["qwen3_moe"], 4, MAX_LENGTH, record_experts=True)
    engine = LocalEngine(models["qwen3_moe"], 4, MAX_LENGTH, record_experts=True, expert_bias=True)
    asked = request(0, prompts(1)[0], temperature=0.0)

    def run(engine: LocalEngine) -> Completion:
        engine.add(asked)
        return drain(engine)[0, 0]

    before = run(plain)
    assert np.array_equal(before.token_ids, run(engine).token_ids)  # zeros change nothing
    tensors = {name: tensor.clone() for name, tensor in engine.weight_targets().items()}
    biases = [name for name in tensors if name.endswith("e_score_correction_bias")]
    assert biases and not set(biases) & set(plain.weight_targets())
    for name in biases:
        tensors[name][[0, 3]] = 9.0  # whatever the routers say
    engine.swap(1, tensors)
    after = run(engine)
    fed = after.experts[:-1].reshape(-1, 2)
    assert (np.sort(fed, axis=1) == [0, 3]).all()
    shutil.copytree(models["qwen3_moe"], tmp_path / "with")
    save_file({name: tensors[name] for name in biases}, tmp_path / "with" / "more.safetensors")
    described = json.loads((tmp_path / "with" / "config.json").read_text())
    (tmp_path / "with" / "config.json").write_text(json.dumps({**described, "expert_bias": True}))
    again = LocalEngine(tmp_path / "with", 4, MAX_LENGTH)
    assert np.array_equal(run(again).token_ids, after.token_ids)


def test_swap_refuses_incomplete_or_foreign_weights_and_changes_nothing(models: dict[str, Path]) -> None:
    engine = engine_of(models["qwen3_moe"])
    tensors = {name: torch.zeros_like(tensor) for name, tensor in engine.weight_targets().items()}
    name = next(iter(tensors))
    with pytest.raises(EngineError, match="1 tensors are missing"):
        engine.swap(1, {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(EngineError, match="1 unknown"):
        engine.swap(1, tensors | {"extra": torch.zeros(1)})
    with pytest.raises(EngineError, match="shape"):
        engine.swap(1, tensors | {name: torch.zeros(2, 2)})
    assert engine.version == 0 and engine.weight_targets()[name].abs().sum() > 0


def test_non_finite_logits_name_version_and_request_and_abort_recovers(models: dict[str, Path]) -> None:
    engine = engine_of(models["qwen3"])
    good = {name: tensor.clone() for name, tensor in engine.weight_targets().items()}
    engine.swap(4, good | {"model.norm.weight": torch.full_like(good["model.norm.weight"], float("nan"))})
    engine.add(request(11, [3, 4], samples=2))
    with pytest.raises(EngineError, match="request 11: version 4"):
        engine.step()
    engine.abort()
    assert not engine.busy and engine.in_flight == 0
    engine.swap(5, good)
    engine.add(request(12, [3, 4]))
    assert np.isfinite(drain(engine)[12, 0].logprobs).all()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request(1, [VOCAB]), "outside"),
        (request(1, [-1]), "outside"),
        (request(1, []), "P >= 1"),
        (request(1, [2] * 30, tokens=11), "max_length=40"),
        (request(1, [2], samples=17), "max_sequences=16"),
        (request(1, [2], temperature=-1.0), "temperature"),
        (request(1, [2], top_logprobs=99), "top_logprobs"),
    ],
)
def test_impossible_requests_are_refused(models: dict[str, Path], bad: SampleRequest, message: str) -> None:
    with pytest.raises(EngineError, match=f"request 1: .*{message}"):
        engine_of(models["llama"]).add(bad)


def test_bad_directories_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not there"):
        engine_of(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"config\.json"):
        engine_of(tmp_path)
    (tmp_path / "config.json").write_bytes((models["llama"] / "config.json").read_bytes())
    with pytest.raises(ModelError, match="copy the whole directory"):
        engine_of(tmp_path)
    weights = (models["llama"] / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        engine_of(tmp_path)
    with pytest.raises(ModelError, match="max_position_embeddings=64"):
        LocalEngine(models["llama"], 1, 65)


@pytest.mark.parametrize("tokens", [1, 5, 24, 25, 200])  # on both sides of FEW_ROWS
@pytest.mark.parametrize("normalised", [True, False])
def test_lean_experts_equal_transformers(tokens: int, normalised: bool) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SHAPE, head_dim=8, **(MOE | {"norm_topk_prob": normalised}))
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    block, hidden = model.model.layers[0].mlp, torch.randn(1, tokens, 32)
    with torch.inference_mode():
        torch.testing.assert_close(sparse_forward(block, hidden), block(hidden), atol=1e-5, rtol=1e-5)
    assert use_lean_experts(model) == 2


def test_sampling_follows_the_distribution() -> None:
    """Chi-square of 1e5 tokens: 5 degrees of freedom, the 0.999 quantile is 20.5."""
    draws = 100_000
    probabilities = np.array([0.5, 0.2, 0.0, 0.15, 0.1, 0.04, 0.01])
    with np.errstate(divide="ignore"):
        logits = torch.from_numpy(np.log(probabilities)).float().mul(0.5).expand(draws, -1)
    noise = torch.from_numpy(uniforms(0, 1, np.arange(draws), 0, 0, 0))
    sampled = sample(logits, torch.full((draws,), 0.5), noise)
    counts = np.bincount(sampled.ids.numpy(), minlength=7)
    assert counts[2] == 0
    expected = probabilities * draws
    kept = expected > 0
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < 20.5
    np.testing.assert_allclose(sampled.logprobs.numpy(), np.log(probabilities[sampled.ids.numpy()]), atol=1e-6)


def test_the_least_temperature_samples_logits_of_thousands() -> None:
    logits = torch.tensor([[5e4, 5e4, -5e4]]).expand(2, -1)
    noise = torch.tensor([0.1, 0.9], dtype=torch.float64)
    sampled = sample(logits, torch.full((2,), LEAST_TEMPERATURE), noise)
    assert sampled.ids.tolist() == [0, 1]
    np.testing.assert_allclose(sampled.logprobs.numpy(), np.log(0.5), atol=1e-6)


def test_zero_probabilities_at_either_end_are_never_sampled() -> None:
    logits = torch.tensor([[-1e9, 0.0, -1e9, 0.0, -1e9]]).expand(4, -1)
    noise = torch.tensor([2.0**-53, 0.5, 1.0 - 2.0**-53, 1.0], dtype=torch.float64)
    ids = sample(logits, torch.ones(4), noise).ids
    assert set(ids.tolist()) <= {1, 3} and ids[0] == 1 and ids[3] == 3


def test_a_model_with_a_bias_that_no_server_knows_is_refused(tmp_path):
    facts = {"max_position_embeddings": 64, "vocab_size": 8, "expert_bias": True}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ModelError, match=r"config\.json: expert_bias: .* actor\.engine=local"):
        read_model_facts(tmp_path, 32)
