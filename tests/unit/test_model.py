"""The decoder against transformers' own model: logits, gradients, files both ways, packing."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from common.config import ModelSection, RunConfig
from common.errors import ModelError
from learner.hf import exchange, files_of, load_hf, save_hf
from learner.layout import places, views
from learner.model.config import ModelConfig
from learner.model.decoder import Decoder
from learner.model.experts import Assignment, ExpertSettings, run_experts, spoils_idle
from learner.model.packing import PackPlan
from tests.unit.named import hf_tensors
from tools.stamp import STAMP, ModelState, model_state

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # far from uniform, so that wrong attention shows
    "pad_token_id": None,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
NO_HEAD_DIM = {name: value for name, value in SHAPE.items() if name != "head_dim"}
CONFIGS = {
    "moe": Qwen3MoeConfig(**SHAPE, **MOE),
    "moe_unnormalised_mixed_layers": Qwen3MoeConfig(
        **SHAPE, **{**MOE, "norm_topk_prob": False, "num_experts": 5, "num_experts_per_tok": 3}, mlp_only_layers=[1]
    ),
    "moe_tied": Qwen3MoeConfig(**SHAPE, **MOE, tie_word_embeddings=True, decoder_sparse_step=2),
    "moe_biased": Qwen3MoeConfig(**{**SHAPE, "num_key_value_heads": 1}, **MOE, attention_bias=True),
    "dense": Qwen3Config(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "dense_yarn": Qwen3Config(
        **{**SHAPE, "num_key_value_heads": 4, "num_hidden_layers": 1},
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    ),
    "shared_expert": Qwen2MoeConfig(**NO_HEAD_DIM, **MOE, shared_expert_intermediate_size=40),
    "qwen2": Qwen2Config(**NO_HEAD_DIM, tie_word_embeddings=True),
    "qwen2_linear": Qwen2Config(
        **{**NO_HEAD_DIM, "num_hidden_layers": 2},
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    ),
    "llama": LlamaConfig(
        **SHAPE,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "llama_biased": LlamaConfig(
        **{**SHAPE, "num_attention_heads": 2, "num_key_value_heads": 1}, attention_bias=True, mlp_bias=True,
        tie_word_embeddings=True,
    ),
}  # fmt: skip
LENGTHS = (7, 1, 19, 7, 12)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    torch.set_num_threads(1)
    out = {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        out[name] = tmp_path_factory.mktemp(name)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # norms start at one and biases at zero: make them matter
            if parameter.ndim == 1:
                parameter.data.uniform_(0.5, 1.5)
        model.save_pretrained(out[name])
    return out


def ours(directory):
    model = Decoder(ModelConfig.from_hf_dir(directory))
    load_hf(directory, model)
    return model


def reference(directory):
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", experts_implementation="eager")


def pack(seed=0):
    generator = np.random.default_rng(seed)
    token_ids = torch.from_numpy(generator.integers(0, SHAPE["vocab_size"], sum(LENGTHS)))
    return token_ids, np.concatenate(([0], np.cumsum(LENGTHS))).astype(np.int32)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_are_those_of_transformers(directories, name):
    model, hf = ours(directories[name]), reference(directories[name])
    token_ids, offsets = pack()
    weights = torch.randn(len(token_ids), SHAPE["vocab_size"], generator=torch.Generator().manual_seed(1))
    logits = model.hidden(token_ids, offsets) @ model.head.T
    parts = [hf(token_ids[None, a:b]).logits[0] for a, b in itertools.pairwise(offsets)]
    expected = torch.cat(parts)
    assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    theirs = {n: p.grad for n, p in hf.named_parameters()}
    named = gradients_by_hf_name(model)
    assert len(named) == sum(1 for _ in hf_tensors(model))
    for their_name, grad in flatten_experts(theirs, hf.config).items():
        scale = grad.abs().max().clamp_min(1e-3)
        assert torch.allclose(named[their_name], grad, rtol=1e-4, atol=1e-5 * float(scale)), their_name


def gradients_by_hf_name(model):
    """Gradients under their HF names: the views of hf_tensors over a copy that holds gradients."""
    shadow = Decoder(model.config)
    for theirs, parameter in zip(shadow.parameters(), model.parameters(), strict=True):
        theirs.data.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return dict(hf_tensors(shadow))


def flatten_experts(grads, config):
    """transformers keeps experts stacked; files and our names have one tensor each."""
    out = {}
    for name, grad in grads.items():
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(grad):
                gate, up = both.chunk(2)
                out[f"{name[: -len('gate_up_proj')]}{e}.gate_proj.weight"] = gate
                out[f"{name[: -len('gate_up_proj')]}{e}.up_proj.weight"] = up
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(grad):
                out[f"{name[: -len('down_proj')]}{e}.down_proj.weight"] = down
        else:
            out[name] = grad
    return out


def test_packed_sequences_are_those_run_one_by_one(directories):
    model = ours(directories["moe"])
    token_ids, offsets = pack()

    def run(tokens, ends):
        return model.stage(model.pack(tokens, ends), None)

    hidden, together = run(token_ids, offsets)
    alone = [run(token_ids[a:b], [0, b - a]) for a, b in itertools.pairwise(offsets)]
    apart = [routing for _, routing in alone]
    assert torch.allclose(hidden, torch.cat([h for h, _ in alone]), rtol=1e-5, atol=1e-5)
    assert torch.equal(together.counts_LE, sum(f.counts_LE for f in apart))
    assert torch.allclose(together.prob_sums_LE, sum(f.prob_sums_LE for f in apart), atol=1e-4)
    assert together.counts_LE.sum(dim=1).tolist() == [sum(LENGTHS) * MOE["num_experts_per_tok"]] * 3


def test_a_later_token_and_a_neighbour_change_nothing(directories):
    model = ours(directories["moe"])
    token_ids, offsets = pack()
    changed = token_ids.clone()
    changed[offsets[2] + 10 :] = 0
    before, after = (model.hidden(t, offsets) for t in (token_ids, changed))
    same = slice(0, int(offsets[2]) + 10)
    assert torch.allclose(before[same], after[same], atol=1e-6)
    assert not torch.allclose(before[int(offsets[2]) + 10 :], after[int(offsets[2]) + 10 :], atol=1e-2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "how",
    [ExpertSettings(grouped=True), pytest.param(ExpertSettings(compiled=True), marks=pytest.mark.slow)],
    ids=str,
)
def test_experts_computed_otherwise_are_those_that_take_turns(directories, how):
    if how.compiled and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    token_ids, offsets = pack()
    results = []
    for settings in (ExpertSettings(), how):
        model = ours(directories["moe"])
        model.use_experts(settings)
        hidden = model.hidden(token_ids, offsets)
        hidden.square().sum().backward()
        results.append((hidden.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    for in_turn, other in zip(results[0][1], results[1][1], strict=True):
        assert torch.allclose(in_turn, other, rtol=1e-4, atol=1e-5 * float(in_turn.abs().max() + 1))


def test_what_experts_compute_beyond_their_own_rows_leaves_no_trace(monkeypatch):
    """Whatever length is taken for theirs: beside every row alone, and with memory that is NaN before it is set."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.tensor([[1, 4], [4, 1], [1, 4], [4, 6], [1, 6], [1, 4], [4, 3]])  # 0, 2, 5 and 7 are idle
    shapes = ((7, 12), (8, 20, 12), (8, 12, 10), (7, 2))
    x, gate_up, down, gates = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    inputs = [t.requires_grad_() for t in (x, gate_up, down, gates)]
    rows = []
    for row in range(7):
        both = torch.einsum("eic,c->ei", gate_up[chosen[row]], x[row])
        hidden = F.silu(both[:, :10]) * both[:, 10:] * gates[row][:, None]
        rows.append(torch.einsum("eci,ei->c", down[chosen[row]], hidden))
    wanted = [torch.stack(rows), *torch.autograd.grad(torch.stack(rows).square().sum(), inputs)]

    assignment = Assignment.of(chosen, 8)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        for longer in (lambda n, _: n, lambda n, _: n + 1, lambda n, _: -(-n // 16) * 16):
            monkeypatch.setattr("learner.model.experts.length_that_comes_again", longer)
            out = run_experts(x, assignment.sort(gates), gate_up, down, assignment, ExpertSettings())
            found = [out, *torch.autograd.grad(out.square().sum(), inputs)]
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    finally:
        torch.use_deterministic_algorithms(False)


def trained_experts(grouped, rows=40):
    """The gradients of 6 experts, of which 1 and 5 are idle, and what came out."""
    generator = torch.Generator().manual_seed(0)
    x, gate_up, down = (
        torch.randn(shape, generator=generator).requires_grad_() for shape in ((rows, 16), (6, 16, 16), (6, 16, 8))
    )
    chosen = torch.tensor([0, 2, 3, 4])[torch.rand((rows, 4), generator=generator).argsort(dim=1)[:, :2]]
    assignment = Assignment.of(chosen, 6)
    weights = torch.rand(2 * rows, generator=generator).requires_grad_()
    out = run_experts(x, weights, gate_up, down, assignment, ExpertSettings(grouped=grouped))
    out.square().sum().backward()
    return [out.detach(), x.grad, weights.grad, gate_up.grad, down.grad]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_a_grouped_product_leaves_for_idle_experts_is_cleared_where_it_is_garbage(monkeypatch):
    whole = F.grouped_mm

    def blackwell(a, b, *, offs):
        out = whole(a, b, offs=offs)
        if a.ndim == b.ndim == 2:  # a weight's gradient, by expert
            out[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
        return out

    monkeypatch.setattr(F, "grouped_mm", blackwell)
    assert trained_experts(True)[4].isnan().any()
    monkeypatch.setattr("learner.model.experts.spoils_idle", lambda device: True)
    for found, expected in zip(trained_experts(True), trained_experts(False), strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("capability", "spoils"), [((9, 0), False), ((10, 0), True), ((10, 3), True)])
def test_blackwell_is_known_by_its_capability(monkeypatch, capability, spoils):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert spoils_idle(torch.device("cuda", 0)) is spoils
    assert not spoils_idle(torch.device("cpu"))


def test_without_rows_no_grouped_product_is_asked_for(monkeypatch):
    monkeypatch.setattr(F, "grouped_mm", None)
    out, *grads = trained_experts(True, rows=0)
    assert out.shape == (0, 16)
    assert not any(grad.any() for grad in grads)


def test_an_empty_pack_runs_and_reaches_no_weight(directories):
    model = ours(directories["moe"])
    hidden, routing = model.stage(model.pack(torch.zeros(0, dtype=torch.int64), [0]), None)
    assert hidden.shape == (0, SHAPE["hidden_size"])
    (hidden.sum() + routing.prob_sums_LE.sum()).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_place_has_its_view_of_that_shape_and_no_byte_is_without_a_name(directories, name):
    model = ours(directories[name])
    held = views(model)
    assert [p.name for p in places(model.config)] == [n for n, _ in hf_tensors(model)]
    for place in places(model.config):
        assert tuple(held[place.name].shape) == place.shape, place.name
        assert held[place.name].is_contiguous(), place.name
    assert sum(v.numel() for v in held.values()) == sum(p.numel() for p in model.parameters())


def test_recomputed_activations_give_the_same_gradients(directories):
    token_ids, offsets = pack()
    grads = []
    for recompute in (False, True):
        model = Decoder(ModelConfig.from_hf_dir(directories["moe"]), recompute=recompute)
        load_hf(directories["moe"], model)
        model.hidden(token_ids, offsets).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for kept, again in zip(*grads, strict=True):
        assert (kept is None and again is None) or torch.equal(kept, again)


def test_recorded_experts_replace_the_routers_own_and_leave_gates_differentiable(directories):
    """algorithms.md 7, T22: a no-op on one's own record; otherwise gates are a softmax over the record."""
    model = ours(directories["moe"])
    token_ids, offsets = pack()
    layer = model.layers["0"].mlp
    x = torch.randn(len(token_ids), SHAPE["hidden_size"], generator=torch.Generator().manual_seed(2))
    own = (x @ layer.router.T).softmax(-1).topk(2).indices
    plain, _ = layer(x, 0, model.pack(token_ids, offsets))
    replayed, stats = layer(x, 0, model.pack(token_ids, offsets, own[:, None]))
    assert torch.equal(plain, replayed)
    assert (stats.replayed, stats.rerouted) == (2 * len(x), 0)
    other = (own + 1) % 8
    unknown = torch.arange(len(x)) % 3 == 0
    record = torch.where(unknown[:, None], -1, other)
    changed, stats = layer(x, 0, model.pack(token_ids, offsets, record[:, None]))
    used = torch.where(unknown[:, None], own, other)
    expected = torch.zeros_like(x)
    gates = (x @ layer.router.T).gather(1, used).softmax(-1)
    for t in range(len(x)):
        for slot in range(2):
            gate, up = (layer.gate_up[used[t, slot]] @ x[t]).chunk(2)
            expected[t] += gates[t, slot] * (layer.down[used[t, slot]] @ (torch.nn.functional.silu(gate) * up))
    assert torch.allclose(changed, expected, rtol=1e-4, atol=1e-4)
    naive = sum(int(e not in own[t]) for t in range(len(x)) if not unknown[t] for e in other[t])
    assert (stats.replayed, stats.rerouted) == (2 * int((~unknown).sum()), naive)
    only_first = torch.zeros(len(x), 1, 2, dtype=torch.int64)
    only_first[..., 1] = 1
    layer(x, 0, model.pack(token_ids, offsets, only_first))[0].square().sum().backward()
    assert layer.router.grad[:2].abs().sum() > 0
    assert not layer.router.grad[2:].any()  # experts outside the record get no gradient


def test_plan_covers_every_token_once():
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(0, 30, rng.integers(1, 12))
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        plan = PackPlan.of(offsets, torch.device("cpu"))
        assert len(set(plan.scatter.tolist())) == offsets[-1]
        assert plan.gather[plan.scatter].tolist() == list(range(offsets[-1]))
        assert plan.positions.tolist() == [i for n in lengths for i in range(n)]
        assert sum(b * t for b, t in plan.shapes) <= 1.2 * offsets[-1] + 1


@pytest.mark.parametrize("name", CONFIGS)
def test_an_exported_directory_loads_in_transformers_with_the_same_logits(directories, tmp_path, name, monkeypatch):
    monkeypatch.setattr("learner.hf.SHARD_BYTES", 30_000)  # several files and an index
    model = ours(directories[name])
    save_hf(hf_tensors(model), directories[name], tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    token_ids, _ = pack()
    with torch.no_grad():
        there = reference(tmp_path / "out")(token_ids[None]).logits
        here = reference(directories[name])(token_ids[None]).logits
    assert torch.allclose(there, here, rtol=1e-6, atol=1e-6)
    again = ours(tmp_path / "out")
    for (name_a, a), (name_b, b) in zip(hf_tensors(model), hf_tensors(again), strict=True):
        assert name_a == name_b
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exported_directory_loads_as_what_was_written_whatever_its_source_is(directories, tmp_path, dtype):
    source = tmp_path / "source"
    shutil.copytree(directories["dense"], source)
    config = json.loads((source / "config.json").read_text())
    said = {torch.float32: "bfloat16", torch.bfloat16: "float32"}[dtype]
    (source / "config.json").write_text(json.dumps({**config, "dtype": said, "torch_dtype": said}))
    model = ours(source).to(dtype)
    save_hf(hf_tensors(model), source, tmp_path / "out")
    loaded = reference(tmp_path / "out")
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert all(torch.equal(dict(loaded.named_parameters())[n], t) for n, t in hf_tensors(model))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["dtype"] == written["torch_dtype"] == str(dtype).removeprefix("torch.")
    (source / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    save_hf(hf_tensors(model), source, tmp_path / "silent")
    assert {p.dtype for p in reference(tmp_path / "silent").parameters()} == {dtype}
    assert "torch_dtype" not in json.loads((tmp_path / "silent" / "config.json").read_text())


@pytest.mark.parametrize("at_once", [True, False])
def test_a_model_is_replaced_by_a_whole_one(directories, tmp_path, monkeypatch, at_once):
    """Whatever number of files it had, and whenever the writing ends."""
    if not at_once:
        monkeypatch.setattr("learner.hf.exchange", lambda one, other: False)
    source, out = directories["dense"], tmp_path / "out"
    first, second = ours(source), ours(source)
    with torch.no_grad():
        second.embed.add_(1)

    def held():
        return ours(out).embed

    def interrupted(model):
        yield from list(hf_tensors(model))[:-1]
        assert torch.equal(held(), first.embed)
        raise KeyboardInterrupt

    for limit, model in ((30_000, first), (1 << 30, second), (30_000, first)):
        monkeypatch.setattr("learner.hf.SHARD_BYTES", limit)
        save_hf(hf_tensors(model), source, out)
        assert torch.equal(held(), model.embed)
        listed = {file for file in files_of(out)}
        assert {file.name for file in out.glob("*.safetensors")} == listed and (len(listed) > 1) == (limit == 30_000)
    with pytest.raises(KeyboardInterrupt):
        save_hf(interrupted(second), source, out)
    assert torch.equal(held(), first.embed)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    (tmp_path / "link").symlink_to(out)
    save_hf(hf_tensors(second), source, tmp_path / "link")
    assert torch.equal(held(), second.embed) and (tmp_path / "link").is_symlink()


def test_two_directories_swap_their_names(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "word").write_text(name)
    swapped = exchange(tmp_path / "a", tmp_path / "b")
    assert [(tmp_path / name / "word").read_text() for name in "ab"] == (["b", "a"] if swapped else ["a", "b"])
    assert not exchange(tmp_path / "a", tmp_path / "nothing")


def test_a_half_directory_says_what_is_missing(directories, tmp_path):
    with pytest.raises(ModelError, match=r"no such directory.*tools\.warmstart"):
        ModelConfig.from_hf_dir(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        ModelConfig.from_hf_dir(tmp_path / "empty")
    source = json.loads((directories["moe"] / "config.json").read_text())
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_text(json.dumps(source))
    with pytest.raises(ModelError, match=r"none of model\.safetensors"):
        ModelConfig.from_hf_dir(half)
    (half / "config.json").write_text(json.dumps(source)[:-20])
    (half / "model.safetensors").write_bytes((directories["moe"] / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ModelError, match="not valid JSON"):
        ModelConfig.from_hf_dir(half)
    (half / "config.json").write_text(json.dumps(source))
    with pytest.raises(ModelError, match=r"half.*copy the whole directory again"):
        load_hf(half, Decoder(ModelConfig.from_hf_dir(half)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type='longrope'"),
        ({"rope_parameters": {"rope_type": "yarn", "max_position_embeddings": 0}}, "rope_type='yarn' needs a factor"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"model_type": "qwen2", "attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)
def test_an_unsupported_architecture_is_refused_by_name(directories, change, words):
    source = json.loads((directories["moe"] / "config.json").read_text())
    with pytest.raises(ModelError, match=words):
        ModelConfig.from_dict({**source, **change}, "config.json")


def test_weights_of_another_shape_are_refused_by_name(directories):
    config = ModelConfig.from_hf_dir(directories["moe"])
    wider = Decoder(ModelConfig(**{**vars(config), "moe_intermediate_size": 32}))
    with pytest.raises(ModelError, match=r"experts\.0\..*has shape"):
        load_hf(directories["moe"], wider)
    deeper = Decoder(ModelConfig(**{**vars(config), "num_hidden_layers": 4}))
    with pytest.raises(ModelError, match=r"tensors are missing, among them model\.layers\.3"):
        load_hf(directories["moe"], deeper)


def test_a_full_disk_or_a_file_in_the_way_is_named(directories, tmp_path):
    source = next(iter(directories.values()))
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(ModelError, match=r"out: cannot write the model .*is the disk full"):
        save_hf(hf_tensors(ours(source)), source, tmp_path / "out")


def test_a_tied_head_that_is_not_the_embedding_and_contradicting_sizes_are_refused(directories, tmp_path):
    shutil.copytree(directories["moe"], tmp_path / "tied")
    described = json.loads((tmp_path / "tied" / "config.json").read_text())
    (tmp_path / "tied" / "config.json").write_text(json.dumps({**described, "tie_word_embeddings": True}))
    with pytest.raises(ModelError, match=r"lm_head\.weight is not model\.embed_tokens\.weight.*tie_word_embeddings"):
        ours(tmp_path / "tied")
    for change, words in (
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than num_experts=8"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"hidden_size": None}, "a size is not a number"),
    ):
        with pytest.raises(ModelError, match=words):
            ModelConfig.from_dict({**described, **change}, "config.json")


def test_a_trained_directory_is_nobody_s_to_replace(directories, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(next(iter(directories.values())), source)
    (source / STAMP).write_text("{}")
    save_hf(hf_tensors(ours(source)), source, tmp_path / "trained")
    assert not (tmp_path / "trained" / STAMP).exists()
    config = RunConfig(model=ModelSection(path=str(tmp_path / "trained")))
    assert model_state(config) is ModelState.FOREIGN
