"""The policy replica: one batch at a time; messages and weights in between."""

from tools.simulate.broker import Broker, Step
from tools.simulate.lengths import Spread
from tools.simulate.receiver import Receiver
from tools.simulate.world import World


class Replica:
    """One replica."""

    def __init__(self, world: World, broker: Broker, number: int) -> None:
        self._world, self._broker = world, broker
        self._part = world.setup.replica
        self._spread = Spread(self._part.spread, world.setup.run.seed + 1000 + number)
        self._requests: list[Step] = []
        self._busy = False
        self.receiver = Receiver(world, self._wake, lambda: not self._busy)
        self._meter = world.meter("replica", "idle.requests")

    def asked(self, step: Step) -> None:
        """A score request has come."""
        self._requests.append(step)
        self._wake()

    def _wake(self) -> None:
        if not self._busy:
            self._turn()

    def _turn(self) -> None:
        self._busy = True
        self.receiver.between()
        cores, part = self._world.cores, self._part
        if self.receiver.staged:
            self._meter.to("swap")
            cores.start(part.swap_s, self._swapped, threads=part.threads)
        elif self._requests:
            step = self._requests.pop(0)
            self._meter.to("score")
            cost = (part.score_s + step.tokens * part.score_token_s) * self._spread.take()
            cores.start(cost, self._scored, step, threads=part.threads)
        else:
            self._busy = False
            self._meter.to("idle.requests")

    def _swapped(self) -> None:
        self.receiver.staged.pop(0).applied()
        self._turn()

    def _scored(self, step: Step) -> None:
        part = self._world.setup.broker
        self._broker.post(part.message_s + part.decide_s, self._broker.on_scores, step)
        self._turn()
