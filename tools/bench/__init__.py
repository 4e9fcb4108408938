"""The one harness for every figure: ``python -m tools.bench NAME [--json] [--reps N]``."""
