"""Agents written elsewhere: they talk to an OpenAI-compatible server and say what their conversation was worth.

::

    question -> AgentSession -> a function, or a command of its own -> {channel: value}

``params.agent`` names a function (``package.module:function``, sync or async) that is called in a
thread; ``params.command`` is a list of words that is run for each rollout, with the session in its
environment, and prints its channels as the last line, in JSON. ``params.questions`` is a JSONL file;
the last ``params.heldout`` lines are for evaluation alone.
"""

import asyncio
import contextlib
import importlib
import json
import math
import os
import resource
import shutil
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actor.rewards import is_told
from actor.tasks.base import PromptItem, Split, refuse_params
from actor.tasks.finite import Questions
from actor.tasks.rows import read_lines, read_row
from common.errors import TaskError

PARAMS = (
    "agent", "command", "questions", "heldout", "channels", "deadline_s", "workers", "port", "chat_template"
)  # fmt: skip
DEFAULT_DEADLINE_S = 300.0  # for one rollout
DEFAULT_WORKERS = 32  # rollouts at once
OUTPUT_KEPT = 64 << 10  # bytes of what a command prints
SHOWN = 300  # characters of what a failed command said last
STDOUT, STDERR = 1, 2
QUESTION = "CROUPIER_QUESTION"  # in a command's environment
LONGEST = 32 * resource.getpagesize()  # bytes of one entry of it, name and end included: MAX_ARG_STRLEN in execve(2)
MAX_PORT = (1 << 16) - 1
LAST_WORDS_S = 1.0  # for what a command printed to be read, once it has ended


@dataclass(frozen=True)
class AgentSession:
    """What an agent is given for one rollout."""

    base_url: str  # of the OpenAI-compatible server: http://127.0.0.1:PORT/v1
    api_key: str  # says which rollout a request belongs to
    question: dict[str, Any]  # a line of the JSONL file
    split: Split


class AgentTask:
    """See the module. Raises TaskError for parameters that cannot be used."""

    def __init__(self, seed: int, params: dict[str, Any]) -> None:
        refuse_params("agent", params, PARAMS)
        self.channels = _names(params.get("channels", ["correct"]))
        self.deadline_s = _number(params, "deadline_s", DEFAULT_DEADLINE_S, 0.1)
        self.workers = int(_number(params, "workers", DEFAULT_WORKERS, 1))
        self.port = int(_number(params, "port", 0, 0, MAX_PORT))
        self.chat_template = str(params.get("chat_template", ""))
        lines = _read_questions(str(params.get("questions", "")), "command" in params)
        self.held_out = int(_number(params, "heldout", 0, 0))
        trained = len(lines) - self.held_out
        if trained < 1:
            raise TaskError(f"task.params.heldout={self.held_out} of {len(lines)} questions leaves none to train on")
        self._questions = Questions(seed, lines[:trained], lines[trained:])
        self._command = params.get("command")
        if (self._command is None) == ("agent" not in params):
            raise TaskError("task agent needs task.params.agent=package.module:function or task.params.command")
        if self._command is not None and not (
            isinstance(self._command, list) and self._command and all(isinstance(w, str) for w in self._command)
        ):
            raise TaskError(f"task.params.command={self._command!r}: must be a list of words")
        if self._command is not None and shutil.which(self._command[0]) is None:
            raise TaskError(
                f"task.params.command={self._command!r}: no program {self._command[0]!r} to run, "
                f"seen from {Path.cwd()}; name one on PATH, or its path"
            )
        self._function = None if self._command is not None else _import(str(params["agent"]))

    @property
    def questions(self) -> int:
        """Those to train on."""
        return len(self._questions.train)

    def prompt(self, index: int, split: Split) -> PromptItem:
        """Question ``index``, its prompt unwritten; training goes through the file in another order each time."""
        return PromptItem(np.zeros(0, np.int32), self._questions.at(index, split))

    def reward(self, item: PromptItem, completion_ids: Any) -> dict[str, float]:
        """Never asked: agents bring their own rewards."""
        raise AssertionError("an agent's rewards come with its end")

    def call(self, session: AgentSession) -> Any:
        """Run a sync agent to its end, or return what is to be awaited for its channels."""
        if self._function is not None:
            return self._function(session)
        assert self._command is not None
        return run_command(self._command, session)

    def read_channels(self, given: Any) -> dict[str, float]:
        """An agent's word as channels; raises TaskError for anything but a finite number for each."""
        if not isinstance(given, dict) or set(given) != set(self.channels):
            said = sorted(map(str, given)) if isinstance(given, dict) else repr(given)[:SHOWN]
            raise TaskError(f"the agent returned {said}; task.params.channels={list(self.channels)} are wanted")
        channels = {}
        for name, value in given.items():
            try:
                channels[name] = float(value)
            except (TypeError, ValueError) as error:
                raise TaskError(f"the agent's channel {name}={value!r} is no number") from error
            except OverflowError:
                channels[name] = math.inf
            if not is_told(channels[name]):
                raise TaskError(f"the agent's channel {name}={channels[name]} is not finite (float32)")
        return channels


async def run_command(command: list[str], session: AgentSession) -> Any:
    """The last line that ``command`` prints, as JSON. Its process group is killed when it ends or this is cancelled.

    Raises TaskError, with its last words, if it fails.
    """
    environment = {
        **os.environ,
        "OPENAI_BASE_URL": session.base_url,
        "OPENAI_API_KEY": session.api_key,
        QUESTION: json.dumps(session.question),
        "CROUPIER_SPLIT": session.split,
    }
    pipe, nothing = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    process, printed = await asyncio.get_running_loop().subprocess_exec(
        _Printed, *command, stdin=nothing, stdout=pipe, stderr=pipe, env=environment, start_new_session=True
    )
    try:
        await printed.exited.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.get_pid(), signal.SIGKILL)  # it leads a group: children go too
        await printed.exited.wait()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(printed.ended.wait(), LAST_WORDS_S)
        process.close()
    if code := process.get_returncode():
        raise TaskError(f"{command[0]} ended with exit code {code}: {printed.tail(STDERR).strip()[-SHOWN:]}")
    last = printed.tail(STDOUT).strip().rpartition("\n")[2]
    try:
        return json.loads(last)
    except ValueError as error:
        raise TaskError(f"{command[0]} printed no JSON on its last line: {last[-SHOWN:]!r}") from error


class _Printed(asyncio.SubprocessProtocol):
    """The ends of what a command prints, all of which is read.

    Its exit is told from the pipes' end: a process that it left behind may hold them open for ever.
    """

    def __init__(self) -> None:
        self.exited, self.ended = asyncio.Event(), asyncio.Event()
        self._kept = {STDOUT: b"", STDERR: b""}
        self._open = {STDOUT, STDERR}

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """A piece of it."""
        self._kept[fd] = (self._kept[fd] + data)[-OUTPUT_KEPT:]

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        """Nothing more comes there."""
        self._open.discard(fd)
        if not self._open:
            self.ended.set()

    def process_exited(self) -> None:
        """The command has ended."""
        self.exited.set()

    def tail(self, fd: int) -> str:
        """The last that came there."""
        return self._kept[fd].decode(errors="replace")


def _names(given: Any) -> tuple[str, ...]:
    if not isinstance(given, list) or not given or not all(isinstance(name, str) for name in given):
        raise TaskError(f"task.params.channels={given!r}: must be a list of names")
    return tuple(given)


def _number(params: dict[str, Any], name: str, default: float, least: float, most: float = math.inf) -> float:
    value = params.get(name, default)
    if not isinstance(value, int | float) or not math.isfinite(value) or not least <= value <= most:
        bounds = f"of at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise TaskError(f"task.params.{name}={value!r}: must be a number {bounds}")
    return value


def _read_questions(path: str, in_environment: bool) -> list[dict[str, Any]]:
    if not path:
        raise TaskError("task agent needs task.params.questions, a JSONL file")
    lines = read_lines(path, f"task.params.questions={path}")
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        questions.append(read_row(line, f"{path}:{number}"))
        size = len(f"{QUESTION}={json.dumps(questions[-1])}") + 1 if in_environment else 0
        if size > LONGEST:
            raise TaskError(
                f"{path}:{number}: takes {size} bytes of a command's environment, where {LONGEST} have room; "
                "put a file's path in its place, or play it with task.params.agent"
            )
    return questions


def _import(name: str) -> Callable[[AgentSession], dict[str, Any] | Awaitable[dict[str, Any]]]:
    module, _, function = name.partition(":")
    if not module or not function or module.startswith("."):
        raise TaskError(f"task.params.agent={name}: must read package.module:function")
    try:
        found = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{module}.".startswith(f"{error.name}."):
            raise TaskError(
                f"task.params.agent={name}: {module} imports {error.name}, which is not there; install it in the "
                f"environment of {sys.executable}"
            ) from error
        raise TaskError(
            f"task.params.agent={name}: {error}; put its directory on PYTHONPATH, or start in it: this process was "
            f"started in {Path.cwd()}"
        ) from error
    except (ImportError, AttributeError) as error:
        raise TaskError(f"task.params.agent={name}: {error}; it must read package.module:function") from error
    if not callable(found):
        raise TaskError(f"task.params.agent={name}: is no function")
    return found  # type: ignore[no-any-return]
