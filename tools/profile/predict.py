"""What a change would do to the rate.

The simulator (tools.simulate) says it where it can be fed from the run. Otherwise bounds do: a step cannot
take less than the busiest resource needs for it, and a change cannot save more than what was waited for on
its account.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Prediction:
    """Of one change."""

    speedup: float  # steps a second, over those of now
    lag_mean: float | None  # versions; None: not predicted
    bound: bool  # at most so much, rather than about
    by: str  # who says so


class Predictor(Protocol):
    """Says what a change would do."""

    def predict(self, changes: Mapping[str, int | str]) -> Prediction | None:
        """``changes``: settings under their names in the YAML; None if it cannot say."""
        ...


@dataclass(frozen=True)
class Bounds:
    """Seconds a step, of one process unless said otherwise; see :meth:`predict`."""

    step_s: float
    learner_s: float  # at work, publishing included
    train_s: float  # of that, what more ranks share
    actors_s: float  # busy, of all actors together
    replica_s: float  # scoring, of all replicas together
    cpu_s: float  # of everything on the fullest machine
    cores: int | None  # of that machine
    full: bool  # whether a machine's cores are used up
    waits: Mapping[str, float]  # the learner's, by cause
    credits_s: float  # an actor's wait for credits
    actors: int
    replicas: int
    ranks: int
    replicates: int  # learner.dp_replicate, a factor of the ranks
    budget: int

    def floor(self, actors: int, replicas: int, ranks: int) -> float:
        """What a step takes at least."""
        learner = self.learner_s - self.train_s * (1 - self.ranks / ranks)
        cpu = self.cpu_s / self.cores if self.cores else 0.0
        replica = self.replica_s / replicas if replicas else 0.0
        return max(learner, self.actors_s / actors, replica, cpu)

    def predict(self, changes: Mapping[str, int | str]) -> Prediction | None:
        """At most so much faster: the step's time less what can be saved, but not below what is needed.

        More actors save their part of the time that the learner waits for sampling. A larger budget saves
        what the learner waits for rollouts while actors could have sampled ahead: the credits they lacked.
        Scores are asked for one batch at a time, so more replicas save nothing here; no rejection saves the
        wait for scores and coins. Where a machine's cores are used up, nothing is saved but work: of these
        only that of the replica.
        """
        actors, replicas, ranks = self.actors, self.replicas, self.ranks
        saved = 0.0
        rollouts = sum(seconds for cause, seconds in self.waits.items() if cause.startswith("rollouts."))
        for key, value in changes.items():
            match key:
                case "actor.count":
                    actors = int(value)
                    saved += self.waits.get("rollouts.sampling", 0.0) * max(0.0, 1 - self.actors / actors)
                case "staleness.budget":
                    if int(value) < self.budget:
                        return None  # what it costs depends on how the waits overlap: no bound says it
                    saved += min(rollouts, self.credits_s)
                case "replica.count":
                    replicas = int(value)
                case "learner.dp_replicate":
                    ranks = self.ranks * int(value) // self.replicates
                    saved += self.train_s * (1 - self.ranks / ranks)
                case "obrs.mode":
                    replicas = 0
                    saved += sum(self.waits.get(c, 0.0) for c in ("scoring", "scoring.weights", "scoring.transport"))
                    saved += self.waits.get("thinning", 0.0)
                case _:
                    return None
        if actors < 1:
            return None
        if self.full:
            if actors < self.actors:
                return None  # fewer decode in larger batches, which may take less of the cores
            working = self.learner_s + self.actors_s + self.replica_s
            share = self.replica_s / working if working and not replicas else 0.0
            return Prediction(1 / (1 - share), None, True, "the bound of the cores")
        floor = self.floor(actors, replicas, ranks)
        fewer = actors < self.actors
        step_s = max(self.step_s, floor) if fewer else max(min(floor, self.step_s), self.step_s - saved)
        return Prediction(self.step_s / step_s, None, True, "the bottleneck's bound")
