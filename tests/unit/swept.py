"""Run directories and launchers made up for tests of sweeps."""

import json
from dataclasses import fields, is_dataclass, replace

from common.config import RunConfig

STEP_S = 0.5


def step_line(step, *, time_s, lag=1, trajectories=32, tokens=200, accepted=190, ahead=100, kl=0.02, **more):
    """One step, ``ahead`` tokens generated beyond those of its batch."""
    return {
        "kind": "step", "time_s": time_s, "step": step, "trajectories": trajectories, "reward": 0.5,
        "tokens_proposed": tokens, "tokens_accepted": accepted, "tokens_generated": (step + 1) * tokens + ahead,
        "lag_mean": float(lag), "lag_max": lag, "lag_histogram": {str(lag): tokens}, "kl_before": kl,
        "kl_after": kl / 4, "kl_to_behaviour": kl / 2, "weight_ess": 0.9, "seconds_train": STEP_S, **more,
    }  # fmt: skip


def eval_line(version, reward, time_s, error=0.02):
    half = 1.959964 * error
    return {
        "kind": "eval", "time_s": time_s, "version": version, "reward": reward,
        "reward_low": reward - half, "reward_high": reward + half,
    }  # fmt: skip


def write_run(path, rewards, *, pace=1.0, start=10.0, status="finished", config="", **step):
    """A run whose version v was made at ``start + STEP_S + pace * v`` and evaluated with ``rewards[v]``.

    So training takes ``STEP_S + pace * (last - 1)`` seconds, and v = 1 is made ``STEP_S`` after its beginning.
    """
    path.mkdir(parents=True)
    last = max(rewards)
    lines = [step_line(s, time_s=start + STEP_S + pace * s, **step) for s in range(last)]
    lines += [eval_line(v, reward, start + 99.0) for v, reward in rewards.items()]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "config.yaml").write_text(config)
    (path / "summary.json").write_text(json.dumps({"status": status, "wall_s": 1.0}))


class KilledError(BaseException):
    """The power went off."""


class Clock:
    """Counts what happens and cuts it short at the ``end``-th event."""

    def __init__(self, end=None):
        self.events, self.end = 0, end

    def tick(self):
        self.events += 1
        if self.events == self.end:
            raise KilledError


class FakeRun:
    """Writes one file a poll; what was written stays when the power goes off."""

    def __init__(self, config, text, clock, fails):
        self.path, self.clock, self.stopped = config.run.path, clock, False
        finished = json.dumps({"status": "failed" if fails else "finished"})
        self.files = [("config.yaml", text), ("metrics.jsonl", '{"kind"'), ("summary.json", finished)]
        self.code = 1 if fails else 0

    def poll(self):
        self.clock.tick()
        if not self.files:
            return self.code
        self.path.mkdir(parents=True, exist_ok=True)
        name, text = self.files.pop(0)
        (self.path / name).write_text(text[: len(text) // 2])
        self.clock.tick()
        (self.path / name).write_text(text)
        return None

    def ask(self):
        self.asked = True

    def stop(self):
        self.stopped = True


class FakeLauncher:
    """Remembers whom it started."""

    def __init__(self, clock, texts, fails=()):
        self.clock, self.texts, self.fails = clock, texts, fails
        self.started, self.children = [], []

    def __call__(self, config, log):
        self.clock.tick()
        key = f"{config.run.path.parent.name}/{config.run.name}"
        self.started.append(key)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"first\nlast words of {key}\n")
        self.children.append(FakeRun(config, self.texts[key], self.clock, key in self.fails))
        return self.children[-1]


class Listener:
    """Keeps what was said."""

    def __init__(self):
        self.lines = []

    def say(self, text, style=""):
        self.lines.append(text)

    def show(self, runner):
        self.shown = runner


def moved(plan, directory):
    """The plan in another directory, without loading it again."""
    jobs = tuple(
        replace(job, config=replace(job.config, run=replace(job.config.run, dir=str(directory / job.cell.name))))
        for job in plan.jobs
    )
    return replace(plan, directory=directory, jobs=jobs)


def texts_of(plan):
    """A ``config.yaml`` of every job, by its key: what differs from the defaults, which is quicker to read."""
    return {job.key: json.dumps(_unusual(job.config, RunConfig())) for job in plan.jobs}


def _unusual(value, usual):
    found = {}
    for f in fields(value):
        own, other = getattr(value, f.name), getattr(usual, f.name)
        if own != other:
            found[f.name] = _unusual(own, other) if is_dataclass(own) else own
    return found
