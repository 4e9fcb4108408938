"""A terminal: the policy writes a shell command a turn and sees its output; what counts is the files in the end.

::

    goal and files -> command -> sandbox -> output -> command -> ... -> files as wanted?

A command is the first fenced block of an answer, or its first line if there is none; each is run by
bash in ``/work``. ``exit`` ends the conversation. Goals are those of :mod:`actor.tasks.goals`.

Between turns nothing runs and nothing lies on a disk: a turn's world is the tree that its sandbox
gave back, kept in memory under what led to it (question and completions) while there is room, and
the next turn's sandbox is laid out with it. What is no longer kept is played again from the
question. So a rollout that is cancelled or an actor that is killed leaves nothing behind, any turn
of any rollout may be asked for in any order and thread, and a command runs once, which a file with
the time or a random number in it would notice. Playing all again for each turn would need no
memory, but n turns would run n * n / 2 commands.
"""

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actor.sandbox.backends import find_backend
from actor.sandbox.box import Limits, Result, Tree
from actor.sandbox.run import run
from actor.tasks.base import PromptItem, Split, refuse_params
from actor.tasks.chat import Chat
from actor.tasks.drawn import draw
from actor.tasks.goals import FAMILIES, MOST_DIFFICULT, Goal, check
from actor.tasks.latest import Latest
from actor.tasks.params import read_limits, read_names, read_number
from actor.tasks.reading import first_block
from common.config import RolloutSection
from common.errors import TaskError

PARAMS = ("families", "difficulty", "wall_s", "cpu_s", "memory_mb")
LIMITS = Limits(wall_s=10.0, cpu_s=2.0, memory_mb=128, processes=16, disk_mb=2, files=500, output_kb=16)
KEPT_BYTES = 64 << 20  # of worlds between turns, all rollouts together
ENTRY_BYTES = 300  # of a world's file beside its contents
LISTED = 40  # files that a prompt names
COMMAND_CHARACTERS = 4096  # of a command at most
ENDS = ("exit", "exit 0", "logout")
NO_COMMAND = "[no command: write one in a block ```sh ... ```, or exit]"
ASK = """You work at a shell in the directory /work.
Task: {text}
Files here:
{listing}
Answer with one bash command in a block:
```sh
command
```
You will see its output. Each command starts in /work. When the task is done, answer with the command exit."""

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Question:
    """A goal and its place among all questions."""

    key: str
    goal: Goal


@dataclass(frozen=True)
class World:
    """What there is behind a turn."""

    files: Tree
    said: str = ""  # to the turn's command
    commands: int = 0  # that could be read
    ended: bool = False


class Terminal:
    """See the module. ``correct``: all is as wanted; ``progress``: how much of it; ``valid``: turns with a command.

    Raises SandboxError where no sandbox can be had, and TaskError for parameters that cannot be used.
    """

    channels = ("correct", "progress", "valid")
    slow = True  # a reply takes a sandbox: tens of milliseconds, seconds at worst

    def __init__(self, model_dir: str, seed: int, params: dict[str, Any]) -> None:
        refuse_params("terminal", params, PARAMS)
        self._seed = seed
        self._families = [FAMILIES[name] for name in read_names(params, "families", tuple(FAMILIES))]
        self._difficulty = int(read_number(params, "difficulty", 2, 1, MOST_DIFFICULT))
        self._limits = read_limits(params, LIMITS)
        self._chat = Chat(model_dir)
        self._backend = find_backend()
        self._worlds: Latest[World] = Latest(KEPT_BYTES)
        self._room = 0  # tokens of a reply

    def fit(self, rollout: RolloutSection) -> None:
        """Keep replies within ``rollout.max_reply_tokens``. Raises ConfigError if that has no room for any."""
        needs = "the terminal needs {} for its shortest replies and more for what commands print"
        self._room = self._chat.room(rollout, NO_COMMAND, needs=needs, times=8)

    def prompt(self, index: int, split: Split) -> PromptItem:
        """Question ``index``: a goal of one of the families. Raises TaskError if they have too few."""
        try:
            goal = draw(self._seed, index, split, self._make, _ask, lambda rng, goal: goal)
        except ValueError as error:
            raise TaskError(f"task.params.families: {error}; name more of them") from error
        return PromptItem(self._chat.prompt(_ask(goal)), Question(f"{split} {index}", goal))

    def question_text(self, item: PromptItem) -> str:
        """Goal, files and what is said about commands."""
        question: Question = item.reference
        return _ask(question.goal)

    def _make(self, rng: Random) -> Goal:
        return rng.choice(self._families)(rng, rng.randint(1, self._difficulty))

    def reply(self, item: PromptItem, completions: Sequence[Ids]) -> Ids | None:
        """The output of the last command; None behind ``exit``. Raises SandboxError if it could not be run."""
        world = self._behind(item.reference, completions)
        return None if world.ended else self._chat.reply(world.said, completions[-1], self._room)

    def reward_turns(self, item: PromptItem, completions: Sequence[Ids]) -> dict[str, float]:
        """Of the files behind the last command. Raises SandboxError if that could not be run."""
        question: Question = item.reference
        world = self._behind(question, completions)
        right, progress = check(question.goal, world.files)
        return {"correct": float(right), "progress": progress, "valid": world.commands / len(completions)}

    def reward(self, item: PromptItem, completion_ids: Ids) -> dict[str, float]:
        """That of a conversation of one turn."""
        return self.reward_turns(item, [completion_ids])

    def _behind(self, question: Question, completions: Sequence[Ids]) -> World:
        """The world behind all of ``completions``: the latest one that is kept, and what is missing played."""
        keys = _keys(question.key, completions)
        world, known = World(question.goal.files), 0
        for number in range(len(completions), 0, -1):
            if (kept := self._worlds.get(keys[number - 1])) is not None:
                world, known = kept, number
                break
        for key, completion in zip(keys[known:], completions[known:], strict=True):
            world = self._turn(world, completion)
            self._worlds.put(key, world, _size(world))
        return world

    def _turn(self, world: World, completion: Ids) -> World:
        if world.ended:
            return world
        command = read_command(self._chat.text(completion))
        if command is None:
            return replace(world, said=NO_COMMAND)
        if command in ENDS:
            return replace(world, said="", commands=world.commands + 1, ended=True)
        result = run(["/bin/bash", "-c", command], world.files, self._limits, self._backend)
        files = world.files if result.files is None else result.files
        return World(files, describe(result, self._limits), world.commands + 1)


def _size(world: World) -> int:
    return len(world.said) + sum(ENTRY_BYTES + len(entry.data) for entry in world.files.values())


def _keys(question: str, completions: Sequence[Ids]) -> list[bytes]:
    """For each turn a digest of all that led to it."""
    digest = hashlib.blake2b(question.encode(), digest_size=16)
    keys = []
    for completion in completions:
        data = np.ascontiguousarray(completion, np.int32).tobytes()
        digest.update(len(data).to_bytes(8, "big") + data)
        keys.append(digest.copy().digest())
    return keys


def _ask(goal: Goal) -> str:
    """All that the policy is told."""
    names = [path + "/" * (entry.kind == "dir") for path, entry in sorted(goal.files.items())]
    listing = [shlex.quote(name) for name in names[:LISTED]]
    listing += [f"and {len(names) - LISTED} more"] * (len(names) > LISTED)
    return ASK.format(text=goal.text, listing="\n".join(listing))


def read_command(text: str) -> str | None:
    """The command of an answer; None if it has none that bash could be given."""
    block = first_block(text)
    if block is None:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        block = "" if not lines or lines[0].startswith("```") else lines[0].removeprefix("$ ")
    command = block.strip()
    return command if command and len(command) <= COMMAND_CHARACTERS and "\0" not in command else None


def describe(result: Result, limits: Limits) -> str:
    """What a terminal would show of a command that has run."""
    if result.cut_at < 0:
        text = result.output.decode(errors="replace")
    else:
        head, tail = result.output[: result.cut_at], result.output[result.cut_at :]
        mark = f"\n[... {result.cut_bytes} bytes left out ...]\n"
        text = head.decode(errors="replace") + mark + tail.decode(errors="replace")
    notes = []
    if result.killed_by:
        allowed = {
            "time": f"{limits.wall_s:g} s", "cpu": f"{limits.cpu_s:g} s of CPU", "memory": f"{limits.memory_mb} MB",
            "processes": f"{limits.processes} processes", "files": f"{limits.files} files",
        }  # fmt: skip
        notes.append(f"[killed: {result.killed_by}, {allowed.get(result.killed_by, 'too much of it')}]")
    elif result.exit_code:
        notes.append(f"[exit code {result.exit_code}]")
    if result.files is None:
        notes.append(f"[more than {limits.disk_mb} MB or {limits.files} files: the command's changes are undone]")
    if not text.strip() and not notes:
        notes.append("[no output]")
    return "\n".join([text.rstrip("\n"), *notes] if text.strip() else notes)
