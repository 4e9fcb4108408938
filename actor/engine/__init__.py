"""Engines: prompts in, sampled tokens out, weights swapped between tokens."""
