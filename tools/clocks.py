"""One clock for a run: what a process's own clock says, in the broker's nanoseconds.

::

    exchanges (at, offset, delay) -> those that nothing close by is surer than -> lines between them

An exchange knows the offset to within half its delay. Clocks of two machines drift apart, so in a long
run the surest exchange of all is not the surest everywhere.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

DRIFT = 1e-4  # of two quartz clocks, at the worst; RFC 5905 allows 15e-6 to each that is disciplined


@dataclass(frozen=True)
class Exchange:
    """At ``at`` of its own clock a process knew the broker's to be that + ``offset``, ± ``delay`` / 2; nanoseconds."""

    at: int
    offset: int
    delay: int


class ClockMap:
    """The broker's clock out of a process's own. Without exchanges the two are taken for the same."""

    def __init__(self, exchanges: Sequence[Exchange] = ()) -> None:
        self.best = min(exchanges, key=lambda e: e.delay, default=None)  # the surest of all
        self._knots = _surest(sorted(exchanges, key=lambda e: e.at))
        self._at = [knot.at for knot in self._knots]

    @property
    def bends(self) -> bool:
        """Whether more than one exchange is believed."""
        return len(self._knots) > 1

    def __call__(self, own: int) -> int:
        """The moment ``own`` on the broker's clock."""
        index = bisect_right(self._at, own)
        if not self._knots:
            return own
        if index in (0, len(self._at)):
            return own + self._knots[min(index, len(self._at) - 1)].offset
        a, b = self._knots[index - 1], self._knots[index]
        return own + a.offset + (b.offset - a.offset) * (own - a.at) // (b.at - a.at)


def _surest(exchanges: Sequence[Exchange]) -> list[Exchange]:
    """Those that no other, for all that clocks may drift between the two, is surer than; one a moment."""
    ahead, bounds = float("inf"), [0.0] * len(exchanges)
    for index in reversed(range(len(exchanges))):
        later = exchanges[index + 1] if index + 1 < len(exchanges) else None
        ahead = ahead + DRIFT * (later.at - exchanges[index].at) if later is not None else ahead
        bounds[index] = ahead
        ahead = min(ahead, exchanges[index].delay / 2)
    found: list[Exchange] = []
    behind = float("inf")
    for index, exchange in enumerate(exchanges):
        if index:
            behind += DRIFT * (exchange.at - exchanges[index - 1].at)
        sure = exchange.delay / 2
        if sure < behind and sure <= bounds[index] and not (found and found[-1].at == exchange.at):
            found.append(exchange)
        behind = min(behind, sure)
    return found or list(exchanges[:1])
