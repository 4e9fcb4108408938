"""Shares of time: of roles and of single peers, over the last seconds or since their start."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from common.trace import IDLE, STATES

WINDOW_S = 10.0  # heartbeats come once a second
LEAST_S = 2.0  # a shorter difference would be mostly rounding
SHARD = "idle.shard"

Seconds = Mapping[str, float]  # state -> since the start


@dataclass(frozen=True)
class Share:
    """One state's part of the time of a role or peer."""

    state: str
    share: float  # of 1

    @property
    def idle(self) -> bool:
        """Whether it is waiting."""
        return self.state.startswith(IDLE)


def words(role: str, state: str) -> str:
    """What the state is, for people."""
    base, _, cause = state.partition(":")
    known = STATES.get(role, {}).get(base, base)
    return f"waits for a shard, which waits for {cause}" if cause else known


def split_shard(seconds: Seconds, parked: Seconds) -> dict[str, float]:
    """A learner's wait for its shard, split by what the broker lacked meanwhile."""
    whole, known = seconds.get(SHARD, 0.0), sum(parked.values())
    if not whole or known <= 0:
        return dict(seconds)
    split = {state: value for state, value in seconds.items() if state != SHARD}
    split |= {f"{SHARD}:{cause}": whole * value / known for cause, value in parked.items() if value > 0}
    return split


def difference(now: Seconds, before: Seconds) -> dict[str, float]:
    """What came since; a sum that fell began anew."""
    return {state: value - before.get(state, 0.0) if value >= before.get(state, 0.0) else value
            for state, value in now.items()}  # fmt: skip


def shares_of(seconds: Seconds) -> list[Share]:
    """Largest first within work and within waiting; work comes first. Empty where no time passed."""
    total = sum(seconds.values())
    if total <= 0:
        return []
    found = [Share(state, value / total) for state, value in seconds.items() if value > 0]
    return sorted(found, key=lambda share: (share.idle, -share.share))


class Window:
    """The last seconds of many cumulative clocks, by name."""

    def __init__(self, seconds: float = WINDOW_S) -> None:
        self.seconds = seconds
        self._samples: deque[tuple[float, Mapping[str, Seconds]]] = deque()

    def add(self, at: float, clocks: Mapping[str, Seconds]) -> None:
        """``clocks`` at ``at`` seconds; a time that ran backwards begins anew."""
        if self._samples and at < self._samples[-1][0]:
            self._samples.clear()
        if self._samples and at == self._samples[-1][0]:
            self._samples[-1] = (at, clocks)
            return
        self._samples.append((at, clocks))
        while len(self._samples) > 2 and at - self._samples[1][0] >= self.seconds:
            self._samples.popleft()

    def clear(self) -> None:
        """Another run."""
        self._samples.clear()

    @property
    def span(self) -> float:
        """Seconds between the oldest and the newest."""
        return self._samples[-1][0] - self._samples[0][0] if self._samples else 0.0

    @property
    def settled(self) -> bool:
        """Whether differences mean something yet."""
        return self.span >= LEAST_S

    def of(self, name: str) -> dict[str, float]:
        """What clock ``name`` gained over the window; since its start while there is no window."""
        if not self._samples:
            return {}
        newest, oldest = self._samples[-1][1].get(name, {}), self._samples[0][1].get(name, {})
        return difference(newest, oldest) if self.settled else dict(newest)

    def rate(self, name: str, key: str) -> float | None:
        """What ``key`` of clock ``name`` gained a second."""
        if not self.settled:
            return None
        newest, oldest = self._samples[-1][1].get(name, {}), self._samples[0][1].get(name, {})
        if key not in newest or key not in oldest or newest[key] < oldest[key]:
            return None
        return (newest[key] - oldest[key]) / self.span
