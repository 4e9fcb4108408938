"""What a person is shown of a run at one moment: typed, sound and printable, whoever wrote the files.

::

    status.json + History + Window -> make_view() -> View -> the terminal, and as JSON the page
"""

from dataclasses import dataclass, field

from common.config import MEGABYTE
from common.trace import STATES
from tools.run_files import Record
from tools.watch.history import Alert, History, Move, Receipt
from tools.watch.shares import Share, Window, shares_of, split_shard
from tools.watch.sound import mapping, number, numbers, records, text, whole

SILENT_S = 3.0  # a peer silent for longer is shown in yellow
LOST_S = 10.0  # a status.json that was not replaced for longer: the broker is gone or stopped
LAST_STEPS = 32  # whose lags and receipts are shown
ROLES = ("learner", "replica", "actor", "broker")  # in this order
WORDS = 300  # characters of a sentence


@dataclass(frozen=True)
class Role:
    """A role's time, all its processes added up."""

    role: str
    count: int | None  # None: nobody told
    silent: int
    shares: list[Share]


@dataclass(frozen=True)
class PeerRow:
    """One process."""

    peer: str
    role: str
    version: int | None  # None for a frozen model
    silent_s: float
    tokens_per_s: float | None
    servers: str  # "2/3 servers" of an actor that has some
    shares: list[Share]


@dataclass
class View:
    """Everything a screen shows; what is None is not known."""

    name: str
    phase: str  # waiting, running, evaluating, finished, stopped, gone, nothing
    words: str = ""  # what is waited for, or what is wrong
    step: int = 0
    steps: int | None = None
    version: int | None = None
    elapsed_s: float | None = None
    eta_s: float | None = None
    status_age_s: float | None = None
    reward: float | None = None
    held_out: tuple[int, float, float | None, float | None] | None = None  # version, reward, low, high
    best: tuple[int, float] | None = None
    lag_mean: float | None = None
    lag_max: int | None = None
    lags: dict[int, int] = field(default_factory=dict)  # tokens of the last steps
    budget: int | None = None
    budget_auto: bool = False
    moves: list[Move] = field(default_factory=list)  # the newest first
    figures: dict[str, float | None] = field(default_factory=dict)  # of the last step
    tokens_per_s: float | None = None
    queue_groups: int | None = None
    in_flight_groups: int | None = None
    queue_mb: float | None = None
    queue_limit_mb: float | None = None
    trained: int | None = None  # trajectories
    dropped: dict[str, int] = field(default_factory=dict)
    roles: list[Role] = field(default_factory=list)
    span_s: float | None = None  # that the shares are of; None: all since the broker's start
    peers: list[PeerRow] = field(default_factory=list)
    hidden: int = 0  # peers that are not among them
    receipts: list[Receipt] = field(default_factory=list)  # the newest first
    raised: list[str] = field(default_factory=list)  # alerts that last
    alerts: list[Alert] = field(default_factory=list)  # the newest first
    notes: list[str] = field(default_factory=list)  # what could not be read

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.phase in ("finished", "stopped")

    @property
    def lost(self) -> bool:
        """Whether the broker should have written by now."""
        return not self.over and (self.status_age_s or 0.0) > LOST_S


def clocks(status: Record) -> dict[str, dict[str, float]]:
    """The cumulative clocks of a status: ``role ROLE``, ``parked``, ``peer ROLE NAME`` and ``all``."""
    found = {f"role {text(role)}": numbers(states) for role, states in mapping(status.get("states")).items()}
    found["parked"] = numbers(status.get("parked"))
    for peer in records(status.get("peers")):
        own = numbers(peer.get("seconds"))
        if (tokens := number(peer.get("tokens"))) is not None:
            own["tokens"] = tokens
        found[_clock(peer)] = own
    return found


def _clock(peer: Record) -> str:
    return f"peer {text(peer.get('role'))} {text(peer.get('peer'))}"


def make_view(name: str, status: Record, history: History, window: Window) -> View:
    """The run as ``status`` and the lines so far tell it."""
    step, steps = whole(status.get("step")) or 0, whole(status.get("steps"))
    time, began = number(status.get("time")), number(status.get("started_at"))
    pace = history.pace()
    view = View(
        name=text(name), phase=text(status.get("phase", "nothing")), words=text(status.get("waiting_for"), WORDS)
    )
    view.step, view.steps, view.version = step, steps, whole(status.get("version"))
    view.elapsed_s = time - began if time is not None and began is not None else None
    if pace is not None and steps is not None and not view.over:
        view.eta_s = pace * max(0, steps - step)
    _learning(view, status, history)
    _queues(view, status)
    _fleet(view, status, history, window)
    view.receipts = list(history.receipts)[::-1]
    view.moves, view.alerts = list(history.moves)[::-1], list(history.alerts)[::-1]
    view.raised = [text(one.get("text"), WORDS) for one in records(status.get("alerts"))]
    if history.damaged:
        view.notes.append(f"{history.damaged} damaged line(s) of metrics.jsonl left out")
    return view


def _learning(view: View, status: Record, history: History) -> None:
    """Rewards, lags, rejection."""
    view.reward = number(status.get("reward"))
    evaluations = [one for one in records(status.get("evaluations")) if number(one.get("reward")) is not None]
    if evaluations:
        last = evaluations[-1]
        held_out = number(last.get("reward")) or 0.0
        view.held_out = (whole(last.get("version")) or 0, held_out, number(last.get("low")), number(last.get("high")))
    best = mapping(status.get("best"))
    if (reward := number(best.get("reward"))) is not None:
        view.best = (whole(best.get("version")) or 0, reward)
    view.lag_mean, view.lag_max = number(status.get("lag_mean")), whole(status.get("lag_max"))
    recent = history.steps.since(history.steps.bins[-1].last - LAST_STEPS + 1) if history.steps.bins else []
    for one in recent:
        for lag, tokens in one.lags.items():
            view.lags[lag] = view.lags.get(lag, 0) + tokens
    view.budget = whole(status.get("staleness_budget"))
    if view.budget is None:
        view.budget = history.budget
    view.budget_auto = bool(history.moves)
    for name in ("acceptance", "kl_before", "kl_after", "ess", "weight_ess", "threshold", "entropy", "truncated"):
        view.figures[name] = history.last.get(name)
    if view.reward is None:
        view.reward = history.last.get("reward")


def _queues(view: View, status: Record) -> None:
    view.tokens_per_s = number(status.get("tokens_per_s"))
    view.queue_groups, view.in_flight_groups = whole(status.get("queue_groups")), whole(status.get("in_flight_groups"))
    size, limit = number(status.get("queue_bytes")), number(status.get("queue_limit_bytes"))
    view.queue_mb = size / MEGABYTE if size is not None else None
    view.queue_limit_mb = limit / MEGABYTE if limit else None
    view.trained = whole(status.get("trajectories_trained"))
    dropped = numbers(status.get("trajectories_dropped"))
    view.dropped = {reason: int(count) for reason, count in sorted(dropped.items()) if count >= 1}


def _fleet(view: View, status: Record, history: History, window: Window) -> None:
    """Processes, their states, and the roles' time."""
    fleet, shown = mapping(status.get("fleet")), records(status.get("peers"))
    window.add(number(status.get("time")) or 0.0, clocks(status))
    view.span_s = window.span if window.settled and not view.over else None
    servers = {text(name): _servers(numbers(figures)) for name, figures in mapping(status.get("actors")).items()}
    order = {role: place for place, role in enumerate(ROLES)}
    for peer in sorted(shown, key=lambda peer: (order.get(str(peer.get("role")), 9), text(peer.get("peer")))):
        role, clock = text(peer.get("role")), _clock(peer)
        seconds = {state: value for state, value in window.of(clock).items() if state != "tokens"}
        if role == "learner":
            seconds = split_shard(seconds, window.of("parked"))
        name = text(peer.get("peer"))
        view.peers.append(
            PeerRow(
                peer=name,
                role=role,
                version=None if peer.get("serves") else whole(peer.get("version")),
                silent_s=number(peer.get("silent_s")) or 0.0,
                tokens_per_s=window.rate(clock, "tokens"),
                servers=servers.get(name, "") if role == "actor" else "",
                shares=shares_of(seconds),
            )
        )
    view.roles = [_role(role, fleet, view, window, history) for role in _roles(status, history)]
    counted = sum(whole(mapping(one).get("count")) or 0 for one in fleet.values())
    view.hidden = max(0, counted - len(shown))


def _servers(figures: dict[str, float]) -> str:
    if not figures.get("servers"):
        return ""
    return f"{figures.get('servers_serving', 0):.0f}/{figures['servers']:.0f} servers"


def _roles(status: Record, history: History) -> list[str]:
    found = {text(role) for role in (*mapping(status.get("fleet")), *mapping(status.get("states")))}
    found |= {text(peer.get("role")) for peer in records(status.get("peers"))}
    if history.steps.bins:
        found |= {name.split(" ")[1] for name in history.steps.bins[-1].levels if name.startswith("state ")}
    return [role for role in ROLES if role in found and role in STATES]


def _role(role: str, fleet: Record, view: View, window: Window, history: History) -> Role:
    """``role``'s shares over the window; since the broker's start where status.json tells none."""
    if view.over or not window.settled:
        levels = history.steps.bins[-1].levels if history.steps.bins else {}
        seconds, parked = part(levels, f"state {role} "), part(levels, "parked ")
    else:
        seconds, parked = window.of(f"role {role}"), window.of("parked")
    if role == "learner":
        seconds = split_shard(seconds, parked)
    told = mapping(fleet.get(role))
    count = whole(told.get("count"))
    if count is None:
        count = sum(peer.role == role for peer in view.peers) or None
    silent = whole(told.get("silent"))
    if silent is None:
        silent = sum(peer.role == role and peer.silent_s > SILENT_S for peer in view.peers)
    return Role(role, count, silent, shares_of(seconds))


def part(levels: dict[str, float], prefix: str) -> dict[str, float]:
    """Those whose names begin so, without that."""
    return {name[len(prefix) :]: value for name, value in levels.items() if name.startswith(prefix)}
