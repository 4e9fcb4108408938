"""Any mesh trains as one process does: loss, gradient norm and updated weights, over gloo."""

import json
import math
from functools import cache
from itertools import pairwise

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from common.config import LearnerSection, OptimSection
from common.errors import ConfigError
from common.objective import LossSection
from learner import checkpoint
from learner.checkpoint import TrainingState
from learner.freeze import freeze
from learner.layout import places, views
from learner.mesh import AXES, Mesh, check_world, single
from learner.model.config import ModelConfig
from learner.model.decoder import Decoder
from learner.optim import Optimizer
from learner.retention import Retention
from learner.saving import CheckpointWriter
from learner.step import StepSettings, train_step
from learner.weights.gather import WeightGather
from tests.unit.test_step import batch_of

USUAL = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 8, "mlp_only_layers": (1,),
}  # fmt: skip
MODELS = {
    "moe": ModelConfig(**USUAL),
    "tied_shared_biased": ModelConfig(**{
        **USUAL, "tie_word_embeddings": True, "shared_expert_intermediate_size": 12, "qkv_bias": True, "o_bias": True,
        "mlp_bias": True, "qk_norm": False, "norm_topk_prob": False, "mlp_only_layers": (0, 3),
    }),
    "biased": ModelConfig(**USUAL, expert_bias=True),
    "dense": ModelConfig(**{**USUAL, "num_experts": 0, "num_experts_per_tok": 0, "mlp_only_layers": ()}),
}  # fmt: skip
LENGTHS = (5, 9, 3, 9, 7, 4, 8)
STEPS = 2
OPTIM = OptimSection(lr=1e-2, eps=1e-3, weight_decay=0.1)  # a small eps would turn rounding into whole steps
# Case -> (how sequences go to the data ranks, accepted share, experts that the rollout used)
CASES = {
    "even": ("round", 0.7, None),
    "uneven": ("last", 0.7, None),
    "empty_rank": ("first", 0.7, None),
    "all_rejected": ("round", 0.0, None),
    "idle_experts": ("round", 0.7, (0, 1)),
}
HALF = ("model.embed_tokens.*", "model.layers.0.*", "model.layers.1.*")  # all of the first stage of two
ABOVE = ("model.layers.2.*", "model.layers.3.*", "model.norm.weight", "lm_head.weight")  # all of the second
OTHERWISE = {  # name -> (model, case, more)
    "frozen": ("moe", "uneven", {"frozen": HALF}),
    "frozen_above": ("moe", "even", {"frozen": ABOVE}),
    "frozen_tied": ("tied_shared_biased", "even", {"frozen": HALF}),
    "recompute": ("moe", "empty_rank", {"recompute": True}),
    "dense": ("dense", "empty_rank", {}),
    "bias": ("biased", "uneven", {"expert_bias_rate": 0.05}),
    "m2po": ("moe", "uneven", {"kind": "m2po"}),
    "gspo": ("moe", "even", {"kind": "gspo"}),
    "entropy": ("tied_shared_biased", "uneven", {"kind": "entropy"}),
}
LOSSES = {
    "ppo": {},
    "entropy": {"entropy": 0.01},
    "m2po": {"kind": "m2po", "m2_threshold": 0.3},
    "gspo": {"kind": "gspo", "aggregate": "sequence_mean"},
}
MESHES = {  # part -> what one set of processes goes through
    "axes": ({"tp": 2}, {"ep": 2}, {"dp_shard": 2}, {"dp_replicate": 2}, {"pp": 2}),
    "pairs": ({"tp": 2, "ep": 2}, {"ep": 2, "dp_shard": 2}, {"tp": 2, "dp_shard": 2}, {"pp": 2, "dp_shard": 2}),
    "rest": (
        {"pp": 2, "tp": 2}, {"pp": 2, "ep": 2}, {"dp_replicate": 2, "dp_shard": 2}, {"pp": 4}, {"tp": 4}, {"ep": 4},
        {"dp_replicate": 2, "ep": 2},
    ),
}  # fmt: skip
FAILED = (mp.ProcessRaisedException, mp.ProcessExitedException)
RESUMED_MODELS = ("moe", "tied_shared_biased", "biased")
RESUMED = {  # written on one mesh, read on the next
    "axes": ({"tp": 2}, {"pp": 2}, {"dp_shard": 2}),
    "pairs": (),
    "rest": ({"tp": 2, "ep": 2}, {"pp": 2, "dp_shard": 2}, {"dp_replicate": 2, "ep": 2}, {"tp": 4}),
}


def of_part(part, *values):
    """A test's parameters; those of the long part are slow."""
    return pytest.param(part, *values, marks=pytest.mark.slow if part == "rest" else ())


def split(how, ranks):
    everyone = list(range(len(LENGTHS)))
    if how == "round":
        return [everyone[r::ranks] for r in range(ranks)]
    if how == "first":
        return [everyone if r == 0 else [] for r in range(ranks)]
    return [everyone[r : r + 1] if r < ranks - 1 else everyone[ranks - 1 :] for r in range(ranks)]


def model_of(config, mesh):
    """The same weights on any mesh: drawn whole, by name."""
    model = Decoder(config, mesh)
    held = views(model)
    for index, place in enumerate(places(config)):
        generator = torch.Generator().manual_seed(index)
        whole = torch.randn(place.shape, generator=generator) * 0.2 + (1.0 if len(place.shape) == 1 else 0.0)
        if place.optional:
            whole = torch.zeros(place.shape)
        if place.name in held:
            part = whole if place.dim is None else whole.chunk(mesh.tp.size, dim=place.dim)[mesh.tp.rank]
            held[place.name].copy_(part)
    return model


def train(config, mesh, case, *, save=None, resume=None, frozen=(), recompute=False, expert_bias_rate=0.0, kind="ppo"):
    """Weights and metrics; ``save`` stops after the first step with a checkpoint there, ``resume`` goes on from one."""
    how, accepted, recorded = CASES[case]
    model = model_of(config, mesh)
    model.recompute = recompute
    kept = freeze(model, frozen)
    optimizer = Optimizer(model, OPTIM, STEPS)
    fraction, first = model.uniform_expert_fraction(), 0
    if resume is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(7.0)
        state = checkpoint.load(checkpoint.latest(resume), model, optimizer)
        fraction, first = torch.tensor(state.expert_fraction), state.step
    loss = LossSection(
        clip_low=0.2, clip_high=0.3, balance=0.05, router_z=0.01, expert_bias_rate=expert_bias_rate, **LOSSES[kind]
    )
    settings = StepSettings(loss, temperature=0.9, micro_batch_tokens=30, logprob_mb=10 * 20 * 4 / 2**20)
    history = []
    sequences = split(how, mesh.data_ranks)[mesh.data_rank]
    for step in range(first, STEPS if case in ("even", "uneven") else 1):
        batch = batch_of(step, sequences, accepted, config, LENGTHS, recorded)
        metrics, fraction = train_step(model, optimizer, batch, fraction, settings)
        history.append(metrics)
        if save is not None:
            writer = CheckpointWriter(save, mesh, Retention(save, 2), 20.0)
            state = TrainingState(1, 1, "run", optimizer.steps, optimizer.skipped, fraction.tolist())
            writer.start(model, optimizer, state)
            writer.wait()
            mesh.barrier()
            return {}, history
    sent = {name for name, _ in WeightGather(model, 2000, kept).tensors()}
    weights = dict(WeightGather(model, 2000).tensors())
    assert sent == weights.keys() - kept
    return weights, history


def name_of(model, sizes, case):
    return "-".join((model, *(f"{k}{v}" for k, v in sizes.items()), case))


def plan(part):
    """Every case on every axis and pair of them; elsewhere the hardest, and the model with everything else."""
    cases = {
        "axes": CASES,
        "pairs": [case for case in CASES if case != "uneven"],  # an empty rank is the most uneven
        "rest": ("empty_rank",),
    }[part]
    for sizes in MESHES[part]:
        yield from (("moe", sizes, case) for case in cases)
        yield "tied_shared_biased", sizes, "even"


def rank_main(rank, part, world, out):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world)
    every = [*MESHES[part], *RESUMED[part]]
    meshes = {key: Mesh(dict(key), rank, torch.device("cpu")) for key in dict.fromkeys(tuple(s.items()) for s in every)}

    def keep(name, weights, history=()):
        if rank == 0:
            save_file({n: t.contiguous() for n, t in weights.items()}, out / f"{name}.safetensors")
            (out / f"{name}.json").write_text(json.dumps(history))

    for model, sizes, case in plan(part):
        weights, history = train(MODELS[model], meshes[tuple(sizes.items())], case)
        keep(name_of(model, sizes, case), weights, history)
    for sizes in MESHES[part] if part == "axes" else ():
        for name, (model, case, more) in OTHERWISE.items():
            weights, _ = train(MODELS[model], meshes[tuple(sizes.items())], case, **more)
            keep(name_of(model, sizes, name), weights)
    for sizes, then in pairwise(RESUMED[part]):
        for model in RESUMED_MODELS:
            where = out / "checkpoints" / name_of(model, sizes, "resumed")
            train(MODELS[model], meshes[tuple(sizes.items())], "even", save=where)
            weights, _ = train(MODELS[model], meshes[tuple(then.items())], "even", resume=where)
            keep(where.name, weights)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Where a part's results are, by case; its processes run when it is first asked for."""

    found = {}

    def of(part):
        if part not in found:
            try:
                found[part] = run(part)
            except FAILED as error:  # once is enough
                found[part] = error
        if isinstance(found[part], FAILED):
            raise found[part]
        return found[part]

    def run(part):
        out = tmp_path_factory.mktemp(part)
        world = math.prod(MESHES[part][0].values())
        mp.start_processes(rank_main, (part, world, out), nprocs=world, start_method="forkserver")
        return out

    return of


@pytest.fixture(scope="module")
def reference():
    """What one process makes of a model and a case."""
    torch.set_num_threads(1)
    return cache(lambda model, case: train(MODELS[model], single(), case))


@pytest.mark.parametrize(
    ("part", "model", "sizes", "case"), [of_part(part, *p) for part in MESHES for p in plan(part)], ids=str
)
def test_a_mesh_trains_as_one_process_does(trained, reference, part, model, sizes, case):
    weights, history = reference(model, case)
    name = name_of(model, sizes, case)
    for ours, theirs in zip(history, json.loads((trained(part) / f"{name}.json").read_text()), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-6)
    found = load_file(trained(part) / f"{name}.safetensors")
    assert set(found) == set(weights)
    for key, tensor in weights.items():
        assert torch.allclose(found[key], tensor, rtol=1e-5, atol=1e-5), key


@pytest.mark.parametrize("name", OTHERWISE)
def test_frozen_recomputed_and_dense_models_train_alike(trained, name):
    model, case, more = OTHERWISE[name]
    expected, _ = train(MODELS[model], single(), case, **more)
    for sizes in MESHES["axes"]:
        found = load_file(trained("axes") / f"{name_of(model, sizes, name)}.safetensors")
        for key, tensor in expected.items():
            assert torch.allclose(found[key], tensor, rtol=1e-5, atol=1e-5), (sizes, key)


@pytest.mark.parametrize("model", RESUMED_MODELS)
@pytest.mark.parametrize(("part", "sizes"), [of_part(part, s) for part in MESHES for s in RESUMED[part][:-1]], ids=str)
def test_a_checkpoint_resumes_on_another_mesh_and_on_one_process(trained, reference, model, part, sizes):
    expected, _ = reference(model, "even")
    name = name_of(model, sizes, "resumed")
    alone, _ = train(MODELS[model], single(), "even", resume=trained(part) / "checkpoints" / name)
    for found in (load_file(trained(part) / f"{name}.safetensors"), alone):
        assert set(found) == set(expected)
        for key, tensor in expected.items():
            assert torch.allclose(found[key], tensor, rtol=1e-5, atol=1e-5), key


def test_a_bias_moves_against_the_load_and_changes_the_choice():
    model = model_of(MODELS["biased"], single())
    layer = model.layers["0"].mlp
    layer.move_bias(torch.tensor([9, 3, 0, 4]), 0.1)
    assert layer.bias.tolist() == pytest.approx([-0.1, 0.1, 0.1, 0.0])
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    pack = model.pack(torch.zeros(50, dtype=torch.int64), [0, 50])
    layer.bias.copy_(torch.tensor([5.0, 0.0, 0.0, 5.0]))  # whatever the router says
    out, stats = layer(x, 0, pack)
    assert stats.counts_E.tolist() == [50, 0, 0, 50]
    pack.experts = torch.tensor([0, 3]).expand(50, 3, 2)
    layer.bias.zero_()
    replayed, _ = layer(x, 0, pack)
    assert torch.allclose(out, replayed, atol=1e-6)  # the gates are the router's own


def test_cases_are_what_they_say(reference):
    _, history = reference("moe", "all_rejected")
    assert history[0]["policy_loss"] == 0 < history[0]["balance_loss"]
    assert reference("moe", "idle_experts")[1][0]["routing_disagreement"] > 0.1
    start = dict(WeightGather(model_of(MODELS["moe"], single()), 2000).tensors())
    after = reference("moe", "idle_experts")[0]
    shrunk = 0.999  # a decay at lr 0.01 and 0.1; no gradient reached it
    idle = "model.layers.0.mlp.experts.3.down_proj.weight"
    assert torch.allclose(after[idle], start[idle] * shrunk, rtol=1e-5)


@pytest.mark.parametrize("sizes", [{"tp": 2, "ep": 3}, {"pp": 2, "dp_replicate": 2, "dp_shard": 3, "ep": 5, "tp": 7}])
def test_coordinates_and_shards_agree_with_the_configuration(sizes):
    section = LearnerSection(**sizes)
    seen = set()
    for rank in range(section.ranks):
        mesh = Mesh.__new__(Mesh)
        mesh.sizes = {axis: sizes.get(axis, 1) for axis in AXES}
        mesh.at = mesh._coordinates(rank)
        assert mesh.rank_of(**mesh.at) == rank
        assert mesh.data_rank == section.data_rank_of(rank) < section.data_ranks == mesh.data_ranks
        seen.add(tuple(mesh.at.values()))
    assert len(seen) == section.ranks


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"tp": 3}, "num_attention_heads=4 is not a multiple of tp=3"),
        ({"ep": 3}, r"num_experts=4 is not a multiple of ep\*tp=3"),
        ({"ep": 4, "tp": 2}, r"num_experts=4 is not a multiple of ep\*tp=8"),
        ({"pp": 5}, "pp=5 stages for num_hidden_layers=4"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused_with_its_numbers(sizes, words):
    with pytest.raises(ConfigError, match=words):
        MODELS["moe"].check_mesh(sizes)


def test_a_product_that_is_not_the_world_is_refused_with_every_number():
    with pytest.raises(ConfigError, match=r"pp=2 x tp=2 = 4 ranks, but 3 were started.*--nproc-per-node 4"):
        check_world({"pp": 2, "tp": 2}, 3)
