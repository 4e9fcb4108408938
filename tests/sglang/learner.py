"""A learner that does nothing but broadcast one directory's weights, and may die or hang half way.

``python -m tests.sglang.learner MODEL BUCKET_BYTES EPOCH WORLD AFTER FATE``: prints the port of its store,
waits for a line, broadcasts; after AFTER buckets it meets its FATE (SIGKILL, SIGSTOP or none).
"""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from common.weights import WeightDigest, plan_buckets
from learner.weights.group import WeightGroup
from learner.weights.pack import flatten


def main(model, bucket_bytes, epoch, world, after, fate):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    print(store.port, flush=True)
    sys.stdin.readline()
    group = WeightGroup(store, int(epoch), 0, int(world), "gloo", 20.0, torch.device("cpu"))
    digest = WeightDigest()
    state = load_file(Path(model) / "model.safetensors")
    listing = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in state.items()]
    for index, bucket in enumerate(plan_buckets(listing, int(bucket_bytes))):
        flat = flatten(bucket, state, torch.empty(bucket.nbytes, dtype=torch.uint8))
        if index == int(after) and fate != "none":
            os.kill(os.getpid(), signal.Signals[fate])
        group.start(flat).wait()
        digest.update(group.sums(flat))
    group.send_digest(digest.hex(), int(epoch))  # versions are numbered like epochs here
    print("done", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main(*sys.argv[1:])
