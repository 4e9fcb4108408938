"""Who computes on which GPU of one machine: dealt out, refused where NCCL would have one twice."""

import dataclasses
import io
import os
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from common.config import (
    ActorSection,
    BrokerSection,
    EngineSection,
    LearnerSection,
    ObrsSection,
    ReplicaSection,
    RunConfig,
    RunSection,
    WeightsSection,
)
from common.errors import ConfigError
from common.objective import LossSection
from common.process import StopFlag, free_port
from learner.device import SERVERS_NCCL, match_servers, pick_device
from tools.devices import VISIBLE, count_listed, deal, find_devices, torch_on_gpus, visible
from tools.launch import Run
from tools.preflight import check_devices
from tools.processes import child_environment, processes_of

LISTED = """GPU 0: NVIDIA H200 (UUID: GPU-aaaa)
  MIG 1g.18gb     Device  0: (UUID: MIG-bbbb)
GPU 1: NVIDIA H200 (UUID: GPU-cccc)
"""


def served(count=1, launch=1, tp=1, device="auto", **sections):
    engine = EngineSection(launch=launch, tp=tp, device=device, python=sys.executable)
    return RunConfig(actor=ActorSection(engine="sglang", count=count), engine=engine, **sections)


def eight(number=8):
    return [str(index) for index in range(number)]


def test_each_receiver_has_gpus_of_its_own_and_frozen_models_come_last():
    config = served(
        count=2, tp=2, learner=LearnerSection(dp_shard=2), replica=ReplicaSection(count=2), loss=LossSection(kl=0.1)
    )
    assert deal(config, eight(9), True) == {
        "learner": "0,1", "replica-0": "2", "replica-1": "3", "actor-0": "4,5", "actor-1": "6,7", "reference-0": "8",
    }  # fmt: skip
    assert deal(config, eight(), True)["reference-0"] == "0"
    assert deal(config, [], True) == {}
    assert deal(config, eight(), False) == {"actor-0": "0,1", "actor-1": "2,3"}  # our torch has no CUDA, SGLang's has
    assert deal(config, ["GPU-a", "GPU-b", "GPU-c"], True)["actor-1"] == "GPU-a,GPU-b"


def test_the_embedded_engine_and_servers_on_cpus_take_none():
    assert deal(RunConfig(), eight(2), True) == {"learner": "0", "replica-0": "1"}
    assert deal(RunConfig(obrs=ObrsSection(mode="off")), eight(2), True) == {"learner": "0"}
    assert deal(served(device="cpu"), eight(2), True) == {"learner": "0", "replica-0": "1"}
    assert deal(RunConfig(learner=LearnerSection(tp=4)), eight(2), True) == {"learner": "0,1", "replica-0": "0"}


@pytest.mark.parametrize("there", [True, False])
def test_where_a_gpu_is_picked_cudnns_attention_is_switched_off(monkeypatch, there):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        assert pick_device() == (torch.device("cuda", 3) if there else torch.device("cpu"))
        assert torch.backends.cuda.cudnn_sdp_enabled() is not there
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize(
    ("installed", "setting", "left"),
    [
        (2, None, ["0", "1"]), (2, "1", ["1"]), (4, "3, 1", ["3", "1"]), (2, "", []), (2, "-1", []),
        (2, "0,7,1", ["0"]), (2, "GPU-aaaa,1", ["GPU-aaaa", "1"]), (0, "0,1", []), (0, None, []),
    ],
)  # fmt: skip
def test_what_is_set_already_is_what_there_is_to_deal_out(installed, setting, left):
    assert visible(installed, setting) == left


def fake_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, code: int = 0) -> None:
    """A directory with nothing in it but an ``nvidia-smi`` that says ``words``."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    script = tmp_path / "bin" / "nvidia-smi"
    script.write_text(f"#!{sys.executable}\nimport sys\nprint({words!r}, end='')\nsys.exit({code})\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv(VISIBLE, raising=False)


def test_gpus_are_counted_without_torch_and_none_are_found_without_a_driver(tmp_path, monkeypatch):
    fake_machine(tmp_path, monkeypatch, LISTED)
    assert find_devices() == ["0", "1"]
    monkeypatch.setenv(VISIBLE, "1")
    assert find_devices() == ["1"]
    fake_machine(tmp_path, monkeypatch, "NVIDIA-SMI has failed", code=9)
    assert find_devices() == []
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_devices() == []
    assert count_listed("") == 0


@pytest.mark.parametrize("asked", ["auto", "nccl"])
def test_too_few_gpus_for_nccl_are_refused_with_the_numbers(asked):
    config = served(count=2, weights=WeightsSection(backend=asked))
    words = r"needs 4 \(learner 1, replica-0 1, actor-0 1, actor-1 1\) where this machine has 3 .*weights\.backend=gloo"
    with pytest.raises(ConfigError, match=words):
        check_devices(config, eight(3), True)
    check_devices(config, eight(4), True)
    check_devices(config, [], True)  # a CPU's run


@pytest.mark.parametrize(
    ("config", "on_gpus"),
    [
        (served(count=2, weights=WeightsSection(backend="gloo")), True), (served(count=2, device="cpu"), True),
        (RunConfig(replica=ReplicaSection(count=5)), True), (served(count=2), False),
    ],
)  # fmt: skip
def test_where_gloo_carries_the_weights_gpus_may_be_shared(config, on_gpus):
    check_devices(config, ["0"], on_gpus)


@pytest.mark.parametrize(
    "config", [RunConfig(learner=LearnerSection(dp_shard=2)), RunConfig(replica=ReplicaSection(tp=2))]
)
def test_a_mesh_of_more_ranks_than_gpus_is_refused_whatever_carries_the_weights(config):
    config = dataclasses.replace(config, weights=WeightsSection(backend="gloo"))
    with pytest.raises(ConfigError, match=r"its mesh has 2 ranks, each with a GPU of its own .* this machine has 1 "):
        check_devices(config, ["0"], True)
    check_devices(config, ["0", "1"], True)
    check_devices(config, ["0"], False)
    check_devices(config, [], True)


def test_a_replica_that_is_never_asked_needs_no_gpus():
    unasked = RunConfig(replica=ReplicaSection(tp=2), obrs=ObrsSection(mode="off"))
    check_devices(unasked, ["0"], True)
    with pytest.raises(ConfigError, match="replica: its mesh has 2 ranks"):
        check_devices(dataclasses.replace(unasked, loss=LossSection(kl=0.1)), ["0"], True)  # a reference is


@pytest.mark.parametrize(
    ("config", "there", "set_"),
    [
        (served(), True, True), (served(), False, False), (RunConfig(), True, False),
        (served(weights=WeightsSection(backend="gloo")), True, False),
    ],
)  # fmt: skip
def test_nccl_keeps_its_buffers_as_the_servers_of_its_group_do_unless_told_otherwise(monkeypatch, config, there, set_):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    for name in SERVERS_NCCL:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    match_servers(config)
    assert {name: os.environ.get(name) for name in SERVERS_NCCL} == (
        SERVERS_NCCL if set_ else dict.fromkeys(SERVERS_NCCL)
    )
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "1")
    match_servers(config)
    assert os.environ["NCCL_CUMEM_ENABLE"] == "1"


def test_children_see_their_own_gpus_and_others_what_we_see(monkeypatch):
    monkeypatch.setenv(VISIBLE, "4,5,6")
    dealt = deal(RunConfig(), visible(8, "4,5,6"), True)
    seen = {p.name: child_environment(p.threads, p.devices)[VISIBLE] for p in processes_of(RunConfig(), Path(), dealt)}
    assert seen == {"broker": "4,5,6", "learner": "4", "replica-0": "5", "actor-0": "4,5,6", "actor-1": "4,5,6"}
    monkeypatch.delenv(VISIBLE)
    assert all(VISIBLE not in child_environment(p.threads, p.devices) for p in processes_of(RunConfig(), Path()))


def test_a_launch_deals_out_what_there_is_or_says_what_is_missing(tmp_path, monkeypatch):
    fake_machine(tmp_path, monkeypatch, LISTED)
    monkeypatch.setattr("tools.launch.check_engine", lambda config: [])  # no SGLang is needed to count GPUs
    where = {"run": RunSection(dir=str(tmp_path)), "broker": BrokerSection(f"tcp://127.0.0.1:{free_port()}")}

    def prepared(config):
        run = Run(config, Console(file=io.StringIO()), StopFlag())
        run.prepare()
        return run

    run = prepared(served(**where, weights=WeightsSection(backend="gloo")))
    run.held.close()
    assert run.devices == deal(run.config, ["0", "1"], torch_on_gpus()) != {}
    with pytest.raises(ConfigError, match="where this machine has 2"):
        prepared(served(count=3, **where, weights=WeightsSection(backend="nccl")))
