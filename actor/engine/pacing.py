"""How many requests a server is sent at once, found from its own load instead of set by hand. Pure.

Additive increase while everything we send is running, multiplicative decrease as soon as the
server makes requests wait, takes running ones back or is out of key-value memory (AIMD; until the
first decrease the limit doubles instead).
"""

from dataclasses import dataclass

FULL = 0.97  # share of the key-value memory above which requests will be taken back
WAITING = 0.15  # requests that wait, as a share of those that run, from which more would only wait too
DECREASE = 0.8
LEAST = 4
FIRST = 16
STEP = 0.05  # of the limit, at least one, for each look at the load


@dataclass(frozen=True)
class Load:
    """A server's own account of itself."""

    running: int
    waiting: int
    usage: float  # of the key-value memory, 0 to 1
    retracted: int  # requests taken back and not running again


class Pace:
    """The limit of one server; ``fixed`` above 0 switches the controller off."""

    def __init__(self, fixed: int = 0, most: int = 1 << 20) -> None:
        self._fixed, self._most = fixed, most
        self._limit = float(min(FIRST, most))
        self._doubling = True

    @property
    def limit(self) -> int:
        """Requests that may be under way."""
        return self._fixed or int(self._limit)

    def observe(self, load: Load, in_flight: int) -> None:
        """One look at the load while ``in_flight`` requests of ours were under way."""
        tolerated = max(2.0, WAITING * load.running)
        if load.waiting > tolerated or load.usage > FULL or load.retracted:
            self._doubling = False
            self._limit = max(float(LEAST), DECREASE * self._limit)
        elif in_flight >= 0.9 * int(self._limit):
            step = self._limit if self._doubling else max(1.0, STEP * self._limit)
            self._limit = min(float(self._most), self._limit + step)
