"""What rank 0 keeps of a version that it had to gather: each bucket once, in one piece."""

from types import SimpleNamespace

import pytest
import torch

from common.weights import plan_buckets
from learner.weights.gather import Snapshot, in_memory_order
from learner.weights.pack import as_one

HOST = torch.device("cpu")


class Gather:
    """Tensors that arrive one bucket after the other on ``rank`` 0, each in memory of its own."""

    def __init__(self, rank=0, is_local=False):
        sizes = {"a": 8, "b": 4, "c": 12, "d": 16, "e": 4}
        self.whole = {name: torch.arange(1.0, size + 1) for name, size in sizes.items()}
        self.listing = [[name, "float32", [len(t)]] for name, t in self.whole.items()]
        self.buckets = plan_buckets(self.listing, 64)
        self.mesh, self.is_local, self.arrived = SimpleNamespace(rank=rank), is_local, 0

    def __iter__(self):
        for bucket in self.buckets:
            self.arrived += 1
            named = {slot.name: self.whole[slot.name] for slot in bucket.slots}
            yield bucket, named if self.mesh.rank == 0 else {}


def test_a_gathered_bucket_lies_in_one_piece_and_is_laid_out_once():
    gather = Gather()
    snapshot = Snapshot(gather)
    pieces = []
    for index, bucket in enumerate(gather.buckets):
        named = snapshot.tensors(index, HOST)
        assert gather.arrived == index + 1  # no sooner than it is asked for
        pieces.append(as_one(bucket, named, HOST))
        for name, tensor in named.items():
            assert torch.equal(tensor, gather.whole[name]) and tensor.data_ptr() != gather.whole[name].data_ptr()
    assert len(pieces) > 2 and None not in pieces
    again = [as_one(bucket, snapshot.tensors(i, HOST), HOST) for i, bucket in enumerate(gather.buckets)]
    assert [flat.data_ptr() for flat in again] == [flat.data_ptr() for flat in pieces]


@pytest.mark.parametrize("asked", [0, 1])
def test_what_nobody_asked_for_is_gathered_all_the_same_and_kept_for_late_joiners(asked):
    gather = Gather()
    snapshot = Snapshot(gather)
    for index in range(asked):
        snapshot.tensors(index, HOST)
    snapshot.finish()
    assert gather.arrived == len(gather.buckets)
    published = {name: tensor.clone() for name, tensor in gather.whole.items()}
    for tensor in gather.whole.values():
        tensor.zero_()  # the next update
    late = {name: t for i in range(len(gather.buckets)) for name, t in snapshot.tensors(i, HOST).items()}
    assert list(late) == list(published)
    assert all(torch.equal(late[name], tensor) for name, tensor in published.items())


def test_other_ranks_only_pass_by_and_what_lies_on_rank_0_is_not_copied():
    other = Gather(rank=1)
    passing = Snapshot(other)
    passing.finish()
    assert other.arrived == len(other.buckets) and passing.tensors(0, HOST) == {}
    here = Gather(is_local=True)
    for name, tensor in Snapshot(here).tensors(0, HOST).items():
        assert tensor is here.whole[name]


@pytest.mark.parametrize("swapped", [False, True])
def test_the_order_of_tensors_does_not_depend_on_where_the_pieces_of_memory_lie(swapped):
    low, high = sorted((torch.zeros(8), torch.zeros(8)), key=torch.Tensor.data_ptr)
    first, second = (high, low) if swapped else (low, high)
    tensors = {"a": first[4:], "b": second[:4], "c": first[:4], "d": second[4:]}
    assert in_memory_order(tensors, ["a", "b", "c", "d"]) == ["c", "a", "b", "d"]
