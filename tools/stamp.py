"""Which model a run wants and which one lies there: the cache key of ``tools.warmstart``. No torch here."""

import hashlib
import json
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path

from common.config import RunConfig
from common.joint import JointSection

STAMP = "warmstart.json"  # in the model directory; only a directory that has it is ever replaced
RECIPE = 1  # raise when the warm start's own code changes what it makes


class ModelState(StrEnum):
    """What lies at ``model.path``."""

    MISSING = "missing"
    CURRENT = "current"  # made by this warm start
    STALE = "stale"  # made by another one
    FOREIGN = "foreign"  # not made by us: never overwritten


def models_of(config: RunConfig) -> list[RunConfig]:
    """The run as the warm start of each of its models sees it: the policy's, then the rollout model's if it has one."""
    if not config.joint.path:
        return [config]
    model, joint = replace(config.model, path=config.joint.path), config.joint
    return [config, replace(config, model=model, joint=JointSection(), warmstart=joint.warmstart)]


def wants_warmstart(config: RunConfig) -> bool:
    """Whether a model of the run is to be made first."""
    if not config.task.in_small_alphabet:
        return False
    return any(model_state(one) in (ModelState.MISSING, ModelState.STALE) for one in models_of(config))


def fingerprint(config: RunConfig) -> str:
    """A hash of all that decides the model's bytes: seed, task, shape and recipe."""
    content = {
        "recipe": RECIPE,
        "seed": config.run.seed,
        "task": config.task.sorting.name,
        "params": config.task.sorting.params,
        "warmstart": asdict(config.warmstart),
        "dtype": config.model.dtype,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def model_state(config: RunConfig) -> ModelState:
    """Compare the directory with what ``config`` asks for."""
    path = Path(config.model.path)
    if not path.is_dir() or not any(path.iterdir()):
        return ModelState.MISSING
    stamp = path / STAMP
    if not stamp.is_file():
        return ModelState.FOREIGN
    try:
        made = json.loads(stamp.read_text()).get("fingerprint")
    except json.JSONDecodeError:
        return ModelState.STALE
    return ModelState.CURRENT if made == fingerprint(config) else ModelState.STALE


def write_stamp(directory: Path, config: RunConfig, steps: int, reward: float) -> None:
    """Mark ``directory`` as ours. No times and no host names: the same seed gives the same bytes."""
    stamp = {"fingerprint": fingerprint(config), "seed": config.run.seed, "steps": steps, "reward": round(reward, 4)}
    (directory / STAMP).write_text(json.dumps(stamp, indent=2, sort_keys=True) + "\n")
