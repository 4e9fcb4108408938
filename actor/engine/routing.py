"""Which server a rollout goes to: its own, whose cache has its prefix, unless that one is full. Pure.

Every turn of a rollout and every sibling of its group carry one key. A key's home is the target of
highest hash (rendezvous hashing), or the next one where that already carries more than its share
(bounded load, 1608.01350); so a target that comes or goes moves only the keys that it has to.
"""

import hashlib
import logging
import math
from collections import OrderedDict
from collections.abc import Mapping

BALANCE = 1.25  # a target carries at most so many times the mean
REMEMBERED = 1 << 16  # keys whose homes are known; the others fall back on their hash

log = logging.getLogger("actor.routing")


def weight(key: int, target: str) -> int:
    """How much ``key`` wants to be at ``target``: the same in every process."""
    return int.from_bytes(hashlib.blake2b(f"{key}@{target}".encode(), digest_size=8).digest(), "big")


class Router:
    """Homes of keys among targets (a server, or one data-parallel rank of it)."""

    def __init__(self, balance: float = BALANCE) -> None:
        self._balance = balance
        self._homes: OrderedDict[int, str] = OrderedDict()
        self.moved = 0  # keys that left a home because it was lost
        self.displaced = 0  # keys whose first choice was full when they came

    def place(self, key: int, loads: Mapping[str, int]) -> str:
        """The target of ``key``, given what each carries; ``loads`` must not be empty.

        A key stays where it was placed for as long as that target is there.
        """
        home = self._homes.get(key)
        if home is not None and home in loads:
            return home
        if home is not None:
            log.info("rollouts of key %d move: %s is gone", key, home)
            self.moved += 1
        ranked = sorted(loads, key=lambda target: weight(key, target), reverse=True)
        bound = math.ceil(self._balance * (sum(loads.values()) + 1) / len(loads))
        chosen = next((target for target in ranked if loads[target] < bound), ranked[0])
        self.displaced += chosen != ranked[0]
        self._homes[key] = chosen
        if len(self._homes) > REMEMBERED:
            self._homes.popitem(last=False)
        return chosen

    def move(self, key: int, target: str) -> None:
        """``key`` lives at ``target`` from now on."""
        log.debug("rollouts of key %d move to %s, which idles", key, target)
        self._homes[key] = target
        self.moved += 1
