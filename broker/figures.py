"""What the broker counts for people: one line a step, and status.json."""

import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from broker.alerts import Alert, Alerts
from broker.fleet import Fleet
from broker.peers import Roster
from broker.pipeline import Pipeline
from common.observe import AlertSection

RATE_WINDOW_S = 10.0


class Figures:
    """Running sums that outlive a restart through :meth:`state`."""

    def __init__(self, alerts: AlertSection, own: Callable[[], dict[str, float]] = dict) -> None:
        """``own``: the broker's seconds by state."""
        self.alerts = Alerts(alerts)
        self.errors: Counter[str] = Counter()
        self.fleet = Fleet(own)
        self.last_step: dict[str, Any] = {}
        self.budget_move: dict[str, Any] | None = None  # the last one of the staleness budget
        self.score_seconds = 0.0  # of the policy replicas
        self.frozen_seconds = 0.0  # of reference and teachers, added up
        self.decide_seconds = 0.0  # of thinning: coins, log m, receipt and audit of each batch
        self.lags: Counter[int] = Counter()  # tokens trained at each lag
        self._decoding_s = 0.0  # of actors, up to the last step
        self._rate: deque[tuple[float, int]] = deque()

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs."""
        return {
            "lags": [[lag, tokens] for lag, tokens in self.lags.items()],
            "last_step": self.last_step,
            "alerts": self.alerts.state(),
            "budget_move": self.budget_move,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up where :meth:`state` was written."""
        self.lags = Counter({lag: tokens for lag, tokens in state["lags"]})
        self.last_step, self.budget_move = state["last_step"], state["budget_move"]
        self.alerts.restore(state["alerts"])

    def count(self, receipt: dict[str, Any]) -> None:
        """Add a trained step's lags."""
        self.lags.update({int(lag): tokens for lag, tokens in receipt["lag_histogram"].items()})

    def committed(
        self, receipt: dict[str, Any], metrics: dict[str, float], pipeline: Pipeline
    ) -> tuple[dict[str, Any], list[Alert]]:
        """The step's line for metrics.jsonl (its receipt, the queues, the learner's own figures) and what it tells."""
        self.count(receipt)
        line = {
            **receipt,
            "version": receipt["step"] + 1,
            "dropped": dict(pipeline.dropped),
            "tokens_dropped": pipeline.counts["tokens_dropped"],
            "tokens_generated": pipeline.counts["tokens_generated"],
            "queue_bytes": pipeline.queue_bytes,
            "queue_groups": pipeline.ledger.queued,
            "in_flight_groups": pipeline.ledger.promised,
            "seconds_rollout": self.fleet.decoding_s - self._decoding_s,
            "seconds_score": self.score_seconds,
            "seconds_frozen": self.frozen_seconds,
            "seconds_decide": self.decide_seconds,
            **self.fleet.line(),
        }
        line |= {name: value for name, value in metrics.items() if name not in line}
        self._decoding_s = self.fleet.decoding_s
        self.score_seconds = self.frozen_seconds = self.decide_seconds = 0.0
        self.last_step = line
        return line, self.alerts.step(line)

    def status(self, pipeline: Pipeline, roster: Roster) -> dict[str, Any]:
        """The counted part of status.json."""
        counts, now = pipeline.counts, time.monotonic()
        self._rate.append((now, counts["tokens_generated"]))
        while len(self._rate) > 2 and now - self._rate[0][0] > RATE_WINDOW_S:
            self._rate.popleft()
        (t0, n0), (t1, n1) = self._rate[0], self._rate[-1]
        return {
            "reward": self.last_step.get("reward"),
            "lag_mean": sum(k * n for k, n in self.lags.items()) / self.lags.total() if self.lags else 0.0,
            "lag_max": max(self.lags, default=0),
            "lag_histogram": {str(lag): tokens for lag, tokens in sorted(self.lags.items())},
            "acceptance": self.last_step.get("acceptance"),
            "tokens_generated": counts["tokens_generated"],
            "tokens_proposed": counts["tokens_proposed"],
            "tokens_accepted": counts["tokens_accepted"],
            "tokens_per_s": (n1 - n0) / (t1 - t0) if t1 > t0 else 0.0,
            "staleness_move": self.budget_move,
            "queue_groups": pipeline.ledger.queued,
            "queue_bytes": pipeline.queue_bytes,
            "in_flight_groups": pipeline.ledger.promised,
            **self.fleet.status(roster, now),
            "trajectories_acked": counts["trajectories_acked"],
            "trajectories_trained": counts["trajectories_trained"],
            "trajectories_queued": pipeline.queued,
            "trajectories_dropped": dict(pipeline.dropped),
            "trajectories_refused": {k: n for k, n in (pipeline.refused + pipeline.turned_away).items() if k},
            "trajectories_repeated": pipeline.turned_away[""],
            **pipeline.fates.status(),
            "bad_messages": dict(self.errors),
        }
