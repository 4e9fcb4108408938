"""Artificial slowness: how long to sleep after a piece of work.

Either it takes ``slowdown`` times as long, or ``pace_s`` seconds at least, whatever it costs: as a larger model would.

Sleeping a multiple of what the work has just taken would multiply the noise of the machine too. So a pause is a
multiple of the least that work of about the same size has ever taken here. Where two runs are to be compared to a
few hundredths, even that is too much noise; a pace has none as long as the work takes less.
"""


def pause_s(slowdown: float, pace_s: float, took_s: float, base_s: float) -> float:
    """Seconds to sleep after work that took ``took_s``; ``base_s`` is what it is ``slowdown`` times as long as."""
    return max((slowdown - 1) * base_s, pace_s - took_s, 0.0)


class Slowness:
    """What to sleep after each piece of work; nothing at a ``slowdown`` of 1 and a ``pace_s`` of 0."""

    def __init__(self, slowdown: float, pace_s: float = 0.0) -> None:
        self.slowdown, self.pace_s = slowdown, pace_s
        self._least: dict[int, float] = {}  # seconds, by the size's power of two

    def pause_s(self, size: int, took_s: float) -> float:
        """Seconds to sleep after work on ``size`` rows or tokens that took ``took_s``."""
        key = size.bit_length()
        least = self._least[key] = min(took_s, self._least.get(key, took_s))
        return pause_s(self.slowdown, self.pace_s, took_s, least)
