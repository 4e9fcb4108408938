"""What a run tells of itself while it runs: traces, metrics for other programs, alerts."""

from dataclasses import dataclass

from common.objective import require


@dataclass(frozen=True)
class TraceSection:
    """What every process writes down of its own time, for ``tools.trace`` and ``tools.profile``."""

    spans: bool = True  # false keeps only the totals that heartbeats carry
    follow_every: int = 8  # one group in so many is followed from its rollout to the step that trains it
    limit_mb: float = 256.0  # of a process's file; beyond it only totals go on
    torch_steps: tuple[int, ...] = ()  # training steps that torch.profiler records too

    def __post_init__(self) -> None:
        """Validate."""
        require(self.follow_every >= 1, "trace.follow_every", self.follow_every, "must be at least 1 (every group)")
        require(0 < self.limit_mb <= 1e6, "trace.limit_mb", self.limit_mb, "must be positive, in megabytes")
        require(
            all(step >= 0 for step in self.torch_steps), "trace.torch_steps", self.torch_steps, "are training steps"
        )


@dataclass(frozen=True)
class MetricsSection:
    """Where figures go beside ``metrics.jsonl``."""

    tensorboard: bool = True  # tools.launch writes event files into the run directory
    wandb: str = ""  # a Weights & Biases project; needs `pip install wandb`
    prometheus: bool = False  # each process answers scrapes and leaves its address in RUN_DIR/prometheus
    host: str = "127.0.0.1"  # where they answer; beyond this machine anybody there may read
    port: int = 0  # each process takes the first free one from here on; 0: any

    def __post_init__(self) -> None:
        """Validate."""
        require(0 <= self.port < 1 << 16, "metrics.port", self.port, "is a TCP port, or 0 for any that is free")


@dataclass(frozen=True)
class AlertSection:
    """Signs of a collapse, said in the broker's log once they last ``patience`` steps."""

    entropy_below: float = 0.005  # nats a token, of the learner's policy; 0 switches an alert off
    kl_above: float = 0.5  # nats a token, after rejection (algorithms.md 1.9)
    ess_below: float = 0.3  # normalised, of the learner's weights (algorithms.md 1.9)
    truncated_above: float = 0.5  # share of the trajectories cut at rollout.max_tokens
    reward_lost: float = 0.5  # share of what the batch reward had gained at its best
    patience: int = 5  # steps in a row

    def __post_init__(self) -> None:
        """Validate."""
        require(self.entropy_below >= 0, "alerts.entropy_below", self.entropy_below, "is nats a token, 0 for never")
        require(self.kl_above >= 0, "alerts.kl_above", self.kl_above, "is nats a token, 0 for never")
        require(0 <= self.ess_below <= 1, "alerts.ess_below", self.ess_below, "lies in [0, 1], 0 for never")
        require(self.reward_lost >= 0, "alerts.reward_lost", self.reward_lost, "is a share of the gain, 0 for never")
        truncated = self.truncated_above
        require(0 <= truncated <= 1, "alerts.truncated_above", truncated, "lies in [0, 1], 0 for never")
        require(self.patience >= 1, "alerts.patience", self.patience, "must be at least 1 step")
