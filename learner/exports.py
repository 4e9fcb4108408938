"""What a learner rank tells Prometheus of its last step. Pure."""

from collections.abc import Mapping

from common.exporter import Families, counter, gauge

GAUGES = (  # of the step's metrics: figure, name, help
    ("loss", "croupier_learner_loss", "Loss of the last step."),
    ("policy_loss", "croupier_learner_policy_loss", "Its policy part."),
    ("grad_norm", "croupier_learner_gradient_norm", "Norm of the gradient before clipping."),
    ("entropy", "croupier_learner_entropy_nats", "Entropy of the policy, a token."),
    ("lr", "croupier_learner_learning_rate", "Learning rate."),
    ("clip_fraction", "croupier_learner_clipped_ratio", "Tokens whose gradient the clip took away."),
    ("weight_ess", "croupier_learner_ess_ratio", "Normalised effective sample size of the weights."),
    ("kl_to_behaviour", "croupier_learner_kl_nats", "KL to the behaviour policy, a token."),
    ("expert_load_max", "croupier_learner_expert_load_ratio", "Load of the busiest expert, 1 is the mean."),
)
SECONDS = "seconds_"


def step_families(metrics: Mapping[str, float]) -> Families:
    """Before the first step there are no samples."""
    for figure, name, words in GAUGES:
        yield gauge(name, words, metrics.get(figure))
    skipped = metrics.get("skipped_updates", 0.0)
    yield counter("croupier_learner_skipped_updates_total", "Updates whose gradients were not finite.", skipped)
    parts = {name.removeprefix(SECONDS): value for name, value in metrics.items() if name.startswith(SECONDS)}
    yield gauge("croupier_learner_step_seconds", "The last step's wall-clock by part.", part=parts)
