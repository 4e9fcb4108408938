"""A run while it goes: ``python -m tools.watch RUN_DIR``, in a terminal or, with ``--web``, in a browser.

::

    status.json ----------------------> follow.py -> view.py --> screen.py (blocks.py) -> terminal.py
    metrics.jsonl -> tail.py -> history.py (bins.py)       |
                                                           +--> feed.py -> web.py -> page/

Nothing here writes into the run directory, and nothing is read twice.
"""
