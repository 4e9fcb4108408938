"""A run as plain Kubernetes manifests: one file a role, for ``kubectl apply -k DIR``.

::

    config.yaml    ConfigMap: the run's YAML
    broker.yaml    Service, volume claim, Job
    learner.yaml   headless Service, indexed Job: torchrun in each pod, rendezvous (c10d) in pod 0
    replica.yaml   indexed Job                 (none with rejection off)
    reference.yaml, teacher-NAME.yaml          the same, of frozen models
    actor.yaml     indexed Job, its SGLang servers started by itself
    network.yaml   NetworkPolicies: who may speak to whom

Jobs, since a run ends: they then complete and give their GPUs back, which StatefulSets cannot. A
pod that fails is replaced under its index, which is its name in the run. Needs Kubernetes 1.29.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from common.config import to_yaml
from common.errors import ConfigError
from common.exporter import PORTS_TRIED
from common.keys import is_local
from tools.cluster.plan import MAX_RESTARTS, Plan, Role, broker_volume_gb
from tools.cluster.pods import (
    BROKER_FILES,
    CONFIG,
    GRACE_S,
    KEYS,
    Kubernetes,
    Manifest,
    api_keys,
    job,
    labels_of,
    named,
)

NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")  # with "-learner-99" behind it still a host's name
RENDEZVOUS = 29400
METRICS = 9400  # in place of metrics.port=0: a policy must name what it admits
DNS = 53


def read_mounts(given: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """``CLAIM=PATH`` each."""
    found = []
    for text in given:
        claim, _, path = text.partition("=")
        if not claim or not path.startswith("/"):
            raise ConfigError(f"--mount={text!r}: must read CLAIM=PATH with an absolute path")
        found.append((claim, path))
    return tuple(found)


def render(plan: Plan, options: Kubernetes, command: str) -> dict[str, str]:
    """File names and contents; ``command`` is what rendered them."""
    _check(plan, options)
    files = {
        "config.yaml": [_config(plan)],
        "broker.yaml": _broker(plan, options),
        "learner.yaml": _learner(plan, options),
        **{f"{role.name}.yaml": [_scorer(plan, options, role)] for role in plan.scorers},
        "actor.yaml": [_actor(plan, options)],
        "network.yaml": _network(plan),
    }
    list_of_files = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": [*files]}
    return {
        name: f"# Rendered by {command}\n" + "---\n".join(_dump(document) for document in documents)
        for name, documents in {**files, "kustomization.yaml": [list_of_files]}.items()
    }


def next_steps(plan: Plan, out: Path) -> list[str]:
    """What to do with the files."""
    name, keys = plan.config.run.name, plan.config.broker.keys
    clients = " ".join(f"--client {peer}" for peer in plan.names)
    literals = "".join(f' --from-literal={key}="${key}"' for key in api_keys(plan))
    return [
        f"python -m tools.keys make {keys} {clients}",
        f"kubectl create secret generic {name}-keys --from-file={keys}/server.key --from-file={keys}/server.pub "
        f"--from-file={keys}/clients",
        f"kubectl create secret generic {name}-allowed --from-file={keys}/allowed",
        *([f"kubectl create secret generic {name}-rewards{literals}"] if literals else []),
        f"kubectl apply -k {out}",
        f"kubectl wait --for=condition=complete --timeout=-1s job/{name}-broker",
    ]


def _check(plan: Plan, options: Kubernetes) -> None:
    name, shared = plan.config.run.name, plan.machine.shared
    if NAME.fullmatch(name) is None:
        raise ConfigError(f"run.name={name!r}: names Kubernetes objects; use a-z 0-9 -, a letter first, 40 at most")
    for role in plan.scorers:
        if NAME.fullmatch(role.name) is None:
            raise ConfigError(f"teachers.{role.serves}: names a Kubernetes object; use a-z 0-9 -, 30 at most")
    anywhere, claim = [shared, *(path for _, path in options.mounts)], ", or in a claim that --mount CLAIM=PATH names"
    paths = [("run.dir", plan.config.run.dir, [shared], "")]
    paths += [(key, value, anywhere, claim) for key, value in _paths(plan) if value]
    for key, value, roots, other in paths:
        path = plan.path(value.removeprefix("file:"))
        if ".." in path.parts or not any(path.is_relative_to(root) for root in roots):
            raise ConfigError(
                f"{key}={value!r}: no pod would find it; it must lie in the shared directory {shared} (--shared){other}"
            )


def _paths(plan: Plan) -> list[tuple[str, str]]:
    """Files and directories that pods read; "" for none."""
    config = plan.config
    found = [("model.path", config.model.path), ("joint.path", config.joint.path)]
    found += [(model.key, model.path) for model in config.frozen.values()]
    for name, entry in config.reward.models.items():
        key, rubric = f"reward.models.{name}", entry.rubric if entry.rubric.startswith("file:") else ""
        found += [(f"{key}.path", entry.path), (f"{key}.tokenizer", entry.tokenizer), (f"{key}.rubric", rubric)]
    return [*found, ("reward.exemplars", config.reward.exemplars)]


def _config(plan: Plan) -> Manifest:
    config, name = plan.config, plan.config.run.name
    config = replace(
        config,
        run=replace(config.run, dir=str(plan.path(config.run.dir))),
        model=replace(config.model, path=str(plan.path(config.model.path))),
        reference=replace(config.reference, path=config.reference.path and str(plan.path(config.reference.path))),
        teachers={n: replace(t, path=str(plan.path(t.path))) for n, t in config.teachers.items()},
        joint=replace(config.joint, path=str(plan.path(config.joint.path)) if config.joint.path else ""),
        broker=replace(config.broker, address=f"tcp://{name}-broker:{plan.port}", keys=KEYS),
        learner=replace(config.learner, resume=True),
        metrics=replace(config.metrics, port=_metrics_port(plan) or config.metrics.port),
    )
    text = "# The broker's pod is told to listen on all addresses, each learner pod that weights.host is its own.\n"
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": named(plan, "config"),
        "data": {"run.yaml": text + to_yaml(config)},
    }


def _broker(plan: Plan, options: Kubernetes) -> list[Manifest]:
    listen = [f"broker.address=tcp://*:{plan.port}", f"run.dir={BROKER_FILES}"]
    running = job(
        plan,
        options,
        plan.broker,
        ["python", "-m", "broker", f"{CONFIG}/run.yaml", *listen],
        ports=[{"name": "broker", "containerPort": plan.port}],
        readinessProbe={"tcpSocket": {"port": "broker"}, "periodSeconds": 5},
    )
    spec = {
        "selector": labels_of(plan, "broker"),
        "ports": [{"name": "broker", "port": plan.port, "targetPort": "broker"}],
    }
    storage = {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": f"{broker_volume_gb(plan.config)}Gi"}},
    }
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": named(plan, "broker"), "spec": spec},
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": named(plan, "broker"), "spec": storage},
        running,
    ]


def _learner(plan: Plan, options: Kubernetes) -> list[Manifest]:
    name, role = f"{plan.config.run.name}-learner", plan.learner
    script = "\n".join(
        (
            'if [ "$INDEX" = 0 ]; then host=true; else host=false; fi',
            f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={GRACE_S - 10}  # for ranks to write a checkpoint; torchrun's: 30",
            f"exec python -m torch.distributed.run --nnodes {role.count} --nproc-per-node {role.processes} \\",
            f"  --rdzv-backend c10d --rdzv-endpoint {name}-0.{name}:{RENDEZVOUS} --rdzv-id {name} \\",
            '  --rdzv-conf "is_host=$host,read_timeout=600" --local-addr "$POD_IP" \\',
            f"  --max-restarts {MAX_RESTARTS} \\",
            f'  -m learner {CONFIG}/run.yaml "weights.host=$POD_IP"',
            "",
        )
    )
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": labels_of(plan, "learner"),
        "ports": [{"name": "rendezvous", "port": RENDEZVOUS}],
    }
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": named(plan, "learner"), "spec": spec},
        job(plan, options, role, ["/bin/sh", "-c", script]),
    ]


def _scorer(plan: Plan, options: Kubernetes, role: Role) -> Manifest:
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(role.processes)]
    start = ["python", *(several if role.processes > 1 else []), "-m", "learner.score"]
    serves = ["--serves", role.serves] if role.serves else []
    return job(plan, options, role, [*start, f"{CONFIG}/run.yaml", "--name", f"{role.name}-$(INDEX)", *serves])


def _actor(plan: Plan, options: Kubernetes) -> Manifest:
    return job(plan, options, plan.actor, ["python", "-m", "actor", f"{CONFIG}/run.yaml", "--name", "actor-$(INDEX)"])


def _metrics_port(plan: Plan) -> int:
    """The first on which a pod answers scrapes from elsewhere, 0 for none."""
    section = plan.config.metrics
    if not section.prometheus or is_local(f"tcp://{section.host}:0"):
        return 0
    return section.port or METRICS


def _network(plan: Plan) -> list[Manifest]:
    """The broker's port for the run's pods; among the others every TCP port, since weights travel on free ones.

    From elsewhere scrapes of metrics, to elsewhere actors' questions to served reward models.
    """
    run = {"podSelector": {"matchLabels": labels_of(plan)}}
    not_broker = [{"key": "app.kubernetes.io/component", "operator": "NotIn", "values": ["broker"]}]
    others = {"podSelector": {"matchLabels": labels_of(plan), "matchExpressions": not_broker}}
    to_broker = [{"protocol": "TCP", "port": plan.port}]
    all_ports = [{"protocol": "TCP", "port": 1, "endPort": 65535}]
    names = {"ports": [{"protocol": protocol, "port": DNS} for protocol in ("UDP", "TCP")]}
    first = _metrics_port(plan)
    last = min(first + PORTS_TRIED, 1 << 16) - 1
    scrapes = [{"ports": [{"protocol": "TCP", "port": first, "endPort": last}]}] if first else []
    both = {"policyTypes": ["Ingress", "Egress"]}
    policies = {
        "broker": {
            "podSelector": {"matchLabels": labels_of(plan, "broker")},
            **both,
            "ingress": [{"from": [run], "ports": to_broker}, *scrapes],
            "egress": [names],
        },
        "peers": {
            **others,
            **both,
            "ingress": [{"from": [others], "ports": all_ports}, *scrapes],
            "egress": [{"to": [others], "ports": all_ports}, {"to": [run], "ports": to_broker}, names],
        },
    }
    if served := sorted({entry.port for entry in plan.config.reward.models.values() if entry.url}):
        policies["actor"] = {
            "podSelector": {"matchLabels": labels_of(plan, "actor")},
            "policyTypes": ["Egress"],
            "egress": [{"ports": [{"protocol": "TCP", "port": port} for port in served]}],
        }
    return [
        {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": named(plan, name), "spec": spec}
        for name, spec in policies.items()
    ]


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def _dump(document: Manifest) -> str:
    return str(yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=1000))
