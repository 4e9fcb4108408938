"""Where a version arrives: every tensor at an address that grouped products take, parameters still in one piece."""

import dataclasses
import queue
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from common import wire
from common.config import OptimSection
from common.weights import ALIGNMENT, Bucket, WeightDigest, WeightReceiver, block_sums, lay_out
from learner.layout import views
from learner.model.decoder import Decoder
from learner.optim import Optimizer
from learner.score import PolicyScorer
from learner.weights.gather import WeightGather
from learner.weights.group import unpack
from learner.weights.pack import as_one, flatten
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


class Receiving:
    """A receiver, and versions of ``sender`` as it has them; each comes in a group of its own."""

    def __init__(self):
        self.said, self.epoch, self.flats = queue.Queue(), 0, []
        self.receiver = WeightReceiver(self.said.put, lambda _: Loopback(self.flats), 5.0)

    def take(self, sender, bucket_bytes, frozen=frozenset()):
        gather = WeightGather(sender, bucket_bytes, frozen)
        self.flats = [flatten(bucket, named, torch.zeros(bucket.nbytes, dtype=torch.uint8)) for bucket, named in gather]
        self.epoch += 1
        listing = [list(row) for row in gather.listing]  # as it comes over the wire: equal, not the same
        offer = wire.Publish(self.epoch, "h", 1, "gloo", bucket_bytes, listing)
        self.receiver.on_prepare(wire.Prepare(self.epoch, 1, 1, 2, dataclasses.asdict(offer)))
        self.receiver.on_go(wire.Go(self.epoch, self.epoch, ["x"], 2))
        deadline = time.monotonic() + 20
        while (staged := self.receiver.staged()) is None and time.monotonic() < deadline:
            time.sleep(0.005)
        assert staged is not None, list(self.said.queue)
        return staged


@pytest.fixture
def receiving():
    found = Receiving()
    yield found
    found.receiver.close()


def received(sender, bucket_bytes):
    """A version of ``sender`` as a receiver has it."""
    receiving = Receiving()
    staged = receiving.take(sender, bucket_bytes)
    receiving.receiver.close()
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


def test_a_layout_is_planned_once_and_anew_where_the_tensors_or_the_buckets_are_others(receiving):
    frozen = frozenset({"model.embed_tokens.weight"})
    scorer = PolicyScorer(model(0), 64.0, frozen=tuple(frozen))
    embedding, layouts = views(scorer.model)["model.embed_tokens.weight"].clone(), []
    for seed, bucket_bytes, left_out in (
        (1, 1 << 30, frozenset()), (2, 1 << 30, frozenset()), (3, 1000, frozenset()), (4, 1000, frozen),
        (5, 1000, frozen), (6, 1 << 30, frozenset()),
    ):  # fmt: skip
        sender = model(seed)
        staged = receiving.take(sender, bucket_bytes, left_out)
        assert scorer.swap(staged)
        receiving.receiver.applied(staged, adopted=True)
        ours, theirs = views(scorer.model), views(sender)
        if not left_out:
            embedding = theirs["model.embed_tokens.weight"]
        assert torch.equal(ours["model.embed_tokens.weight"], embedding)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs.keys() - left_out)
        layouts.append([bucket for bucket, _ in staged.buckets])
    same = [all(a is b for a, b in zip(one, two, strict=False)) for one, two in pairwise(layouts)]
    assert same == [True, False, False, True, False]


def test_every_bucket_of_a_model_in_training_is_a_slice_of_its_parameters():
    even = dataclasses.replace(CONFIG, vocab_size=64, hidden_size=64, head_dim=64)  # no kind of parameters is padded
    trained = Decoder(even)
    Optimizer(trained, OptimSection(), 1)
    gather = WeightGather(trained, 1 << 16)
    pieces = [as_one(bucket, named, torch.device("cpu")) for bucket, named in gather]
    assert len(pieces) > 2 and all(piece is not None for piece in pieces)
