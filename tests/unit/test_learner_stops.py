"""However a learner is stopped, it keeps what it trained: a broker that is gone or refuses it, a rank that is told."""

import logging
import re
import time
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing as mp

from common.config import load
from common.errors import ConfigError, DeadlineError, ProtocolError
from common.process import StopFlag
from common.trace import TRACE, silent
from common.wire import Resync, Stop
from learner import checkpoint, hold
from learner.mesh import Mesh, single
from learner.optim import Optimizer
from learner.profiling import profiled
from learner.together import LOOK_S, shared
from learner.train import Learner
from tests.unit.test_step import OPTIM, STEPS, model_of

STEP = 3
GONE, REFUSED = DeadlineError("the broker is silent"), ProtocolError("refused")


class Link:
    """Says what it was given, one at a time; raises what is an error."""

    run_id = ""

    def __init__(self, *said):
        self.said, self.sent = list(said), []

    def send(self, message):
        self.sent.append(message)

    def receive(self, timeout_s=0.0):
        if not self.said:
            time.sleep(min(timeout_s, 0.01))
            return None
        if isinstance(self.said[0], Exception):
            raise self.said[0]
        return self.said.pop(0)

    def set_version(self, version):
        self.version = version


def config_of(directory, *overrides):
    small = ("learner.checkpoint_every=50", "learner.wait_s=1", "weights.deadline_s=0.05")
    return load("configs/smoke.yaml", [f"run.dir={directory}", *small, *overrides])


def learner_of(config, link, published=STEP, step=STEP):
    model = model_of()
    return Learner(
        config, StopFlag(), single(), model, Optimizer(model, OPTIM, STEPS), frozenset(), link,
        silent("learner", "learner"), model.uniform_expert_fraction(), step=step, published=published,
    )  # fmt: skip


@pytest.mark.parametrize("error", [GONE, REFUSED], ids=["gone", "refused"])
@pytest.mark.parametrize("while_it", ["fetches", "publishes"])
def test_a_broker_that_is_gone_or_refuses_costs_no_step_that_was_trained(tmp_path, while_it, error, caplog):
    config = config_of(tmp_path)
    learner = learner_of(config, Link(error), published=STEP if while_it == "fetches" else STEP - 1)
    with pytest.raises(type(error), match=re.escape(str(error))):
        learner.run()
    assert checkpoint.latest(config.run.path / "checkpoints").name == f"step-{STEP:08d}"
    assert f"{error}; stopping with a checkpoint" in caplog.text


def test_a_version_that_the_broker_does_not_start_to_send_is_kept(tmp_path):
    config = config_of(tmp_path)
    with pytest.raises(DeadlineError, match="version 3: the broker did not start the publish within 0 s"):
        learner_of(config, Link(), published=STEP - 1).run()
    assert checkpoint.latest(config.run.path / "checkpoints").name == f"step-{STEP:08d}"


def test_a_finished_learner_ends_well_without_its_broker(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Learner, "_export", lambda *_: None)
    config = config_of(tmp_path, f"run.steps={STEP}")
    learner_of(config, Link(GONE)).run()
    assert f"{GONE}; the run is finished here" in caplog.text


def test_who_asks_for_the_version_that_went_out_before_is_sent_it_with_the_first_word(tmp_path):
    """A learner that resumed holds the fleet's newest version, and somebody asked while it was loading."""
    config = config_of(tmp_path)
    learner = learner_of(config, Link(Stop("done")))
    learner.streams = learner._streams()
    learner._note(Resync("lost it", learner.streams[0].name))
    with pytest.raises(DeadlineError):
        learner.streams[0].publish(STEP, learner._note, lambda: False)
    assert [type(message).__name__ for message in learner.link.sent] == ["Publish"]


def test_a_learner_that_is_told_to_stop_while_it_waits_for_another_says_so(tmp_path):
    with hold.held(tmp_path, 0, lambda: False):
        wanted = pytest.raises(ConfigError, match=r"told to stop while it waited: .*another learner is at work")
        with wanted, hold.held(tmp_path, 0, lambda: True):
            raise AssertionError


def test_a_record_that_cannot_be_written_costs_no_step(tmp_path, caplog):
    config = config_of(tmp_path)
    config = replace(config, trace=replace(config.trace, torch_steps=(1,)))
    (config.run.path).mkdir(parents=True)
    (config.run.path / TRACE).write_text("a file, where a directory should be")
    trained = []
    with profiled(config, silent("learner", "learner"), 1, torch.device("cpu")):
        trained.append(1)
    assert trained == [1] and "step 1: what torch.profiler recorded is lost" in caplog.text


def rank_main(rank, directory):
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    mesh, stop = Mesh({"dp_shard": 2}, rank, torch.device("cpu")), StopFlag()
    logging.disable(logging.CRITICAL)
    with shared(stop, mesh):
        if rank == 1:
            stop.set("SIGTERM")
        deadline = time.monotonic() + 30
        while not stop.is_set and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(2 * LOOK_S)  # the one that was told has told the other
    (directory / f"{rank}").write_text(stop.reason)
    mesh.barrier()
    mesh.close()


def test_a_rank_that_is_told_to_stop_tells_the_others_wherever_they_are(tmp_path):
    mp.spawn(rank_main, (tmp_path,), nprocs=2)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["as rank 1: SIGTERM", "SIGTERM"]
