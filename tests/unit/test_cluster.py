"""Cluster files: what they say agrees with the YAML, and their own validators accept them."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from common.config import load
from common.errors import ConfigError
from common.keys import is_local
from tools.cluster.__main__ import main, render
from tools.cluster.kubernetes import next_steps
from tools.cluster.plan import Machine, plan

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "tools/cluster/examples"
QWEN = "configs/qwen3-30b-a3b.yaml"
OVERRIDES = ["learner.dp_shard=2", "replica.tp=2", "engine.tp=4"]
VERSIONS = ("1.29", "1.37")  # the oldest that the manifests need, the newest that the validator knows
ROLES = ("broker", "learner", "replica", "actor")
SHELLCHECK = Path(sys.executable).with_name("shellcheck")


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


@cache
def slurm(*words):
    return render(["slurm", QWEN, "--out", "x", *words, *OVERRIDES])


@cache
def kubernetes(*words):
    options = ["--image", "i", "--claim", "shared", "--mount", "models=/models", "--out", "x"]
    return render(["kubernetes", QWEN, *options, *OVERRIDES, *words])


def documents(files):
    """Every manifest as (kind, name) -> object."""
    found = [d for name, text in files.items() if name != "kustomization.yaml" for d in yaml.safe_load_all(text)]
    by_name = {(d["kind"], d["metadata"]["name"].removeprefix("qwen3-30b-a3b-")): d for d in found}
    assert len(by_name) == len(found)
    return by_name


def pod(job):
    return job["spec"]["template"]["spec"]


# ---- the examples -------------------------------------------------------------------------------


@pytest.mark.parametrize("directory", sorted(EXAMPLES.iterdir()), ids=lambda d: d.name)
def test_an_example_is_what_its_command_renders(directory, tmp_path):
    """To the byte, but for the run's YAML, where a key that was added since has its default."""
    text = (directory / ("run.yaml" if directory.name == "slurm" else "broker.yaml")).read_text()
    command = shlex.split(text.splitlines()[0].removeprefix("# Rendered by "))
    assert command[:3] == ["python", "-m", "tools.cluster"]
    _, files = render([*command[3:], "--out", "anywhere"])
    there = {path.name: path.read_text() for path in directory.iterdir()}
    name = "run.yaml" if directory.name == "slurm" else "config.yaml"
    configs = []
    for text in (files.pop(name), there.pop(name)):
        (tmp_path / name).write_text(text if name == "run.yaml" else yaml.safe_load(text)["data"]["run.yaml"])
        configs.append(load(tmp_path / name))
    assert configs[0] == configs[1]
    assert files == there, f"render it again: {shlex.join(command)} --out {directory}"


# ---- Kubernetes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_fit_kubernetes_own_schemas(version):
    for document in documents(kubernetes()[1]).values():
        kubernetes_validate.validate(document, version, strict=True)
    wrong = documents(kubernetes()[1])["Job", "actor"]
    wrong["spec"]["paralelism"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="paralelism"):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_manifests_agree_with_each_other_and_with_the_run():
    planned, files = kubernetes()
    found = documents(files)
    jobs = {name: d for (kind, name), d in found.items() if kind == "Job"}
    assert {name: (j["spec"]["completions"], j["spec"]["parallelism"]) for name, j in jobs.items()} == {
        "broker": (1, 1), "learner": (2, 2), "replica": (1, 1), "actor": (4, 4),
    }  # fmt: skip
    gpus = {name: pod(j)["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0) for name, j in jobs.items()}
    assert gpus == {"broker": 0, "learner": 8, "replica": 2, "actor": 4}
    script = pod(jobs["learner"])["containers"][0]["command"][2]
    assert "--nnodes 2 --nproc-per-node 8" in script and planned.config.learner.ranks == 16
    assert subprocess.run(["sh", "-n"], input=script, text=True, check=False).returncode == 0
    for job in jobs.values():
        labels, spec = job["spec"]["template"]["metadata"]["labels"], pod(job)
        for (kind, name), other in found.items():
            if kind == "Service" and name == job["metadata"]["labels"]["app.kubernetes.io/component"]:
                assert other["spec"]["selector"].items() <= labels.items()
        volumes = {v["name"]: v for v in spec["volumes"]}
        assert {m["name"] for m in spec["containers"][0]["volumeMounts"]} == set(volumes)
        assert volumes["config"]["configMap"]["name"] == found["ConfigMap", "config"]["metadata"]["name"]
    assert pod(jobs["learner"])["subdomain"] == found["Service", "learner"]["metadata"]["name"]
    assert f"{pod(jobs['learner'])['subdomain']}-0.{pod(jobs['learner'])['subdomain']}:29400" in script


def test_each_pod_is_given_its_own_key_and_the_broker_alone_the_servers():
    planned, files = kubernetes("actor.count=2")
    seen = {}
    for (kind, name), document in documents(files).items():
        if kind == "Job":
            keys = next(v for v in pod(document)["volumes"] if v["name"] == "keys")["secret"]
            assert keys["defaultMode"] == 0o400  # common.keys refuses what others may read
            seen[name] = {item["key"] for item in keys["items"]} - {"server.pub"}
    assert seen == {
        "broker": {"server.key"}, "learner": {"learner.key"}, "replica": {"replica-0.key"},
        "actor": {"actor-0.key", "actor-1.key"},
    }  # fmt: skip
    assert {f"{name}.key" for name in planned.names} == set.union(*seen.values()) - {"server.key"}


def test_no_pod_is_told_of_an_address_that_only_it_can_reach(tmp_path):
    _, files = kubernetes()
    text = documents(files)["ConfigMap", "config"]["data"]["run.yaml"]
    (tmp_path / "run.yaml").write_text(text)
    config = load(tmp_path / "run.yaml")
    assert config.broker.address == "tcp://qwen3-30b-a3b-broker:5700" and not is_local(config.broker.address)
    assert config.learner.resume and config.run.dir == "/shared/runs" and config.broker.keys == "/etc/croupier-keys"
    found = documents(files)
    assert found["Service", "broker"]["spec"]["ports"][0]["port"] == 5700
    assert found["NetworkPolicy", "broker"]["spec"]["ingress"][0]["ports"] == [{"protocol": "TCP", "port": 5700}]
    assert '"weights.host=$POD_IP"' in pod(found["Job", "learner"])["containers"][0]["command"][2]


FROZEN = (
    "loss.kl=0.1", "loss.distill=1.0", "teachers.math={path: /models/math, count: 2}",
)  # fmt: skip


def test_frozen_models_are_roles_of_their_own_with_keys_and_volumes():
    planned, files = kubernetes(*FROZEN)
    assert planned.names[1:5] == ["replica-0", "reference-0", "teacher-math-0", "teacher-math-1"]
    found = documents(files)
    for document in found.values():
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)
    for name, count, serves in (("reference", 1, "reference"), ("teacher-math", 2, "math")):
        job = found["Job", name]
        assert job["spec"]["completions"] == count
        assert pod(job)["containers"][0]["command"][-4:] == ["--name", f"{name}-$(INDEX)", "--serves", serves]
        assert pod(job)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 2
    text = found["ConfigMap", "config"]["data"]["run.yaml"]
    assert yaml.safe_load(text)["teachers"]["math"]["path"] == "/models/math"
    for words, told in (
        (("loss.distill=1.0", "teachers.m={path: /elsewhere}"), "teachers.m.path='/elsewhere': no pod would find it"),
        (("loss.distill=1.0", "teachers.Math_1={path: /models/m}"), "teachers.Math_1: names a Kubernetes object"),
    ):
        with pytest.raises(ConfigError, match=re.escape(told)):
            kubernetes(*words)


JUDGED = (
    "reward.models.style={kind: grm, url: 'http://judge:8000/v1', model: m, rubric: 'file:rubric.md', "
    "api_key_env: JUDGE_KEY}",
    "reward.models.taste={url: 'https://taste.example/classify', tokenizer: /models/taste, api_key_env: TASTE_KEY}",
    "reward.models.own={path: /models/own, api_key_env: NEVER_READ}",
    "task.reward_weights={correct: 1.0, style: 0.3, taste: 0.1, own: 0.0}",
    "reward.exemplars=answers.jsonl",
)


def test_actors_reach_served_reward_models_and_have_their_keys_from_a_secret():
    planned, files = kubernetes(*JUDGED)
    found = documents(files)
    for document in found.values():
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)
    given = {}
    for (kind, name), document in found.items():
        if kind == "Job":
            env = {e["name"]: e.get("valueFrom", {}) for e in pod(document)["containers"][0]["env"]}
            given[name] = {key: e["secretKeyRef"] for key, e in env.items() if "secretKeyRef" in e}
    keys = {key: {"name": "qwen3-30b-a3b-rewards", "key": key} for key in ("JUDGE_KEY", "TASTE_KEY")}
    assert given == {"broker": {}, "learner": {}, "replica": {}, "actor": keys}
    made = 'kubectl create secret generic qwen3-30b-a3b-rewards --from-literal=JUDGE_KEY="$JUDGE_KEY" '
    assert made + '--from-literal=TASTE_KEY="$TASTE_KEY"' in next_steps(planned, Path("x"))
    policy = found["NetworkPolicy", "actor"]["spec"]
    assert policy["podSelector"]["matchLabels"] == found["Job", "actor"]["spec"]["template"]["metadata"]["labels"]
    assert policy["policyTypes"] == ["Egress"]
    assert policy["egress"] == [{"ports": [{"protocol": "TCP", "port": port} for port in (443, 8000)]}]
    planned, files = kubernetes(JUDGED[2], "task.reward_weights={correct: 1.0, own: 0.0}")
    assert ("NetworkPolicy", "actor") not in documents(files)
    assert not [step for step in next_steps(planned, Path("x")) if "rewards" in step]


@pytest.mark.parametrize(
    ("overrides", "ports", "configured"),
    [
        (["metrics.host=0.0.0.0"], (9400, 9463), 9400),
        (["metrics.host='::'", "metrics.port=65500"], (65500, 65535), 65500),
        ([], None, 0),  # on the pod's own loopback
        (["metrics.host=0.0.0.0", "metrics.prometheus=false"], None, 0),
    ],
)
def test_scrapes_are_let_in_where_pods_answer_them(overrides, ports, configured):
    found = documents(kubernetes("metrics.prometheus=true", *overrides)[1])
    scrapes = [{"ports": [{"protocol": "TCP", "port": ports[0], "endPort": ports[1]}]}] if ports else []
    for name in ("broker", "peers"):
        policy = found["NetworkPolicy", name]
        kubernetes_validate.validate(policy, VERSIONS[-1], strict=True)
        assert policy["spec"]["ingress"][1:] == scrapes
    assert yaml.safe_load(found["ConfigMap", "config"]["data"]["run.yaml"])["metrics"]["port"] == configured


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_kustomize_reads_all_of_it(tmp_path):
    for name, text in kubernetes()[1].items():
        (tmp_path / name).write_text(text)
    done = subprocess.run(["kubectl", "kustomize", str(tmp_path)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert len(list(yaml.safe_load_all(done.stdout))) == len(documents(kubernetes()[1]))


def test_ranks_have_time_for_a_checkpoint_within_what_the_cluster_gives_them():
    """torchrun kills ranks 30 s after SIGTERM unless told otherwise."""

    def seconds(text):
        return int(re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", text)[1])

    learner = pod(documents(kubernetes()[1])["Job", "learner"])
    script = " ".join([*learner["containers"][0].get("command", []), *learner["containers"][0].get("args", [])])
    assert 60 <= seconds(script) < learner["terminationGracePeriodSeconds"]
    files = slurm()[1]
    stop_s = int(re.search(r"^STOP_S=(\d+)", files["job.sbatch"], re.MULTILINE)[1])
    assert 60 <= seconds(files["role.sh"]) < stop_s


# ---- Slurm --------------------------------------------------------------------------------------


def test_scripts_pass_bash_and_shellcheck(tmp_path):
    variants = (
        [],
        ["--gpus-per-node", "0", "obrs.mode=off", "engine.device=cpu", "--interface", "ib0", "--shared", "/a path"],
        FROZEN,
    )
    scripts = []
    for number, words in enumerate(variants):
        for name in ("job.sbatch", "role.sh"):
            text = slurm(*words)[1][name]
            assert re.search("@[A-Z_]+@", text) is None
            scripts.append(tmp_path / f"{number}-{name}")
            scripts[-1].write_text(text)
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
    done = subprocess.run([str(SHELLCHECK), "-s", "bash", *map(str, scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_groups_have_the_run_s_numbers():
    _, files = slurm()
    groups = files["job.sbatch"].split("#SBATCH hetjob")
    assert len(groups) == 4
    for group, words in zip(
        groups,
        (
            "--nodes=1 --ntasks=1 --cpus-per-task=4 --mem-per-cpu=4096M",
            "--nodes=2 --ntasks-per-node=1 --cpus-per-task=64 --gpus-per-node=8 --mem-per-cpu=12288M",
            "--ntasks=1 --cpus-per-task=16 --gpus-per-task=2 --mem-per-cpu=12288M",
            "--ntasks=4 --cpus-per-task=32 --gpus-per-task=4 --mem-per-cpu=12288M",
        ),
        strict=True,
    ):
        assert f"#SBATCH {words}\n" in group
    assert "--nnodes 2 --nproc-per-node 8" in files["role.sh"]
    without = slurm("--gpus-per-node", "0", "engine.device=cpu")[1]["job.sbatch"].splitlines()
    assert not [line for line in without if "--gpus" in line and "tools.cluster" not in line]


def test_a_frozen_model_is_a_group_of_its_own():
    files = slurm(*FROZEN)[1]
    assert len(files["job.sbatch"].split("#SBATCH hetjob")) == 6
    assert "start teacher-math 4 --ntasks=2" in files["job.sbatch"]
    assert "start actor 5 " in files["job.sbatch"]
    assert "teacher-math)\n" in files["role.sh"]
    assert 'learner.score "$yaml" "$address" --name "teacher-math-$SLURM_PROCID" --serves math\n' in files["role.sh"]
    assert 'learner.score "$yaml" "$address" --name "replica-$SLURM_PROCID"\n' in files["role.sh"]


def fake(directory, name, text):
    path = directory / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def job(tmp_path):
    """A rendered job whose Slurm is a handful of fakes; ``role.sh`` of a role is ``<role>.sh`` in its place."""
    for name, text in slurm("--shared", "/SHARED", "--python", "bin/python")[1].items():
        (tmp_path / name).write_text(text.replace("/SHARED", str(tmp_path)))
    fake(tmp_path, "scontrol", 'if [ "$1" = show ]; then echo "first-of-$3"; else echo "$*" >> did; fi')
    fake(tmp_path, "srun", 'while [ "$1" != bash ]; do shift; done; touch "$3-began"; exec "./$3.sh"')
    fake(tmp_path, "scancel", 'echo "scancel $*" >> did; touch told')
    fake(tmp_path, "squeue", "echo RUNNING")
    fake(tmp_path, "sleep", "exec /bin/sleep 0.02")
    for role in ROLES:
        script = tmp_path / f"{role}.sh"
        script.write_text("#!/bin/bash\nwhile [ ! -e told ]; do /bin/sleep 0.02; done\n")
        script.chmod(0o755)
    return tmp_path


def environment(directory, **more):
    groups = {f"SLURM_JOB_NODELIST_HET_GROUP_{i}": f"group-{i}" for i in range(4)}
    return {
        **os.environ, "PATH": f"{directory / 'bin'}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(directory),
        "SLURM_JOB_ID": "77", **groups, **more,
    }  # fmt: skip


def start(directory, **more):
    return subprocess.Popen(
        ["bash", "job.sbatch"], cwd=directory, env=environment(directory, **more), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def did(directory):
    file = directory / "did"
    return file.read_text().splitlines() if file.exists() else []


def test_a_job_ends_well_with_its_broker_and_sets_an_earlier_run_aside(job):
    (job / "runs/qwen3-30b-a3b").mkdir(parents=True)
    (job / "runs/qwen3-30b-a3b/old").touch()
    for role in ("broker", "learner"):
        (job / f"{role}.sh").write_text("#!/bin/bash\nexit 0\n")
    (job / "actor.sh").write_text("#!/bin/bash\nexit 0\n")
    (job / "replica.sh").write_text("#!/bin/bash\nexit 3\n")
    running = start(job)
    said, _ = running.communicate(timeout=20)
    assert running.returncode == 0, said
    assert "broker on first-of-group-0, learner from first-of-group-1" in said
    assert (job / "runs/qwen3-30b-a3b.before-77/old").exists() and not (job / "runs/qwen3-30b-a3b/old").exists()


def test_a_job_waits_for_what_the_learner_writes_last_and_fails_with_it(job):
    (job / "broker.sh").write_text("#!/bin/bash\ntouch broker-ended\n")
    writes = "while [ ! -e broker-ended ]; do /bin/sleep 0.02; done; /bin/sleep 0.5; exit 7"
    (job / "learner.sh").write_text(f"#!/bin/bash\n{writes}\n")
    running = start(job)
    said, _ = running.communicate(timeout=20)
    assert running.returncode == 7 and "ended with exit code 7" in said, said
    assert did(job) == ["scancel --signal=TERM 77"]


def test_a_learner_that_writes_for_ever_fails_the_job(job):
    script = job / "job.sbatch"
    script.write_text(re.sub(r"WRITE_S=\d+", "WRITE_S=1", script.read_text()))
    (job / "broker.sh").write_text("#!/bin/bash\nexit 0\n")
    running = start(job)
    said, _ = running.communicate(timeout=20)
    assert running.returncode == 1 and "the learner has not ended 1 s after the broker" in said, said


@pytest.mark.parametrize("more", [{"SLURM_RESTART_COUNT": "2"}, {"CONTINUE": "1"}])
def test_a_job_that_goes_on_keeps_the_run_and_a_failed_learner_fails_it(job, more):
    (job / "runs/qwen3-30b-a3b").mkdir(parents=True)
    (job / "runs/qwen3-30b-a3b/old").touch()
    (job / "learner.sh").write_text("#!/bin/bash\nexit 5\n")
    running = start(job, **more)
    said, _ = running.communicate(timeout=20)
    assert running.returncode == 5, said
    assert did(job) == ["scancel --signal=TERM 77"]
    assert (job / "runs/qwen3-30b-a3b/old").exists()


@pytest.mark.parametrize("state", ["RUNNING", "CANCELLED"])
def test_sigterm_puts_a_job_back_into_the_queue_unless_it_was_cancelled(job, state):
    fake(job, "squeue", f"echo {state}")
    running = start(job)
    deadline = time.monotonic() + 10
    while not all((job / f"{role}-began").exists() for role in ROLES):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    said, _ = running.communicate(timeout=20)
    assert running.returncode == 0, said
    assert did(job) == ["scancel --signal=TERM 77", *(["requeue 77"] if state == "RUNNING" else [])]


@pytest.mark.parametrize("role", ROLES)
def test_every_role_is_told_where_the_others_are(job, role):
    fake(job, "python", 'printf "%s\\n" "$@" > said')
    subprocess.run(
        ["bash", "role.sh", role], cwd=job, check=True, timeout=10,
        env=environment(job, CROUPIER_BROKER="n0", CROUPIER_LEARNER="n1", CROUPIER_RENDEZVOUS="29077",
                        SLURM_PROCID="1", SLURMD_NODENAME="n2"),
    )  # fmt: skip
    words = (job / "said").read_text().splitlines()
    config = load(job / "run.yaml", [w for w in words if "=" in w and "." in w.split("=")[0]])
    assert config.broker.address == ("tcp://*:5700" if role == "broker" else "tcp://n0:5700")
    if role == "learner":
        assert config.weights.host == "n2" and config.learner.resume
        assert words[words.index("--rdzv-endpoint") + 1] == "n1:29077"
    elif role != "broker":
        assert words[words.index("--name") + 1] == f"{role}-1"


def test_what_fails_is_started_again_three_times(job):
    fake(job, "python", "echo again >> said; exit 9")
    settings = {"CROUPIER_BROKER": "n0", "SLURM_PROCID": "0", "SLURMD_NODENAME": "n2"}
    done = subprocess.run(
        ["bash", "role.sh", "actor"], cwd=job, timeout=10, env=environment(job, **settings), capture_output=True
    )
    assert done.returncode == 9
    assert (job / "said").read_text().count("again") == 4


# ---- contradictions -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "sections", "said"),
    [
        (Machine(learner_nodes=3), {}, ["learner ranks=16", "3 nodes (--learner-nodes)", "1, 2, 4, 8, 16 nodes"]),
        (Machine(learner_nodes=1), {}, ["16 on each of 1 nodes, which have 8 GPUs", "raise --learner-nodes"]),
        (Machine(learner_nodes=8), {"learner": {"tp": 4, "dp_shard": 1, "ep": 4}}, ["learner.tp=4", "8 nodes"]),
        (Machine(), {"learner": {"tp": 16, "dp_shard": 1, "ep": 1}}, ["learner.tp=16", "2 nodes has 8 ranks"]),
        (Machine(), {"replica": {"ep": 8}}, ["replica.ep × replica.tp='8 × 2'", "8 GPUs"]),
        (Machine(), {"engine": {"tp": 8, "launch": 2}}, ["engine.launch × engine.tp='2 × 8'", "8 GPUs"]),
        (
            Machine(),
            {"engine": {"launch": 0, "addresses": ("http://h:1",)}, "actor": {"count": 1}},
            ["engine.addresses", "engine.launch=1"],
        ),
        (Machine(gpus_per_node=0), {"engine": {"device": "cuda"}}, ["engine.device='cuda'", "set cpu"]),
        (Machine(), {"broker": {"keys": ""}}, ["broker.keys=''", "python -m tools.keys make"]),
        (Machine(), {"broker": {"address": "ipc:///tmp/b"}}, ["broker.address='ipc:///tmp/b'", "tcp://HOST:PORT"]),
        (Machine(), {"learner": {"checkpoint_every": 0}}, ["learner.checkpoint_every=0", "25"]),
        (Machine(), {"run": {"name": "two words"}}, ["run.name='two words'"]),
        (Machine(shared="here"), {}, ["--shared='here'", "absolute"]),
    ],
)
def test_what_contradicts_itself_is_refused_with_key_value_and_remedy(machine, sections, said):
    config = slurm()[0].config
    changed = {name: replace(getattr(config, name), **values) for name, values in sections.items()}
    with pytest.raises(ConfigError) as caught:
        plan(replace(config, **changed), machine)
    assert all(words in str(caught.value) for words in said), caught.value


def test_a_learner_takes_as_few_nodes_as_keep_neighbours_together():
    config = slurm()[0].config
    mesh = replace(config.learner, pp=1, dp_replicate=1, dp_shard=3, ep=1, tp=4)  # 6 ranks would fit on each of two
    learner = plan(replace(config, learner=mesh), Machine(gpus_per_node=8)).learner
    assert (learner.count, learner.processes) == (3, 4)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["run.name=Big_Run"], "run.name='Big_Run'"),
        (["model.path=/elsewhere/model"], "model.path='/elsewhere/model'"),
        (["run.dir=/tmp/runs"], "run.dir='/tmp/runs'"),
        ([*JUDGED, "reward.models.own.path=/elsewhere/m"], r"reward\.models\.own\.path='/elsewhere/m': no pod"),
        ([*JUDGED, "reward.models.taste.tokenizer=../m"], r"reward\.models\.taste\.tokenizer='\.\./m'"),
        ([*JUDGED, "reward.models.style.rubric=file:/etc/r"], r"reward\.models\.style\.rubric='file:/etc/r'"),
        (["reward.exemplars=/tmp/answers.jsonl"], r"reward\.exemplars='/tmp/answers\.jsonl'"),
        (["--mount", "models"], "--mount='models'"),
    ],
)
def test_what_no_pod_would_find_is_refused(overrides, said):
    with pytest.raises(ConfigError, match=said):
        kubernetes(*overrides)


def test_the_program_writes_the_files_and_says_what_comes_next(tmp_path, capsys):
    words = ["slurm", QWEN, *OVERRIDES, "--out", str(tmp_path / "job"), "--partition", "gpu"]
    assert main(words) == 0
    assert {path.name for path in (tmp_path / "job").iterdir()} == {"run.yaml", "job.sbatch", "role.sh"}
    said = capsys.readouterr().out
    assert "tools.keys make /shared/keys --client learner --client replica-0 --client actor-0" in said
    assert "sbatch job.sbatch" in said
    assert main([*words, "--time", "soon"]) == 2
    assert "--time='soon'" in capsys.readouterr().out


def test_a_directory_that_cannot_be_written_is_told_in_a_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["slurm", QWEN, *OVERRIDES, "--out", str(tmp_path / "file" / "job")]) == 2
    assert "file/job: cannot be written (Not a directory); --out DIR elsewhere\n" in capsys.readouterr().out
