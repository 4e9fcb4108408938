"""An actor: credits in, completions out, weights taken between two steps; one engine of its own or several servers."""

from collections import deque
from typing import TYPE_CHECKING

from tools.simulate.engine import Ended, Engine, Request
from tools.simulate.publish import Publish
from tools.simulate.receiver import Receiver
from tools.simulate.world import Group, World

if TYPE_CHECKING:
    from tools.simulate.broker import Broker

HELD_OUT_SHARE = 4  # as actor.play.HELD_OUT_SHARE


class Actor:
    """One actor; each of its engines reports here through a :class:`Seat`."""

    def __init__(self, world: World, broker: "Broker", number: int) -> None:
        setup = world.setup
        self.world, self.broker, self.number = world, broker, number
        cores = world.clock if setup.actor.servers else world.cores
        self.seats = [Seat(self) for _ in range(max(1, setup.actor.servers))]
        for seat in self.seats:
            seat.engine = Engine(seat, setup.actor, setup.rollout.prompt_tokens, world.clock, cores)
        self.receiver = Receiver(world, self._wake, lambda: all(s.state.startswith("idle") for s in self.seats))
        self.capacity = len(self.seats) * (setup.actor.max_sequences // setup.rollout.started)  # groups
        self.in_flight = 0  # groups that it owes, as the broker knows
        self._mail: list[list[Group]] = []  # grants
        self._held_out: deque[Group] = deque()
        self._evaluating = 0  # held-out rows under way
        self._loading: Publish | None = None
        self._missing = 0  # engines that do not have it yet
        self.sent = 0  # tokens of completions to be trained
        self.held_out = 0  # tokens of evaluations
        self.cancelled = 0  # tokens of siblings that were not needed

    def granted(self, groups: list[Group], held_out: list[Group]) -> None:
        """A grant has come."""
        self._mail.append(groups)
        self._held_out.extend(held_out)
        self._wake()

    def _wake(self) -> None:
        if len(self.seats) > 1 or self.world.setup.actor.servers:
            self.look()  # an actor with servers is never busy for long
        for seat in self.seats:
            seat.engine.wake()

    def look(self) -> None:
        """Messages, weights and new requests, as between two steps."""
        self.receiver.between()
        if self._loading is None and self.receiver.staged:
            self._loading = self.receiver.staged.pop(0)
            self._missing = len(self.seats)
            for seat in self.seats:
                seat.engine.update(self._loading.version, self.world.setup.actor.swap_s)
        if self._mail:
            rollout = self.world.setup.rollout
            mail, self._mail = self._mail, []
            for groups in mail:
                for group in groups:
                    self._ask(group, rollout.started, rollout.group_size)
        if self._held_out:
            self._ask_held_out()

    def _ask(self, group: Group, started: int, wanted: int) -> None:
        seat = self.seats[0] if len(self.seats) == 1 else min(self.seats, key=lambda s: s.engine.in_flight)
        seat.engine.add(Request(group, self.world.lengths.take(started), wanted))

    def _ask_held_out(self) -> None:
        """As Play._ask_held_out: beside training where there is room, or in a share of their own."""
        part = self.world.setup.actor
        room, samples = part.max_sequences * len(self.seats), self.world.setup.evaluation.samples
        while self._held_out:
            own = self._evaluating + samples <= max(samples, room // HELD_OUT_SHARE)
            if not own and sum(seat.engine.in_flight for seat in self.seats) + samples > room:
                return
            self._evaluating += samples
            self._ask(self._held_out.popleft(), samples, samples)

    def updated(self) -> None:
        """An engine has taken the version into use."""
        self._missing -= 1
        if not self._missing and self._loading is not None:
            loaded, self._loading = self._loading, None
            loaded.applied()

    def ended(self, rows: list[Ended]) -> None:
        """Completions are sent; those of held-out questions make room for the next."""
        trained: list[Ended] = []
        for one in rows:
            group: Group = one.request.group
            self.cancelled += one.cancelled * one.tokens
            if group.evaluation:
                self._evaluating -= one.rows
                self.held_out += one.rows * one.tokens
                group.missing -= one.rows
                if not group.missing:
                    self.broker.evaluated()
            else:
                self.sent += one.rows * one.tokens
                trained.append(one)
        if trained:
            part = self.world.setup.broker
            sent = sum(one.rows for one in trained)
            self.broker.post(part.message_s + sent * part.trajectory_s, self.broker.on_trajectories, trained)


class Seat:
    """One engine's place at an actor."""

    def __init__(self, actor: Actor) -> None:
        self.actor = actor
        self.engine: Engine
        self.state = "idle"
        self.meter = actor.world.meter("actor", "idle.credits")

    def between(self) -> None:
        """See :class:`tools.simulate.engine.Owner`."""
        self.actor.look()

    def updated(self, version: int) -> None:
        """The same."""
        self.actor.updated()

    def ended(self, rows: list[Ended]) -> None:
        """The same."""
        self.actor.ended(rows)

    def doing(self, state: str) -> None:
        """The same; an idle one says what for."""
        if state != self.state:
            self.state = state
            self.account()

    def account(self) -> None:
        """Its cause of idleness may have changed."""
        idle = "idle.weights" if self.actor.broker.publishing else "idle.credits"
        self.meter.to(idle if self.state == "idle" else self.state)
