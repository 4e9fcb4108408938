"""How peers behave: offences counted by name and kind, and quarantine for those who go on."""

from collections import OrderedDict, deque
from dataclasses import dataclass, field

MAX_NAMES = 10_000  # of which anything is remembered; a peer chooses its own name
MAX_KINDS = 32  # counted apart for one name
OTHER = "other"  # every kind beyond them


@dataclass
class _Record:
    counts: dict[str, int] = field(default_factory=dict)
    recent: deque[float] = field(default_factory=deque)  # when, oldest first; at most limit + 1
    quarantined_until: float = 0.0


class Conduct:
    """Offences of each peer: more than ``limit`` within ``window_s`` quarantine it for ``quarantine_s``.

    Time is what the caller says it is; it must not run backwards. An offence in quarantine is counted
    and changes nothing else, and what came before it is forgiven when it ends. Of the names heard of
    longest ago, those beyond MAX_NAMES are forgotten.
    """

    def __init__(self, limit: int = 20, window_s: float = 60.0, quarantine_s: float = 60.0) -> None:
        self.limit = limit
        self.window_s = window_s
        self.quarantine_s = quarantine_s
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def offence(self, name: str, kind: str, now: float) -> bool:
        """Note an offence; True if it has just put ``name`` into quarantine."""
        record = self._records.setdefault(name, _Record())
        self._records.move_to_end(name)
        while len(self._records) > MAX_NAMES:
            self._records.popitem(last=False)
        if kind not in record.counts and len(record.counts) >= MAX_KINDS:
            kind = OTHER
        record.counts[kind] = record.counts.get(kind, 0) + 1
        if now < record.quarantined_until:
            return False
        record.recent.append(now)
        while record.recent[0] <= now - self.window_s:
            record.recent.popleft()
        if len(record.recent) <= self.limit:
            return False
        record.recent.clear()
        record.quarantined_until = now + self.quarantine_s
        return True

    def is_quarantined(self, name: str, now: float) -> bool:
        """Whether ``name`` should not be listened to."""
        record = self._records.get(name)
        return record is not None and now < record.quarantined_until

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Offences by name and kind, quarantined or not."""
        return {name: dict(record.counts) for name, record in self._records.items()}
