"""Which trajectories of a message are awaited at all: asked before anything is written down.

The journal holds what was granted and came for the first time, within the size that was granted. What nobody
awaits costs neither disk nor memory, however often it is sent.
"""

from dataclasses import dataclass, field
from operator import sub

from broker.pipeline import Pipeline
from common.wire import Ack, Trajectories


@dataclass
class Sifted:
    """A message's trajectories apart, by their place in it."""

    awaited: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)  # [B] what is to be said of each; "" also of repeats
    unfit: dict[int, str] = field(default_factory=dict)  # groups that are given up, and why

    def ack(self, message: Trajectories, admitted: Ack | None) -> Ack:
        """The answer to ``message``; ``admitted`` speaks of those that were awaited."""
        for index, reason in zip(self.awaited, admitted.reasons if admitted else (), strict=True):
            self.reasons[index] = reason
        return Ack(self.reasons, message.groups, message.siblings)


def sift(message: Trajectories, actor: str, pipeline: Pipeline) -> Sifted:
    """Look at identities, lengths and widths alone; counts what it turns away in :attr:`Pipeline.turned_away`."""
    misfit, cuts, siblings = pipeline.misfit(message), message.cuts, message.siblings.tolist()
    book, longest, group = pipeline.book, pipeline.max_length, message.sole_group
    fits = not misfit and max(map(sub, cuts[1:], cuts), default=0) <= longest
    if fits and group is not None and book.awaits_all(group, siblings, actor):  # as is usual
        return Sifted(list(range(len(siblings))), [""] * len(siblings))
    found, seen = Sifted(), set[tuple[int, int]]()
    for index, identity in enumerate(zip(message.groups.tolist(), siblings, strict=True)):
        group, sibling = identity
        answer = book.answer(group, sibling, actor)
        if answer is None:
            answer = "" if identity in seen else "refused_sibling" if group in found.unfit else None
        if answer is not None:
            pipeline.turned_away[answer] += 1
            found.reasons.append(answer)
            continue
        seen.add(identity)
        length = cuts[index + 1] - cuts[index]
        reason = f"{length} tokens, more than rollout allows ({longest})" if length > longest else misfit
        if reason:
            found.unfit[group] = reason
        else:
            found.awaited.append(index)
        found.reasons.append(reason)
    return found
