"""A run while it goes: ``python -m tools.watch RUN_DIR``.

::

    status.json ----------------------> follow.py -> view.py -> screen.py (blocks.py) -> terminal.py
    metrics.jsonl -> tail.py -> history.py (bins.py)

Nothing here writes into the run directory, and nothing is read twice.
"""
