"""Every process answers Prometheus: each role's own figures over real HTTP, and a dashboard that asks for no other."""

import json
import re
import socket
import threading
import urllib.error
import urllib.request
from collections import Counter, deque
from dataclasses import replace
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from actor.service import ActorService
from broker import exports
from broker.alerts import Alerts
from broker.service import BrokerService
from common.config import ModelSection, RunConfig, RunSection
from common.errors import ConfigError
from common.exporter import counter, gauge, open_exporter
from common.observe import AlertSection, MetricsSection
from common.process import StopFlag, free_port
from common.trace import silent
from learner.score import ReplicaService
from learner.train import Learner
from tests.integration.fleet import free_address
from tests.unit.test_report import step_record
from tools.grafana.__main__ import WRITTEN
from tools.grafana.__main__ import main as grafana
from tools.grafana.dashboard import dashboard


def config_in(tmp_path, **metrics):
    section = MetricsSection(prometheus=True, **metrics)
    return RunConfig(run=RunSection(name="r", dir=str(tmp_path)), metrics=section)


def tracer_of(role):
    tracer = silent(f"{role}-0", role)
    tracer.state("idle.start")
    tracer.state("sample")
    tracer.tally("train", 8, 2_000_000_000, 1_000_000_000, 6)
    tracer.tally("train", 16, 1_000_000_000, 500_000_000, 10)
    return tracer


def target_of(config, process):
    return json.loads((config.run.path / "prometheus" / f"{process}.json").read_text())


def scrape(config, process):
    (found,) = target_of(config, process)
    with urllib.request.urlopen(f"http://{found['targets'][0]}/metrics", timeout=10) as answer:
        return answer.read().decode()


def samples(text):
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def link():
    offset = SimpleNamespace(best=(1, 2_500_000_000, 10))
    return SimpleNamespace(version=7, welcomed=True, tracer=SimpleNamespace(offset=offset), counters={
        "tokens": 12.0, "seconds_decode": 1.5, "servers": 2.0, "scoring": 3.0, "reward_judge_down": 1.0,
        "reward_judge_seconds": 0.25, "failures": 4.0,
    })  # fmt: skip


def families_of_role(role, tmp_path):
    """What the service of that role gives, its bulky parts left out."""
    if role == "actor":
        service = ActorService.__new__(ActorService)
        service.link, service._grants = link(), deque([SimpleNamespace(groups=[1, 2, 3])])
        service.engine = SimpleNamespace(in_flight=5)
        service.outbox = type("Outbox", (), {"nbytes": 64, "__len__": lambda self: 2})()
        return service.families
    if role == "replica":
        replica = ReplicaService.__new__(ReplicaService)
        replica.link, replica._requests = link(), deque([1])
        return replica.families
    if role == "learner":
        learner = Learner.__new__(Learner)
        learner.link, learner.step = link(), 3
        learner.metrics = {"loss": 0.5, "grad_norm": 2.0, "lr": 1e-3, "entropy": 0.4, "weight_ess": 0.9,
                           "kl_to_behaviour": 0.01, "skipped_updates": 1.0, "seconds_train": 0.25}  # fmt: skip
        return learner.families
    status, line = broker_status(tmp_path)
    return lambda: exports.families(status, line)


def broker_status(tmp_path):
    """A real broker's, with some of everything that may be counted."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"vocab_size": 16}')
    config = config_in(tmp_path)
    config = replace(config, model=ModelSection(path=str(tmp_path / "model")),
                     broker=replace(config.broker, address=free_address()))  # fmt: skip
    service = BrokerService(config, StopFlag())
    try:
        service.figures.count({"lag_histogram": {"0": 10, "2": 30, "5": 2}})
        service.figures.errors["WireError"] += 3
        service.figures.fleet.seconds["actor"]["sample"] = 8.0
        service.figures.fleet.parked["rollouts"] = 1.5
        service.figures.alerts = Alerts(AlertSection(patience=1))
        service.figures.alerts.step({"step": 0, "entropy": 0.0})
        service.pipeline.dropped["lag"] += 2
        service.door.conduct.offence("mallory", "DataError", 0.0)
        status = service.status()
        status["fleet"] = {"actor": {"count": 2, "silent": 1, "oldest_version": 4}}
        status["receivers_late"] = {"replica-0": 2}
        status["trajectories_refused"] = Counter(invalid=1)
        status["evaluations"] = [{"version": 4, "reward": 0.5, "low": 0.4, "high": 0.6}]
    finally:
        service.files.close()
        service.router.close()
        if service.recorder.journal is not None:
            service.recorder.journal.close()
    return status, step_record(3, weight_ess=0.9, ess=0.95, truncated=0.1, length_mean=7.0, threshold=1.0)


WANTED = {
    "broker": {
        ("croupier_steps_total", ()): 0, ("croupier_tokens_generated_total", ()): 0,
        ("croupier_token_lag_versions_bucket", (("le", "0.0"),)): 10,
        ("croupier_token_lag_versions_bucket", (("le", "4.0"),)): 40,
        ("croupier_token_lag_versions_bucket", (("le", "+Inf"),)): 42, ("croupier_token_lag_versions_count", ()): 42,
        ("croupier_token_lag_versions_sum", ()): 70, ("croupier_alert", (("sign", "entropy"),)): 1,
        ("croupier_alert", (("sign", "kl"),)): 0, ("croupier_phase", (("phase", "waiting"),)): 1,
        ("croupier_trajectories_dropped_total", (("reason", "lag"),)): 2,
        ("croupier_fleet_seconds_total", (("peer_role", "actor"), ("state", "sample"))): 8,
        ("croupier_parked_seconds_total", (("cause", "rollouts"),)): 1.5,
        ("croupier_bad_messages_total", (("kind", "WireError"),)): 3,
        ("croupier_offences_total", (("peer", "mallory"),)): 1,
        ("croupier_peers", (("peer_role", "actor"),)): 2, ("croupier_evaluation_reward", ()): 0.5,
        ("croupier_batch_kl_nats", (("when", "after"),)): 1e-4, ("croupier_batch_ess_ratio", (("of", "learner"),)): 0.9,
        ("croupier_staleness_budget", ()): 2,
    },
    "learner": {
        ("croupier_learner_loss", ()): 0.5, ("croupier_learner_gradient_norm", ()): 2, ("croupier_learner_step", ()): 3,
        ("croupier_learner_skipped_updates_total", ()): 1,
        ("croupier_learner_step_seconds", (("part", "train"),)): 0.25,
        ("croupier_version_held", ()): 7, ("croupier_link_up", ()): 1, ("croupier_link_clock_offset_seconds", ()): 2.5,
    },
    "actor": {
        ("croupier_actor_tokens_total", ()): 12, ("croupier_actor_in_flight", ()): 5, ("croupier_actor_grants", ()): 3,
        ("croupier_actor_unacknowledged", ()): 2, ("croupier_actor_unacknowledged_bytes", ()): 64,
        ("croupier_actor_seconds_total", (("what", "decode"),)): 1.5, ("croupier_actor_servers", ()): 2,
        ("croupier_actor_seconds_total", (("what", "reward_judge"),)): 0.25, ("croupier_actor_scoring", ()): 3,
        ("croupier_actor_reward_model_down", (("model", "judge"),)): 1,
        ("croupier_actor_events_total", (("event", "failures"),)): 4,
    },
    "replica": {("croupier_replica_waiting_requests", ()): 1, ("croupier_version_held", ()): 7},
}  # fmt: skip
EVERYBODY = {
    ("croupier_work_times_total", (("work", "train"),)): 2, ("croupier_work_seconds_total", (("work", "train"),)): 3,
    ("croupier_work_cpu_seconds_total", (("work", "train"),)): 1.5,
    ("croupier_work_amount_total", (("work", "train"),)): 16,
}  # fmt: skip


@pytest.mark.parametrize("role", ["broker", "learner", "actor", "replica"])
def test_every_role_answers_with_its_own_figures_while_it_lives(role, tmp_path):
    config, tracer = config_in(tmp_path), tracer_of(role)
    with open_exporter(config, tracer) as exporter:
        before = samples(scrape(config, tracer.process))
        exporter.families = families_of_role(role, tmp_path)
        text = scrape(config, tracer.process)
        target = target_of(config, tracer.process)
    found = samples(text)
    for key, value in (WANTED[role] | EVERYBODY).items():
        assert found[key] == pytest.approx(value), key
    assert found["croupier_state_seconds_total", (("state", "sample"),)] > 0
    assert found["process_resident_memory_bytes", ()] > 0 and not any(n.startswith("python_") for n, _ in found)
    assert set(before) < set(found)  # before the service was there, its tracer and process answered
    assert target[0]["labels"] == {"run": "r", "process": tracer.process, "role": role}
    assert list((config.run.path / "prometheus").iterdir()) == []  # taken away at the end
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://{target[0]['targets'][0]}/metrics", timeout=2)


def test_names_keep_prometheus_conventions(tmp_path):
    for role in WANTED:
        (tmp_path / role).mkdir()
        for family in families_of_role(role, tmp_path / role)():
            assert re.fullmatch(r"croupier_[a-z_]+[a-z]", family.name) and family.help.endswith(".")
            assert not re.search(r"_(ms|mb|percent|count|sum|bucket)(_|$)", family.name)
            labels = {label for sample in getattr(family, "samples", ()) for label, _ in sample}
            assert not labels & {"run", "process", "role", "job", "instance"}  # the target's: would be renamed
    with pytest.raises(AssertionError):
        counter("croupier_things", "A counter without _total.", 1)
    with pytest.raises(AssertionError):
        gauge("croupier_things_total", "A gauge with it.", 1)


def test_the_dashboard_is_what_the_code_makes_and_asks_only_for_what_is_exported(tmp_path):
    written = json.loads(WRITTEN.read_text())
    assert written == dashboard(), "run `python -m tools.grafana`"
    exported = set()
    for role in WANTED:
        (tmp_path / role).mkdir()
        config, tracer = config_in(tmp_path / role), tracer_of(role)
        with open_exporter(config, tracer) as exporter:
            exporter.families = families_of_role(role, tmp_path / role)
            exported |= {name for name, _ in samples(scrape(config, tracer.process))}
    panels = [panel for panel in written["panels"] if panel["type"] != "row"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    queries += [variable["definition"] for variable in written["templating"]["list"] if "definition" in variable]
    asked = {name for query in queries for name in re.findall(r"\b(?:croupier|process)_\w+", query)}
    optional = {"croupier_actor_servers_serving"}  # of SGLang's servers
    assert asked - exported - optional == set()
    assert len(queries) > 50 and all(query.count("(") == query.count(")") for query in queries)
    assert all('run=~"$run"' in query for query in queries[:-1])
    assert len({panel["id"] for panel in written["panels"]}) == len(written["panels"])
    places = [tuple(panel["gridPos"].values()) for panel in written["panels"]]
    assert len(set(places)) == len(places)
    assert {v["name"] for v in written["templating"]["list"]} == {"datasource", "run"}


def test_the_dashboard_is_written_where_it_may_be(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        grafana(["--help"])
    for path, said in (("x.txt", "must end in .json"), (".", "must end in"), ("d.json", "is a directory")):
        (tmp_path / "d.json").mkdir(exist_ok=True)
        assert grafana([path]) == 2 and said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["d.json"]
    (tmp_path / "x.json").write_text("{}")
    assert grafana(["x.json"]) == 0 and json.loads((tmp_path / "x.json").read_text()) == dashboard()


def test_a_port_that_is_taken_is_passed_over_and_none_at_all_is_only_a_warning(tmp_path, caplog):
    port = free_port()
    first, second = config_in(tmp_path, port=port), config_in(tmp_path, port=port)
    with open_exporter(first, silent("a", "actor")), open_exporter(second, silent("b", "actor")):
        ports = [int(target_of(first, name)[0]["targets"][0].rpartition(":")[2]) for name in "ab"]
        assert ports[0] == port < ports[1] <= port + 63
    elsewhere = config_in(tmp_path, host="203.0.113.1")  # an address that is not this machine's
    with open_exporter(elsewhere, silent("c", "actor")):
        assert not (elsewhere.run.path / "prometheus" / "c.json").exists()
    assert "no metrics of this process" in caplog.text and "203.0.113.1" in caplog.text


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_an_ipv6_address_is_answered_at_and_announced_in_brackets(tmp_path):
    config, tracer = config_in(tmp_path, host="::1"), tracer_of("actor")
    with open_exporter(config, tracer):
        assert target_of(config, tracer.process)[0]["targets"][0].startswith("[::1]:")
        assert samples(scrape(config, tracer.process))["croupier_work_times_total", (("work", "train"),)] == 2


def test_switched_off_it_leaves_nothing(tmp_path):
    config = RunConfig(run=RunSection(name="r", dir=str(tmp_path)))
    before = threading.active_count()
    with open_exporter(config, silent("a", "actor")):
        assert threading.active_count() == before and not config.run.path.exists()


def test_a_loop_that_changes_what_is_read_costs_its_figures_and_not_the_scrape(tmp_path):
    config, tracer = config_in(tmp_path), tracer_of("actor")

    def changing():
        raise RuntimeError("dictionary changed size during iteration")

    with open_exporter(config, tracer) as exporter:
        exporter.families = changing
        found = samples(scrape(config, tracer.process))
    assert found["croupier_work_times_total", (("work", "train"),)] == 2


def test_what_everybody_may_reach_is_announced_under_this_machines_name(tmp_path):
    config = config_in(tmp_path, host="0.0.0.0")
    with open_exporter(config, silent("a", "actor")):
        host = target_of(config, "a")[0]["targets"][0].rpartition(":")[0]
    assert host and host != "0.0.0.0"
    with pytest.raises(ConfigError, match=r"metrics\.port"):
        MetricsSection(port=70_000)
