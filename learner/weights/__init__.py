"""Weights to the fleet: the learner publishes, the policy replica receives."""
