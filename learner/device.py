"""Which device this process computes on, and how its host memory behaves."""

import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from common.config import RunConfig

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)
NEVER_TRIM = 0x7FFFFFFF
# As an SGLang server sets them for itself where nobody has.
SERVERS_NCCL = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}


def match_servers(config: RunConfig) -> None:
    """Where weights go to SGLang servers by NCCL, have it keep its buffers here as it does there.

    A group whose members keep theirs in two ways breaks or hangs at its first broadcast. To be called before this
    process makes a communicator: NCCL looks once. What the environment says already stays.
    """
    if config.actor.engine == "sglang" and config.weight_backend(torch.cuda.is_available()) == "nccl":
        for name, value in SERVERS_NCCL.items():
            os.environ.setdefault(name, value)


def pick_device() -> torch.device:
    """This rank's GPU where there is one, without cuDNN's attention; else the CPU.

    cuDNN makes a plan, in 20 to 500 ms, for every shape of attention that it has not met, and keeps them
    all: packed sequences (:mod:`learner.model.packing`) come in new shapes with almost every micro-batch.
    """
    if torch.cuda.is_available():
        torch.backends.cuda.enable_cudnn_sdp(False)
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """``array`` there; onto a GPU by way of page-locked memory, so that the host does not wait for what the GPU does.

    An ordinary copy returns when all that was asked of the GPU before is done, and then it idles until it is asked
    for more.
    """
    tensor = torch.from_numpy(array)
    if device.type != "cuda" or not array.size:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def keep_freed_memory() -> bool:
    """Let glibc keep what tensors free for the next ones; False where the C library knows no such thing.

    By default every large tensor is mapped afresh and its pages are zeroed when they are first
    touched: 27 ms for 64 MB, a tenth of a mixture-of-experts layer's time on a CPU. The process then
    holds its peak.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER_TRIM))


def compile_rows(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``torch.compile`` with ``options`` for any number of rows; other sizes and constants each get code of their own.

    Told that everything may change (``dynamic=True``), it makes variables of every width and constant, and code
    that takes up to three times as long on a CPU.
    """
    compiled = torch.compile(function, dynamic=False, options=options or None)

    def call(*arguments: Any) -> Any:
        for argument in arguments:
            if isinstance(argument, Tensor):
                torch._dynamo.maybe_mark_dynamic(argument, 0)
        return compiled(*arguments)

    return call
