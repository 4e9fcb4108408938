"""Which of a machine's GPUs each process of a run computes on.

::

    nvidia-smi -L, CUDA_VISIBLE_DEVICES -> find_devices() -> deal() -> CUDA_VISIBLE_DEVICES of each child

Whoever receives weights has GPUs of its own as long as there are enough: NCCL takes none twice. Torch
is not imported, so that a launcher starts at once.
"""

import importlib.metadata
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from common.config import RunConfig

VISIBLE = "CUDA_VISIBLE_DEVICES"
LIST_TIMEOUT_S = 30.0  # a driver that nothing keeps loaded takes seconds


def find_devices() -> list[str]:
    """This machine's GPUs that children may use, as ``CUDA_VISIBLE_DEVICES`` names them; none without CUDA."""
    return visible(_installed(), os.environ.get(VISIBLE))


def visible(installed: int, setting: str | None) -> list[str]:
    """What ``CUDA_VISIBLE_DEVICES=setting`` leaves of ``installed`` GPUs: CUDA ends at the first that is not there."""
    if setting is None or not installed:
        return [str(index) for index in range(installed)]
    found: list[str] = []
    for name in map(str.strip, setting.split(",")):
        if not name or (name.lstrip("-").isdigit() and not 0 <= int(name) < installed):
            break
        found.append(name)
    return found


def _installed() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=LIST_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return count_listed(done.stdout) if done.returncode == 0 else 0


def count_listed(text: str) -> int:
    """GPUs in what ``nvidia-smi -L`` prints; the lines of their MIG slices are indented."""
    return sum(line.startswith("GPU ") for line in text.splitlines())


def torch_on_gpus() -> bool:
    """Whether the installed torch can use GPUs, by its version."""
    return not importlib.metadata.version("torch").endswith("+cpu")


def receivers(config: RunConfig, on_gpus: bool) -> dict[str, int]:
    """GPUs of the learner and of those who receive its weights, by process; ``on_gpus`` is torch's."""
    replicas = config.replica.count if config.obrs.mode != "off" else 0
    servers = config.engine.launch * config.engine.tp * starts_on_gpus(config)
    return {
        "learner": config.learner.ranks * on_gpus,
        **{f"replica-{index}": config.replica.ranks * on_gpus for index in range(replicas)},
        **{f"actor-{index}": servers for index in range(config.actor.count)},
    }


def starts_on_gpus(config: RunConfig) -> bool:
    """Whether actors start SGLang servers that compute on GPUs."""
    return config.actor.engine == "sglang" and config.engine.launch > 0 and config.engine.device != "cpu"


def deal(config: RunConfig, devices: Sequence[str], on_gpus: bool) -> dict[str, str]:
    """``CUDA_VISIBLE_DEVICES`` of each process that takes GPUs; from the first again when all are dealt out.

    Frozen models come last: they may share. Without GPUs nobody gets any.
    """
    frozen = [model.process(index) for model in config.frozen.values() for index in range(model.count)]
    wanted = receivers(config, on_gpus) | {name: config.replica.ranks * on_gpus for name in frozen}
    return _in_turn(wanted, devices)


def _in_turn(wanted: Mapping[str, int], devices: Sequence[str]) -> dict[str, str]:
    dealt, start = {}, 0
    for name, number in wanted.items():
        if number and devices:
            mine = [devices[(start + i) % len(devices)] for i in range(min(number, len(devices)))]
            dealt[name], start = ",".join(mine), start + number
    return dealt
