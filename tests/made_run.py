"""A run directory as the broker writes it, made up, and growing as a test likes."""

import json
import math
import random

HOSTILE = '<img src=x onerror="document.title=1">'


class MadeRun:
    """Writes status.json and metrics.jsonl of a run of ``steps`` steps; every figure follows from the step."""

    def __init__(self, directory, steps=200, actors=("actor-0", "actor-1"), run_id="made", budget=2):
        self.directory, self.steps, self.actors, self.run_id = directory, steps, list(actors), run_id
        self.budget, self.step, self.evaluations, self.alerts = budget, 0, [], []
        self.generated = 0
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.yaml").write_text(f"run: {{steps: {steps}}}\nstaleness: {{budget: auto}}\n")
        self._lines = []
        self.write_status()

    def seconds(self, step=None):
        """Of the run's clock; a step takes a quarter of a second."""
        return 5.0 + 0.25 * (self.step if step is None else step)

    def advance(self, count=1, status=True):
        for _ in range(count):
            self._write_step()
            self.step += 1
            if self.step % 25 == 0 or self.step == 1:
                reward = 0.25 + 0.7 * (1 - math.exp(-self.step / 80))
                line = {
                    "version": self.step,
                    "reward": reward,
                    "reward_low": reward - 0.03,
                    "reward_high": reward + 0.03,
                }
                self.evaluations.append(
                    {"version": self.step, "reward": reward, "low": reward - 0.03, "high": reward + 0.03}
                )
                self.line("eval", line)
            if self.step % 60 == 0:
                old, self.budget = self.budget, min(16, self.budget + 1)
                self.line("budget", {
                    "move": self.step // 60 - 1, "step": self.step, "old": old, "value": self.budget,
                    "reason": "the learner idles 21 % for rollouts, KL 0.003 below its target 0.05",
                })  # fmt: skip
        self.flush()
        if status:
            self.write_status()

    def line(self, kind, values):
        self._lines.append(json.dumps({"kind": kind, "time_s": self.seconds(), **values}) + "\n")

    def flush(self):
        with (self.directory / "metrics.jsonl").open("a") as file:
            file.writelines(self._lines)
        self._lines = []

    def alert(self, text="the policy's entropy is 0.003 nats a token; it hardly explores any more: raise loss.entropy"):
        self.alerts.append({"sign": "entropy", "since": self.step, "text": text})
        self.line("alert", {"sign": "entropy", "state": "raised", "step": self.step, "since": self.step, "text": text})
        self.flush()
        self.write_status()

    def _write_step(self):
        step, chance = self.step, random.Random(self.step)
        reward = 0.25 + 0.7 * (1 - math.exp(-step / 80)) + chance.uniform(-0.05, 0.05)
        kl = 1e-3 * math.exp(chance.gauss(0, 0.5)) * (1 + 20 * math.exp(-step / 60)) / 4
        self.generated += 4096 + chance.randrange(800)
        lag = {
            str(k): int(4000 * math.exp(-abs(k - 0.7 * self.budget)) * chance.uniform(0.8, 1.2))
            for k in range(self.budget + 1)
        }
        mean = sum(int(k) * v for k, v in lag.items()) / sum(lag.values())
        self.line("step", {
            "step": step, "version": step + 1, "reward": reward, "trajectories": 256, "tokens": 7000,
            "tokens_proposed": 4096, "tokens_accepted": 4000 - chance.randrange(60), "tokens_generated": self.generated,
            "acceptance": 0.985 - chance.uniform(0, 0.02), "acceptance_low": 0.96, "acceptance_high": 0.99,
            "kl_before": kl, "kl_after": kl / 6, "ess": 0.99, "weight_ess": 0.97 - chance.uniform(0, 0.04),
            "threshold": 1.0, "lag_mean": mean, "lag_max": self.budget, "lag_histogram": lag, "entropy": 0.4,
            "grad_norm": 1.2, "loss": 0.01, "truncated": 0.02, "length_mean": 7.0, "staleness_budget": self.budget,
            "queue_bytes": 92_000 * (1 + step % 7), "queue_groups": 32 + step % 9, "in_flight_groups": 64 - step % 9,
            "dropped": {"stale": step // 20, "invalid": step // 50}, "states": self.states(), "parked": self.parked(),
        })  # fmt: skip

    def states(self):
        t = self.seconds()
        wave = 0.1 * math.sin(t / 20)
        shares = {
            "actor": {"sample": 0.7 + wave, "play": 0.06, "send": 0.03, "swap": 0.02, "idle.credits": 0.19 - wave},
            "learner": {
                "forward": 0.24, "backward": 0.34, "optimizer": 0.05, "send": 0.08,
                "idle.shard": 0.25, "idle.receivers": 0.04,
            },
            "replica": {"score": 0.31, "swap": 0.04, "idle.requests": 0.65},
            "broker": {"receive": 0.04, "thin": 0.02, "pack": 0.01, "journal": 0.05, "idle.messages": 0.88},
        }  # fmt: skip
        return {
            role: {state: round(share * t, 2) for state, share in states.items()} for role, states in shares.items()
        }

    def parked(self):
        return {"rollouts": round(0.17 * self.seconds(), 2), "scoring": round(0.08 * self.seconds(), 2)}

    def peers(self):
        states, version = self.states(), self.step
        found = [("learner", "learner.0", version), ("replica", "replica-0", version)]
        found += [("actor", name, max(0, version - place % 3)) for place, name in enumerate(self.actors)]
        return [
            {"peer": name, "role": role, "serves": "", "version": v,
             "silent_s": 4.2 if place == 3 else 0.3, "seconds": states[role],
             "tokens": self.generated / max(1, len(self.actors)) if role == "actor" else None}
            for place, (role, name, v) in enumerate(found)
        ]  # fmt: skip

    def status(self, phase="running"):
        peers = self.peers()
        fleet = {}
        for role in ("actor", "learner", "replica"):
            own = [p for p in peers if p["role"] == role]
            fleet[role] = {
                "count": len(own), "oldest_version": 0, "newest_version": self.step,
                "silent": sum(p["silent_s"] > 3 for p in own), "silent_names": [],
            }  # fmt: skip
        return {
            "time": 1.8e9 + self.seconds(), "started_at": 1.8e9, "run_id": self.run_id, "phase": phase,
            "waiting_for": "" if self.step else "rollouts: 3 of 32 groups complete, 61 in flight",
            "step": self.step, "steps": self.steps, "version": self.step, "evaluations": self.evaluations,
            "reward": 0.25 + 0.7 * (1 - math.exp(-self.step / 80)) if self.step else None, "lag_mean": 1.4,
            "lag_max": self.budget, "staleness_budget": self.budget, "acceptance": 0.98, "tokens_per_s": 17_000.0,
            "queue_groups": 32 + self.step % 9, "queue_bytes": 92_000_000 + 1_000_000 * (self.step % 7),
            "queue_limit_bytes": 268_435_456, "in_flight_groups": 61, "trajectories_trained": 256 * self.step,
            "trajectories_dropped": {"stale": self.step // 20, "invalid": self.step // 50},
            "states": self.states(), "parked": self.parked(), "fleet": fleet, "peers": peers[:64],
            "alerts": self.alerts, "actors": {self.actors[0]: {"servers": 2.0, "servers_serving": 1.0}},
        }  # fmt: skip

    def write_status(self, phase="running"):
        path = self.directory / "status.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.status(phase)))
        temporary.replace(path)
