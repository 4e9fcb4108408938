"""The dashboard, panel by panel. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WIDTH = 24  # of Grafana's grid
HEIGHT = 8  # of a panel
STAT_HEIGHT = 4
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
RUN = 'run=~"$run"'
WINDOW = "$__rate_interval"


@dataclass(frozen=True)
class Panel:
    """One picture: ``queries`` are (PromQL, legend)."""

    title: str
    queries: Sequence[tuple[str, str]]
    unit: str = "short"  # of Grafana's
    kind: str = "timeseries"
    stacked: bool = False
    words: str = ""


def now(metric: str, by: str = "") -> str:
    """Its value, of the chosen runs."""
    return f"sum by (run{',' + by if by else ''}) ({metric}{{{RUN}}})"


def rate(metric: str, by: str = "", where: str = "") -> str:
    """How fast a counter grows."""
    chosen = f"{RUN},{where}" if where else RUN
    return f"sum by (run{',' + by if by else ''}) (rate({metric}{{{chosen}}}[{WINDOW}]))"


def share(role: str) -> str:
    """Of a role's time, by state: its processes' mean."""
    chosen = f'{RUN},role="{role}"'
    return f"avg by (run,state) (rate(croupier_state_seconds_total{{{chosen}}}[{WINDOW}]))"


def cost() -> str:
    """Seconds of one piece of each work."""
    top, bottom = rate("croupier_work_seconds_total", "work,role"), rate("croupier_work_times_total", "work,role")
    return f"{top} / {bottom}"


DONE = f"{now('croupier_steps_total')} / {now('croupier_steps_planned')}"
LAGS = rate("croupier_token_lag_versions_bucket", "le")
SKIPPED = f"max by (run) (croupier_learner_skipped_updates_total{{{RUN}}})"

STATS = (
    Panel("Steps", [(now("croupier_steps_total"), "{{run}}")], kind="stat"),
    Panel("Done", [(DONE, "{{run}}")], "percentunit", "stat"),
    Panel("Held-out reward", [(now("croupier_evaluation_reward"), "{{run}}")], kind="stat"),
    Panel("Tokens/s trained", [(rate("croupier_tokens_accepted_total"), "{{run}}")], kind="stat"),
    Panel("Alerts", [(now("croupier_alert"), "{{run}}")], kind="stat", words="Signs of a collapse that last."),
    Panel("Peers silent", [(now("croupier_peers_silent"), "{{run}}")], kind="stat"),
)  # fmt: skip

ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Learning",
        (
            Panel("Reward", [
                (now("croupier_batch_reward"), "batch {{run}}"),
                (now("croupier_evaluation_reward"), "held out {{run}}"),
            ]),
            Panel("Entropy, nats a token", [(f"max by (run) (croupier_learner_entropy_nats{{{RUN}}})", "{{run}}")]),
            Panel("Loss, gradient norm", [
                (f"max by (run) (croupier_learner_loss{{{RUN}}})", "loss {{run}}"),
                (f"max by (run) (croupier_learner_gradient_norm{{{RUN}}})", "gradient {{run}}"),
            ]),
            Panel("KL, nats a token", [
                (now("croupier_batch_kl_nats", "when"), "{{when}} rejection {{run}}"),
                (f"max by (run) (croupier_learner_kl_nats{{{RUN}}})", "to the behaviour {{run}}"),
            ]),
            Panel("Effective sample size", [(now("croupier_batch_ess_ratio", "of"), "{{of}} {{run}}")], "percentunit"),
            Panel("Cut at the length limit", [(now("croupier_batch_truncated_ratio"), "{{run}}")], "percentunit"),
            Panel("Alerts by sign", [(now("croupier_alert", "sign"), "{{sign}} {{run}}")]),
            Panel("Learning rate", [(f"max by (run) (croupier_learner_learning_rate{{{RUN}}})", "{{run}}")]),
        ),
    ),
    (
        "Staleness",
        (
            Panel("Budget and lag, versions", [
                (now("croupier_staleness_budget"), "budget {{run}}"),
                (now("croupier_batch_lag_versions"), "mean of the batch {{run}}"),
                (f"histogram_quantile(0.95, {LAGS})", "95 % of tokens {{run}}"),
            ]),
            Panel("Trained tokens/s by lag", [(LAGS, "{{le}}")], kind="heatmap"),
            Panel("Accepted of the proposed", [(now("croupier_batch_acceptance_ratio"), "{{run}}")], "percentunit"),
            Panel("Oldest version held", [(now("croupier_peers_oldest_version", "peer_role"), "{{peer_role}} {{run}}"),
                                          (now("croupier_version"), "published {{run}}")]),
        ),
    ),
    (
        "Where the time goes",
        (
            Panel("Learner", [(share("learner"), "{{state}}")], "percentunit", stacked=True),
            Panel("Actors", [(share("actor"), "{{state}}")], "percentunit", stacked=True),
            Panel("Replicas", [(share("replica"), "{{state}}")], "percentunit", stacked=True),
            Panel("Broker", [(share("broker"), "{{state}}")], "percentunit", stacked=True),
            Panel("What the learner waits for", [(rate("croupier_parked_seconds_total", "cause"), "{{cause}} {{run}}")],
                  "percentunit", stacked=True),
            Panel("Seconds of a step", [
                (f"max by (run,part) (croupier_learner_step_seconds{{{RUN}}})", "{{part}} {{run}}"),
            ], "s"),
            Panel("Cost of one piece of work", [(cost(), "{{role}}: {{work}}")], "s"),
            Panel("Bytes published a second", [
                (rate("croupier_work_amount_total", where='work="publish"'), "{{run}}"),
            ], "Bps"),
        ),
    ),
    (
        "Throughput and queues",
        (
            Panel("Tokens a second", [
                (rate("croupier_tokens_generated_total"), "generated {{run}}"),
                (rate("croupier_tokens_proposed_total"), "in batches {{run}}"),
                (rate("croupier_tokens_accepted_total"), "trained {{run}}"),
            ]),
            Panel("Sampled by each actor, tokens/s", [(rate("croupier_actor_tokens_total", "process"), "{{process}}")]),
            Panel("Queue, bytes", [
                (now("croupier_queue_bytes"), "{{run}}"), (now("croupier_queue_limit_bytes"), "limit {{run}}"),
            ], "bytes"),
            Panel("Groups", [
                (now("croupier_queue_groups"), "complete {{run}}"),
                (now("croupier_in_flight_groups"), "in flight {{run}}"),
            ]),
            Panel("In flight by actor", [(now("croupier_actor_in_flight", "process"), "{{process}}")]),
            Panel("Requests for scores, waiting", [
                (now("croupier_replica_waiting_requests", "process"), "{{process}}"),
            ]),
            Panel("SGLang servers", [
                (now("croupier_actor_servers"), "all {{run}}"),
                (now("croupier_actor_servers_serving"), "serving {{run}}"),
            ]),
            Panel("Unacknowledged by actor, bytes", [
                (now("croupier_actor_unacknowledged_bytes", "process"), "{{process}}"),
            ], "bytes"),
        ),
    ),
    (
        "Faults and machines",
        (
            Panel("Trajectories lost a second", [
                (rate("croupier_trajectories_dropped_total", "reason"), "dropped: {{reason}}"),
                (rate("croupier_trajectories_refused_total", "reason"), "refused: {{reason}}"),
            ]),
            Panel("Bad messages, late receivers", [
                (now("croupier_bad_messages_total", "kind"), "{{kind}}"),
                (now("croupier_receivers_late_total", "receiver"), "late: {{receiver}}"),
                (now("croupier_offences_total", "peer"), "offences: {{peer}}"),
            ]),
            Panel("Peers", [(now("croupier_peers", "peer_role"), "{{peer_role}} {{run}}")]),
            Panel("Updates skipped", [(SKIPPED, "{{run}}")]),
            Panel("CPU of each process, cores", [(rate("process_cpu_seconds_total", "process"), "{{process}}")]),
            Panel("Memory of each process", [
                (now("process_resident_memory_bytes", "process"), "{{process}}"),
            ], "bytes"),
            Panel("What actors count", [(rate("croupier_actor_events_total", "event"), "{{event}}")]),
            Panel("Link to the broker", [(now("croupier_link_up", "process"), "{{process}}")]),
        ),
    ),
)  # fmt: skip


def dashboard() -> dict[str, Any]:
    """What Grafana imports."""
    panels, y = _stats(), STAT_HEIGHT
    for title, row in ROWS:
        panels.append(_row(title, y))
        y += 1
        for index, panel in enumerate(row):
            at = {"h": HEIGHT, "w": WIDTH // 2, "x": index % 2 * (WIDTH // 2), "y": y + index // 2 * HEIGHT}
            panels.append(_panel(panel, at))
        y += -(-len(row) // 2) * HEIGHT
    for number, panel_json in enumerate(panels, 1):
        panel_json["id"] = number
    return {
        "title": "croupier", "uid": "croupier", "tags": ["croupier"], "schemaVersion": 39, "version": 1,
        "editable": True, "graphTooltip": 1, "refresh": "10s", "timezone": "",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source(), _runs()]},
        "panels": panels,
    }  # fmt: skip


def _source() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _runs() -> dict[str, Any]:
    query = "label_values(croupier_steps_total, run)"
    return {
        "name": "run", "label": "Run", "type": "query", "datasource": SOURCE, "definition": query,
        "query": {"query": query, "refId": "run"}, "refresh": 2, "sort": 2, "multi": True, "includeAll": True,
        "allValue": ".+", "current": {"text": ["All"], "value": ["$__all"]},
    }  # fmt: skip


def _stats() -> list[dict[str, Any]]:
    width = WIDTH // len(STATS)
    return [
        _panel(panel, {"h": STAT_HEIGHT, "w": width, "x": index * width, "y": 0}) for index, panel in enumerate(STATS)
    ]


def _row(title: str, y: int) -> dict[str, Any]:
    return {
        "type": "row", "title": title, "collapsed": False, "panels": [],
        "gridPos": {"h": 1, "w": WIDTH, "x": 0, "y": y},
    }  # fmt: skip


def _panel(panel: Panel, at: dict[str, int]) -> dict[str, Any]:
    custom: dict[str, Any] = {}
    if panel.kind == "timeseries":
        custom = {"lineWidth": 1, "fillOpacity": 60 if panel.stacked else 5, "showPoints": "never"}
        custom["stacking"] = {"mode": "normal" if panel.stacked else "none", "group": "A"}
    options: dict[str, Any] = {"tooltip": {"mode": "multi", "sort": "desc"}}
    if panel.kind == "heatmap":
        options = {"calculate": False, "yAxis": {"axisPlacement": "left"}, "color": {"scheme": "Blues"}}
    if panel.kind == "stat":
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value"}
    return {
        "type": panel.kind, "title": panel.title, "description": panel.words, "datasource": SOURCE, "gridPos": at,
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": custom}, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + index), "datasource": SOURCE, "expr": query, "legendFormat": legend,
                "format": "heatmap" if panel.kind == "heatmap" else "time_series",
            }
            for index, (query, legend) in enumerate(panel.queries)
        ],
    }  # fmt: skip
