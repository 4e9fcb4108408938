"""A run as one heterogeneous Slurm job: ``run.yaml``, ``job.sbatch`` and ``role.sh``.

::

    group 0  broker    1 task
    group 1  learner   torchrun on each node, rendezvous (c10d) on the first
    group 2  replicas  a task each          (none with rejection off)
    ...      a group for each frozen model  (reference, teachers)
    last     actors    a task each, its SGLang servers started by itself

Groups have nodes of their own, tasks of a group share them. Addresses come from the nodes' names
when the job starts.
"""

import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from common.config import to_yaml
from common.errors import ConfigError
from tools.cluster.plan import MAX_RESTARTS, Plan, Role

TEMPLATES = Path(__file__).parent / "templates"
TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}")  # what sbatch understands
PLACEHOLDER = re.compile(r"(?P<start>^)?@(?P<name>[A-Z_]+)@(?P<end>\n?)", re.MULTILINE)
GRACE_S = 120  # between SIGTERM and the time limit
SPREAD = "--kill-on-bad-exit=0 --wait=0"  # one task's end is not the others'
TOGETHER = "--kill-on-bad-exit=1"


@dataclass(frozen=True)
class Slurm:
    """What only Slurm needs to know."""

    python: str = ""  # interpreter of an environment that croupier is installed in, on every node
    partition: str = ""
    broker_partition: str = ""  # where nodes without GPUs are, if not in ``partition``
    account: str = ""
    time: str = "1-00:00:00"
    interface: str = ""  # network interface of gloo and NCCL; "" lets them choose


def render(plan: Plan, slurm: Slurm, command: str) -> dict[str, str]:
    """File names and contents; ``command`` is what rendered them."""
    if TIME.fullmatch(slurm.time) is None:
        raise ConfigError(f"--time={slurm.time!r}: must read D-HH:MM:SS, HH:MM:SS or minutes")
    yaml = f"# Rendered by {command}\n# role.sh gives broker.address and weights.host their hosts.\n"
    return {
        "run.yaml": yaml + to_yaml(plan.config),
        "job.sbatch": _job(plan, slurm, command),
        "role.sh": _role(plan, slurm),
    }


def _fill(template: str, values: dict[str, str]) -> str:
    """``@NAME@`` becomes its value; a line that is nothing else and has no value goes."""

    def put(match: re.Match[str]) -> str:
        value = values[match["name"]].rstrip("\n")
        return value + match["end"] if value or match["start"] is None else ""

    return PLACEHOLDER.sub(put, (TEMPLATES / template).read_text())


def _job(plan: Plan, slurm: Slurm, command: str) -> str:
    steps = []
    for group, role in enumerate(plan.roles):
        manner = TOGETHER if role.name in ("broker", "learner") else SPREAD
        steps.append(f"start {role.name} {group} {_size(role)} {manner}")
        if role.name in ("broker", "learner"):
            steps.append(f"{role.name}=${{steps[{group}]}}")
    return _fill(
        "job.sbatch",
        {
            "RUN": plan.config.run.name,
            "COMMAND": command,
            "DIRECTIVES": "\n".join(_directives(plan, slurm)),
            "RUN_PATH": shlex.quote(str(plan.run_path)),
            "STEPS": "\n".join(steps),
            "WRITE_S": f"{math.ceil(plan.config.learner.write_timeout_s)}",
        },
    )


def _directives(plan: Plan, slurm: Slurm) -> list[str]:
    lines = [
        f"#SBATCH --job-name={plan.config.run.name}",
        "#SBATCH --output=%x-%j.log --open-mode=append",
        f"#SBATCH --requeue --signal=B:TERM@{GRACE_S}",
    ]
    for group, role in enumerate(plan.roles):
        partition = slurm.broker_partition if role.name == "broker" else ""
        where = {"partition": partition or slurm.partition, "account": slurm.account, "time": slurm.time}
        given = " ".join(f"--{key}={value}" for key, value in where.items() if value)
        if group:
            lines.append("#SBATCH hetjob")
        lines.append(f"# group {group}: {_words(role)}")
        lines.append(f"#SBATCH {given}")
        lines.append(f"#SBATCH {_size(role)} --mem-per-cpu={math.ceil(1024 * role.memory_gb / role.cpus)}M")
    return lines


def _words(role: Role) -> str:
    tasks = "node" if role.name == "learner" else "task"
    each = f" of {role.processes} processes" if role.processes > 1 else ""
    return f"{role.name}, {role.count} {tasks}{'s' if role.count > 1 else ''}{each}"


def _size(role: Role) -> str:
    """Of a group and of the step that fills it: Slurm's steps do not inherit all of it."""
    if role.name == "learner":
        words = [f"--nodes={role.count} --ntasks-per-node=1 --cpus-per-task={role.cpus}"]
        words += [f"--gpus-per-node={role.gpus}"] if role.gpus else []
    else:
        nodes = "--nodes=1 " if role.name == "broker" else ""
        words = [f"{nodes}--ntasks={role.count} --cpus-per-task={role.cpus}"]
        words += [f"--gpus-per-task={role.gpus}"] if role.gpus else []
    return " ".join(words)


def _role(plan: Plan, slurm: Slurm) -> str:
    python = slurm.python or str(plan.path("croupier/.venv/bin/python"))
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if slurm.interface else ()
    return _fill(
        "role.sh",
        {
            "RUN": plan.config.run.name,
            "PYTHON": shlex.quote(python),
            "SHARED": shlex.quote(plan.machine.shared),
            "INTERFACE": "\n".join(f"export {name}={shlex.quote(slurm.interface)}" for name in names),
            "PORT": str(plan.port),
            "SCORERS": "".join(map(_scorer, plan.scorers)),
            "MAX_RESTARTS": str(MAX_RESTARTS),
            "BROKER_THREADS": str(plan.broker.threads),
            "LEARNER_NODES": str(plan.learner.count),
            "LEARNER_RANKS": str(plan.learner.processes),
            "LEARNER_THREADS": str(plan.learner.threads),
            "ACTOR_THREADS": str(plan.actor.threads),
        },
    )


def _scorer(role: Role) -> str:
    several = f"-m torch.distributed.run --standalone --nproc-per-node {role.processes} -m"
    start = several if role.processes > 1 else "-m"
    serves = f" --serves {role.serves}" if role.serves else ""
    return _fill("replica.sh", {"ROLE": role.name, "THREADS": str(role.threads), "START": start, "SERVES": serves})


def next_steps(plan: Plan, out: Path) -> list[str]:
    """What to do with the files."""
    keys = plan.path(plan.config.broker.keys)
    clients = " ".join(f"--client {name}" for name in plan.names)
    return [f"python -m tools.keys make {keys} {clients}", f"cd {out} && sbatch job.sbatch"]
