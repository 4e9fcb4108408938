"""What the broker tells Prometheus, from status.json's content and the last step's line. Pure."""

from collections.abc import Iterable, Mapping
from typing import Any

from broker.alerts import SIGNS
from common.exporter import Families, Family, Histogram, Labels, counter, gauge

LAG_BOUNDS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)  # versions
PHASES = ("waiting", "running", "evaluating", "stopped", "finished")


def families(status: Mapping[str, Any], line: Mapping[str, Any]) -> Families:
    """Both as they were last made, half a second ago at most; {} at the beginning."""
    if not status:
        return
    yield from _progress(status)
    yield from _data(status)
    yield from _fleet(status)
    yield from _last_step(line)


def _progress(status: Mapping[str, Any]) -> Iterable[Family | Histogram]:
    yield counter("croupier_steps_total", "Training steps committed.", status["step"])
    yield gauge("croupier_steps_planned", "Training steps of the run.", status["steps"])
    yield gauge("croupier_version", "The newest version published.", status["version"])
    phase = {name: float(name == status["phase"]) for name in PHASES}
    yield gauge("croupier_phase", "1 for the phase that the run is in.", phase=phase)
    evaluations = status["evaluations"]
    last = evaluations[-1] if evaluations else {}
    yield gauge("croupier_evaluation_reward", "Mean held-out reward of the last evaluation.", last.get("reward"))
    yield gauge("croupier_evaluation_version", "The version that was evaluated.", last.get("version"))
    raised = {alert["sign"].partition(":")[0] for alert in status["alerts"]}
    signs = {name: float(name in raised) for name in (*(sign.name for sign in SIGNS), "reward", "updates", "rollouts")}
    yield gauge("croupier_alert", "1 for a sign of a collapse that lasts (alerts).", sign=signs)


def _data(status: Mapping[str, Any]) -> Iterable[Family | Histogram]:
    yield counter("croupier_tokens_generated_total", "Completion tokens admitted.", status["tokens_generated"])
    yield counter("croupier_tokens_proposed_total", "Tokens of trained batches.", status["tokens_proposed"])
    yield counter("croupier_tokens_accepted_total", "Of those, accepted and trained.", status["tokens_accepted"])
    acked, trained = status["trajectories_acked"], status["trajectories_trained"]
    yield counter("croupier_trajectories_acknowledged_total", "Trajectories taken from actors.", acked)
    yield counter("croupier_trajectories_trained_total", "Trajectories trained.", trained)
    dropped, refused = status["trajectories_dropped"], status["trajectories_refused"]
    yield counter("croupier_trajectories_dropped_total", "Trajectories taken and not trained.", reason=dropped)
    yield counter("croupier_trajectories_refused_total", "Trajectories not taken.", reason=refused)
    yield gauge("croupier_trajectories_queued", "Trajectories that wait.", status["trajectories_queued"])
    yield gauge("croupier_queue_bytes", "Bytes of trajectories that wait.", status["queue_bytes"])
    yield gauge("croupier_queue_limit_bytes", "What they may be (broker.queue_mb).", status["queue_limit_bytes"])
    yield gauge("croupier_queue_groups", "Whole groups that wait for a step.", status["queue_groups"])
    yield gauge("croupier_in_flight_groups", "Groups granted and not complete.", status["in_flight_groups"])
    yield gauge("croupier_staleness_budget", "The budget now, versions.", status["staleness_budget"])
    lags = {int(lag): count for lag, count in status["lag_histogram"].items()}
    yield Histogram("croupier_token_lag_versions", "Lag of every trained token.", lags, LAG_BOUNDS)


def _fleet(status: Mapping[str, Any]) -> Iterable[Family | Histogram]:
    fleet = status["fleet"]

    def of(figure: str) -> dict[str, float]:
        return {role: row[figure] for role, row in fleet.items()}

    yield gauge("croupier_peers", "Peers that are there.", peer_role=of("count"))
    yield gauge("croupier_peers_silent", "Of those, not heard for three heartbeats.", peer_role=of("silent"))
    yield gauge(
        "croupier_peers_oldest_version", "The oldest version that a peer holds.", peer_role=of("oldest_version")
    )
    seconds: dict[Labels, float] = {
        (("peer_role", str(role)), ("state", str(state))): float(value)
        for role, states in status["states"].items()
        for state, value in states.items()
    }
    words = "Wall-clock of all peers of a role by state, as their heartbeats told."
    yield Family("counter", "croupier_fleet_seconds_total", words, seconds)
    yield counter("croupier_parked_seconds_total", "The learner waited for data, by cause.", cause=status["parked"])
    late = status["receivers_late"]
    yield counter("croupier_receivers_late_total", "Left out of a publish.", receiver=late)
    yield counter("croupier_bad_messages_total", "Messages refused.", kind=status["bad_messages"])
    offences = {name: float(sum(kinds.values())) for name, kinds in status["offences"].items()}
    yield counter("croupier_offences_total", "Offences of a peer.", peer=offences)


def _last_step(line: Mapping[str, Any]) -> Iterable[Family | Histogram]:
    yield gauge("croupier_batch_reward", "Mean reward of the last batch.", line.get("reward"))
    yield gauge("croupier_batch_lag_versions", "Mean lag of the last batch's tokens.", line.get("lag_mean"))
    yield gauge("croupier_batch_acceptance_ratio", "Accepted of its proposed tokens.", line.get("acceptance"))
    kl = {when: line[f"kl_{when}"] for when in ("before", "after") if line.get(f"kl_{when}") is not None}
    yield gauge("croupier_batch_kl_nats", "KL to the scoring policy, around rejection.", when=kl)
    ess = {of: line[key] for of, key in (("rejection", "ess"), ("learner", "weight_ess")) if line.get(key) is not None}
    yield gauge("croupier_batch_ess_ratio", "Normalised effective sample size.", of=ess)
    yield gauge("croupier_batch_truncated_ratio", "Trajectories cut at their length limit.", line.get("truncated"))
    yield gauge("croupier_batch_length_tokens", "Mean length of a trajectory.", line.get("length_mean"))
    yield gauge("croupier_batch_threshold", "Lambda of the rejection.", line.get("threshold"))
