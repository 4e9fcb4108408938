"""What the broker goes by: staleness, rejection, its sockets and stores."""

from dataclasses import dataclass
from typing import Literal

from common.config.units import MEGABYTE
from common.objective import require


@dataclass(frozen=True)
class StalenessSection:
    """The staleness budget: no trained token has a lag above it, in policy versions.

    ``auto`` moves the budget while the run goes (broker.governor): up while somebody idles for want of it
    and the targets hold, down where it costs more than it buys.
    """

    budget: int | str = 2  # versions, or auto
    start: int = 2  # auto: where it begins
    most: int = 16  # auto: what it never exceeds
    every: int = 8  # auto: steps between two moves
    kl_target: float = 0.05  # auto: nats a token after rejection that a move up must stay below
    ess_target: float = 0.5  # auto: normalised ESS of the learner's weights that a move up must stay above

    def __post_init__(self) -> None:
        """Validate."""
        sound = self.budget == "auto" if isinstance(self.budget, str) else self.budget >= 0
        require(sound, "staleness.budget", self.budget, "must be 0 (synchronous) or more, or auto")
        require(0 <= self.start <= self.most, "staleness.start", self.start, f"must lie in [0, most={self.most}]")
        require(1 <= self.most <= 1024, "staleness.most", self.most, "must lie in [1, 1024] versions")
        require(self.every >= 2, "staleness.every", self.every, "must be at least 2 steps")
        require(self.kl_target > 0, "staleness.kl_target", self.kl_target, "must be positive")
        require(0 <= self.ess_target < 1, "staleness.ess_target", self.ess_target, "must lie in [0, 1)")

    @property
    def auto(self) -> bool:
        """Whether the broker moves the budget."""
        return self.budget == "auto"

    @property
    def limit(self) -> int:
        """What the budget never exceeds."""
        return self.budget if isinstance(self.budget, int) else self.most

    @property
    def first(self) -> int:
        """The budget at the beginning."""
        return self.budget if isinstance(self.budget, int) else self.start


@dataclass(frozen=True)
class ObrsSection:
    """Optimal budgeted rejection (algorithms.md 1). ``off`` accepts all and needs no replica."""

    mode: Literal["off", "threshold", "budget", "ess"] = "threshold"
    threshold: float = 1.0  # mode threshold: the paper's lambda
    budget: float = 0.9  # mode budget: the share of tokens to accept; lambda follows, one step behind
    target_ess: float = 0.9  # mode ess: normalised ESS of the learner's weights a trained token; lambda follows
    window: int = 1  # modes budget and ess: steps that lambda is estimated from
    z_weight: Literal["none", "context", "batch"] = "none"  # none is exact; context is the paper's loss
    rethin_below: float = 0.0  # a step is thinned again before it is served if the learner's last ESS was less
    z_kappa: bool = False  # z_weight context: the paper's debias of Z instead of interpolating between bounds

    def __post_init__(self) -> None:
        """Validate."""
        require(
            0.01 <= self.threshold <= 100, "obrs.threshold", self.threshold, "must lie in [0.01, 100]; 1 is the default"
        )
        require(0 < self.budget <= 1, "obrs.budget", self.budget, "is a share of the tokens: above 0, at most 1")
        require(
            0 < self.target_ess < 1,
            "obrs.target_ess",
            self.target_ess,
            "is a normalised effective sample size: above 0, below 1",
        )
        require(
            self.mode != "ess" or self.z_weight != "context",
            "obrs.z_weight",
            self.z_weight,
            "weighs tokens by their context's acceptance, which obrs.mode=ess does not reckon with; set it to none or "
            "batch, or obrs.mode=budget",
        )
        require(
            self.rethin_below == 0 or (self.z_weight == "none" and self.mode != "off"),
            "obrs.rethin_below",
            self.rethin_below,
            "needs rejection (obrs.mode) and its exact form (obrs.z_weight=none); set it to 0",
        )
        require(
            not self.z_kappa or self.z_weight == "context",
            "obrs.z_kappa",
            self.z_kappa,
            "debiases the Z of obrs.z_weight=context; set that, or false",
        )
        require(1 <= self.window <= 64, "obrs.window", self.window, "must lie in [1, 64] steps")


@dataclass(frozen=True)
class BrokerSection:
    """The broker's address and bounds."""

    address: str = "tcp://127.0.0.1:5700"
    queue_mb: float = 256.0  # trajectories waiting to be trained; a full queue stops the grants
    journal_mb: float = 2048.0  # on disk in the run directory, before anything is acknowledged; 0 keeps no journal
    retain_mb: float = 256.0  # committed steps kept for a learner that resumes; at most a quarter of the journal
    heartbeat_s: float = 1.0
    peer_timeout_s: float = 15.0  # a silent peer is dropped and its groups are granted again
    group_timeout_s: float = 7200.0  # from a group's grant to its last sibling; what is missing then has failed
    assemble_ahead: int = 1  # versions between scoring and training; 0 scores with the learner's own, at its pace
    score_timeout_s: float = 60.0
    verify_rate: float = 0.25  # share of the trajectories whose claimed probabilities are checked against the scores
    quarantine_after: int = 20  # offences of one peer within a minute, after which it is not listened to for a while
    quarantine_s: float = 60.0
    max_message_mb: float = 256.0  # of one message, either way; what is larger is refused before it is read
    keys: str = ""  # directory of the keys that `python -m tools.keys` makes; needed unless the address is local

    def __post_init__(self) -> None:
        """Validate."""
        require(
            self.address.startswith(("tcp://", "ipc://")),
            "broker.address",
            self.address,
            "must start with tcp:// or ipc://",
        )
        require(self.queue_mb > 0, "broker.queue_mb", self.queue_mb, "must be positive")
        require(
            self.peer_timeout_s > 2 * self.heartbeat_s > 0,
            "broker.peer_timeout_s",
            self.peer_timeout_s,
            f"must exceed two heartbeats (broker.heartbeat_s={self.heartbeat_s})",
        )
        require(0 <= self.assemble_ahead <= 8, "broker.assemble_ahead", self.assemble_ahead, "must lie in [0, 8]")
        require(self.quarantine_after >= 1, "broker.quarantine_after", self.quarantine_after, "must be at least 1")
        require(self.quarantine_s >= 0, "broker.quarantine_s", self.quarantine_s, "must not be negative")
        require(
            1 <= self.max_message_mb <= 65536,
            "broker.max_message_mb",
            self.max_message_mb,
            "must lie in [1, 65536] megabytes",
        )

    @property
    def max_message_bytes(self) -> int:
        """``max_message_mb`` in bytes."""
        return int(self.max_message_mb * MEGABYTE)
