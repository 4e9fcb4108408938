"""The fleet: engines that sample, tasks that score, and the rollout loop that streams trajectories to the broker."""
