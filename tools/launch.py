"""``python -m tools.launch RUN.yaml [key=value ...]``: a whole run on this machine.

::

    load -> check address -> claim the directory, set an earlier run aside -> warm start -> start processes
         -> watch -> stop -> report

The broker's ``status.json`` is all that is watched, beside exit codes. Exit codes: 0 finished,
1 failed, 2 a configuration that cannot be run, 130 interrupted.
"""

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from common.cli import EXIT_LASTING
from common.config import RunConfig, load, to_yaml
from common.errors import CroupierError
from common.keys import broker_keys
from common.process import StopFlag
from common.routing import read_routing
from learner.retention import CHECKPOINTS, complete, step_of
from tools.console import LastingConsole
from tools.devices import deal, find_devices, torch_on_gpus
from tools.follow.follower import Background
from tools.follow.sinks import find_wandb
from tools.outcomes import Outcome, earlier
from tools.preflight import (
    check_address,
    check_devices,
    check_engine,
    check_frozen,
    check_meshes,
    check_models,
    check_nccl,
    check_resumed,
    check_rewards,
    check_sandbox,
    check_tasks,
    unwritable,
)
from tools.processes import SAVE_S, Process, processes_of, stop_all, wait_all
from tools.run_files import CONFIG, LEARNER_S, LOGS, PAGE, Before, claim, last_lines, read_status, set_aside
from tools.stamp import wants_warmstart
from tools.watch.follow import Follower
from tools.watch.screen import Screen, plain_line

EXIT_CODES: dict[Outcome, int] = {"finished": 0, "failed": 1, "interrupted": 130}

POLL_S = 0.2  # of exit codes and status.json, which the broker writes every 0.5 s
LOOK_S = 0.05  # that one look into the run directory may take
LINE_S = 5.0  # between plain lines where there is no terminal
MAX_RESTARTS = 3  # of one actor or replica in a row
HEALTHY_S = 300.0  # of life that forget the restarts before, or twice what a start may take
LEAVE_S = 5.0  # for the others to go by themselves once the broker is done
LOG_LINES = 20  # of a process that died
LAST_LINES_S = {"finished": 60.0, "failed": 5.0, "interrupted": 3.0}  # for the charts; wandb may have to upload
LEVELS = {"yellow": "WARNING", "bold red": "ERROR"}  # in logs/launch.log


def main(arguments: list[str] | None = None) -> int:
    """Run one YAML to its end; returns the exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m tools.launch", description="Start a whole run on this machine."
    )
    parser.add_argument("config", help="the run's YAML; configs/ holds examples")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, such as staleness.budget=0")
    given = parser.parse_args(arguments)
    console = LastingConsole(highlight=False, markup=False, emoji=False)
    stop = StopFlag().install()
    stop_on_hangup(stop, console)
    with contextlib.ExitStack() as held:
        try:
            config = load(given.config, given.overrides)
            run = Run(config, console, stop, held=held)
            run.prepare()
        except CroupierError as error:
            console.print(Text.assemble(("error:", "bold red"), f" {error}"), soft_wrap=True)
            return EXIT_CODES["interrupted"] if stop.is_set else 2
        return EXIT_CODES[run.execute()]


def stop_on_hangup(stop: StopFlag, console: Console) -> None:
    """Take a closed terminal for a Ctrl-C, unless hangups are ignored (nohup); nothing more is written to it."""

    def handle(number: int, _frame: FrameType | None) -> None:
        console.file = open(os.devnull, "w")  # noqa: SIM115  # until the end
        stop.set(signal.Signals(number).name)

    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, handle)


@dataclass
class Run:
    """One run, from its directory to its report."""

    config: RunConfig
    console: Console
    stop: StopFlag
    processes: list[Process] = field(default_factory=list)
    devices: dict[str, str] = field(default_factory=dict)  # GPUs of those that take some
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # the run directory's lock
    started: float = field(default_factory=time.monotonic)
    follower: Follower = field(init=False)
    live: Live | None = None
    left: dict[tuple[str, int], float] = field(default_factory=dict)  # who ended well, and when that was seen
    line_at: float = -LINE_S  # when the last plain line was printed
    charts: Background | None = None  # of metrics.jsonl, into TensorBoard and the like
    before: Before | None = None  # what a run that goes on had written
    log: Path | None = None  # where what is said is kept, once there is a run directory

    def __post_init__(self) -> None:
        """Follow what will lie in the run directory."""
        self.follower = Follower(self.directory)

    @property
    def directory(self) -> Path:
        """Where everything of this run lies."""
        return self.config.run.path

    def prepare(self) -> None:
        """Check what can be checked before anything starts, then make the run directory."""
        check_address(self.config.broker.address)
        broker_keys(self.config.broker)
        check_tasks(self.config)
        warnings = check_engine(self.config)
        on_gpus, devices = torch_on_gpus(), find_devices()
        check_devices(self.config, devices, on_gpus)
        check_nccl(self.config, on_gpus)
        self.devices = deal(self.config, devices, on_gpus)
        check_sandbox(self.config)
        if self.config.metrics.wandb:
            find_wandb()
        for warning in [*warnings, *check_rewards(self.config)]:
            self.say(f"warning: {warning}", "yellow")
        policy = None if self.needs_warmstart() else self.config.model.path
        for model in self.config.frozen.values():
            if model.path != self.config.model.path:
                check_frozen(model, policy)
        if policy is not None:
            check_models(self.config)
            read_routing(self.config)
            check_meshes(self.config)
        try:
            self.take_directory()
        except OSError as error:
            raise unwritable(self.config, error) from error

    def take_directory(self) -> None:
        """Make the run directory and hold it; an earlier run that does not go on is set aside.

        Raises :class:`ConfigError` where a run of this name is under way.
        """
        claimed = self.held.enter_context(claim(self.directory, self._tell_wait, lambda: self.stop.is_set))
        if self.config.learner.resume:
            check_resumed(self.config)
            self.before = Before(self.directory)
            self.started -= earlier(self.directory)[1]  # the run's time goes on
            self.follower.disregard()
        elif (moved := set_aside(self.directory)) is not None:
            self.held.enter_context(claim(self.directory))
            claimed.close()  # it went with the earlier run, which may be resumed beside this one
            self.say(f"moved the earlier run to {moved}")
        (self.directory / CONFIG).write_text(to_yaml(self.config))
        (self.directory / LOGS).mkdir(exist_ok=True)
        self.log = self.directory / LOGS / "launch.log"

    def _tell_wait(self) -> None:
        self.say(f"waiting {LEARNER_S:g} s at most for broker and learner of an earlier launch to end")

    def needs_warmstart(self) -> bool:
        """Whether ``tools.warmstart`` has to make the model first."""
        return wants_warmstart(self.config)

    def execute(self) -> Outcome:
        """Warm start, train, stop everything and write the report, whatever happens."""
        outcome: Outcome = "failed"
        try:
            outcome = self.warm_start() if self.needs_warmstart() else "finished"
            if outcome == "finished":
                outcome = self.train()
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a further Ctrl-C cuts neither the stop nor the report short
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a terminal that is closed kills no learner that saves
            if self.stop.is_set and outcome == "failed":
                outcome = "interrupted"
            killed = stop_all(self.processes)
            if killed:
                self.warn(f"had to kill {', '.join(killed)}: deaf to SIGTERM")
            if self.charts is not None:
                self.charts.close(LAST_LINES_S[outcome])
            self.report(outcome)
        return outcome

    def warm_start(self) -> Outcome:
        """Make the starting model in a process of its own: the launcher stays free of torch."""
        command = [sys.executable, "-m", "tools.warmstart", str(self.directory / CONFIG)]
        maker = Process("warmstart", command, self.directory / "logs" / "warmstart.log")
        self.processes = [maker]
        self.say(f"making the starting model {self.config.model.path} (tools.warmstart, at most 2 minutes)")
        maker.start()
        shown = 0
        while maker.alive and not self.stop.is_set:
            time.sleep(POLL_S)
            shown = self._show_new_lines(maker, shown)
        if self.stop.is_set:
            return "interrupted"
        self._show_new_lines(maker, shown)
        if maker.poll() != 0:
            self.say(f"warm start failed with exit code {maker.poll()}; all of it is in {maker.log}", "bold red")
            return "failed"
        return "finished"

    def _show_new_lines(self, process: Process, shown: int) -> int:
        lines = process.log.read_text(errors="replace").splitlines(keepends=True) if process.log.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        for line in whole[shown:]:
            self.say(f"  {line.rstrip()}", "dim")
        return len(whole)

    def train(self) -> Outcome:
        """Start every process and watch until the broker is done."""
        self.processes = processes_of(self.config, self.directory / CONFIG, self.devices)
        for process in self.processes:
            process.start()
        self.say(f"started {', '.join(process.name for process in self.processes)}; logs in {self.directory / 'logs'}")
        metrics = self.config.metrics
        if metrics.tensorboard or metrics.wandb:
            self.charts = Background(self.directory, metrics.tensorboard, metrics.wandb, self.warn)
        with self.display():
            while not self.stop.is_set:
                time.sleep(POLL_S)
                self.look()
                ended = self.check()
                if ended is not None:
                    return ended
        saves = f"the learner has {SAVE_S:g} s for a checkpoint"
        self.say(f"{self.stop.reason}: stopping every process; {saves}", "yellow")
        return "interrupted"

    def check(self) -> Outcome | None:
        """Look at exit codes: restart whom the run can miss, end it for the others."""
        broker = self.processes[0]
        if broker.poll() == 0:
            return self.close()
        for process in self.processes:
            code = process.poll()
            if code is None or (code == 0 and self._may_leave(process)):
                continue
            if time.monotonic() - process.started > max(HEALTHY_S, 2 * self.config.engine.start_timeout_s):
                process.in_a_row = 0
            if process.may_restart and code != EXIT_LASTING and process.in_a_row < MAX_RESTARTS:
                process.restarts += 1
                process.in_a_row += 1
                self.say(f"{process.name} {_ended(code)}; restart {process.in_a_row} of {MAX_RESTARTS}", "yellow")
                process.start()
                continue
            self.tell_death(process)
            return "failed"
        return None

    def _may_leave(self, process: Process) -> bool:
        """Whether one that ended well did so in its time: told by the broker, or a learner that has done its part."""
        since = self.left.setdefault((process.name, process.restarts), time.monotonic())
        if time.monotonic() - since < LEAVE_S:
            return True
        status = read_status(self.directory)
        done = status.get("step") == status.get("steps") if process is self.processes[1] else False
        return done or status.get("phase") in ("finished", "stopped")

    def close(self) -> Outcome:
        """The broker is done: let the learner write its model and the others go by themselves, then stop them."""
        wait_all(self.processes, LEAVE_S)
        learner, allowed_s = self.processes[1], self.config.learner.write_timeout_s
        if learner.alive:
            self.say(f"waiting for the learner to write {self.directory / 'model'}")
        deadline = time.monotonic() + allowed_s
        while learner.alive and not self.stop.is_set and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if learner.alive:
            if self.stop.is_set:
                return "interrupted"
            self.warn(f"the learner has not ended {allowed_s:g} s after the broker (learner.write_timeout_s)")
            return "failed"
        if learner.poll() != 0:
            self.tell_death(learner)
            return "failed"
        self.line_at = -LINE_S  # the last line is due now
        self.look()
        return "interrupted" if read_status(self.directory).get("phase") == "stopped" else "finished"

    def tell_death(self, process: Process) -> None:
        """Print how a process ended and its last words."""
        code = process.poll()
        self.say(f"{process.name} {_ended(code)}; the last lines of {process.log}:", "bold red")
        for line in last_lines(process.log, LOG_LINES):
            self.say(f"  {line}")

    def look(self) -> None:
        """Read what the broker wrote and show it."""
        now = time.monotonic()
        if self.live is None and now - self.line_at <= LINE_S:
            return
        view = self.follower.look(LOOK_S)
        if view.phase == "nothing":  # nobody needs to be told how to start it
            view.phase, view.words = "starting", ""
        if self.live is not None:
            height = max(1, self.console.height - 1)  # the cursor's line stays free
            with contextlib.suppress(OSError):
                self.live.update(Screen(view, self.follower.history, height), refresh=True)
            return
        self.line_at = now
        self.say(plain_line(view))

    @contextlib.contextmanager
    def display(self) -> Iterator[None]:
        """The screen of tools.watch on a terminal, plain lines elsewhere."""
        if not self.console.is_terminal:
            yield
            return
        with Live(console=self.console, auto_refresh=False, transient=False) as self.live:
            yield

    def report(self, outcome: Outcome) -> None:
        """Write summary, reports and curves, and say how it went; a run that did not go on keeps those it has."""
        if outcome == "failed" and self.before is not None and self.before.put_back():
            self.say("failed before anything was done; the run is as it was", "bold red")
            return
        from tools.report import write_report  # matplotlib takes a second that a start need not wait for

        summary = write_report(self.directory, outcome, time.monotonic() - self.started)
        colour = {"finished": "bold green", "interrupted": "yellow", "failed": "bold red"}[outcome]
        self.say(f"{outcome} after {summary['wall_s']:.0f} s, {summary['steps']} steps", colour)
        first, last = summary["eval_first"], summary["eval_last"]
        if first is not None and last is not None:
            self.say(f"held-out reward {first:.3f}" + (f" -> {last:.3f}" if first != last else ""), "bold")
        self.say(f"report: {self.directory / PAGE}")
        checkpoints = complete(self.directory / CHECKPOINTS)
        if outcome != "finished" and checkpoints:
            self.say(f"the same command with learner.resume=true goes on from step {step_of(checkpoints[-1])}")

    def warn(self, text: str) -> None:
        """Something that a person may want to mend."""
        self.say(text, "yellow")

    def say(self, text: str, style: str = "") -> None:
        """One line to the person in front."""
        with contextlib.suppress(OSError):  # a terminal that is gone ends no run
            self.console.print(text, style=style or None, markup=False, emoji=False, soft_wrap=True)
        if self.log is not None:
            with contextlib.suppress(OSError), self.log.open("a") as log:  # a full disk silences the log, not the run
                log.write(f"{time.strftime('%H:%M:%S')} launch {LEVELS.get(style, 'INFO')} {text}\n")


def _ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}" if code else "left before the run's end"


if __name__ == "__main__":
    sys.exit(main())
