"""The learner's own decoder: Qwen and Llama, dense and mixture-of-experts, over packed sequences."""
