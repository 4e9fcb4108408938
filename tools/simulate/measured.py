"""A :class:`Setup` from what runs tell.

::

    RUN_DIR ... -> sample.read_sample -> Sample ... -> costs.fit -> Setup
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.simulate.costs import fit
from tools.simulate.sample import Sample, read_sample
from tools.simulate.settings import Setup


@dataclass
class Measured:
    """A setup, and what could not be known."""

    setup: Setup
    notes: list[str]
    samples: list[Sample]


def measure(run_dirs: Sequence[Path]) -> Measured:
    """The costs of one or several runs of the same model; settings are the first's.

    Raises :class:`DataError` for runs that do not tell enough.
    """
    samples = [read_sample(run_dir) for run_dir in run_dirs]
    notes = [f"{sample.run.path}: {note}" for sample in samples for note in sample.run.notes]
    return Measured(fit(samples, notes), notes, samples)
