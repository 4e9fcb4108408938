"""A state machine drives the staleness ledger through grants, losses, late groups and other budgets in any order."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from broker.ledger import StalenessLedger
from common.versions import lag

STEPS = 12


class LedgerMachine(RuleBasedStateMachine):
    """The fleet is adversarial: any group may finish or die at any time."""

    @initialize(budget=st.integers(0, 5), size=st.integers(1, 4))
    def start(self, budget, size):
        self.ledger = StalenessLedger(budget, size, STEPS)
        self.budget, self.size = budget, size
        self.budgets = {}  # group -> in force at its grant
        self.version = 0  # newest published
        self.assembled_not_trained = []
        self.next_group = 0
        self.in_flight, self.done = {}, {}  # group -> oldest version

    @rule(share=st.floats(0, 1), pick=st.randoms(use_true_random=False))
    def grant(self, share, pick):
        room = self.ledger.grantable(self.version)
        for _ in range(round(room * share)):
            self.ledger.grant(self.next_group, self.version)
            self.in_flight[self.next_group] = self.version
            self.budgets[self.next_group] = self.budget
            self.next_group += 1
        assert self.ledger.grantable(self.version) == room - round(room * share)

    @rule(budget=st.integers(0, 5))
    def move(self, budget):
        self.budget = budget
        self.ledger.set_budget(budget)
        if self.ledger.grantable(self.version):  # a lower one waits until no more is outstanding than it would allow
            outstanding = len(self.in_flight) + len(self.done)
            assert outstanding < (self.version + budget - self.ledger.next_step + 1) * self.size

    @rule()
    def restart(self):
        state = self.ledger.state()
        self.ledger = StalenessLedger(0, self.size, STEPS)
        self.ledger.restore(state)
        assert self.ledger.state() == state and self.ledger.budget == self.budget

    @precondition(lambda self: self.in_flight)
    @rule(pick=st.randoms(use_true_random=False), newer=st.booleans())
    def finish(self, pick, newer):
        group = pick.choice(sorted(self.in_flight))
        oldest = self.in_flight.pop(group)
        if newer:  # it started later than it was allowed to
            oldest = self.version
        self.ledger.complete(group, oldest)
        self.done[group] = oldest

    @precondition(lambda self: self.in_flight)
    @rule(pick=st.randoms(use_true_random=False))
    def lose(self, pick):
        group = pick.choice(sorted(self.in_flight))
        del self.in_flight[group]
        self.ledger.release(group)

    @rule()
    def assemble(self):
        step = self.ledger.next_step
        chosen = self.ledger.select()
        if chosen is None:
            return
        assert len(set(chosen)) == self.size
        for group in chosen:
            assert lag(step, min(step, self.done[group])) <= self.budgets[group]
            assert step - self.done.pop(group) <= self.budgets[group]
        self.ledger.assembled(chosen)
        self.assembled_not_trained.append(step)

    @precondition(lambda self: self.assembled_not_trained)
    @rule()
    def train_and_publish(self):
        self.version = self.assembled_not_trained.pop(0) + 1

    @invariant()
    def no_phantom_reservation(self):
        if not hasattr(self, "ledger"):
            return
        assert self.ledger.promised == len(self.in_flight)
        assert self.ledger.queued == len(self.done)
        fresh = StalenessLedger(0, self.size, STEPS)  # one that has nothing chosen from before
        fresh.restore(self.ledger.state())
        assert self.ledger.select() == fresh.select()

    @invariant()
    def schedule_is_feasible(self):
        if not hasattr(self, "ledger"):
            return
        deadlines = Counter(v + self.budgets[g] for g, v in (*self.in_flight.items(), *self.done.items()))
        total = 0
        for deadline in sorted(deadlines):
            total += deadlines[deadline]
            assert total <= (deadline - self.ledger.next_step + 1) * self.size

    def teardown(self):
        """From any state the run can be brought to its end: nothing is ever stuck."""
        if not hasattr(self, "ledger"):
            return
        for _ in range(STEPS + 1):
            for group, oldest in list(self.in_flight.items()):
                self.ledger.complete(group, oldest)
                self.done[group] = self.in_flight.pop(group)
            while self.ledger.next_step < STEPS and self.ledger.select() is not None:
                self.assemble()
            while self.assembled_not_trained:
                self.train_and_publish()
            self.grant(1.0, None)
        assert self.ledger.next_step == STEPS


LedgerMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestLedger = LedgerMachine.TestCase
