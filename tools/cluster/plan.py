"""What a run asks of a cluster: its roles, their processes, and what contradicts the YAML.

::

    RunConfig + Machine -> plan() -> Plan(broker, learner, scorers, actor) -> slurm.render | kubernetes.render

Every number comes from the configuration or is checked against it, so that files and YAML cannot
disagree. Errors name the key, its value and the remedy.
"""

import math
import re
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from common.config import RunConfig
from common.errors import ConfigError
from common.frozen import POLICY

ADDRESS = re.compile(r"tcp://(?:\[[^\]]+\]|[^:]+):(?P<port>\d+)")
MEGABYTES_PER_GB = 1024
BROKER_CPUS = 4  # the loop, the journal's writer, ZeroMQ and CURVE
BROKER_GB = 4  # beside the queue and the shards that it keeps
FILES_GB = 10  # metrics and receipts of a long run, beside the journal
MAX_RESTARTS = 3  # of the learner's ranks by torchrun, and of another process in its place


@dataclass(frozen=True)
class Machine:
    """The cluster's nodes, and how much of them a process takes."""

    gpus_per_node: int = 8  # 0: no GPUs
    learner_nodes: int = 0  # 0: as few as hold the learner's ranks
    cpus: int = 8  # for a rank of the learner or of a replica, and for a rank of an actor's server
    memory_gb: int = 96  # for the same
    shared: str = "/shared"  # a directory that every node sees; relative paths of the YAML are taken from it


@dataclass(frozen=True)
class Role:
    """``count`` tasks or pods of ``processes`` processes each; ``gpus``, ``cpus``, ``memory_gb`` are of one task."""

    name: str  # broker, learner, actor; of a scorer replica, reference or teacher-NAME
    count: int
    processes: int
    gpus: int
    cpus: int
    memory_gb: int
    threads: int
    serves: str = POLICY  # of a scorer: the frozen model


@dataclass(frozen=True)
class Plan:
    """All roles of a run; scorers are the policy replicas, unless rejection is off, and the frozen models."""

    config: RunConfig
    machine: Machine
    port: int  # the broker's
    broker: Role
    learner: Role
    scorers: tuple[Role, ...]
    actor: Role

    @property
    def roles(self) -> tuple[Role, ...]:
        """The broker first."""
        return (self.broker, self.learner, *self.scorers, self.actor)

    @property
    def names(self) -> list[str]:
        """Under which peers speak to the broker; each needs a key."""
        return ["learner", *(f"{role.name}-{i}" for role in (*self.scorers, self.actor) for i in range(role.count))]

    def path(self, path: str) -> PurePosixPath:
        """``path`` as every node sees it."""
        return PurePosixPath(self.machine.shared) / path

    @property
    def run_path(self) -> PurePosixPath:
        """The run's directory on the shared path."""
        return self.path(self.config.run.dir) / self.config.run.name


def plan(config: RunConfig, machine: Machine) -> Plan:
    """The roles of ``config`` on ``machine``. Raises :class:`ConfigError` for what contradicts itself."""
    _require(machine.gpus_per_node >= 0, "--gpus-per-node", machine.gpus_per_node, "must be 0 (CPUs only) or more")
    _require(machine.cpus >= 1, "--cpus", machine.cpus, "must be at least 1")
    _require(machine.memory_gb >= 1, "--memory", machine.memory_gb, "must be at least 1 GB")
    _require(PurePosixPath(machine.shared).is_absolute(), "--shared", machine.shared, "must be an absolute path")
    _require(
        re.fullmatch(r"[A-Za-z0-9._-]+", config.run.name) is not None,
        "run.name",
        config.run.name,
        "names jobs and files of a cluster; use A-Z a-z 0-9 . _ -",
    )
    port = _check_broker(config)
    _check_restart(config)
    broker_gb = BROKER_GB + math.ceil((2 * config.broker.queue_mb + config.broker.retain_mb) / MEGABYTES_PER_GB)
    return Plan(
        config,
        machine,
        port,
        Role("broker", 1, 1, 0, BROKER_CPUS, broker_gb, 1),
        _learner(config, machine),
        _scorers(config, machine),
        _actor(config, machine),
    )


def broker_volume_gb(config: RunConfig) -> int:
    """What the broker's run directory may grow to."""
    return FILES_GB + math.ceil(2 * config.broker.journal_mb / MEGABYTES_PER_GB)


def _require(condition: bool, key: str, value: object, rule: str) -> None:
    if not condition:
        raise ConfigError(f"{key}={value!r}: {rule}")


def _check_broker(config: RunConfig) -> int:
    """The broker's port; its host is given when the run starts."""
    broker = config.broker
    match = ADDRESS.fullmatch(broker.address)
    _require(
        match is not None and 0 < int(match["port"]) < 65536,
        "broker.address",
        broker.address,
        "other nodes must reach it; give tcp://HOST:PORT (PORT is used, HOST is set when the run starts)",
    )
    assert match is not None
    _require(
        bool(broker.keys),
        "broker.keys",
        broker.keys,
        "other nodes reach the broker, so it needs keys: `python -m tools.keys make DIR`, and set broker.keys=DIR",
    )
    return int(match["port"])


def _check_restart(config: RunConfig) -> None:
    _require(
        config.learner.checkpoint_every > 0,
        "learner.checkpoint_every",
        config.learner.checkpoint_every,
        "a learner that is started again would begin anew; set it to some steps (25, say)",
    )


def _role(name: str, count: int, processes: int, machine: Machine, threads: int, on_gpus: bool = True) -> Role:
    gpus = processes if on_gpus and machine.gpus_per_node else 0
    cpus = processes * max(machine.cpus, threads)
    return Role(name, count, processes, gpus, cpus, processes * machine.memory_gb, threads)


def _learner(config: RunConfig, machine: Machine) -> Role:
    learner, gpus, nodes = config.learner, machine.gpus_per_node, machine.learner_nodes
    ranks = learner.ranks
    said = (
        f"{ranks} (pp {learner.pp} × dp_replicate {learner.dp_replicate} × dp_shard {learner.dp_shard} "
        f"× ep {learner.ep} × tp {learner.tp})"
    )
    _require(nodes >= 0, "--learner-nodes", nodes, "must be at least 1, or 0 for as few as hold the ranks")
    if not nodes:
        fit = [n for n in range(1, ranks + 1) if ranks % n == 0 and (not gpus or ranks // n <= gpus)]
        nodes = next((n for n in fit if ranks // n % learner.tp == 0), fit[0])
    if ranks % nodes:
        divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
        raise ConfigError(
            f"learner ranks={said}: {nodes} nodes (--learner-nodes) cannot hold equally many; take one of "
            f"{', '.join(map(str, divisors))} nodes, or change the mesh"
        )
    each = ranks // nodes
    if gpus and each > gpus:
        raise ConfigError(
            f"learner ranks={said}: {each} on each of {nodes} nodes, which have {gpus} GPUs (--gpus-per-node); "
            "raise --learner-nodes, or change the mesh"
        )
    _require(
        each % learner.tp == 0,
        "learner.tp",
        learner.tp,
        f"neighbours must share a node, and each of {nodes} nodes has {each} ranks; change it or --learner-nodes",
    )
    return _role("learner", nodes, each, machine, learner.threads)


def _scorers(config: RunConfig, machine: Machine) -> tuple[Role, ...]:
    replica, gpus = config.replica, machine.gpus_per_node
    ranks = replica.ranks
    _require(
        not gpus or ranks <= gpus,
        "replica.ep × replica.tp",
        f"{replica.ep} × {replica.tp}",
        f"a replica runs on one node, which has {gpus} GPUs (--gpus-per-node); lower them",
    )
    wanted = [("replica", replica.count, POLICY)] if POLICY in config.scorers else []
    wanted += [(model.role, model.count, model.name) for model in config.frozen.values()]
    return tuple(
        replace(_role(name, count, ranks, machine, replica.threads), serves=serves) for name, count, serves in wanted
    )


def _actor(config: RunConfig, machine: Machine) -> Role:
    actor, engine, gpus = config.actor, config.engine, machine.gpus_per_node
    if actor.engine == "local":
        return _role("actor", actor.count, 1, machine, actor.threads, on_gpus=False)
    _require(
        engine.launch > 0,
        "engine.addresses",
        engine.addresses,
        "every actor of the run would drive these servers; clear it and set engine.launch=1",
    )
    on_gpus = engine.device == "cuda" or (engine.device == "auto" and gpus > 0)
    _require(
        not on_gpus or gpus > 0, "engine.device", engine.device, "the nodes have no GPUs (--gpus-per-node 0); set cpu"
    )
    ranks = engine.launch * engine.tp
    if on_gpus:
        _check_servers(config, gpus)
    return _role("actor", actor.count, ranks, machine, actor.threads, on_gpus)


def _check_servers(config: RunConfig, gpus: int) -> None:
    """Of an actor with GPUs."""
    engine = config.engine
    _require(
        engine.launch * engine.tp <= gpus,
        "engine.launch × engine.tp",
        f"{engine.launch} × {engine.tp}",
        f"an actor and its servers share one node, which has {gpus} GPUs (--gpus-per-node); lower them",
    )
    _require(
        engine.launch == 1,
        "engine.launch",
        engine.launch,
        "each server would take the first engine.tp GPUs that it sees, the same ones; set it to 1 and start "
        f"actor.count={config.actor.count * engine.launch} actors, several of which fit on a node",
    )
