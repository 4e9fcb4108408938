"""Checkpoints: the same run after as without, atomic, kept, and refused by name when they do not fit."""

import dataclasses
import json
import re
import shutil
import threading
import time

import pytest
import torch

from common.config import OptimSection
from common.errors import CheckpointError, ConfigError, DeadlineError
from learner import checkpoint, hold, saving
from learner.checkpoint import TrainingState
from learner.freeze import freeze
from learner.hf import load_hf
from learner.layout import BIAS
from learner.mesh import single
from learner.model.config import ModelConfig
from learner.model.decoder import Decoder
from learner.optim import Optimizer
from learner.retention import Retention
from learner.saving import CheckpointWriter
from learner.step import train_step
from tests.unit.named import hf_tensors, write_hf
from tests.unit.test_step import CONFIG, LENGTHS, OPTIM, STEPS, batch_of, model_of, settings, train
from tools.export import main as export

EVERYTHING = list(range(len(LENGTHS)))


def writer_of(directory, keep=2, timeout=5.0):
    return CheckpointWriter(directory, single(), Retention(directory, keep), timeout)


def write(writer, model, optimizer, step, fraction=None):
    fraction = model.uniform_expert_fraction() if fraction is None else fraction
    state = TrainingState(step, step, "r", optimizer.steps, optimizer.skipped, fraction.tolist())
    writer.start(model, optimizer, state)


def saved(directory, step=1):
    model = model_of()
    optimizer = Optimizer(model, OptimSection(), 10)
    writer = writer_of(directory)
    write(writer, model, optimizer, step)
    writer.wait()
    assert writer.finished() == [step]
    return model, optimizer


def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path):
    whole, _, _ = train(EVERYTHING, 0.7)
    model = model_of()
    optimizer = Optimizer(model, OPTIM, STEPS)
    fraction = model.uniform_expert_fraction()
    writer = writer_of(tmp_path)
    for step in range(STEPS):
        if step == 2:
            write(writer, model, optimizer, step, fraction)
            expected_rng = torch.get_rng_state()
            with torch.no_grad():  # training goes on while the copy is written
                next(model.parameters()).add_(1.0)
            writer.wait()
            torch.rand(3)
            model = model_of(seed=9)
            optimizer = Optimizer(model, OPTIM, STEPS)
            state = checkpoint.load(checkpoint.latest(tmp_path), model, optimizer)
            assert (state.step, state.version, state.run_id, state.updates) == (2, 2, "r", 2)
            assert torch.equal(torch.get_rng_state(), expected_rng)
            fraction = torch.tensor(state.expert_fraction)
        _, fraction = train_step(model, optimizer, batch_of(step, EVERYTHING, 0.7), fraction, settings())
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))


def test_in_bfloat16_the_float32_weights_are_what_is_resumed(tmp_path):
    def low():
        model = model_of().to(torch.bfloat16)
        return model, Optimizer(model, OPTIM, STEPS)

    model, optimizer = low()
    fraction = model.uniform_expert_fraction()
    for step in range(2):
        _, fraction = train_step(model, optimizer, batch_of(step, EVERYTHING, 0.7), fraction, settings())
    writer = writer_of(tmp_path)
    write(writer, model, optimizer, 2, fraction)
    writer.wait()
    other, resumed = low()
    checkpoint.load(checkpoint.latest(tmp_path), other, resumed)
    for ours, theirs in zip(optimizer.flats, resumed.flats, strict=True):
        assert torch.equal(ours.master, theirs.master)
        assert torch.equal(ours.weights, theirs.weights)
        assert not torch.equal(ours.master, ours.weights.float())


def test_what_cannot_be_written_for_any_reason_does_not_count(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("surprise")

    model = model_of()
    writer = writer_of(tmp_path)
    monkeypatch.setattr("learner.saving.save_file", broken)
    write(writer, model, Optimizer(model, OptimSection(), 10), 3)
    with pytest.raises(CheckpointError, match="surprise"):
        writer.wait()
    assert writer.finished() == []


def test_a_directory_that_became_another_runs_gets_no_checkpoint(tmp_path):
    model, directory = model_of(), tmp_path / "checkpoints"
    optimizer = Optimizer(model, OPTIM, STEPS)
    writer = writer_of(directory)
    (tmp_path / "run.json").write_text('{"run_id": "r"}')
    write(writer, model, optimizer, 1)
    writer.wait()
    (tmp_path / "run.json").write_text('{"run_id": "other"}')
    write(writer, model, optimizer, 2)
    with pytest.raises(CheckpointError, match="run other's by now"):
        writer.wait()
    assert [path.name for path in checkpoint.complete(directory)] == ["step-00000001"]


def test_one_learner_at_a_time_holds_a_run_directory(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(hold, "WAIT_S", 0.2)
    with hold.held(tmp_path / "r", 0, lambda: False):
        with hold.held(tmp_path / "r", 1, lambda: False):  # another rank of the same
            pass
        wanted = pytest.raises(ConfigError, match=r"another learner is at work.*learner\.lock.*run\.name")
        with wanted, hold.held(tmp_path / "r", 0, lambda: False):
            raise AssertionError
        assert "waiting 0.2 s" in caplog.text
    with hold.held(tmp_path / "r", 0, lambda: False):
        pass


def test_a_learner_that_began_from_what_an_earlier_one_then_replaced_is_told_to_start_again(tmp_path):
    model, directory = model_of(), tmp_path / "checkpoints"
    optimizer, writer = Optimizer(model, OPTIM, STEPS), writer_of(directory)
    checkpoint.check_newest(directory, None)
    for step in (1, 2):
        found = checkpoint.find(directory, step > 1, single())
        write(writer, model, optimizer, step)
        writer.wait()
        with pytest.raises(CheckpointError, match=rf"step-0000000{step}: an earlier learner .*start this .* again"):
            checkpoint.check_newest(directory, found)
    checkpoint.check_newest(directory, checkpoint.find(directory, True, single()))


def test_the_last_finished_checkpoints_are_kept_and_leftovers_removed(tmp_path):
    (tmp_path / ".step-00000009.x.tmp").mkdir()
    (tmp_path / "step-00000008").mkdir()  # half deleted or half copied: no state.json
    for step in (1, 2, 3):
        saved(tmp_path, step)
    assert checkpoint.latest(tmp_path).name == "step-00000003"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003", "step-00000008"]
    assert checkpoint.latest(tmp_path / "nothing") is None


def test_until_every_rank_has_written_there_is_no_checkpoint_and_the_late_are_named(tmp_path):
    model = model_of()
    writer = writer_of(tmp_path, timeout=0.3)
    writer.mesh.world = 3  # two ranks that never write
    write(writer, model, Optimizer(model, OptimSection(), 10), 4)
    with pytest.raises(DeadlineError, match=r"step-00000004: ranks \[1, 2\] wrote nothing within"):
        writer.wait()
    assert checkpoint.latest(tmp_path) is None


@pytest.mark.parametrize("stage", ["write its file", "complete it"])
def test_what_the_disk_holds_up_is_given_up_and_does_not_count_later(tmp_path, monkeypatch, stage):
    model, going = model_of(), threading.Event()
    writer = writer_of(tmp_path, timeout=0.2)
    hung = {"write its file": "save_file", "complete it": "sync"}[stage]
    original = getattr(saving, hung)

    def hang(what, *more):
        if hung == "save_file" or what.name == "state.json":
            going.wait(20)
        return original(what, *more)

    monkeypatch.setattr(saving, hung, hang)
    write(writer, model, Optimizer(model, OptimSection(), 10), 3)
    thread = writer._thread
    with pytest.raises(DeadlineError, match=rf"step 3: rank 0 did not {stage} within 0 s \(learner.write_timeout_s"):
        writer.wait()
    going.set()
    thread.join(20)
    assert checkpoint.latest(tmp_path) is None


def test_a_late_rank_is_waited_for(tmp_path):
    model = model_of()
    writer = writer_of(tmp_path)
    writer.mesh.world = 2
    write(writer, model, Optimizer(model, OptimSection(), 10), 4)

    def second():
        deadline = time.monotonic() + 10
        while not (found := list(tmp_path.glob(".step-*.tmp"))) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        (found[0] / "rank-00001.safetensors").write_bytes(b"")

    threading.Thread(target=second).start()
    writer.wait()
    assert checkpoint.latest(tmp_path).name == "step-00000004"


def test_a_disk_that_takes_no_more_costs_no_older_checkpoint(tmp_path):
    model, optimizer = saved(tmp_path)
    writer = writer_of(tmp_path)
    blocked = tmp_path / f".step-00000002.{writer._nonce}.tmp"
    blocked.write_text("a file where the directory should be")
    write(writer, model, optimizer, 2)
    with pytest.raises(CheckpointError, match=r"step-00000002: rank 0 cannot write it .*is the disk full"):
        writer.wait()
    assert checkpoint.latest(tmp_path).name == "step-00000001"
    blocked.unlink()
    write(writer, model, optimizer, 3)
    writer.wait()
    assert writer.finished() == [3]


class Rank:
    """As much of a mesh as finds a checkpoint: rank 0 chose ``step``."""

    def __init__(self, step, rank=1):
        self.step, self.rank = step, rank

    def broadcast_int(self, value):
        return self.step if self.rank else value


def test_without_resume_checkpoints_of_an_earlier_start_are_left_alone(tmp_path):
    assert checkpoint.find(tmp_path / "nothing", False, single()) is None
    assert checkpoint.find(tmp_path / "nothing", True, single()) is None
    (tmp_path / "step-00000030").mkdir()
    assert checkpoint.find(tmp_path, False, single()) is None
    with pytest.raises(CheckpointError, match=r"holds no complete checkpoint.*another run\.name"):
        checkpoint.find(tmp_path, True, single())
    saved(tmp_path, 20)
    with pytest.raises(CheckpointError, match=rf"{tmp_path} holds .*step-00000020.*learner\.resume=true, or move that"):
        checkpoint.find(tmp_path, False, single())
    assert checkpoint.find(tmp_path, True, single()).name == "step-00000020"


def test_every_rank_goes_on_from_the_checkpoint_that_rank_0_chose(tmp_path):
    for step in (1, 2):
        saved(tmp_path, step)
    shutil.copytree(tmp_path / "step-00000002", tmp_path / "step-00000002.bak")  # somebody's copy is no checkpoint
    assert checkpoint.find(tmp_path, True, Rank(1)).name == "step-00000001"
    assert checkpoint.find(tmp_path, True, Rank(checkpoint.NOTHING)) is None
    with pytest.raises(CheckpointError, match="rank 0 goes on from nothing there; its log says why"):
        checkpoint.find(tmp_path, False, Rank(checkpoint.REFUSED))
    assert checkpoint.find(tmp_path, True, Rank(1, rank=0)).name == "step-00000002"
    with pytest.raises(CheckpointError, match=r"step-00000003: rank 0 goes on from it, and rank 1 sees no state\.json"):
        checkpoint.find(tmp_path, True, Rank(3), seen_s=0.1)
    late = threading.Timer(0.2, lambda: saved(tmp_path, 3))
    late.start()
    assert checkpoint.find(tmp_path, True, Rank(3)).name == "step-00000003"
    late.join()


@pytest.mark.parametrize("change", [{"num_experts": 8}, {"moe_intermediate_size": 16}, {"num_hidden_layers": 3}])
def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path, change):
    saved(tmp_path)
    other = Decoder(dataclasses.replace(CONFIG, **change))
    with pytest.raises(CheckpointError, match=r"model\.layers\.[02]\..*belongs to another model"):
        checkpoint.load(checkpoint.latest(tmp_path), other, Optimizer(other, OptimSection(), 10))
    shallow = Decoder(dataclasses.replace(CONFIG, num_hidden_layers=1))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\..*no such tensor in model.path"):
        checkpoint.load(checkpoint.latest(tmp_path), shallow, Optimizer(shallow, OptimSection(), 10))


@pytest.mark.parametrize("harm", ["half", "json", "missing", "pickle", "flipped"])
def test_a_damaged_checkpoint_says_so(tmp_path, harm):
    model, optimizer = saved(tmp_path)
    path = checkpoint.latest(tmp_path)
    file = path / "rank-00000.safetensors"
    if harm == "half":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif harm == "missing":
        file.unlink()
    elif harm == "pickle":
        torch.save({"a": 1}, file)
    elif harm == "flipped":  # within some tensor: nothing of its form is wrong
        raw = bytearray(file.read_bytes())
        raw[len(raw) * 2 // 3] ^= 1
        file.write_bytes(raw)
    else:
        (path / "state.json").write_text(json.dumps({"ranks": 1, "step": 1, "surprise": 2}))
    said = r"step-00000001: damaged.*goes on from the beginning; .*only a new run .*: another run\.name"
    with pytest.raises(CheckpointError, match=said):
        checkpoint.load(path, model, optimizer)


def test_beside_a_damaged_checkpoint_the_advice_is_to_export_the_one_before(tmp_path):
    """A broker that was told of the newest holds no step between the two; one that was not resumes from it."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    write_hf(tmp_path / "model", model_of())
    (run / "config.yaml").write_text(f"model: {{path: {tmp_path / 'model'}}}\n")
    model, optimizer = saved(run / "checkpoints", 10)
    saved(run / "checkpoints", 20)
    newest = checkpoint.latest(run / "checkpoints")
    (newest / "rank-00000.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="damaged") as caught:
        checkpoint.load(newest, model, optimizer)
    advice = re.search(r"`python -m tools\.export (.*) --out DIR`, then model\.path=DIR", str(caught.value))
    assert "If the broker was not told of it yet, move it out of" in str(caught.value)
    assert "learner.resume=true goes on from step-00000010; else" in str(caught.value)
    assert export([*advice[1].split(), "--out", str(tmp_path / "out")]) == 0
    load_hf(tmp_path / "out", again := Decoder(ModelConfig.from_hf_dir(tmp_path / "out")))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    newest.rename(tmp_path / "moved")
    assert checkpoint.find(run / "checkpoints", True, single()).name == "step-00000010"


def test_frozen_parameters_stay_and_are_neither_kept_nor_gathered(tmp_path):
    patterns = ("model.embed_tokens.*", "model.layers.0.mlp.experts.*")
    model = model_of()
    names = freeze(model, patterns)
    optimizer = Optimizer(model, OPTIM, STEPS)
    before = {name: tensor.clone() for name, tensor in hf_tensors(model)}
    train_step(model, optimizer, batch_of(0, EVERYTHING, 0.7), model.uniform_expert_fraction(), settings())
    after = dict(hf_tensors(model))
    assert {name for name in after if torch.equal(before[name], after[name])} == names
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in names
    writer = writer_of(tmp_path)
    write(writer, model, optimizer, 1)
    writer.wait()
    assert checkpoint.CheckpointReader(checkpoint.latest(tmp_path)).names() == set(after) - names
    other = model_of()
    freeze(other, patterns)
    checkpoint.load(checkpoint.latest(tmp_path), other, Optimizer(other, OPTIM, STEPS), names)
    assert all(torch.equal(tensor, after[name]) for name, tensor in hf_tensors(other))


def test_freezing_something_else_on_resume_is_refused(tmp_path):
    saved(tmp_path)
    for patterns, words in (
        (("model.embed_tokens.*",), "was trained and is frozen now"),
        ((), "optim.freeze kept it then"),
    ):
        model = model_of()
        names = freeze(model, patterns)
        optimizer = Optimizer(model, OPTIM, STEPS)
        if not patterns:
            write(writer := writer_of(tmp_path / "less"), frozen_model := model_of(), frozen_optimizer(frozen_model), 1)
            writer.wait()
        where = tmp_path if patterns else tmp_path / "less"
        with pytest.raises(CheckpointError, match=words):
            checkpoint.load(checkpoint.latest(where), model, optimizer, names)


def test_biases_of_experts_are_kept_whatever_is_frozen_and_may_be_new(tmp_path):
    def made(bias):
        torch.manual_seed(0)
        model = Decoder(dataclasses.replace(CONFIG, expert_bias=bias))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        names = freeze(model, ("model.layers.0.*",))
        return model, Optimizer(model, OPTIM, STEPS), names

    for bias, directory in ((True, tmp_path / "with"), (False, tmp_path / "without")):
        model, optimizer, _ = made(bias)
        if bias:
            model.layers["0"].mlp.bias.fill_(0.25)
        write(writer := writer_of(directory), model, optimizer, 1)
        writer.wait()
    model, optimizer, names = made(True)
    assert not any(name.endswith(BIAS) for name in names)
    checkpoint.load(checkpoint.latest(tmp_path / "with"), model, optimizer, names)
    assert model.layers["0"].mlp.bias.tolist() == [0.25] * 4
    model, optimizer, names = made(True)
    checkpoint.load(checkpoint.latest(tmp_path / "without"), model, optimizer, names)
    assert not model.layers["0"].mlp.bias.any()
    model, optimizer, names = made(False)
    with pytest.raises(CheckpointError, match=r"correction_bias: set loss\.expert_bias_rate above 0"):
        checkpoint.load(checkpoint.latest(tmp_path / "with"), model, optimizer, names)


def frozen_optimizer(model):
    freeze(model, ("model.norm.*",))
    return Optimizer(model, OPTIM, STEPS)


def test_a_pattern_that_cannot_be_frozen_is_refused():
    with pytest.raises(ConfigError, match=r"'layers\.0' matches no tensor; names look like model\."):
        freeze(model_of(), ("layers.0",))
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj\.weight is frozen but .* is not"):
        freeze(model_of(), ("model.layers.0.self_attn.q_proj.weight",))
    with pytest.raises(ConfigError, match=r"=\['model\.\*', 'lm_\*'\]: no tensor is left to train; leave"):
        freeze(model_of(), ("model.*", "lm_*"))
    assert freeze(model_of(), ("model.*",))  # all but the head
