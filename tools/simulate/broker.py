"""The broker: one thread that handles messages, assembles steps, grants and serves, in this order.

::

    turn: messages -> a version that waits -> assemble (at most one batch is scored) -> grant -> serve -> turn

Decisions are the broker's own: the ledger's, who gets how much (:meth:`broker.rollouts.Rollouts.grant`) and
when a step is due (:meth:`broker.pipeline.Pipeline.assemble`).
"""

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from tools.simulate.engine import Ended
from tools.simulate.ledger import CountingLedger
from tools.simulate.publish import Publish
from tools.simulate.world import Group, World

if TYPE_CHECKING:
    from tools.simulate.actor import Actor
    from tools.simulate.learner import Learner
    from tools.simulate.replica import Replica

Message = tuple[float, Callable[..., None], tuple[object, ...]]


class Step:
    """A step's data: tokens by version, and how many to score and to train."""

    __slots__ = ("number", "sequences", "tokens", "versions")

    def __init__(self, number: int, groups: list[Group], group_size: int, prompt_tokens: int) -> None:
        self.number = number
        self.versions: Counter[int] = Counter()
        for group in groups:
            self.versions.update(group.versions)
        self.sequences = len(groups) * group_size
        self.tokens = self.versions.total() + self.sequences * prompt_tokens


class Broker:
    """Everything is posted to it."""

    def __init__(self, world: World) -> None:
        setup = world.setup
        self.world = world
        self.ledger = CountingLedger(setup.staleness.budget, setup.rollout.groups_per_step, setup.run.steps)
        self.published = 0
        self.publishing: Publish | None = None
        self.actors: list[Actor] = []
        self.replicas: list[Replica] = []
        self.learner: Learner
        self.decided: dict[int, Step] = {}
        self.committed = -1
        self._scoring: Step | None = None
        self._turns = 0  # of the replicas
        self._queued: Publish | None = None
        self._groups: dict[int, Group] = {}  # granted and not assembled
        self._next_group = 0
        self._with_room: set[int] = set()  # actors
        self._inbox: list[Message] = []
        self._held: list[tuple[Callable[..., None], tuple[object, ...]]] = []  # answers until they are on disk
        self._unwritten = False  # something was journaled that nobody waits for
        self._writing = False  # a group commit is under way
        self._busy = False
        self._wanted = -1  # the step that the learner waits for
        self._evaluator = -1  # the actor that evaluates
        self._missing = 0  # held-out questions that are not answered
        self._covered = -1  # newest version that was evaluated
        self.meter = world.meter("broker", "idle.messages")

    def begin(self) -> None:
        """Everybody is there, with version 0."""
        self._with_room = {actor.number for actor in self.actors}
        self._wake()

    # ---- messages -------------------------------------------------------------------------------

    def post(self, cost: float, action: Callable[..., None], *arguments: object) -> None:
        """A message leaves for the broker; see :class:`tools.simulate.publish.Post`."""
        self.world.send(self._arrived, (cost, action, arguments))

    def _arrived(self, message: Message) -> None:
        self._inbox.append(message)
        self._wake()

    def _wake(self) -> None:
        if not self._busy:
            self._busy = True
            self.meter.to("work")
            self._turn()

    def _turn(self) -> None:
        messages, self._inbox = self._inbox, []
        self.world.cores.start(sum(message[0] for message in messages), self._handle, messages)

    def _handle(self, messages: list[Message]) -> None:
        for _, action, arguments in messages:
            action(*arguments)
        self._look()

    def answer(self, action: Callable[..., None], *arguments: object) -> None:
        """Send what was decided, once that is on disk: with the next group commit."""
        self._held.append((action, arguments))
        self._write()

    def _write(self) -> None:
        if not self._writing and (self._held or self._unwritten):
            self._writing, self._unwritten = True, False
            held, self._held = self._held, []
            self.world.clock.after(self.world.setup.broker.hold_s, self._durable, held)

    def _durable(self, held: list[tuple[Callable[..., None], tuple[object, ...]]]) -> None:
        self._writing = False
        for action, arguments in held:
            self.world.send(action, *arguments)
        self._write()

    # ---- a turn ---------------------------------------------------------------------------------

    def _look(self) -> None:
        if self.publishing is None and self._queued is not None:
            self._start_publish(self._queued)
        if (groups := self._due()) is not None:
            self.world.cores.start(self.world.setup.broker.assemble_s, self._assembled, groups)
        else:
            self._grant_and_serve()

    def _due(self) -> list[int] | None:
        ahead = self.ledger.next_step - self.published
        if self._scoring is not None or ahead > self.world.setup.broker.assemble_ahead:
            return None
        return self.ledger.take()

    def _assembled(self, numbers: list[int]) -> None:
        rollout = self.world.setup.rollout
        groups = [self._groups.pop(number) for number in numbers]
        step = Step(self.ledger.next_step - 1, groups, rollout.group_size, rollout.prompt_tokens)
        if self.replicas:
            self._scoring = step
            replica = self.replicas[self._turns % len(self.replicas)]
            self._turns += 1
            self.answer(replica.asked, step)
        else:
            self.decided[step.number] = step
        self._look()

    def on_scores(self, step: Step) -> None:
        """The replica has answered."""
        self._scoring = None
        self.decided[step.number] = step

    def _grant_and_serve(self) -> None:
        self._grant()
        if self._wanted in self.decided:
            self.world.cores.start(self.world.setup.broker.pack_s, self._serve, self._wanted)
            self._wanted = -1
        else:
            self._end_turn()

    def _serve(self, number: int) -> None:
        self.answer(self.learner.served, self.decided.pop(number))
        self._end_turn()

    def _end_turn(self) -> None:
        if self._inbox:
            self._turn()
        else:
            self._busy = False
            self.meter.to("idle.messages")

    # ---- grants ---------------------------------------------------------------------------------

    def _grant(self) -> None:
        if self._evaluation_due():
            self._ask_evaluation()
        if (self._covered < 0 and self.world.setup.evaluation.prompts) or not self._with_room:
            return  # the starting model is evaluated before it changes
        if not self.ledger.grantable(self.published):
            return
        evaluating = {self._evaluator} if self._evaluator >= 0 else set()
        for some, count in (
            (self._with_room - evaluating if evaluating else self._with_room, len(self.actors) - len(evaluating)),
            (self._with_room & evaluating, len(evaluating)),
        ):
            room = self.ledger.grantable(self.published)
            share = -(-room // max(1, count))
            for number in sorted(some) if room and some else ():
                room -= self._grant_to(self.actors[number], min(share, room))
                if not room:
                    break

    def _grant_to(self, actor: "Actor", share: int) -> int:
        count = min(share, actor.capacity - actor.in_flight)
        groups = []
        for number in range(self._next_group, self._next_group + count):
            self.ledger.grant(number, self.published)
            group = Group(number, actor.number, self.world.setup.rollout.group_size)
            self._groups[number] = group
            groups.append(group)
        self._next_group += count
        actor.in_flight += count
        if actor.in_flight >= actor.capacity:
            self._with_room.discard(actor.number)
        self.answer(actor.granted, groups, [])
        return count

    def on_trajectories(self, ended: list[Ended]) -> None:
        """Completions have come; they are journaled before they are acknowledged."""
        self._unwritten = True
        self._write()
        for one in ended:
            group: Group = one.request.group
            for version, tokens in one.versions:
                group.versions[version] += tokens * one.rows
            group.missing -= one.rows
            if not group.missing:
                actor = self.actors[group.actor]
                actor.in_flight -= 1
                self._with_room.add(group.actor)
                self.ledger.complete(group.number, min(group.versions))

    # ---- evaluations ----------------------------------------------------------------------------

    def _evaluation_due(self) -> bool:
        part, version = self.world.setup.evaluation, self.published
        if part.prompts == 0 or self._evaluator >= 0 or (version <= self._covered and self._covered >= 0):
            return False
        if self._covered < 0:
            return not self._missing
        return version >= self.world.setup.run.steps or version // part.every > self._covered // part.every

    def _ask_evaluation(self) -> None:
        part = self.world.setup.evaluation
        actor = min(self.actors, key=lambda a: (a.in_flight, a.number))
        self._evaluator, self._missing, self._asked = actor.number, part.prompts, self.published
        questions = [Group(-1, actor.number, part.samples, evaluation=True) for _ in range(part.prompts)]
        self.answer(actor.granted, [], questions)

    def evaluated(self) -> None:
        """A held-out question is answered; with the last one the actor says so."""
        self._missing -= 1
        if not self._missing:
            self.post(self.world.setup.broker.message_s, self._on_evaluation)

    def _on_evaluation(self) -> None:
        self._covered, self._evaluator = self._asked, -1

    # ---- the learner ----------------------------------------------------------------------------

    def on_fetch(self, step: int) -> None:
        """The learner wants its shard."""
        self._wanted = step

    def on_commit(self, step: Step) -> None:
        """The learner has trained it."""
        self.committed = step.number

    def on_publish(self, publish: Publish) -> None:
        """The learner offers a version."""
        if self.publishing is None:
            self._start_publish(publish)
        else:
            self._queued = publish

    def _start_publish(self, publish: Publish) -> None:
        self.publishing, self._queued = publish, None
        self._account()
        publish.start()

    def settled(self, publish: Publish) -> None:
        """Everybody uses it."""
        self.published, self.publishing = publish.version, None
        self._account()

    def _account(self) -> None:
        for actor in self.actors:
            for seat in actor.seats:
                if seat.state == "idle":
                    seat.account()
