"""An OpenAI-compatible front for agents written elsewhere: what they say and sample becomes exact trajectories."""
