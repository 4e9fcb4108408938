"""``python -m tools.doctor [RUN.yaml [key=value ...]]``: what this machine lacks, and how to get it.

Only the standard library is imported at the top: a doctor must be able to start on a machine where
nothing is installed. Exit code 1 if something required is missing.
"""

import argparse
import configparser
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

State = Literal["ok", "note", "missing"]

ROOT = Path(__file__).resolve().parents[1]  # of the checkout
INSTALL = "make .venv, then call .venv/bin/python"
IMPORT_NAMES = {"pyzmq": "zmq", "reasoning-gym": "reasoning_gym"}  # where it is not the package's own
MIN_PYTHON = (3, 11)
MIN_MEMORY_GB = 4.0  # the quick start's five processes hold 3 GB
MIN_DISK_GB = 1.0
GLOO_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    what: str
    state: State
    detail: str
    remedy: str = ""


def main(arguments: list[str] | None = None) -> int:
    """Print the findings; 1 if something required is missing."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m tools.doctor", description="What this machine lacks to run croupier."
    )
    parser.add_argument("config", nargs="?", help="also check what this run needs")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_args(arguments)
    findings = examine(given.config, given.overrides)
    show(findings)
    return 1 if any(finding.state == "missing" for finding in findings) else 0


def examine(config: str | None, overrides: list[str]) -> list[Finding]:
    """Every check, in the order in which a person would mend things."""
    findings = [
        check_python(),
        *check_packages(),
        check_checkout(),
        *check_machine(),
        check_accelerator(),
        check_gloo(),
    ]
    return findings + (check_run(config, overrides) if config else [])


def check_python() -> Finding:
    """The interpreter."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < MIN_PYTHON:
        return Finding("Python", "missing", version, "install Python 3.11 or later and make a new .venv with it")
    return Finding("Python", "ok", f"{version} at {sys.executable}")


def requirements() -> list[str]:
    """Names of the packages that setup.cfg asks for."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg")
    lines = parser.get("options", "install_requires", fallback="").split("\n")
    return [re.split(r"[ <>=!~\[;]", line.strip())[0] for line in lines if line.strip()]


def pinned_versions() -> dict[str, str]:
    """Package -> version, as constraints.txt pins them."""
    file = ROOT / "constraints.txt"
    lines = file.read_text().splitlines() if file.is_file() else []
    pairs = (line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))
    return {_normal(name): version.strip() for name, version in pairs}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def check_packages() -> list[Finding]:
    """Each required package: installed, importable, at the pinned version."""
    pinned = pinned_versions()
    return [check_package(name, pinned.get(_normal(name))) for name in requirements()]


def check_package(name: str, pinned: str | None) -> Finding:
    """One package."""
    try:
        version = importlib.metadata.version(name)
        importlib.import_module(IMPORT_NAMES.get(name, name.replace("-", "_")))
    except importlib.metadata.PackageNotFoundError:
        wanted = f"{name}=={pinned}" if pinned else name
        return Finding(name, "missing", "not installed", f"{INSTALL}; or pip install -c constraints.txt {wanted}")
    except (ImportError, OSError) as error:  # OSError: a shared library that the package needs
        return Finding(
            name, "missing", f"installed but not importable: {error}", f"pip install --force-reinstall {name}"
        )
    if pinned is not None and version.split("+")[0] != pinned:
        return Finding(
            name, "note", f"{version}; tested with {pinned}", f"pip install -c constraints.txt {name}=={pinned}"
        )
    return Finding(name, "ok", version)


def check_checkout() -> Finding:
    """The package ``common`` must be ours, not some other project's of that name."""
    import common

    found = Path(common.__file__ or "").resolve().parent
    if found != ROOT / "common":
        return Finding("package common", "missing", f"{found} is not this checkout's", f"call python from {ROOT}")
    return Finding("package common", "ok", str(found))


def check_machine() -> list[Finding]:
    """Cores, memory and disk."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    disk = shutil.disk_usage(Path.cwd()).free / 1e9
    few, small, full = "the quick start takes about twice as long", "use a smaller model", "free some space for runs/"
    return [
        Finding("CPU cores", "ok" if cores >= 2 else "note", str(cores), "" if cores >= 2 else few),
        _amount("memory", memory, MIN_MEMORY_GB, small),
        _amount("free disk here", disk, MIN_DISK_GB, full),
    ]


def _amount(what: str, gigabytes: float, least: float, remedy: str) -> Finding:
    enough = gigabytes >= least
    return Finding(
        what, "ok" if enough else "note", f"{gigabytes:.1f} GB", "" if enough else f"below {least:g} GB: {remedy}"
    )


def check_accelerator() -> Finding:
    """CUDA and NCCL; never required."""
    try:
        import torch
    except (ImportError, OSError):
        return Finding("CUDA and NCCL", "note", "unknown without torch")
    if not torch.cuda.is_available():
        return Finding("CUDA and NCCL", "note", "no GPU: learner and weights use gloo on the CPU")
    nccl = "with" if torch.distributed.is_nccl_available() else "without"
    return Finding("CUDA and NCCL", "ok", f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}, {nccl} NCCL")


def check_gloo() -> Finding:
    """Two ranks in this process add two numbers over the loopback interface."""
    try:
        from tools.gloo_check import add_over_loopback
    except (ImportError, OSError):
        return Finding("gloo on loopback", "missing", "unknown without torch", INSTALL)
    try:
        took_s = add_over_loopback(GLOO_TIMEOUT_S)
    except (RuntimeError, TimeoutError) as error:
        remedy = "unset GLOO_SOCKET_IFNAME, or set it to the loopback interface (lo)"
        return Finding("gloo on loopback", "missing", str(error).splitlines()[0], remedy)
    return Finding("gloo on loopback", "ok", f"two ranks met in {took_s * 1e3:.0f} ms")


def check_run(config: str, overrides: list[str]) -> list[Finding]:
    """What one run needs: a valid YAML, a free address, a whole model."""
    try:
        from actor.tasks.base import SANDBOXED
        from common.config import RunConfig, load
        from common.errors import ConfigError, ModelError, TaskError
        from common.keys import broker_keys
        from common.routing import read_routing
    except ImportError as error:
        return [Finding("run file", "missing", f"cannot be read yet: {error}", INSTALL)]
    from tools.devices import find_devices, receivers, torch_on_gpus
    from tools.preflight import (
        check_address,
        check_devices,
        check_directory,
        check_engine,
        check_frozen,
        check_meshes,
        check_models,
        check_opened,
        check_rewards,
        check_sandbox,
    )
    from tools.stamp import model_state, models_of, wants_warmstart

    try:
        run = load(config, overrides)
    except ConfigError as error:
        return [Finding("run file", "missing", *_split(error))]

    def attempt(what: str, good: str, check: Callable[[], object]) -> Finding:
        try:
            found = check()
        except (ConfigError, ModelError, TaskError) as error:
            return Finding(what, "missing", *_split(error))
        except ImportError as error:
            return Finding(what, "missing", f"cannot be looked at yet: {error}", INSTALL)
        return Finding(what, "ok", good or str(found))

    def attempt_warned(what: str, good: str, check: Callable[[RunConfig], list[str]], remedy: str) -> Finding:
        warnings: list[str] = []
        finding = attempt(what, good, lambda: warnings.extend(check(run)))
        return Finding(what, "note", "; ".join(warnings), remedy) if warnings else finding

    address = run.broker.address
    findings = [
        Finding("run file", "ok", config),
        attempt("broker address", f"{address} is free", lambda: check_address(address)),
        attempt("run directory", str(run.run.path), lambda: check_directory(run)),
    ]
    if run.broker.keys:
        findings.append(attempt("keys", run.broker.keys, lambda: broker_keys(run.broker)))
    if run.actor.engine == "sglang":
        remedy = "install one of these, or try it: its answers were not looked at"
        findings.append(attempt_warned("SGLang", f"engine.python={run.engine.python}", check_engine, remedy))
    if devices := find_devices():
        shown = f"{len(devices)} for {sum(receivers(run, torch_on_gpus()).values())} ranks"
        findings.append(attempt("GPUs", shown, lambda: check_devices(run, devices, torch_on_gpus())))
    for frozen in run.frozen.values():
        if frozen.path != run.model.path:
            findings.append(attempt(frozen.words, frozen.path, partial(check_frozen, frozen, run.model.path)))
    if any(entry.name in SANDBOXED for entry in run.task.entries.values()):
        findings.append(attempt("sandbox", "", lambda: check_sandbox(run)))
    if run.reward.models or run.reward.exemplars:
        findings.append(attempt_warned("rewards", "models answer", check_rewards, "start its server before the run"))
    if wants_warmstart(run):
        states = "; ".join(f"{one.model.path}: {model_state(one)}" for one in models_of(run))
        return [*findings, Finding("model", "note", states, "tools.launch makes it (tools.warmstart)")]
    paths = ", ".join(one.model.path for one in models_of(run))
    findings.append(attempt("model", paths, lambda: check_models(run)))
    findings.append(attempt("tasks", ", ".join(run.task.labels), lambda: check_opened(run)))
    if run.learner.ranks * run.replica.ranks > 1:
        findings.append(attempt("meshes", "learner's and replica's divide the model", lambda: check_meshes(run)))
    if run.rollout.routing_replay:
        findings.append(attempt("routing replay", "the model has experts", lambda: read_routing(run)))
    return findings


def _split(error: Exception) -> tuple[str, str]:
    """What is wrong, and the remedy: our errors say both, a semicolon between them."""
    detail, _, remedy = str(error).partition("; ")
    return detail, remedy


def show(findings: list[Finding]) -> None:
    """A table on a terminal where rich is installed; elsewhere lines, in which no address or command is broken."""
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        for finding in findings:
            remedy = f" -> {finding.remedy}" if finding.remedy else ""
            print(f"{finding.state:8} {finding.what}: {finding.detail}{remedy}")
        return
    from rich.table import Table
    from rich.text import Text

    from tools.console import make_console

    colours = {"ok": "green", "note": "yellow", "missing": "bold red"}
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for title in ("", "what", "found", "how to get it"):
        table.add_column(title, header_style="dim", overflow="fold")
    for finding in findings:
        table.add_row(
            Text(finding.state, style=colours[finding.state]),
            Text(finding.what),
            Text(finding.detail),
            Text(finding.remedy),
        )
    make_console().print(table)


if __name__ == "__main__":
    sys.exit(main())
