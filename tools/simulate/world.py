"""What all parts of a simulation share: time, the setup, messages' ways, and who did what for how long."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tools.simulate.clock import Clock, Processors
from tools.simulate.lengths import Lengths
from tools.simulate.settings import Setup


class Meter:
    """Seconds by state of one process, added to those of its role."""

    __slots__ = ("_clock", "_since", "_totals", "state")

    def __init__(self, clock: Clock, totals: Counter[str], state: str) -> None:
        self._clock, self._totals, self.state = clock, totals, state
        self._since = clock.now

    def to(self, state: str) -> None:
        """From now on it does ``state``."""
        now = self._clock.now
        self._totals[self.state] += now - self._since  # type: ignore[assignment]  # a Counter of seconds
        self.state, self._since = state, now


@dataclass
class Group:
    """A granted group; or with ``evaluation`` a held-out question."""

    number: int
    actor: int
    missing: int  # siblings that have not ended
    evaluation: bool = False
    versions: Counter[int] = field(default_factory=Counter)  # tokens by the version that sampled them

    @property
    def tokens(self) -> int:
        """Sampled."""
        return self.versions.total()


class World:
    """One simulation's surroundings."""

    def __init__(self, setup: Setup) -> None:
        machine = setup.machine
        self.setup = setup
        self.clock = Clock(machine.cores - machine.background, machine.crowded)
        self.cores: Processors = self.clock.shared if machine.shared else self.clock
        self.lengths = Lengths(setup.length, setup.rollout.max_tokens, setup.run.seed)
        self.seconds: dict[str, Counter[str]] = {}  # role -> state -> seconds of all its processes
        self.meters: list[Meter] = []

    def meter(self, role: str, state: str) -> Meter:
        """A process of ``role`` begins in ``state``."""
        meter = Meter(self.clock, self.seconds.setdefault(role, Counter()), state)
        self.meters.append(meter)
        return meter

    def totals(self) -> dict[str, Counter[str]]:
        """Seconds by role and state up to now."""
        for meter in self.meters:
            meter.to(meter.state)
        return {role: Counter(seconds) for role, seconds in self.seconds.items()}

    def send(self, action: Callable[..., None], *arguments: object) -> None:
        """A message that leaves now arrives ``broker.link_s`` later."""
        self.clock.after(self.setup.broker.link_s, action, *arguments)
