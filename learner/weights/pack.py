"""A bucket's tensors as one piece of memory, which a broadcast takes."""

import torch

from common.weights import Bucket


def as_one(bucket: Bucket, tensors: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor | None:
    """The bucket as a slice of the memory its tensors lie in, if they do so in its order without gaps."""
    parts = [tensors[slot.name] for slot in bucket.slots]
    storage, base = parts[0].untyped_storage(), parts[0].data_ptr()
    for slot, part in zip(bucket.slots, parts, strict=True):
        if part.data_ptr() - base != slot.offset or part.device != device or not part.is_contiguous():
            return None
        if part.untyped_storage().data_ptr() != storage.data_ptr():
            return None
    last = bucket.slots[-1]
    if last.offset + last.nbytes != bucket.nbytes:
        return None
    start = base - storage.data_ptr()
    one = torch.empty(0, dtype=torch.uint8, device=device)
    one.set_(storage, start, (bucket.nbytes,), (1,))  # bytes of another dtype's storage
    return one


def flatten(bucket: Bucket, tensors: dict[str, torch.Tensor], flat: torch.Tensor) -> torch.Tensor:
    """Copies the bucket's tensors into ``flat``, uint8 ``[nbytes]``, padding zeroed."""
    end = 0
    for slot in bucket.slots:
        flat[end : slot.offset].zero_()
        end = slot.offset + slot.nbytes
        flat[slot.offset : end].copy_(tensors[slot.name].contiguous().view(-1).view(torch.uint8))
    flat[end:].zero_()
    return flat
