"""What the manifests of a run have in common: labels, volumes, and the Job of a role."""

from dataclasses import dataclass
from typing import Any

from tools.cluster.plan import Plan, Role

Manifest = dict[str, Any]

CONFIG, KEYS, BROKER_FILES = "/etc/croupier", "/etc/croupier-keys", "/var/lib/croupier"  # mount paths
GRACE_S = 90  # between SIGTERM and SIGKILL
MAX_FAILURES = 10  # pods of one index that may fail before it is given up
INDEX = "metadata.labels['batch.kubernetes.io/job-completion-index']"
GPU = "nvidia.com/gpu"
DISRUPTED = {"type": "DisruptionTarget", "status": "True"}  # drained, preempted, lost with its node: no failure


@dataclass(frozen=True)
class Kubernetes:
    """What only Kubernetes needs to know."""

    image: str
    claim: str  # ReadWriteMany, mounted at the shared path
    mounts: tuple[tuple[str, str], ...] = ()  # further claims and where they are mounted, read only


@dataclass(frozen=True)
class Volume:
    """A volume and where it is mounted."""

    name: str
    source: Manifest
    mounts: tuple[Manifest, ...]  # without name and readOnly
    writable: bool = False


def labels_of(plan: Plan, component: str = "") -> dict[str, str]:
    """Of the run, or of one role in it."""
    labels = {"app.kubernetes.io/name": "croupier", "app.kubernetes.io/instance": plan.config.run.name}
    return labels | ({"app.kubernetes.io/component": component} if component else {})


def named(plan: Plan, component: str) -> Manifest:
    """The metadata of an object."""
    return {"name": f"{plan.config.run.name}-{component}", "labels": labels_of(plan, component)}


def broker_volumes(plan: Plan) -> list[Volume]:
    """Its run directory, its keys and the allow-list, which follows its Secret."""
    name = plan.config.run.name
    files = ("server.key", "server.pub")
    return [
        Volume("files", _claim(f"{name}-broker"), ({"mountPath": BROKER_FILES},), writable=True),
        Volume(
            "keys",
            _secret(f"{name}-keys", {file: file for file in files}),
            tuple({"mountPath": f"{KEYS}/{file}", "subPath": file} for file in files),
        ),
        Volume("allowed", {"secret": {"secretName": f"{name}-allowed"}}, ({"mountPath": f"{KEYS}/allowed"},)),
    ]


def peer_volumes(plan: Plan, role: Role) -> list[Volume]:
    """The broker's public key and this pod's own secret: it does not see its siblings'."""
    alone = role.name == "learner"  # whose ranks share one
    names = ["learner"] if alone else [f"{role.name}-{index}" for index in range(role.count)]
    items = {"server.pub": "server.pub"} | {f"{name}.key": f"{name}/{name}.key" for name in names}
    own = {"subPath": "learner"} if alone else {"subPathExpr": f"{role.name}-$(INDEX)"}
    mounts: tuple[Manifest, ...] = (
        {"mountPath": f"{KEYS}/server.pub", "subPath": "server.pub"},
        {"mountPath": f"{KEYS}/clients", **own},
    )
    memory = {"medium": "Memory", "sizeLimit": f"{role.processes}Gi"}  # part of the container's memory
    return [
        Volume("keys", _secret(f"{plan.config.run.name}-keys", items), mounts),
        Volume("shm", {"emptyDir": memory}, ({"mountPath": "/dev/shm"},), writable=True),
    ]


def job(plan: Plan, options: Kubernetes, role: Role, command: list[str], **container: Any) -> Manifest:
    """A Job with a pod for each of the role's tasks; ``container`` holds further fields of its container."""
    own = broker_volumes(plan) if role.name == "broker" else peer_volumes(plan, role)
    volumes = [*_common_volumes(plan, options), *own]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": named(plan, role.name),
        "spec": {
            "completions": role.count,
            "parallelism": role.count,
            "completionMode": "Indexed",
            **_patience(role),
            "podReplacementPolicy": "Failed",  # never two under one name
            "podFailurePolicy": {"rules": [{"action": "Ignore", "onPodConditions": [DISRUPTED]}]},
            "template": {
                "metadata": {"labels": labels_of(plan, role.name)},
                "spec": {
                    "restartPolicy": "Never",
                    **({"subdomain": f"{plan.config.run.name}-learner"} if role.name == "learner" else {}),
                    "terminationGracePeriodSeconds": GRACE_S,
                    "automountServiceAccountToken": False,
                    "enableServiceLinks": False,
                    "shareProcessNamespace": True,  # its first process then reaps what SGLang's servers leave
                    "containers": [
                        {
                            "name": role.name,
                            "image": options.image,
                            "command": command,
                            **container,
                            "workingDir": plan.machine.shared,
                            "env": _environment(plan, role),
                            "resources": _resources(role),
                            "securityContext": {"runAsUser": 0, "allowPrivilegeEscalation": False},  # keys are root's
                            "volumeMounts": [
                                {"name": volume.name, "readOnly": not volume.writable, **mount}
                                for volume in volumes
                                for mount in volume.mounts
                            ],
                        }
                    ],
                    "volumes": [{"name": volume.name, **volume.source} for volume in volumes],
                },
            },
        },
    }


def _patience(role: Role) -> Manifest:
    """Broker and learner fail as one; each replica and actor has an account of its own."""
    if role.name in ("broker", "learner"):
        return {"backoffLimit": MAX_FAILURES * role.count}
    return {"backoffLimitPerIndex": MAX_FAILURES}


def api_keys(plan: Plan) -> list[str]:
    """Environment variables in which actors look for the keys of served reward models."""
    entries = plan.config.reward.models.values()
    return sorted({entry.api_key_env for entry in entries if entry.url and entry.api_key_env})


def _environment(plan: Plan, role: Role) -> list[Manifest]:
    fixed = {
        "OMP_NUM_THREADS": str(role.threads),
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    fields = {"INDEX": INDEX, "POD_IP": "status.podIP"} if role.name != "broker" else {}
    keys = api_keys(plan) if role.name == "actor" else []
    secret = f"{plan.config.run.name}-rewards"
    return [
        *({"name": name, "value": value} for name, value in fixed.items()),
        *({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in fields.items()),
        *({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": name}}} for name in keys),
    ]


def _resources(role: Role) -> Manifest:
    held: Manifest = {"memory": f"{role.memory_gb}Gi"} | ({GPU: role.gpus} if role.gpus else {})
    return {"requests": {"cpu": role.cpus, **held}, "limits": held}


def _common_volumes(plan: Plan, options: Kubernetes) -> list[Volume]:
    config = {"configMap": {"name": f"{plan.config.run.name}-config"}}
    return [
        Volume("config", config, ({"mountPath": CONFIG},)),
        Volume("shared", _claim(options.claim), ({"mountPath": plan.machine.shared},), writable=True),
        *(
            Volume(f"mount-{number}", _claim(claim), ({"mountPath": path},))
            for number, (claim, path) in enumerate(options.mounts)
        ),
    ]


def _claim(name: str) -> Manifest:
    return {"persistentVolumeClaim": {"claimName": name}}


def _secret(name: str, paths: dict[str, str]) -> Manifest:
    """Files by key, for their owner alone."""
    items = [{"key": key, "path": path} for key, path in paths.items()]
    return {"secret": {"secretName": name, "defaultMode": 0o400, "items": items}}
