"""The learner's own decoder: Qwen3-MoE and Qwen3, over packed sequences."""
