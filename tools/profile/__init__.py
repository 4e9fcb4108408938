"""The verdict of a run: see tools.profile.verdict and docs/profiling.md."""
