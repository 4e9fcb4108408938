"""How long a run was at work: time without the pauses between a broker's end and the next one's start. Pure.

A line's ``time_s`` goes on while nobody works. What a broker says it lived, the sum of its seconds by state, begins
anew with each.
"""

from tools.run_files import Record
from tools.watch.sound import mapping, number, numbers

ALIVE_S = 10.0  # by which the broker's seconds may fall behind the clock: a line is written once the disk has its step


def alive_s(record: Record) -> float:
    """Seconds since the broker that wrote ``record`` began; 0 where it does not say."""
    return sum(numbers(mapping(record.get("states")).get("broker")).values())


def is_another_start(before: Record, record: Record) -> bool:
    """Whether the broker began anew between two records that have ``time_s``, if both say how long it was alive."""
    alive, alive_now = alive_s(before), alive_s(record)
    lived = alive_now - alive
    return bool(alive and alive_now) and (lived < 0 or record["time_s"] - before["time_s"] - lived > ALIVE_S)


class Lived:
    """Adds up, record by record."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._before: Record = {}

    def take(self, record: Record) -> float | None:
        """Seconds of work until ``record``, which has ``time_s`` and ``states``; None for one without a time."""
        time_s = number(record.get("time_s"))
        if time_s is None:
            return None
        record = {"time_s": time_s, "states": {"broker": {"": alive_s(record)}}}
        passed = max(0.0, time_s - self._before.get("time_s", 0.0))
        if self._before and is_another_start(self._before, record):
            passed = min(passed, alive_s(record))
        self.seconds += passed
        self._before = record
        return self.seconds
