"""Artificial slowness: how long to sleep after a piece of work, so that it takes ``slowdown`` times as long.

Sleeping a multiple of what the work has just taken would multiply the noise of the machine too. So a pause is a
multiple of the least that work of about the same size has ever taken here: ratios of speeds then stay what they
were set to, whoever else is on the machine.
"""


class Slowness:
    """What to sleep after each piece of work; nothing at a ``slowdown`` of 1."""

    def __init__(self, slowdown: float) -> None:
        self.slowdown = slowdown
        self._least: dict[int, float] = {}  # seconds, by the size's power of two

    def pause_s(self, size: int, took_s: float) -> float:
        """Seconds to sleep after work on ``size`` rows or tokens that took ``took_s``."""
        key = size.bit_length()
        least = self._least[key] = min(took_s, self._least.get(key, took_s))
        return (self.slowdown - 1) * least
