"""Can what an actor says of its sampling be true?

For tokens really drawn from q, the mean of ``p/q`` is the mass that p has where q has any: 1 up to
noise, whatever p is. An actor that reports another q (raw logits, a wrong temperature, made-up
numbers) shows a mean that is not 1. Every scored batch is a test, on a random sample of its
trajectories; no old weights are needed. Where trajectories are chosen by their outcome
(`advantage.zero_signal=mask` or `resample`, `advantage.overlong_filter`) the mean moves as the odds of
that outcome have moved from q to p, in batches of which nothing was taken out too; there only grosser
lies are told from it.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.batch import Batch
from broker.decision import Scores, trainable_scores

SIGMA = 6.0  # beyond the noise of the mean
LEAST, LEAST_CHOSEN = 0.05, 0.2  # ... and at least this far from 1; the second where outcomes choose
FEWEST = 2000  # tokens before an actor is judged
LARGEST_RATIO = 20.0  # p/q is cut here: one wild token must not hide or make a case
WILDEST = np.log(1e12)  # of p/q, of what is cut off
ACCOUNTS = 4096  # kept; those that were heard of last
REMEMBERED = 10 * FEWEST  # tokens of an account, beyond which
FORGET = 0.9  # is what a batch leaves of its past: however small an actor's share of a batch is, it will be judged


@dataclass
class Account:
    """Discounted sums over an actor's checked tokens, of ``min(p/q, LARGEST_RATIO)``."""

    tokens: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    cut: float = 0.0  # what was cut off
    answers: float = 0.0  # that the tokens are of

    @property
    def mean(self) -> float:
        """Mean of p/q."""
        return self.total / self.tokens if self.tokens else 1.0

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        if not self.tokens:
            return 0.0
        return float(np.sqrt(max(self.squares / self.tokens - self.mean**2, 0.0) / self.tokens))

    def is_suspect(self, chosen: bool) -> bool:
        """The claimed q cannot be true: too large although cut, or too small with all that was cut off.

        ``chosen``: an honest answer's ratio, too, moves as the odds of its outcome have, perhaps twofold; its tokens
        share in that.
        """
        if self.tokens < FEWEST:
            return False
        above = LEAST_CHOSEN + self.answers / self.tokens if chosen else LEAST
        below = above / (1.0 + above) if chosen else LEAST  # as far from 1, as a factor
        noise = SIGMA * self.error
        return self.mean - 1.0 > max(above, noise) or 1.0 - self.mean - self.cut / self.tokens > max(below, noise)


class Honesty:
    """One account an actor."""

    def __init__(self, rate: float, seed: int, chosen: bool = False) -> None:
        """``rate``: share of the trajectories that are checked; ``chosen``: outcomes decide which are trained."""
        self.rate, self._seed = rate, seed
        self._chosen = chosen
        self.accounts: dict[str, Account] = {}
        self._known: set[str] = set()

    def check(self, batch: Batch, scored: Scores) -> list[str]:
        """Add a scored batch; returns a sentence for each actor that has just become suspect."""
        if self.rate <= 0:
            return []
        log_p, log_q, _ = trainable_scores(batch, scored)
        ratio = np.exp(np.minimum(log_p.astype(np.float64) - log_q, WILDEST))
        owner = batch.owner[batch.on]
        sampled = np.random.default_rng((self._seed, batch.step)).random(len(batch.groups)) < self.rate
        said = []
        for actor in sorted(set(batch.actors)):
            mine = np.array([a == actor for a in batch.actors], np.bool_) & sampled
            of_mine = mine[owner]
            said += self._add(actor, ratio[of_mine], len(np.unique(owner[of_mine])))
        return said

    def _add(self, actor: str, ratio: NDArray[np.float64], answers: int) -> list[str]:
        account = self.accounts.pop(actor, Account())
        self.accounts[actor] = account  # the last
        if len(self.accounts) > ACCOUNTS:
            oldest = next(iter(self.accounts))
            del self.accounts[oldest]
            self._known.discard(oldest)
        cut = np.minimum(ratio, LARGEST_RATIO)
        kept = FORGET if account.tokens > REMEMBERED else 1.0
        account.tokens = kept * account.tokens + len(ratio)
        account.total = kept * account.total + float(cut.sum())
        account.squares = kept * account.squares + float(np.square(cut).sum())
        account.cut = kept * account.cut + float((ratio - cut).sum())
        account.answers = kept * account.answers + answers
        if not account.is_suspect(self._chosen):
            self._known.discard(actor)
            return []
        if actor in self._known:
            return []
        self._known.add(actor)
        return [
            f"{actor} claims probabilities that cannot be those it sampled with: the mean of p/q over "
            f"{account.tokens:.0f} tokens is {account.mean:.3f} ± {account.error:.3f}, it must be 1; "
            "check its temperature, top-p and which logprobs its engine returns"
        ]

    def state(self) -> list[list[Any]]:
        """What :meth:`restore` needs."""
        return [[name, *astuple(account)] for name, account in self.accounts.items()]

    def restore(self, state: Sequence[Sequence[Any]]) -> None:
        """Take up where :meth:`state` was written."""
        self.accounts = {str(name): Account(*sums) for name, *sums in state}
        self._known = {name for name, account in self.accounts.items() if account.is_suspect(self._chosen)}

    @property
    def suspects(self) -> dict[str, float]:
        """Actors whose claims cannot be true, with their mean of p/q."""
        return {name: round(a.mean, 4) for name, a in self.accounts.items() if a.is_suspect(self._chosen)}
