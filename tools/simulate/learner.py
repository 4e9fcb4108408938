"""The learner: fetch, train, commit, publish, checkpoint, one after the other as :mod:`learner.train` does."""

from collections.abc import Callable

from common.slowness import pause_s
from tools.simulate.broker import Broker, Step
from tools.simulate.lengths import Spread
from tools.simulate.publish import Publish
from tools.simulate.world import World


class Learner:
    """``trained(step)`` is called at each commit, ``finished()`` when the last version is out."""

    def __init__(self, world: World, broker: Broker, trained: Callable[[Step], None]) -> None:
        self._world, self._broker, self._trained = world, broker, trained
        self._part = world.setup.learner
        self._spread = Spread(self._part.spread, world.setup.run.seed + 999)
        self._step = 0  # the next to train
        self._began = 0.0
        self.finished = False
        self._meter = world.meter("learner", "idle.shard")

    def begin(self) -> None:
        """Ask for the next shard, if one is left."""
        if self._step >= self._world.setup.run.steps:
            self.finished = True
            self._meter.to("idle.end")
            return
        self._meter.to("idle.shard")
        self._broker.post(self._world.setup.broker.message_s, self._broker.on_fetch, self._step)

    def served(self, step: Step) -> None:
        """The shard is here."""
        part, cores = self._part, self._world.cores
        cost = (part.step_s + step.tokens * part.token_s) * self._spread.take()
        self._meter.to("train")
        self._began = self._world.clock.now
        if not cores.contended:
            cost *= part.slowdown
        cores.start(cost, self._slow_down, step, threads=part.threads)

    def _slow_down(self, step: Step) -> None:
        clock, part = self._world.clock, self._part
        took = clock.now - self._began
        slowdown = part.slowdown if self._world.cores.contended else 1.0  # a sleep takes no processor
        pause = pause_s(slowdown, part.pace_s, took, took)
        if pause:
            clock.after(pause, self._commit, step)
        else:
            self._commit(step)

    def _commit(self, step: Step) -> None:
        self._step += 1
        self._trained(step)
        self._broker.post(self._world.setup.broker.commit_s, self._broker.on_commit, step)
        self._meter.to("gather")
        self._world.cores.start(self._world.setup.weights.gather_s, self._offer)

    def _offer(self) -> None:
        self._meter.to("idle.receivers")
        everybody = [actor.receiver for actor in self._broker.actors]
        everybody += [replica.receiver for replica in self._broker.replicas]
        publish = Publish(
            self._world, self._broker, self._step, everybody, self._joined, self._sent, self._broker.settled
        )
        self._broker.post(self._world.setup.broker.message_s, self._broker.on_publish, publish)

    def _joined(self) -> None:
        self._meter.to("send")

    def _sent(self) -> None:
        every, cost = self._part.checkpoint_every, self._part.checkpoint_s
        if cost and (self._step == self._world.setup.run.steps or (every and self._step % every == 0)):
            self._meter.to("checkpoint")
            self._world.cores.start(cost, self.begin)
        else:
            self.begin()
