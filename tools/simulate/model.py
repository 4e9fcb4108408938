"""A whole run in virtual time: :func:`simulate`."""

import gc
from collections import Counter
from collections.abc import Callable

from common.errors import ConfigError
from tools.simulate.actor import Actor
from tools.simulate.broker import Broker, Step
from tools.simulate.learner import Learner
from tools.simulate.outcome import Counts, Outcome, first_step, outcome
from tools.simulate.replica import Replica
from tools.simulate.settings import Setup
from tools.simulate.world import World

LOOK_EVERY = 20_000  # events between two words of progress

Progress = Callable[[int, int], None]  # steps trained, of how many


class Simulation:
    """All parts, put together; :meth:`run` once."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.world = World(setup)
        self.broker = Broker(self.world)
        self.counts = Counts()
        self.broker.actors = [Actor(self.world, self.broker, number) for number in range(setup.actor.count)]
        if setup.obrs.mode != "off":
            self.broker.replicas = [Replica(self.world, self.broker, n) for n in range(setup.replica.count)]
        self.learner = self.broker.learner = Learner(self.world, self.broker, self._trained)

    def run(self, progress: Progress | None = None) -> Outcome:
        """Train every step. Raises :class:`ConfigError` for a run that would wait for ever."""
        self.broker.begin()
        self.learner.begin()
        collecting = gc.isenabled()
        gc.disable()  # millions of small records without a cycle: looking for some takes a third of the time
        try:
            self._run(progress)
        finally:
            if collecting:
                gc.enable()
        cancelled = sum(actor.cancelled for actor in self.broker.actors)
        return outcome(self.setup, self.counts, cancelled, self.world.clock.events)

    def _run(self, progress: Progress | None) -> None:
        clock, steps = self.world.clock, self.setup.run.steps
        while not clock.halted:
            if clock.run(LOOK_EVERY) < LOOK_EVERY and not clock.halted:
                raise ConfigError(
                    f"the run stops after {len(self.counts.commits)} of {steps} steps: nobody has anything to do; "
                    "this is a fault of the simulator, please report the setup"
                )
            if progress is not None:
                progress(len(self.counts.commits), steps)

    def _trained(self, step: Step) -> None:
        counts = self.counts
        counts.commits.append(self.world.clock.now)
        counts.tokens.append(step.versions.total())
        counts.lags.append(Counter({step.number - version: n for version, n in step.versions.items()}))
        counts.generated.append(sum(actor.sent + actor.cancelled for actor in self.broker.actors))
        if step.number in (first_step(self.setup), self.setup.run.steps - 1):
            counts.seconds.append(self.world.totals())
        self.world.clock.halted = len(counts.commits) == self.setup.run.steps


def simulate(setup: Setup, progress: Progress | None = None) -> Outcome:
    """What a run of ``setup`` comes to; the same for the same setup, ``run.seed`` included."""
    return Simulation(setup).run(progress)
