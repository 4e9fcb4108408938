"""One recommendation: the change that is predicted to be worth most, within what the data bear. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from common.config import RunConfig
from tools.profile.drift import FURTHEST, Drift
from tools.profile.figures import Staleness
from tools.profile.predict import Prediction, Predictor

WORTH = 1.03  # a change that is predicted to give less is not recommended
COSTLESS = 0.99  # a process less that is predicted to leave as much of the rate is
ALIKE = 0.02  # speed-ups that differ by less are alike: the cheaper change is taken
NOT_KNOWN = "what it does to KL is not known from this run: tools.sweep measures it"
NEGLIGIBLE_KL = 1e-3  # nats a token, before rejection, below which rejection buys nothing


@dataclass(frozen=True)
class Candidate:
    """A change under its YAML names."""

    changes: dict[str, int | str]
    words: str
    cost: int  # 0: a setting; 1: a process more; 2: another learner
    saves: bool = False  # a process, or lag: worth it where it costs no speed

    @property
    def moves_lag(self) -> bool:
        """Whether it is a change of the budget."""
        return "staleness.budget" in self.changes


@dataclass(frozen=True)
class Judged:
    """A candidate and what is predicted of it."""

    words: str
    changes: dict[str, int | str]
    speedup: float
    bound: bool
    by: str
    lag: tuple[float, float] | None = None
    kl: tuple[float, float] | None = None  # after rejection, now and then
    caveat: str = ""  # what is not known of it
    refused: str = ""  # why it is not recommended although it may be faster

    @property
    def sentence(self) -> str:
        """With its predicted effect."""
        speed = f"{'at most ' if self.bound else ''}{self.speedup:.2f}× predicted"
        kl = f", KL after rejection {self.kl[0]:.2g} → {self.kl[1]:.2g}" if self.kl else ""
        caveat = f"; {self.caveat}" if self.caveat else ""
        return f"{self.words}: {speed}{kl}{caveat}" + (f"; not recommended: {self.refused}" if self.refused else "")


@dataclass(frozen=True)
class Recommendation:
    """What to do next, and what else was weighed."""

    words: str
    why: str
    best: Judged | None  # None: nothing is worth changing
    others: tuple[Judged, ...] = ()
    basis: str = ""  # of the prediction of KL


def candidates(config: RunConfig) -> Iterator[Candidate]:
    """Every change that is weighed."""
    if not config.staleness.auto:
        now = config.staleness.limit
        more = max(1, 2 * now)
        yield Candidate({"staleness.budget": more}, f"raise staleness.budget from {now} to {more}", 0)
        if now:
            yield Candidate({"staleness.budget": now // 2}, f"lower staleness.budget from {now} to {now // 2}", 0, True)
    if config.obrs.mode != "off":
        if not config.frozen:  # whose scores would be waited for all the same: nobody can say how long
            yield Candidate({"obrs.mode": "off"}, "switch rejection off (obrs.mode=off)", 0)
        count = config.replica.count
        yield Candidate({"replica.count": count + 1}, f"add one replica (replica.count={count + 1})", 1)
    count = config.actor.count
    if count > 1:
        yield Candidate({"actor.count": count - 1}, f"take one actor away (actor.count={count - 1})", 0, True)
    yield Candidate({"actor.count": count + 1}, f"add one actor (actor.count={count + 1})", 1)
    ranks = 2 * config.learner.dp_replicate
    yield Candidate({"learner.dp_replicate": ranks}, f"train on {ranks} data ranks (learner.dp_replicate={ranks})", 2)


def judge(
    candidate: Candidate, prediction: Prediction, config: RunConfig, now: Staleness, drift: Drift | None
) -> Judged:
    """Add what the change would do to the data, and whether they bear it."""
    found = Judged(candidate.words, candidate.changes, prediction.speedup, prediction.bound, prediction.by)
    if candidate.changes.get("obrs.mode") == "off":
        return _without_rejection(found, now)
    return _with_lag(found, prediction, config, now, drift) if candidate.moves_lag else found


def _with_lag(found: Judged, prediction: Prediction, config: RunConfig, now: Staleness, drift: Drift | None) -> Judged:
    """What another budget does to lag and KL. Less lag is never refused; more of it where KL is known and grows too
    far, or might. Who has no lag at all cannot know, and is told so."""
    before, then = config.staleness.limit, int(found.changes["staleness.budget"])
    lag, now_lag = prediction.lag_mean, now.lag_mean
    if now_lag is None:
        return found if then < before else _with(found, caveat=NOT_KNOWN)
    if lag is None:  # the lag follows the budget where actors use all of it
        lag = now_lag * then / before if before else float(then)
    found = _with(found, lag=(now_lag, lag))
    if then > before and (not before or now_lag <= 0):
        return _with(found, caveat=NOT_KNOWN)
    at = drift.at(lag) if drift is not None else None
    here = drift.at(now_lag) if drift is not None else None
    kl = now.kl_after * at / here if now.kl_after is not None and at is not None and here else None
    if then < before:
        return found if kl is None else _with(found, kl=(now.kl_after, kl))
    if drift is None or now.kl_after is None:
        refused = "" if config.obrs.mode == "off" else "too few steps to tell what it does to KL"
        return _with(found, refused=refused)
    if kl is None:
        return _with(
            found,
            refused=f"a mean lag of {lag:.1f} is more than {FURTHEST:g}× the largest lag of this run "
            f"({drift.largest:.0f}): what it does to KL cannot be told from it",
        )
    limit = config.alerts.kl_above
    refused = f"KL would exceed alerts.kl_above={limit:g}" if limit and kl > limit else ""
    return _with(found, kl=(now.kl_after, kl), refused=refused)


def _without_rejection(found: Judged, now: Staleness) -> Judged:
    if now.kl_before is None:
        return _with(found, refused="KL before rejection is not known")
    if now.kl_before > NEGLIGIBLE_KL:
        return _with(
            found, refused=f"KL would be {now.kl_before:.2g}, as before rejection, not {now.kl_after or 0:.2g}"
        )
    return _with(found, kl=(now.kl_after or 0.0, now.kl_before))


def _with(found: Judged, **changes: object) -> Judged:
    return Judged(**{**vars(found), **changes})


def recommend(
    config: RunConfig, predictors: Sequence[Predictor], now: Staleness, drift: Drift | None, rest: str
) -> Recommendation:
    """The first predictor that can say, says it. ``rest``: what is said when nothing is worth it."""
    judged: list[tuple[Candidate, Judged]] = []
    for candidate in candidates(config):
        prediction = next((p for predictor in predictors if (p := predictor.predict(candidate.changes))), None)
        if prediction is not None:
            judged.append((candidate, judge(candidate, prediction, config, now, drift)))
    judged.sort(key=lambda pair: -pair[1].speedup)
    basis = drift.basis if drift is not None else ""
    open_ = [(c, j) for c, j in judged if not j.refused]
    worth = [(c, j) for c, j in open_ if j.speedup >= WORTH]
    worth = [(c, j) for c, j in worth if not j.bound] or worth  # a bound says less than an estimate
    spare = [j for c, j in open_ if c.saves and not j.bound and j.speedup >= COSTLESS]
    if worth:
        top = worth[0][1].speedup
        alike = [(c, j) for c, j in worth if j.speedup >= top - ALIKE]
        chosen = min(alike, key=lambda pair: (pair[0].cost, not pair[0].saves, -pair[1].speedup))[1]
        why = f"by {chosen.by}"
    elif spare:
        chosen, why = spare[0], f"by {spare[0].by}; nothing is predicted to gain 3 %, and this costs no speed"
    else:
        others = tuple(j for _, j in judged)
        return Recommendation(rest, "no change is predicted to gain 3 %", None, others, basis)
    others = tuple(j for _, j in judged if j is not chosen)
    return Recommendation(chosen.sentence, why, chosen, others, basis)
