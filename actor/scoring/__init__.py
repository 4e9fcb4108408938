"""What a rollout is worth, off the actor's loop: slow verifiers and reward models."""
