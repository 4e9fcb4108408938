"""Arrows through a drawn run: each followed trajectory from its grant to the optimizer step that trained on it.

::

    group (broker) -> rollout (actor) -> queued (broker) -> is scored -> score (replica) -> is thinned -> update

Perfetto points every arrow from the slice that begins first to the other, so this is the order of their beginnings.
"""

from collections.abc import Iterator

from tools.perfetto import Drawing, Drawn, Place

UPDATES = ("optimizer", "reduce", "backward", "forward", "load")  # the first that was long enough to be drawn


def draw_flows(drawing: Drawing, drawn: Drawn) -> int:
    """An arrow for every followed trajectory that has got somewhere; returns how many."""
    count = 0
    for (group, sibling), rollout in sorted(drawn.rollouts.items()):
        hops = list(_in_order(_places(drawn, group, rollout)))
        if len(hops) < 2:
            continue
        number, count = drawing.flow(), count + 1
        name = f"trajectory {group}.{sibling}"
        for index, (place, at) in enumerate(hops):
            phase = "s" if index == 0 else "f" if index == len(hops) - 1 else "t"
            drawing.arrow(phase, number, place, at, name, "trajectory")
    return count


def _places(drawn: Drawn, group: int, rollout: Place) -> Iterator[tuple[Place, int]]:
    """Where the trajectory was, and at which moment to pass through."""
    if group in drawn.groups:
        yield drawn.groups[group], min(drawn.groups[group].start, rollout.start) + 1
    yield rollout, rollout.end - 1
    if group not in drawn.queued:
        return
    queued, step = drawn.queued[group]
    yield queued, _middle(queued)
    scored = drawn.stages.get((step, "is scored"))
    if scored is not None:
        yield scored, scored.start + 1
        replica = _most_within(drawn.scores, scored)
        if replica is not None:
            yield replica, _middle(replica)
    thinned = drawn.stages.get((step, "is thinned"))
    if thinned is not None:
        yield thinned, _middle(thinned)
    update = drawn.updates.get(step, {})
    for state in UPDATES:
        if state in update:
            yield update[state], _middle(update[state])
            return


def _middle(place: Place) -> int:
    return (place.start + place.end) // 2


def _most_within(places: list[Place], other: Place) -> Place | None:
    """The one that shares the most time with ``other``."""
    shared = [(min(p.end, other.end) - max(p.start, other.start), p) for p in places]
    best = max(shared, key=lambda found: found[0], default=None)
    return best[1] if best is not None and best[0] > 0 else None


def _in_order(hops: Iterator[tuple[Place, int]]) -> Iterator[tuple[Place, int]]:
    """Each strictly within its slice and after the one before; what clocks put out of order is passed over."""
    last = -(1 << 62)
    for place, at in hops:
        at = max(min(at, place.end - 1), place.start + 1, last + 1)
        if at < place.end:
            yield place, at
            last = at
