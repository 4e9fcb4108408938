"""What must hold before processes are started: a free address and a whole model directory."""

import errno
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from broker.fixed import fixed_settings
from broker.journal import ANEW, Journal
from broker.recovery import check_settings, steps_assembled
from broker.service import JOURNAL
from common.config import RunConfig
from common.errors import ConfigError, JournalError, ModelError
from common.frozen import FrozenModel
from common.identity import TOKENS, check_same_tokens, differing_identity, model_identity, other_tokens
from common.process import free_port
from common.rewards import RewardModelEntry
from tools.devices import VISIBLE, receivers, starts_on_gpus

ANSWER_S = 3.0  # for a reward model's server
VERSION_S = 30.0  # for engine.python to start and tell which SGLang it has, on a cold network disk
VERSION = "import importlib.metadata as m; print(m.version('sglang'))"
NCCL = "nvidia-nccl-cu"  # begins the name of the package that brings it
NCCL_VERSION = (
    "import importlib.metadata as m; "
    f"print(*{{d.version for d in m.distributions() if str(d.metadata['Name']).startswith('{NCCL}')}})"
)
TCP = re.compile(r"tcp://(?P<host>\[[^\]]+\]|[^:]+):(?P<port>\d+)")


def check_address(address: str) -> None:
    """Raise :class:`ConfigError` unless a broker could bind ``address`` on this machine now."""
    if address.startswith("ipc://"):
        _check_ipc(address)
        return
    match = TCP.fullmatch(address)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ConfigError(
            f"broker.address={address!r}: must read tcp://HOST:PORT with a port in 1..65535, or ipc://PATH"
        )
    if match["host"] == "*":
        raise ConfigError(
            f"broker.address={address!r}: its peers read this address too; give tcp://HOST:{match['port']} with this "
            "machine's name, or start each process by hand"
        )
    host = match["host"].strip("[]")
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, int(match["port"]), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a closed broker's TIME_WAIT is no obstacle
            probe.bind(target)
    except socket.gaierror as error:
        raise ConfigError(f"broker.address={address!r}: unknown host {host!r} ({error.strerror})") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise _in_use(address) from error
        raise ConfigError(f"broker.address={address!r}: cannot be bound on this machine: {error.strerror}") from error


def _in_use(address: str) -> ConfigError:
    return ConfigError(
        f"broker.address={address!r}: address in use, perhaps by another run; stop that run, or pass "
        f"broker.address=tcp://127.0.0.1:{free_port()} (free now) and a run.name= that no other run has"
    )


def _check_ipc(address: str) -> None:
    path = Path(address.removeprefix("ipc://"))
    if not path.parent.is_dir():
        raise ConfigError(f"broker.address={address!r}: {path.parent} is no directory")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return  # nothing there, or a socket file that its owner left behind: the broker replaces it
    raise _in_use(address)


def check_directory(config: RunConfig) -> None:
    """Raise :class:`ConfigError` unless the run directory is there or can be made, and can be written to."""
    there = next(path for path in (config.run.path, *config.run.path.absolute().parents) if path.exists())
    try:
        with TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise unwritable(config, error) from error


def unwritable(config: RunConfig, error: OSError) -> ConfigError:
    """For a run directory that the system refuses."""
    words = error.strerror or error
    return ConfigError(f"run.dir={config.run.dir!r}: cannot be written ({words}); name another directory")


def check_frozen(model: FrozenModel, policy: str | None) -> None:
    """Raise :class:`ModelError` unless a frozen model is whole and has the tokens of the one at ``policy``.

    None: the policy is still to be made.
    """
    check_model(Path(model.path), model.key)
    ours = model_identity(policy) if policy is not None else {}
    if differs := differing_identity(ours, model_identity(model.path), TOKENS):
        raise ModelError(other_tokens(f"{model.words} at {model.path}", model.key, differs))


def check_tasks(config: RunConfig) -> None:
    """Raise :class:`common.errors.TaskError` for a task that does not exist."""
    from actor.tasks.base import check_name

    for entry in config.task.entries.values():
        check_name(entry.name)


def check_opened(config: RunConfig) -> None:
    """Raise what an actor would end by that cannot open the tasks: their parameters, files and the user's own code."""
    from actor.play import open_task  # with torch, which a launcher need not import

    open_task(config)


def check_sandbox(config: RunConfig) -> str:
    """What shuts in the programs of the run's tasks, "" if they run none. Raises SandboxError, with the remedy."""
    from actor.tasks.base import SANDBOXED

    if not any(entry.name in SANDBOXED for entry in config.task.entries.values()):
        return ""
    from actor.sandbox.backends import find_backend

    return find_backend().name


def check_meshes(config: RunConfig) -> None:
    """Raise :class:`ConfigError` if the learner's or the replica's mesh does not divide the model.

    Looks at config.json alone; costs nothing where there is one process each.
    """
    learner, replica = config.learner, config.replica
    sizes = {"learner": {"pp": learner.pp, "ep": learner.ep, "tp": learner.tp}, "replica": vars(replica)}
    if learner.ranks * replica.ranks > 1:
        from learner.model.config import ModelConfig  # torch, which starting one process each need not import

        model = ModelConfig.from_hf_dir(config.model.path)
        for whose, mesh in sizes.items():
            model.check_mesh(mesh, whose)
        for frozen in config.frozen.values():
            ModelConfig.from_hf_dir(frozen.path).check_mesh(sizes["replica"], "replica")


def check_resumed(config: RunConfig) -> None:
    """Raise :class:`JournalError` where the run that is to go on has settings that may not change within it.

    Or a journal that is damaged.
    """
    directory = config.run.path / JOURNAL
    if not (directory / "data.mdb").is_file() or not (directory / "data.mdb").stat().st_size:
        return
    if not config.broker.journal_mb:
        raise JournalError(
            "broker.journal_mb=0: this run has a journal, without which its steps would be counted anew; leave "
            f"broker.journal_mb as it was, move {directory} away to go on without what it holds, or choose another "
            "run.name to begin a new run"
        )
    try:
        journal = Journal(directory, "", config.broker.journal_mb, read_only=True)
        assembled = steps_assembled(journal)
    except JournalError as error:  # damaged, or of another format
        raise JournalError(f"{error}, or {ANEW}") from error
    try:
        check_settings(fixed_settings(config), journal)
    finally:
        journal.close()
    if config.run.steps < assembled:
        raise JournalError(
            f"run.steps={config.run.steps}: this run has assembled {assembled} already; set run.steps={assembled} or "
            "more, or choose another run.name to begin a new run"
        )


def check_engine(config: RunConfig) -> list[str]:
    """What may go wrong with the SGLang servers that actors here would start, in words: an untried release.

    Raises :class:`ConfigError` for an interpreter that is not there, or in which no SGLang is installed.
    """
    if config.actor.engine != "sglang" or not config.engine.launch:
        return []
    from actor.engine.probe import NEWEST, OLDEST

    version = _sglang_of(config.engine.python)
    if OLDEST <= tuple(map(int, re.findall(r"\d+", version)[:3])) <= NEWEST:
        return []
    oldest, newest = (".".join(map(str, release)) for release in (OLDEST, NEWEST))
    return [f"engine.python={config.engine.python!r}: SGLang {version}; {oldest} to {newest} are supported"]


def check_nccl(config: RunConfig, on_gpus: bool, here: str | None = None) -> None:
    """Raise :class:`ConfigError` if NCCL would refuse the servers that actors start: its ends must be of one version.

    ``on_gpus``: whether our torch can use GPUs; ``here``: our NCCL. One that no package brought is not looked at.
    """
    if not starts_on_gpus(config) or config.weight_backend(on_gpus) != "nccl":
        return
    ours = (_nccl_of(sys.executable) if here is None else here).split()
    theirs = _nccl_of(config.engine.python).split()
    if ours and theirs and not set(ours) & set(theirs):
        raise ConfigError(
            f"weights.backend={config.weights.backend}: weights go by NCCL, which takes one version of itself: "
            f"{', '.join(sorted(ours))} is here and {', '.join(sorted(theirs))} in "
            f"engine.python={config.engine.python!r}; install one torch in both, or set weights.backend=gloo"
        )


def _nccl_of(python: str) -> str:
    """The versions of NCCL that packages brought there, of which there may be two; "" where that is not known."""
    try:
        return _said(python, NCCL_VERSION)
    except (OSError, subprocess.SubprocessError):
        return ""


def _said(python: str, script: str) -> str:
    """What ``script`` prints in the environment that an actor's server would have."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    asked = subprocess.run(
        [python, "-c", script], capture_output=True, text=True, timeout=VERSION_S, env=environment, check=True
    )
    return asked.stdout.strip()


def _sglang_of(python: str) -> str:
    """Which SGLang an interpreter has. Raises :class:`ConfigError` with the remedy if that cannot be told."""
    try:
        return _said(python, VERSION)
    except FileNotFoundError:
        trouble = "no such program"
    except OSError as error:
        trouble = f"cannot be started ({error.strerror or error})"
    except subprocess.TimeoutExpired:
        trouble = f"does not say within {VERSION_S:g} s which SGLang it has"
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines()
        trouble = f"sglang is not installed there ({said[-1] if said else f'exit code {error.returncode}'})"
    raise ConfigError(
        f"engine.python={python!r}: {trouble}; without a GPU run "
        "`python -m tools.sglang_cpu install` and set engine.python=.sglang/bin/python; with one install sglang "
        "and name its interpreter"
    )


def check_devices(config: RunConfig, devices: Sequence[str], on_gpus: bool) -> None:
    """Raise :class:`ConfigError` if weights would go by NCCL and two ends of it share one of ``devices``.

    ``on_gpus``: whether our torch can use them.
    """
    wanted = receivers(config, on_gpus)
    meshes = {"learner": config.learner.ranks, "replica": config.replica.ranks if config.scorers else 0}
    for name, ranks in meshes.items() if on_gpus and devices else ():
        if ranks > len(devices):
            raise ConfigError(
                f"{name}: its mesh has {ranks} ranks, each with a GPU of its own (NCCL takes none twice), and this "
                f"machine has {len(devices)} (or {VISIBLE} names so many); choose a smaller one"
            )
    if config.weight_backend(on_gpus) != "nccl" or not devices or sum(wanted.values()) <= len(devices):
        return
    takers = ", ".join(f"{name} {number}" for name, number in wanted.items() if number)
    raise ConfigError(
        f"weights.backend={config.weights.backend}: weights go by NCCL, which takes no GPU twice, and this run needs "
        f"{sum(wanted.values())} ({takers}) where this machine has {len(devices)} (or {VISIBLE} names so many); set "
        "weights.backend=gloo, or start fewer processes (the learner's and the replica's mesh, replica.count, "
        "actor.count, engine.launch, engine.tp)"
    )


def check_rewards(config: RunConfig) -> list[str]:
    """What may go wrong with the reward models, in words: servers that do not answer now.

    Raises :class:`ConfigError` or :class:`ModelError` for what must go wrong: no key, rubric, checkpoint or exemplars.
    """
    reward, warnings = config.reward, []
    if reward.exemplars and not Path(reward.exemplars).is_file():
        raise ConfigError(f"reward.exemplars={reward.exemplars!r}: no such file; correct the path")
    for name, entry in reward.models.items():
        key = entry.read_key(name)
        if entry.kind == "grm":
            entry.read_rubric(name)
        if entry.path:
            check_model(Path(entry.path), f"reward.models.{name}.path")
        elif trouble := _reach(entry, key):
            warnings.append(
                f"reward.models.{name}.url={entry.url}: {trouble}; rollouts that it scores will wait or fail"
            )
    return warnings


def _reach(entry: RewardModelEntry, key: str) -> str:
    """Why the server of a reward model does not answer, "" if it does, whatever it says."""
    url = f"{entry.url.rstrip('/')}/models" if entry.kind == "grm" else entry.url
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=ANSWER_S):
            return ""
    except urllib.error.HTTPError as error:
        with error:
            return f"it refuses the key (HTTP {error.code})" if error.code in (401, 403) else ""
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"it does not answer ({getattr(error, 'reason', error)!s})"


def check_models(config: RunConfig) -> None:
    """Raise :class:`ModelError` unless the run's model directories are whole and go together."""
    check_model(Path(config.model.path))
    if config.joint.path:
        check_model(Path(config.joint.path), "joint.path")
        check_same_tokens(config.model.path, config.joint.path)


def check_model(path: Path, key: str = "model.path") -> None:
    """Raise :class:`ModelError` unless ``path``, named by ``key``, holds a configuration and all weight files."""
    if not path.is_dir():
        raise ModelError(
            f"{key}={str(path)!r}: no such directory; download the model there, train it first, or correct the path"
        )
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index}: is damaged ({error}); fetch the model again") from error
    else:
        shards = ["model.safetensors"]
    missing = [name for name in ("config.json", *shards) if not (path / name).is_file()]
    if missing:
        shown = ", ".join(missing[:4]) + (" …" if len(missing) > 4 else "")
        raise ModelError(
            f"{key}={str(path)!r}: half a model, {len(missing)} file(s) missing: {shown}; fetch them again"
        )
