"""What a run may not change when its broker is started again: its journal is decided again under it."""

import dataclasses
from typing import Any

from common.config import RunConfig

MIXING = "rewards mixed by the broker (reward.normalise, reward.gate, reward models)"


def fixed_settings(config: RunConfig, model: dict[str, int] | None = None) -> dict[str, Any]:
    """Key -> value of all that the steps of a run, as they are held and served again, are a function of.

    ``model`` is what of the model trajectories are checked against; None where it is not known, which is let pass.

    What grants and admission follow is not among it: what was granted and admitted stays so.
    """
    rollout, obrs, reward = config.rollout, dataclasses.asdict(config.obrs), config.reward
    del obrs["rethin_below"]  # whether a step was thinned again is in the journal
    found = {
        "run.seed": config.run.seed,
        **{f"model.path's {name}": value for name, value in (model or {}).items()},
        "rollout.groups_per_step": rollout.groups_per_step,
        "rollout.group_size": rollout.group_size,
        "rollout.temperature": rollout.temperature,
        "rollout.top_logprobs": rollout.top_logprobs,
        "rollout.routing_replay": rollout.routing_replay,
        "rollout.exemplars": rollout.exemplars,
        **{f"advantage.{name}": value for name, value in dataclasses.asdict(config.advantage).items()},
        **{f"obrs.{name}": value for name, value in obrs.items()},
        "loss.aggregate": config.loss.aggregate,
        "whoever scores (obrs.mode, loss.kl, teachers)": list(config.scorers),
        "the tasks of teachers": {name: model.tasks for name, model in config.frozen.items()},
        "task.mix": list(zip(config.task.labels, config.task.ratios, strict=True)),  # tasks are numbered in this order
    }
    if config.advantage.overlong_buffer or config.loss.aggregate == "constant":
        found["rollout.max_turns × max_tokens"] = rollout.max_sampled
    found[MIXING] = reward.mixes
    if reward.mixes:
        found |= {
            "reward.normalise": reward.normalise,
            "reward.normalise_by": reward.normalise_by,
            "reward.memory": reward.memory,
            "reward.gate": {name: dataclasses.asdict(gate) for name, gate in reward.gate.items()},
            "task.reward_weights": {label: entry.reward_weights for label, entry in config.task.entries.items()},
        }
    return {key: _plain(value) for key, value in found.items()}


def changed(then: dict[str, Any], now: dict[str, Any]) -> str:
    """What of a run's settings ``then`` is another ``now``, in words; "" if nothing is.

    Older journals do not say whether rewards were mixed, but how only where they were.
    """
    then = {MIXING: "reward.normalise" in then, **then}
    odd = [f"{name}={then[name]}, not {now[name]}" for name in now if name in then and then[name] != now[name]]
    remedy = "; set that back, or choose another run.name to begin a new run"
    return f"this run has {' and '.join(odd)}{remedy}" if odd else ""


def _plain(value: Any) -> Any:
    """As it comes back from a journal."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
