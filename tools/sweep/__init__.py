"""A grid of real runs, resumable at any point, and one report of what each budget costs and buys.

::

    key=a,b,c ...  ->  grid.cells()  ->  plan: every cell x seed as a validated RunConfig
                                          |
    runner: tools.launch, one at a time (or --jobs)  ->  SWEEP_DIR/<cell>/seed-<n>
                                          |
    measure -> analysis -> advice  ->  report.md, report.html, *.png
"""
