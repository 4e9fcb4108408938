"""Losses, pure. They know nothing of rejection beyond a mask and a density (algorithms.md 1.4)."""
