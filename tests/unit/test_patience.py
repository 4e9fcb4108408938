"""Ranks wait for rank 0 as long as it may be busy alone."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from common import wire
from common.config import MEGABYTE, LearnerSection, RunConfig, load
from common.errors import DeadlineError
from learner.feed import Feed
from learner.layout import nbytes_of, views
from learner.mesh import COLLECTIVE_TIMEOUT_S, Mesh
from learner.model.decoder import Decoder
from learner.patience import patience_s, published_sizes
from learner.train import Learner
from tests.unit.test_mesh import MODELS

EXAMPLE = Path(__file__).parents[2] / "configs" / "qwen3-30b-a3b.yaml"


def test_a_rank_is_as_patient_as_everything_that_rank_0_may_do_alone():
    config = RunConfig()
    config = replace(config, weights=replace(config.weights, deadline_s=10.0, least_mb_s=1.0))
    config = replace(config, learner=replace(config.learner, wait_s=100.0, write_timeout_s=50.0))
    once = 8 * (10.0 + 5.0)  # the broker's six attempts, then a connection and a broadcast
    assert patience_s(config, [5 * MEGABYTE]) == COLLECTIVE_TIMEOUT_S + 2 * once + 100
    assert patience_s(config, [5 * MEGABYTE] * 2) == COLLECTIVE_TIMEOUT_S + 4 * once + 100
    slow = replace(config, learner=replace(config.learner, write_timeout_s=5000.0))
    assert patience_s(slow, [5 * MEGABYTE]) == COLLECTIVE_TIMEOUT_S + 5000


def test_a_hung_receiver_does_not_outlast_the_ranks_of_the_shipped_example():
    config = load(EXAMPLE)
    broker_tries = 6 * (config.weights.deadline_s + 61e9 / (config.weights.least_mb_s * MEGABYTE))
    assert broker_tries > 4000
    assert patience_s(config, [int(61e9)]) > broker_tries + config.learner.wait_s


@pytest.mark.parametrize("name", MODELS)
def test_a_models_size_is_known_before_it_is_loaded(name):
    model = Decoder(MODELS[name]).to(torch.bfloat16)
    model.prepare(compiled=False)
    assert nbytes_of(MODELS[name], "bfloat16") == sum(view.nbytes for view in views(model).values())


def test_a_learner_of_two_models_publishes_both(tmp_path):
    from transformers import Qwen3Config

    for name, vocabulary in (("policy", 64), ("rollout", 32)):
        Qwen3Config(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, head_dim=16, architectures=["Qwen3ForCausalLM"],
        ).save_pretrained(tmp_path / name)  # fmt: skip
        (tmp_path / name / "model.safetensors").touch()  # looked for, not read
    config = RunConfig()
    config = replace(config, model=replace(config.model, path=str(tmp_path / "policy")))
    (alone,) = published_sizes(config)
    config = replace(config, joint=replace(config.joint, path=str(tmp_path / "rollout")))
    policy, rollout = published_sizes(config)
    assert policy == alone == rollout + 2 * 32 * 32 * 4  # embedding and head have half the rows


def test_the_meshs_group_waits_as_long_as_it_is_told(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        monkeypatch.setenv(name, value)
    mesh = Mesh.from_environment(LearnerSection(), 1234.0)
    try:
        group = dist.group.WORLD._get_backend(mesh.device)
        assert group.options._timeout.total_seconds() == mesh.timeout_s == 1234.0
    finally:
        dist.destroy_process_group()


class Link:
    """Says ``messages``, then nothing; what it waits passes on the clock ``now`` alone."""

    def __init__(self, *messages):
        self._messages, self.now = list(messages), 0.0

    def send(self, message):
        """Nobody listens."""

    def receive(self, timeout):
        if self._messages:
            return self._messages.pop(0)
        self.now += timeout
        return None

    def work(self, seconds):
        self.now += seconds


def test_what_is_done_for_late_joiners_does_not_count_as_waiting_for_a_shard(monkeypatch):
    shard = object.__new__(wire.Shard)
    shard.step = 3
    link = Link(wire.Resync("policy", "late"), shard)
    monkeypatch.setattr("learner.feed.time", SimpleNamespace(monotonic=lambda: link.now))
    feed = Feed(link, 0, 1, 1.0, lambda: False)
    assert feed.fetch(3, lambda _: link.work(5.0)) is shard
    with pytest.raises(DeadlineError, match=r"no shard for step 4 within 1 s \(learner\.wait_s\)"):
        feed.fetch(4, lambda _: None)
    assert link.now == pytest.approx(6.0, abs=0.5)


def test_a_broker_that_comes_back_while_a_shard_is_waited_for_is_told_what_others_are(monkeypatch):
    shard = object.__new__(wire.Shard)
    shard.step, told = 3, []
    link = Link(welcome := wire.Welcome("run", 3, 1.0), shard)
    monkeypatch.setattr("learner.feed.time", SimpleNamespace(monotonic=lambda: link.now))
    assert Feed(link, 0, 1, 1.0, lambda: False).fetch(3, told.append) is shard
    assert told == [welcome]


def test_a_learner_says_how_far_it_is_also_where_the_fleet_had_later_versions():
    said, learner = [], object.__new__(Learner)
    learner.step, learner.published, learner.streams, learner._stopping = 7, 11, [], lambda: False
    learner.link = SimpleNamespace(set_version=said.append)
    learner._publish()
    assert said == [7]


@pytest.mark.parametrize(("rank", "waits", "why"), [(0, 300, "learner.wait_s"), (1, 1708, "all that rank 0 may do")])
def test_ranks_that_rank_0_holds_up_wait_for_their_shards_as_they_do_for_each_other(monkeypatch, rank, waits, why):
    learner = object.__new__(Learner)
    learner.config, learner.link, learner._stopping = RunConfig(), Link(), lambda: False
    learner.mesh = SimpleNamespace(rank=rank, data_rank=rank, data_ranks=2, timeout_s=1708.0)
    monkeypatch.setattr("learner.feed.time", SimpleNamespace(monotonic=lambda: learner.link.now))
    with pytest.raises(DeadlineError, match=rf"no shard for step 4 within {waits} s \(.*{why}"):
        learner._feed().fetch(4, lambda _: None)
    assert learner.link.now == pytest.approx(waits, abs=0.5)
