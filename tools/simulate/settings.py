"""What is simulated: a run's settings under the names they have in a run's YAML, and what everything costs.

::

    SETUP.yaml + ["actor.count=4", ...]  ->  read_setup()        ->  Setup
    RUN_DIR + the same                   ->  Setup.from_run()    ->  Setup
    "staleness.budget=0,1,2"             ->  variants()          ->  one list of overrides a combination

Costs are seconds: of one thread's CPU for what runs on the machine that all share (``machine.shared``), of
time otherwise. Tokens are those sampled, unless said otherwise.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from common.config import merge, read_overrides, read_yaml
from common.objective import require

COSTS = ("_s", "spread", "background", "rejected_per_lag")  # how the names of figures end that cannot be negative
MOST_ACTORS = 100_000


@dataclass(frozen=True)
class RunPart:
    """How long, and from where on figures are taken."""

    steps: int = 100
    seed: int = 0
    first: int = 3  # the step after whose commit figures begin: queues have filled by then


@dataclass(frozen=True)
class RolloutPart:
    """What a step is made of."""

    groups_per_step: int = 32
    group_size: int = 8
    max_tokens: int = 128
    prompt_tokens: int = 32
    oversample: float = 1.0

    @property
    def started(self) -> int:
        """Siblings that are started for a group."""
        return math.ceil(self.group_size * self.oversample)


@dataclass(frozen=True)
class LengthPart:
    """Tokens of a completion; none is longer than ``rollout.max_tokens``."""

    kind: Literal["longest", "lognormal", "uniform", "histogram"] = "longest"
    mean: float = 64.0  # lognormal: before rollout.max_tokens cuts
    sigma: float = 0.6  # lognormal: standard deviation of the logarithm
    least: int = 1  # uniform: between this and rollout.max_tokens
    values: tuple[int, ...] = ()  # histogram: lengths ...
    weights: tuple[float, ...] = ()  # ... and how often each; none given: equally


@dataclass(frozen=True)
class StalenessPart:
    """The budget, in versions."""

    budget: int = 2


@dataclass(frozen=True)
class ObrsPart:
    """Whether a replica scores every step, and what rejection takes."""

    mode: Literal["off", "threshold", "budget", "ess"] = "threshold"
    rejected_per_lag: float = 0.0  # share of the tokens that a version of lag costs


@dataclass(frozen=True)
class ActorPart:
    """The fleet. A decode step of n rows costs ``step_s + n row_s + n longest context_s``."""

    count: int = 2
    servers: int = 0  # SGLang servers behind each, with processors of their own; 0: it samples itself
    max_sequences: int = 256  # rows that one engine or server decodes together
    slowdown: float = 1.0
    pace_s: float = 0.0  # what a decode step takes at least
    threads: int = 1
    step_s: float = 0.004
    row_s: float = 0.0001
    context_s: float = 0.0  # a row and token of the longest sequence's context, prompt included
    prefill_s: float = 0.002  # a pass over new prompts
    prefill_token_s: float = 2e-5  # a token of them
    sequence_s: float = 0.0002  # a completion: scored, packed, sent
    swap_s: float = 0.01  # a new version is taken into use


@dataclass(frozen=True)
class ReplicaPart:
    """The policy replica."""

    count: int = 1
    threads: int = 1
    score_s: float = 0.005  # a batch
    score_token_s: float = 2e-5  # a token of it, prompts included
    swap_s: float = 0.01
    spread: float = 0.0  # of a batch's cost: standard deviation over mean


@dataclass(frozen=True)
class LearnerPart:
    """The trainer."""

    slowdown: float = 1.0
    pace_s: float = 0.0  # what a step takes at least
    threads: int = 1
    step_s: float = 0.02  # a step, whatever is in it: the optimizer
    token_s: float = 1e-4  # a token of it, prompts included
    checkpoint_every: int = 0
    checkpoint_s: float = 0.0
    spread: float = 0.0  # of a step's cost: standard deviation over mean


@dataclass(frozen=True)
class WeightsPart:
    """A publish: gathered by the learner, one collective with every receiver, then taken into use."""

    gather_s: float = 0.005
    send_s: float = 0.02  # the learner's part of the collective ...
    receiver_s: float = 0.0  # ... and more for every receiver
    receive_s: float = 0.02  # a receiver's part, beside its sampling or scoring
    wire_s: float = 0.0  # during which nobody computes


@dataclass(frozen=True)
class BrokerPart:
    """The broker's thread, and how far its answers travel."""

    assemble_ahead: int = 1
    message_s: float = 0.0002  # any message
    trajectory_s: float = 0.00005  # a trajectory in one: decoded, admitted, journaled
    assemble_s: float = 0.002  # a step: collated
    decide_s: float = 0.002  # a step: coins and receipt
    pack_s: float = 0.002  # a step: packed and sent
    commit_s: float = 0.001
    hold_s: float = 0.002  # until what was decided is on disk and answers may leave
    link_s: float = 0.0005  # of any message


@dataclass(frozen=True)
class EvaluationPart:
    """Held-out rounds."""

    prompts: int = 0
    every: int = 50
    samples: int = 1


@dataclass(frozen=True)
class MachinePart:
    """Who computes where."""

    shared: bool = True  # all processes share the cores of one machine (servers never do); false: each has its own
    cores: float = 2.0
    background: float = 0.0  # cores that everything not modelled takes
    crowded: float = 1.0  # a thread's speed while another runs beside it, 1 if it does not matter


@dataclass(frozen=True)
class Setup:
    """Everything that :func:`tools.simulate.simulate` wants to know."""

    run: RunPart = field(default_factory=RunPart)
    rollout: RolloutPart = field(default_factory=RolloutPart)
    length: LengthPart = field(default_factory=LengthPart)
    staleness: StalenessPart = field(default_factory=StalenessPart)
    obrs: ObrsPart = field(default_factory=ObrsPart)
    actor: ActorPart = field(default_factory=ActorPart)
    replica: ReplicaPart = field(default_factory=ReplicaPart)
    learner: LearnerPart = field(default_factory=LearnerPart)
    weights: WeightsPart = field(default_factory=WeightsPart)
    broker: BrokerPart = field(default_factory=BrokerPart)
    evaluation: EvaluationPart = field(default_factory=EvaluationPart)
    machine: MachinePart = field(default_factory=MachinePart)

    def __post_init__(self) -> None:
        """Validate: raises :class:`ConfigError` with the field's name."""
        for section in fields(self):
            part = getattr(self, section.name)
            for one in fields(part):
                value, key = getattr(part, one.name), f"{section.name}.{one.name}"
                if isinstance(value, int | float):
                    require(math.isfinite(value), key, value, "must be a finite number")
                    require(value >= 0 or not one.name.endswith(COSTS), key, value, "must not be negative")
        self._check_counts()
        self._check_lengths()
        for key, value in (("actor.slowdown", self.actor.slowdown), ("learner.slowdown", self.learner.slowdown)):
            require(value >= 1, key, value, "must be at least 1")
        machine = self.machine
        require(machine.cores > 0, "machine.cores", machine.cores, "must be positive")
        free = machine.cores - machine.background
        require(free > 0, "machine.background", machine.background, f"leaves nothing of machine.cores={machine.cores}")
        require(0.1 <= machine.crowded <= 1, "machine.crowded", machine.crowded, "must lie in [0.1, 1]")
        work = self.actor.step_s + self.actor.row_s + self.learner.step_s + self.learner.token_s
        require(work > 0, "learner.token_s", self.learner.token_s, "somebody must cost something")

    def _check_counts(self) -> None:
        actor, rollout = self.actor, self.rollout
        least_one = {
            "run.steps": self.run.steps, "rollout.groups_per_step": rollout.groups_per_step,
            "rollout.group_size": rollout.group_size, "rollout.max_tokens": rollout.max_tokens,
            "rollout.prompt_tokens": rollout.prompt_tokens, "actor.threads": actor.threads,
            "replica.threads": self.replica.threads, "learner.threads": self.learner.threads,
            "evaluation.every": self.evaluation.every, "evaluation.samples": self.evaluation.samples,
        }  # fmt: skip
        for key, count in least_one.items():
            require(count >= 1, key, count, "must be at least 1")
        not_negative = {
            "run.seed": self.run.seed, "run.first": self.run.first, "staleness.budget": self.staleness.budget,
            "actor.servers": actor.servers, "replica.count": self.replica.count,
            "evaluation.prompts": self.evaluation.prompts,
            "learner.checkpoint_every": self.learner.checkpoint_every,
            "broker.assemble_ahead": self.broker.assemble_ahead,
        }  # fmt: skip
        for key, count in not_negative.items():
            require(count >= 0, key, count, "must not be negative")
        require(1 <= actor.count <= MOST_ACTORS, "actor.count", actor.count, f"must lie in [1, {MOST_ACTORS}]")
        require(1 <= rollout.oversample <= 4, "rollout.oversample", rollout.oversample, "must lie in [1, 4]")
        least = max(rollout.started, self.evaluation.samples if self.evaluation.prompts else 1)
        require(
            actor.max_sequences >= least, "actor.max_sequences", actor.max_sequences,
            f"must hold one whole group (rollout.group_size={rollout.group_size}, with rollout.oversample) and all "
            "evaluation.samples of a prompt",
        )  # fmt: skip
        require(
            self.replica.count >= 1 or self.obrs.mode == "off", "replica.count", self.replica.count,
            "rejection needs a policy replica; set it to 1 or obrs.mode=off",
        )  # fmt: skip

    def _check_lengths(self) -> None:
        length, most = self.length, self.rollout.max_tokens
        require(length.mean > 0, "length.mean", length.mean, "must be positive")
        require(length.sigma >= 0, "length.sigma", length.sigma, "must not be negative")
        require(1 <= length.least <= most, "length.least", length.least, f"must lie in [1, rollout.max_tokens={most}]")
        if length.kind != "histogram":
            return
        require(bool(length.values), "length.values", length.values, "is empty; length.kind=histogram needs lengths")
        require(min(length.values) >= 1, "length.values", length.values, "must be at least 1 token each")
        fits = len(length.weights) in (0, len(length.values))
        require(fits, "length.weights", length.weights, f"must be as many as length.values ({len(length.values)})")
        sound = all(math.isfinite(weight) and weight >= 0 for weight in length.weights)
        sound = sound and (not length.weights or sum(length.weights) > 0)
        require(sound, "length.weights", length.weights, "must be finite, not negative, and not all 0")

    @staticmethod
    def from_run(run_dir: Path | str, overrides: Sequence[str] = ()) -> "Setup":
        """What ``run_dir`` did, at the costs it had, with ``overrides``; see :mod:`tools.simulate.measured`.

        Raises :class:`DataError` for a run that does not tell enough, :class:`ConfigError` for the overrides.
        """
        from tools.simulate.measured import measure

        return override(measure([Path(run_dir)]).setup, overrides)


def read_setup(path: Path | None, overrides: Sequence[str] = ()) -> Setup:
    """The setup in a YAML file, or the defaults, with overrides. Raises :class:`ConfigError`."""
    instead = "configs/ holds runs, docs/simulator.md an example of a setup"
    file = OmegaConf.create({}) if path is None else read_yaml(path, instead)
    return merge(Setup, file, read_overrides(overrides), str(path or "defaults"))


def override(setup: Setup, overrides: Sequence[str]) -> Setup:
    """``setup`` with ``section.key=value``. Raises :class:`ConfigError` that suggests the near name."""
    if not overrides:
        return setup
    return merge(Setup, OmegaConf.create({}), read_overrides(overrides), "setup", start=setup)


def replaced(setup: Setup, values: Mapping[str, Mapping[str, Any]]) -> Setup:
    """``setup`` with the given fields of its sections. Raises :class:`ConfigError`."""
    sections = {f.name: getattr(setup, f.name) for f in fields(setup)}
    return Setup(**{name: replace(part, **values.get(name, {})) for name, part in sections.items()})


def variants(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of the values that overrides list, ``key=a,b``; brackets and braces keep theirs together."""
    choices = []
    for one in overrides:
        key, equals, value = one.partition("=")
        listed = [value] if value.lstrip().startswith(("[", "{")) else value.split(",")
        choices.append([f"{key}{equals}{each.strip()}" for each in listed])
    return [list(combination) for combination in itertools.product(*choices)]


def varied(overrides: Sequence[str]) -> list[str]:
    """The keys that are given more than one value."""
    return [one.partition("=")[0] for one in overrides if len(variants([one])) > 1]


def to_yaml(setup: Setup) -> str:
    """All of it, for a file that can be changed by hand."""
    text: str = OmegaConf.to_yaml(OmegaConf.structured(setup))
    return text


def settings_of(config: Any) -> dict[str, Any]:
    """Overrides, as a nested dictionary, with what a run's configuration shares with a setup."""
    rollout, actor, learner = config.rollout, config.actor, config.learner
    return {
        "run": {"steps": config.run.steps, "seed": config.run.seed},
        "rollout": {
            "groups_per_step": rollout.groups_per_step, "group_size": rollout.group_size,
            "max_tokens": rollout.max_sampled, "oversample": rollout.oversample,
        },
        "staleness": {"budget": config.staleness.first},
        "obrs": {"mode": config.obrs.mode},
        "actor": {
            "count": actor.count, "max_sequences": actor.max_sequences, "slowdown": actor.slowdown,
            "pace_s": actor.pace_s, "threads": actor.threads,
            "servers": 0 if actor.engine == "local" else max(config.engine.launch, len(config.engine.addresses)),
        },
        "replica": {"count": config.replica.count if config.obrs.mode != "off" else 0},
        "learner": {
            "slowdown": learner.slowdown, "pace_s": learner.pace_s, "threads": learner.threads * learner.ranks,
            "checkpoint_every": learner.checkpoint_every,
        },
        "broker": {"assemble_ahead": config.broker.assemble_ahead},
        "evaluation": {
            "prompts": config.evaluation.prompts, "every": config.evaluation.every,
            "samples": config.evaluation.samples,
        },
    }  # fmt: skip
