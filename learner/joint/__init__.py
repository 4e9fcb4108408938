"""A rollout model trained beside the policy on the same shards (algorithms.md 1.12): docs/joint.md."""
