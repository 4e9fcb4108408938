"""Where a version arrives: every tensor at an address that grouped products take, parameters still in one piece."""

import dataclasses
import queue
import time
from types import SimpleNamespace

import pytest
import torch

from common import wire
from common.weights import ALIGNMENT, Bucket, WeightDigest, WeightReceiver, block_sums, lay_out
from learner.layout import views
from learner.model.decoder import Decoder
from learner.score import PolicyScorer
from learner.weights.gather import WeightGather
from learner.weights.group import unpack
from learner.weights.pack import flatten
from tests.unit.test_step import CONFIG

SHAPE = dataclasses.replace(CONFIG, num_experts=6, expert_bias=True)  # a bias of 24 bytes: no multiple of 16


def test_a_gap_follows_only_what_ends_at_no_multiple():
    buckets = [Bucket(nbytes, ()) for nbytes in (32, 24, 16, 4)]
    assert lay_out(buckets) == ([0, 32, 64, 80], 96)
    assert lay_out([]) == ([], 0)


class Loopback:
    """A collective of one process: what ``buckets`` hold arrives in their order."""

    def __init__(self, buckets):
        self._coming, digest = iter(buckets), WeightDigest()
        for flat in buckets:
            digest.update(block_sums(flat.numpy()))
        self._digest = digest.hex()

    def allocate(self, nbytes):
        return torch.zeros(nbytes, dtype=torch.uint8)

    def start(self, tensor):
        tensor.copy_(next(self._coming))
        return SimpleNamespace(wait=lambda: None)

    def sums(self, tensor):
        return block_sums(tensor.numpy())

    def receive_digest(self, version):
        return self._digest

    def close(self):
        """Nothing to leave."""


def model(seed):
    torch.manual_seed(seed)
    made = Decoder(SHAPE)
    for tensor in views(made).values():
        torch.nn.init.normal_(tensor, std=0.2)
    return made


def received(sender, bucket_bytes):
    """A version of ``sender`` as a receiver has it."""
    gather = WeightGather(sender, bucket_bytes)
    flats = [flatten(bucket, named, torch.zeros(bucket.nbytes, dtype=torch.uint8)) for bucket, named in gather]
    said = queue.Queue()
    receiver = WeightReceiver(said.put, lambda _: Loopback(flats), 5.0)
    offer = wire.Publish(1, "h", 1, "gloo", bucket_bytes, gather.listing)
    receiver.on_prepare(wire.Prepare(1, 1, 1, 2, dataclasses.asdict(offer)))
    receiver.on_go(wire.Go(1, 1, ["x"], 2))
    deadline = time.monotonic() + 20
    while (staged := receiver.staged()) is None and time.monotonic() < deadline:
        time.sleep(0.005)
    receiver.close()
    assert staged is not None, list(said.queue)
    return staged


@pytest.mark.parametrize("bucket_bytes", [1 << 30, 1000])
def test_tensors_arrive_aligned_and_parameters_in_one_piece(bucket_bytes):
    sender, scorer = model(1), PolicyScorer(model(0), 64.0)
    staged = received(sender, bucket_bytes)
    assert any(bucket.nbytes % ALIGNMENT for bucket, _ in staged.buckets)
    assert [name for name, tensor in unpack(staged.buckets) if tensor.data_ptr() % ALIGNMENT] == []
    if bucket_bytes == 1000:
        homes = {
            name: index for index, (bucket, _) in enumerate(staged.buckets) for name in (s.name for s in bucket.slots)
        }
        experts = {homes[f"model.layers.0.mlp.experts.{e}.down_proj.weight"] for e in range(6)}
        assert len(experts) > 1  # a parameter that came in several buckets
    assert scorer.swap(staged)
    ours, theirs = views(scorer.model), views(sender)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
