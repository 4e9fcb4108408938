"""A virtual-time, discrete-event model of a run: ``Setup``, ``simulate(setup) -> Outcome``; see docs/simulator.md.

::

    Setup (costs, settings)  ->  simulate  ->  Outcome (throughput, lags, idle shares, waste)

The core is pure: time is a number, randomness a seed. Reading runs is :mod:`tools.simulate.measured`.
"""

from tools.simulate.model import simulate
from tools.simulate.outcome import Outcome
from tools.simulate.settings import Setup

__all__ = ["Outcome", "Setup", "simulate"]
