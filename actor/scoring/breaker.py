"""When a reward model that keeps failing is left alone, and when it is tried again. Pure."""


class Breaker:
    """Up until ``down_after`` failures in a row; then one try every ``probe_s`` until one succeeds."""

    def __init__(self, down_after: int, probe_s: float) -> None:
        self._down_after, self._probe_s = down_after, probe_s
        self._failures = 0  # in a row
        self._probe_at = 0.0
        self.is_down = False

    def admits(self, now: float) -> bool:
        """Whether to ask at ``now`` (seconds of any steady clock); of one that is down, once every ``probe_s``."""
        if not self.is_down:
            return True
        if now < self._probe_at:
            return False
        self._probe_at = now + self._probe_s
        return True

    def wait_s(self, now: float) -> float:
        """Seconds until :meth:`admits` would say yes."""
        return max(0.0, self._probe_at - now) if self.is_down else 0.0

    def failed(self, now: float) -> bool:
        """One more failure; returns whether it goes down with it."""
        self._failures += 1
        if self.is_down or self._failures < self._down_after:
            return False
        self.is_down, self._probe_at = True, now + self._probe_s
        return True

    def succeeded(self) -> bool:
        """An answer; returns whether it comes up with it."""
        was_down, self.is_down, self._failures = self.is_down, False, 0
        return was_down
