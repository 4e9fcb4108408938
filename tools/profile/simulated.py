"""Predictions of the simulator, fed with the costs that the run had."""

from collections.abc import Mapping
from dataclasses import replace

from common.errors import ConfigError, CroupierError
from tools.profile.predict import Prediction, Predictor
from tools.runs import Run
from tools.simulate import Outcome, Setup, simulate
from tools.simulate.settings import override

STEPS = (20, 120)  # simulated for each change, at least and at most
TRAJECTORIES = 30_000  # about so many for each change
FAR = 0.15  # of the run's own rate: a simulation of the run as it was that is further off is said to be
USELESS = 0.5  # and is not believed beyond this


class Simulated:
    """The run as it was, simulated, and what a change makes of it."""

    def __init__(self, setup: Setup, steps_s: float, lag_mean: float | None) -> None:
        """``steps_s``, ``lag_mean``: what was measured."""
        a_step = setup.rollout.groups_per_step * setup.rollout.group_size
        steps = min(STEPS[1], max(STEPS[0], TRAJECTORIES // a_step))
        self._setup = replace(setup, run=replace(setup.run, steps=steps))
        self._now: Outcome = simulate(self._setup)
        self._lag = lag_mean
        self.off = self._now.steps_per_s / steps_s - 1 if steps_s > 0 else 0.0  # from the run's own rate
        far = abs(self.off) > FAR
        self.by = "the simulator" + (f", which is {self.off:+.0%} off on this run itself" if far else "")

    def predict(self, changes: Mapping[str, int | str]) -> Prediction | None:
        """None for settings that it does not know."""
        try:
            then = simulate(override(self._setup, [f"{key}={value}" for key, value in changes.items()]))
        except ConfigError:
            return None
        lag = then.lag_mean
        if self._lag is not None and self._now.lag_mean > 0:
            lag *= self._lag / self._now.lag_mean
        return Prediction(then.steps_per_s / self._now.steps_per_s, lag, False, self.by)


def simulated(run: Run, steps_s: float, lag_mean: float | None) -> tuple[Predictor | None, str]:
    """What :func:`tools.profile.verdict.verdict` may ask; None and the reason where the run does not tell enough."""
    try:
        found = Simulated(Setup.from_run(run.path), steps_s, lag_mean)
    except CroupierError as error:
        return None, f"no simulation of this run, only bounds: {error}"
    if abs(found.off) > USELESS:
        return None, f"only bounds: the simulator is {found.off:+.0%} off on this run itself"
    return found, ""
