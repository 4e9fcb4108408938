"""``python -m tools.cluster slurm|kubernetes RUN.yaml --out DIR [options] [key=value ...]``."""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.config import load
from common.errors import CroupierError
from tools.cluster import kubernetes, slurm
from tools.cluster.plan import Machine, Plan, plan
from tools.cluster.pods import Kubernetes
from tools.console import make_console, print_error
from tools.outputs import writing

SYSTEMS = ("slurm", "kubernetes")
PROGRAM = "python -m tools.cluster"


def main(arguments: Sequence[str] | None = None) -> int:
    """Render the files and say what comes next; 2 for a run that cannot be started so."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    given = parse(words)
    console = make_console()
    try:
        planned, files = render(words)
        _write(given.out, files)
    except CroupierError as error:
        print_error(console, error)
        return 2
    next_steps = slurm.next_steps if given.system == "slurm" else kubernetes.next_steps
    for line in (f"{given.out}: {', '.join(files)}", *next_steps(planned, given.out)):
        console.print(line, markup=False, soft_wrap=True)
    return 0


def render(words: Sequence[str]) -> tuple[Plan, dict[str, str]]:
    """The plan that a command line asks for, and its files by name. Raises :class:`CroupierError`."""
    given = parse(words)
    machine = Machine(given.gpus_per_node, given.learner_nodes, given.cpus, given.memory, given.shared)
    planned = plan(load(given.config, given.overrides), machine)
    command = shlex.join([*PROGRAM.split(), *_without_out(words)])
    if given.system == "slurm":
        steps = slurm.Slurm(
            given.python, given.partition, given.broker_partition, given.account, given.time, given.interface
        )
        return planned, slurm.render(planned, steps, command)
    pods = Kubernetes(given.image, given.claim, kubernetes.read_mounts(given.mount))
    return planned, kubernetes.render(planned, pods, command)


def _write(out: Path, files: Mapping[str, str]) -> None:
    with writing(out, "--out DIR elsewhere"):
        out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (out / name).write_text(text)


def _without_out(words: Sequence[str]) -> list[str]:
    """The same files come of it wherever they are written."""
    kept, skip = [], False
    for word in words:
        if not skip and word != "--out" and not word.startswith("--out="):
            kept.append(word)
        skip = word == "--out" and not skip
    return kept


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line; ends the process on a wrong one."""
    first = argparse.ArgumentParser(
        allow_abbrev=False,
        prog=PROGRAM,
        description="Render the files that start a run on a cluster.",
        epilog="docs/cluster.md says more",
    )
    first.add_argument(
        "system", choices=SYSTEMS, help=f"what the cluster runs; {PROGRAM} SYSTEM --help for its options"
    )
    system = first.parse_args(words[:1]).system
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {system}", allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(system=system)
    parser.add_argument("config", help="the run's YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, such as actor.count=8")
    parser.add_argument("--out", type=Path, required=True, help="directory for the files")
    machine = Machine()
    for flag, default, text in (
        ("--gpus-per-node", machine.gpus_per_node, "0: no GPUs"),
        ("--learner-nodes", machine.learner_nodes, "0: as few as hold the learner's ranks"),
        ("--cpus", machine.cpus, "for a rank of the learner, of a replica or of an actor's server"),
        ("--memory", machine.memory_gb, "GB for the same"),
    ):
        parser.add_argument(flag, type=int, default=default, help=text)
    parser.add_argument("--shared", default=machine.shared, help="a directory that every node sees")
    if system == "slurm":
        _slurm_options(parser)
    else:
        _kubernetes_options(parser)
    return parser.parse_intermixed_args(words[1:])


def _slurm_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--python", default="", help="interpreter that has croupier (SHARED/croupier/.venv/bin/python)")
    parser.add_argument("--partition", default="", help="of all nodes")
    parser.add_argument("--broker-partition", default="", help="of the broker's node, which needs no GPU")
    parser.add_argument("--account", default="", help="that the job is charged to")
    parser.add_argument("--time", default=slurm.Slurm().time, help="limit of one start; the run goes on after it")
    parser.add_argument("--interface", default="", help="network interface of gloo and NCCL")


def _kubernetes_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", required=True, help="with croupier, and SGLang where actors use it")
    parser.add_argument("--claim", required=True, help="ReadWriteMany volume claim, mounted as the shared directory")
    parser.add_argument("--mount", action="append", default=[], metavar="CLAIM=PATH", help="one more, read only")


if __name__ == "__main__":
    sys.exit(main())
